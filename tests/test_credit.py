"""credit.py against slow oracles, at its limits, and through to the tokens; and rollouts with imposed segments, penalties and players."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import credit
import envs
import eval as evaluation
import hiper
from worlds import household
from support import metrics as report
from support import cloning as scratch
from config import Config
from credit import assign, gigpo, grpo, relative, returns, rloo
from hae import gae, hae, normalize, switch_gain
from hiper import Masks, Scores
from rollout import Seat, Style, batch_of as batches, collect

B, T = 12, 5


def batch_of(seed=0, tasks=3):
    """A ragged batch of random episodes of few tasks that meet few states; a response is two tokens of each decision."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)
    n = torch.randint(1, T + 1, (B,), generator=g)  # [B]
    mask = torch.arange(T) < n[:, None]  # [B, T]
    row, col = mask.nonzero(as_tuple=True)  # [N] each
    switch = ((rand(B, T) < 0.4) | (torch.arange(T) == 0)) & mask
    masks = Masks(
        *(torch.arange(6).div(2, rounding_mode="floor").eq(k).expand(len(row), 6) for k in range(3))
    )  # [N, 6]
    flat = lambda x: x[row, col]
    grid = lambda x: x.new_zeros(mask.shape).index_put((row, col), x)
    return SimpleNamespace(
        mask=mask,
        rewards=torch.randn(B, T, generator=g) * mask,
        switch=switch,
        truncated=rand(B) < 0.5,
        row=row,
        col=col,
        group=torch.randint(tasks, (B,), generator=g),
        state=torch.randint(4, (B, T), generator=g) * mask,
        samples=SimpleNamespace(masks=masks, lengths=torch.full((len(row),), 6)),
        flat=flat,
        grid=grid,
    )


def scores_of(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Scores(-torch.rand(n, 6, generator=g), None, *torch.randn(3, n, generator=g))


def config_of(method="hiper", **changes):
    return Config(
        **{
            **dict(method=method, gamma=0.9, lam_low=0.8, lam_high=0.7, lam=0.6, whiten="each"),
            **changes,
        }
    )


def turns(batch):
    return list(zip(batch.row.tolist(), batch.col.tolist()))


def sample_std(xs):
    mean = sum(xs) / len(xs)
    return math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1)) if len(xs) > 1 else 0.0


# ---- the estimators ----


@pytest.mark.parametrize("seed", range(6))
def test_rloo_and_grpo_are_their_equations(seed):
    x = batch_of(seed)
    ret = returns(x.rewards, x.mask, 0.9)[:, 0]
    for b in range(B):
        want = sum(0.9**t * x.rewards[b, t].item() for t in range(T) if x.mask[b, t])
        assert ret[b].item() == pytest.approx(want, abs=1e-5)
    for b in range(B):
        same = [i for i in range(B) if x.group[i] == x.group[b]]
        others = [ret[i].item() for i in same if i != b]
        assert rloo(ret, x.group)[b].item() == pytest.approx(
            ret[b].item() - sum(others) / len(others) if others else 0, abs=1e-5
        )
        mine = [ret[i].item() for i in same]
        want = (ret[b].item() - sum(mine) / len(mine)) / (sample_std(mine) + 1e-6)
        assert grpo(ret, x.group)[b].item() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_gigpo_is_its_equation(seed, scale):
    x = batch_of(seed)
    ret = returns(x.rewards, x.mask, 1.0)[:, 0]
    got = gigpo(ret, x.rewards, x.mask, x.group, x.state, gamma=0.8, weight=0.5, scale=scale)
    ahead = {
        (b, t): sum(0.8 ** (u - t) * x.rewards[b, u].item() for u in range(t, T) if x.mask[b, u])
        for b, t in turns(x)
    }
    for b, t in turns(x):
        mine = [ret[i].item() for i in range(B) if x.group[i] == x.group[b]]
        step = [
            ahead[i, u]
            for i, u in turns(x)
            if x.group[i] == x.group[b] and x.state[i, u] == x.state[b, t]
        ]
        episode = (ret[b].item() - sum(mine) / len(mine)) / (
            sample_std(mine) + 1e-6 if scale else 1
        )
        local = (ahead[b, t] - sum(step) / len(step)) / (sample_std(step) + 1e-6 if scale else 1)
        assert got[b, t].item() == pytest.approx(episode + 0.5 * local, abs=1e-4)
    assert not got[~x.mask].any()


def test_limits_of_the_group_methods():
    x = batch_of()
    ret = returns(x.rewards, x.mask, 1.0)[:, 0]
    alone = torch.arange(B)
    assert not rloo(ret, alone).any() and not grpo(ret, alone).any()  # nothing to compare with
    assert not grpo(
        torch.full((B,), 0.1), x.group
    ).any()  # equal returns teach nothing, rounding does not
    assert not relative(torch.full((B,), 1e6) / 3, x.group).any()
    unmet = torch.arange(B * T).view(B, T)
    args = ret, x.rewards, x.mask, x.group
    torch.testing.assert_close(
        gigpo(*args, unmet), grpo(ret, x.group)[:, None] * x.mask
    )  # no state met twice: GRPO
    torch.testing.assert_close(
        gigpo(*args, x.state, weight=0.0), grpo(ret, x.group)[:, None] * x.mask
    )
    for adv in (rloo(ret, x.group), grpo(ret, x.group)):
        for task in x.group.unique():
            assert abs(adv[x.group == task].sum().item()) < 1e-4
    other = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grpo(ret[other], x.group[other]), grpo(ret, x.group)[other])
    torch.testing.assert_close(
        gigpo(ret[other], x.rewards[other], x.mask[other], x.group[other], x.state[other]),
        gigpo(*args, x.state)[other],
    )


def test_equal_states_of_two_tasks_are_not_compared():
    x = batch_of()
    ret = returns(x.rewards, x.mask, 1.0)[:, 0]
    mine = x.group == 0
    torch.testing.assert_close(
        gigpo(ret, x.rewards, x.mask, x.group, x.state)[mine],
        gigpo(ret[mine], x.rewards[mine], x.mask[mine], x.group[mine], x.state[mine]),
    )


# ---- from methods to tokens ----


def test_baselines_give_every_token_of_a_turn_its_advantage():
    x, n = batch_of(), len(batch_of().row)
    old, ends = scores_of(n), scores_of(B, 2)
    ret = returns(x.rewards, x.mask, 0.9)[:, 0]
    adv, target = gae(x.rewards, x.mask, x.grid(old.v_high), gamma=0.9, lam=0.6)
    wanted = {
        "ppo": normalize(adv, x.mask),
        "rloo": normalize(rloo(ret, x.group)[:, None] * x.mask, x.mask),
        "grpo": grpo(ret, x.group)[:, None] * x.mask,
        "gigpo": gigpo(ret, x.rewards, x.mask, x.group, x.state, gamma=0.95),
    }
    for method, want in wanted.items():
        got = assign(x, old, config_of(method), normalize, ends)
        assert got.trained.all() and got.adv.shape == (n, 6)
        torch.testing.assert_close(got.adv, x.flat(want)[:, None].expand(n, 6))
        assert list(got.targets) == (["high"] if method == "ppo" else [])
    torch.testing.assert_close(
        assign(x, old, config_of("ppo"), normalize, ends).targets["high"][0], x.flat(target)
    )


def test_ppo_bootstraps_truncated_episodes_where_it_is_asked_to():
    x, old, ends = batch_of(), scores_of(len(batch_of().row)), scores_of(B, 2)
    plain, asked = (
        assign(x, old, config_of("ppo", bootstrap=b), normalize, ends).shown["A"]
        for b in (False, True)
    )
    torch.testing.assert_close(
        asked,
        gae(
            x.rewards,
            x.mask,
            x.grid(old.v_high),
            gamma=0.9,
            lam=0.6,
            end_value=ends.v_high * x.truncated,
        )[0],
    )
    assert torch.equal(plain[~x.truncated], asked[~x.truncated]) and not torch.equal(
        plain[x.truncated], asked[x.truncated]
    )


def hae_of(x, old, ends, **changes):
    return hae(
        x.rewards,
        x.switch,
        x.mask,
        *(x.grid(v) for v in old[2:]),
        **{**dict(gamma=0.9, lam_low=0.8, lam_high=0.7), **changes},
    )


def test_hiper_trains_each_decision_where_it_is_made():
    x = batch_of()
    old, ends = scores_of(len(x.row)), scores_of(B, 2)
    got, raw = assign(x, old, config_of(), normalize, ends), hae_of(x, old, ends)
    decides = x.mask & (torch.arange(T) > 0)
    for k, (adv, where) in enumerate(
        ((raw.adv_switch, decides), (raw.adv_subgoal, x.switch), (raw.adv_action, x.mask))
    ):
        tokens = slice(2 * k, 2 * k + 2)
        assert torch.equal(got.trained[:, tokens], x.flat(where)[:, None].expand(-1, 2))
        torch.testing.assert_close(
            (got.adv * got.trained)[:, tokens], x.flat(normalize(adv, where))[:, None].expand(-1, 2)
        )
    assert list(got.targets) == ["high", "low", "switch"]
    assert torch.equal(got.targets["high"][1], x.flat(x.switch)) and got.targets["low"][1].all()
    for head, want in (("high", raw.ret_high), ("low", raw.ret_low), ("switch", raw.ret_switch)):
        torch.testing.assert_close(got.targets[head][0], x.flat(want))


@pytest.mark.parametrize("decisions", ["switch,subgoal,action", "switch,action", "subgoal"])
def test_scaled_together_advantages_keep_their_proportions(decisions):
    """Each decision's mean is taken off, then one standard deviation of all that are trained divides them all (Thm 4.1 but for a factor)."""
    x = batch_of()
    old, ends = scores_of(len(x.row)), scores_of(B, 2)
    got, raw = (
        assign(x, old, config_of(whiten="together", decisions=decisions), normalize, ends),
        hae_of(x, old, ends),
    )
    each = {
        "switch": (raw.adv_switch, x.mask & (torch.arange(T) > 0)),
        "subgoal": (raw.adv_subgoal, x.switch),
        "action": (raw.adv_action, x.mask),
    }
    centred = {name: (adv - adv[where].mean()) * where for name, (adv, where) in each.items()}
    chosen = torch.cat([centred[name][each[name][1]] for name in decisions.split(",")])
    for k, name in enumerate(credit.DECISIONS):
        wanted = x.flat(centred[name] / chosen.square().mean().sqrt())[:, None].expand(-1, 2) * (
            name in decisions
        )
        torch.testing.assert_close((got.adv * got.trained)[:, 2 * k : 2 * k + 2], wanted)


@pytest.mark.parametrize("decisions", ["switch,subgoal", "action", "subgoal"])
def test_decisions_that_are_not_named_are_not_trained(decisions):
    x = batch_of()
    old, ends = scores_of(len(x.row)), scores_of(B, 2)
    whole, part = (
        assign(x, old, config_of(**c), normalize, ends) for c in ({}, {"decisions": decisions})
    )
    for k, name in enumerate(credit.DECISIONS):
        tokens = slice(2 * k, 2 * k + 2)
        assert torch.equal(
            part.trained[:, tokens],
            whole.trained[:, tokens]
            if name in decisions.split(",")
            else torch.zeros(len(x.row), 2).bool(),
        )
    assert list(part.targets) == list(whole.targets)  # the critic learns all the same


def test_the_gain_is_the_paper_s_and_needs_the_value_of_carrying_on():
    x = batch_of()
    old, ends, keep = (
        scores_of(len(x.row)),
        scores_of(B, 2),
        torch.randn(len(x.row), generator=torch.Generator().manual_seed(3)),
    )
    config = config_of(switch_advantage="gain")
    assert credit.needs_keep(config) and credit.needs_keep(config_of(heads=2))
    assert not credit.needs_keep(config_of()) and not credit.needs_keep(
        config_of("ppo", switch_advantage="gain")
    )
    said = old.logp[:, :2].sum(1).exp()  # probability of the word that was written
    beta = x.grid(torch.where(x.flat(x.switch), said, 1 - said))
    decides = x.mask & (torch.arange(T) > 0)
    want = switch_gain(x.switch, beta, x.grid(old.v_high), x.grid(keep)) * decides
    got = assign(x, old, config, normalize, ends, keep)
    torch.testing.assert_close(got.shown["A_switch"], want)
    two = assign(x, old, config_of(heads=2), normalize, ends, keep)
    third = (beta * x.grid(old.v_high) + (1 - beta) * x.grid(keep)) * x.mask
    torch.testing.assert_close(
        two.shown["A_switch"], (hae_of(x, old, ends).ret_switch - third) * x.mask
    )
    assert list(two.targets) == ["high", "low"]


def test_targets_td0_are_the_paper_s_one_step_targets():
    x = batch_of()
    old, ends = scores_of(len(x.row)), scores_of(B, 2)
    got = assign(x, old, config_of(targets="td0"), normalize, ends)
    one = hae_of(x, old, ends, lam_low=0.0, lam_high=0.0)
    torch.testing.assert_close(got.targets["low"][0], x.flat(one.ret_low))
    torch.testing.assert_close(got.targets["high"][0], x.flat(one.ret_high))
    assert torch.equal(
        got.shown["A_action"], hae_of(x, old, ends).adv_action
    )  # the advantages stay


def test_imposed_segments_leave_no_switch_to_train():
    x = batch_of()
    got = assign(
        x, scores_of(len(x.row)), config_of(segments="fixed:2"), normalize, scores_of(B, 2)
    )
    assert not got.trained[:, :2].any() and got.trained[:, 4:].all()


# ---- the flat answer ----


@pytest.mark.parametrize(
    "text, action, error",
    [
        ("<think>so</think><action>look</action>", "look", ""),
        ("x <think>so</think> y <action> look </action> z", "look", ""),
        ("<action>look</action>", "look", "<think> block not well-formed"),
        ("<think></think><action>look</action>", "look", "<think> block"),
        ("<action>look</action><think>so</think>", "look", "<think> block"),
        ("<think>so</think>", "", "no <action> block"),
        ("<think>a</think><think>b</think><action>look</action>", "look", "<think> block"),
        ("", "", "no <action> block"),
        ("<think>so</think><action> </action>", "", "empty <action> block"),
        ("<think>so<action>look</action></think>", "look", "<think> block"),
    ],
)
def test_parse_flat(text, action, error):
    got = hiper.parse_flat(text)
    assert (got.action, got.switch, got.subgoal, got.valid) == (
        action,
        False,
        "",
        not error,
    ) and got.error.startswith(error)


# ---- the alarm ----


def lines(success, switch_rate=0.3, valid=1.0):
    return [
        {"iteration": i, "success": s, "switch_rate": switch_rate, "valid_format": valid}
        for i, s in enumerate(success)
    ]


def test_alarm_names_a_collapse_once_when_it_begins():
    alarm = report.alarm
    assert alarm(lines([0.5] * 9), True) is None and alarm(lines([0.5] * 3, 0.0), True) is None
    assert "hardly ever switches" in alarm(lines([0.5] * 4, 0.0), True)
    assert alarm(lines([0.5] * 5, 0.0), True) is None  # it has been said
    assert alarm(lines([0.5] * 4, 0.0), False) is None  # who has no switch cannot lose it
    assert "every turn" in alarm(lines([0.5] * 4, 0.99), True)
    assert "unreadable" in alarm(lines([0.5] * 4, valid=0.5), False)
    fall = [0.8] * 6 + [0.5] * 6
    assert [i for i in range(1, 13) if alarm(lines(fall[:i]), True)] == [
        9
    ] and "20 points" in alarm(lines(fall[:9]), True)


# ---- who plays ----


@pytest.mark.parametrize(
    "given, words",
    [
        (["planner=me"], "must be planner= or executor="),
        (["actor=expert"], "must be planner="),
        (["planner=random"], "lists its subgoals"),
    ],
)
def test_swaps_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        evaluation.read_swaps(given, {"env": "x"}, {})
    with pytest.raises(ValueError, match="flat prompt"):
        evaluation.read_swaps(["planner=expert"], {"env": "x", "prompt": "flat"}, {})
    assert evaluation.read_swaps(["planner=expert", "executor=frozen"], {"env": "x"}, {}) == {
        "planner": "expert",
        "executor": "frozen",
    }


STYLE = Style(history=0, brief=True, show_admissible=False, max_response=6)


def play(actor, tokenizer, tasks=range(4), style=STYLE, **players):
    torch.manual_seed(0)
    with envs.Runner("household", "train", 1, max_steps=14) as runner:
        players = (
            evaluation.players(
                players.pop("swaps"), runner, players.pop("frozen", None), tokenizer, style, 1.0
            )
            if "swaps" in players
            else players
        )
        return collect(
            actor, tokenizer, runner, list(tasks), slots=4, temperature=1.0, style=style, **players
        )


def test_an_expert_in_both_parts_wins_whatever_the_model_is(tiny_actor, tiny_tokenizer):
    """And in one of them he does not: an action of a random model's does nothing, nor does a random subgoal of it."""
    both = play(
        tiny_actor, tiny_tokenizer, range(12), swaps={"planner": "expert", "executor": "expert"}
    )
    assert all(e.won for e in both) and all(len(e.turns) > 2 for e in both)
    assert any(turn.opened for turn in both[0].turns[1:]) and not all(
        turn.opened for turn in both[0].turns
    )
    for swaps in (
        {"planner": "expert"},
        {"executor": "expert"},
        {"planner": "expert", "executor": "random"},
        {"planner": "random", "executor": "frozen"},
        {"planner": "frozen", "executor": "expert"},
    ):
        assert not all(
            e.won
            for e in play(tiny_actor, tiny_tokenizer, range(6), swaps=swaps, frozen=tiny_actor)
        ), swaps


def test_a_random_planner_plans_only_what_can_be_had(tiny_actor, tiny_tokenizer):
    episodes = play(
        tiny_actor, tiny_tokenizer, range(6), swaps={"planner": "random", "executor": "expert"}
    )
    goals = {turn.subgoal.split()[0] for e in episodes for turn in e.turns if turn.decision.subgoal}
    assert len(goals) >= 3 and goals <= {"find", "drop", "clean", "heat", "cool", "use", "put"}


@pytest.mark.parametrize(
    "segments, opens", [("single", [0]), ("every-turn", range(14)), ("fixed:4", [0, 4, 8, 12])]
)
def test_imposed_segments_are_written_for_the_agent(tiny_actor, tiny_tokenizer, segments, opens):
    style = replace(STYLE, segments=segments, max_response=12)
    (episode,) = play(tiny_actor, tiny_tokenizer, [0], style)
    assert len(episode.turns) == 14
    for t, turn in enumerate(episode.turns):
        said = tiny_tokenizer.decode(turn.response)
        assert said.startswith(
            "<switch>SWITCH</switch>"
            if t in opens
            else f"<switch>KEEP</switch><subgoal>{turn.carried or 'None'}</subgoal>"
        )
        assert turn.opened == (t in opens) and (turn.opened or turn.subgoal == turn.carried)


def answered(style, *turns):
    """Rewards of turns (decision, progress, won) in a seat of its own."""
    seat = Seat(0, "page", {"task": "x", "task_type": "y"}, style)
    for decision, progress, won in turns:
        seat.answer([], [], decision, ("page", float(won), won, False, {"progress": progress}))
    return [turn.reward for turn in seat.turns]


def test_penalties_and_the_checklist():
    said = lambda switch, subgoal, valid=True: hiper.Decision(switch, subgoal, "x", valid, "")
    style = replace(STYLE, keep_penalty=0.3, drift_penalty=0.2, invalid_penalty=1.0)
    rewards = answered(
        style,
        (said(False, "a"), 0, False),
        (said(False, "a"), 0, False),
        (said(False, "b"), 0, False),
        (said(True, "b"), 0, False),
        (said(False, "b", False), 0, False),
        (said(False, "b"), 0, True),
    )
    assert rewards == pytest.approx(
        [0, -0.3, -0.5, 0, -1.0, 9.7]
    )  # turn 0 opens a segment whatever it says
    flat = answered(replace(style, prompt="flat"), *[(said(False, ""), 0, False)] * 2)
    assert flat == [0, 0]
    paid = answered(
        replace(STYLE, checklist=0.4),
        (said(True, "a"), 0.5, False),
        (said(True, "a"), 0.0, False),
        (said(True, "a"), 0.5, False),
        (said(True, "a"), 1.0, True),
    )
    assert paid == pytest.approx(
        [2.0, 0, 0, 2.0 + 6.0]
    )  # a subtask pays once, all of it together as much as winning


def test_progress_of_the_household_grows_with_its_subtasks():
    for index in range(24):
        env = household.make("train", index)
        (_, info), subgoal, seen = env.reset(), "", []
        while not env.done:
            seen.append(info["progress"])
            _, subgoal, action = env.expert(subgoal)
            *_, info = env.step(action)
        assert seen[0] == 0 and seen == sorted(seen) and info["progress"] == 1 and info["won"]
        assert len({*seen, 1.0}) == {"look_at_obj_in_light": 3, "pick_and_place_simple": 3}.get(
            info["task_type"], 4
        )


def test_the_flat_prompt_shows_no_plan_and_reads_none(tiny_actor, tiny_tokenizer):
    style = replace(STYLE, prompt="flat", max_response=12)
    (episode,) = play(tiny_actor, tiny_tokenizer, [0], style)
    assert not any(
        turn.opened for turn in episode.turns[1:]
    ) and "Subgoal" not in tiny_tokenizer.decode(episode.turns[3].prompt)
    with envs.Runner("household", "train", 1) as runner:
        shown = scratch.demonstrations(
            runner, range(3), plan_noise=0.5, slips=0.0, style=style, seed=0
        )
    assert all(
        hiper.parse_flat(said).valid and "Subgoal" not in prompt for prompt, said, _ in shown
    )


def test_a_batch_numbers_tasks_and_states(tiny_actor, tiny_tokenizer):
    episodes = play(tiny_actor, tiny_tokenizer, [3, 5, 3])
    batch = batches(episodes, tiny_tokenizer)
    assert batch.group.tolist() == [3, 5, 3]
    pages = [[turn.observation for turn in e.turns] for e in episodes]
    for b, c in ((0, 1), (0, 2), (1, 1)):
        for t, u in ((0, 0), (3, 3), (2, 7)):
            assert (batch.state[b, t] == batch.state[c, u]).item() == (pages[b][t] == pages[c][u])
    assert batch.state[0, 0] == batch.state[2, 0]


def test_alignment_is_the_cosine_with_a_truth_that_is_only_seen_through_noise():
    """benchmarks/alignment.py: no batch meets itself, the lengths of the unbiased estimators do not matter, a bias shows."""
    from benchmarks.alignment import alignment

    g, truth = torch.Generator().manual_seed(0), torch.zeros(40, dtype=torch.float64)
    truth[0] = 1.0
    noisy = lambda scale, sd: (
        scale * truth + sd * torch.randn(3000, 40, generator=g, dtype=torch.float64)
    )
    unbiased, one = [noisy(1.0, 0.5), noisy(5.0, 1.0)], noisy(2.0, 0.3)
    want = 2 / (4 + 40 * 0.09) ** 0.5
    assert abs(alignment(one, unbiased) - want) < 0.02
    assert abs(alignment(unbiased[0], unbiased) - 1 / (1 + 40 * 0.25) ** 0.5) < 0.02
    assert abs(alignment(one + 2 * truth.roll(1), unbiased) - 2 / (8 + 40 * 0.09) ** 0.5) < 0.02
