"""Advantages of every method against slow oracles, at their limits, and through to the tokens.

Also the flat prompt's parser, penalties, warnings of a collapse, and benchmarks/swap.py.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import envs
import hiper
from baselines import (
    baseline_advantages,
    beacon,
    gagpo,
    gigpo,
    group_normalize,
    grpo,
    hgpo,
    returns,
    rloo,
)
from benchmarks import swap
from benchmarks.alignment import alignment
from config import METHODS, ConfigError
from conftest import tiny_config
from hae import gae, hae, normalize, switch_gain
from hiper import DECISIONS, Masks, PolicyOutput, hiper_advantages
from rollout import AgentState, collect
from support import loading
from support.batch import make_batch
from support.cloning import demonstrations
from support.metrics import ALARMS, collapse_warning
from worlds import household

B, T = 12, 5


def random_batch(seed=0, tasks=3):
    """Ragged random episodes of few tasks that meet few states; two tokens of each decision."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]  # [B, T]
    episode_idx, turn_idx = mask.nonzero(as_tuple=True)  # [N] each
    switch = ((torch.rand(B, T, generator=g) < 0.4) | (torch.arange(T) == 0)) & mask
    decision = torch.arange(6).div(2, rounding_mode="floor")
    masks = Masks(*(decision.eq(k).expand(len(episode_idx), 6) for k in range(3)))  # [N, 6]
    everywhere = torch.ones(len(episode_idx), 6, dtype=torch.bool)

    def to_turns(grid):
        return grid[episode_idx, turn_idx]

    def to_grid(turns):
        return turns.new_zeros(mask.shape).index_put((episode_idx, turn_idx), turns)

    return SimpleNamespace(
        mask=mask,
        rewards=torch.randn(B, T, generator=g) * mask,
        switch=switch,
        truncated=torch.rand(B, generator=g) < 0.5,
        episode_idx=episode_idx,
        turn_idx=turn_idx,
        group=torch.randint(tasks, (B,), generator=g),
        state=torch.randint(4, (B, T), generator=g) * mask,
        progress=torch.randint(4, (B, T), generator=g) / 4 * mask,
        samples=SimpleNamespace(
            masks=masks,
            switch_word=everywhere & (torch.arange(6) == 0),
            response_mask=lambda: everywhere,
        ),
        to_turns=to_turns,
        to_grid=to_grid,
    )


def random_output(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(n, 6, generator=g)
    return PolicyOutput(logprobs, None, *torch.randn(3, n, generator=g))


def settings(method="hiper", **changes):
    base = dict(gamma=0.9, lam_low=0.8, lam_high=0.7, gae_lambda=0.6, normalize="per_decision")
    return tiny_config(**{"method": method, **base, **changes})


def hiper_of(x, old, v_keep=None, end_values=None, **changes):
    return hiper_advantages(
        x, old, settings(**changes), normalize, end_values=end_values, v_keep=v_keep
    )


def baseline_of(x, old, method, end_values=None, **changes):
    return baseline_advantages(
        x, old, settings(method, **changes), normalize, end_values=end_values
    )


def hae_of(x, old, **changes):
    arguments = dict(gamma=0.9, lam_low=0.8, lam_high=0.7)
    values = (x.to_grid(value) for value in old[2:])
    return hae(x.rewards, x.switch, x.mask, *values, **{**arguments, **changes})


def where_decided(x):
    """The turns on which each decision is made."""
    later = x.mask & (torch.arange(T) > 0)
    return {"switch": later, "subgoal": x.switch, "action": x.mask}


def tokens_of(decision):
    start = 2 * DECISIONS.index(decision)
    return slice(start, start + 2)


def turns_of(x):
    return list(zip(x.episode_idx.tolist(), x.turn_idx.tolist(), strict=True))


def mean_of(xs):
    return sum(xs) / len(xs)


def sample_std(xs):
    if len(xs) < 2:
        return 0.0
    return math.sqrt(sum((x - mean_of(xs)) ** 2 for x in xs) / (len(xs) - 1))


# ---- the baselines' estimators -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_returns_are_discounted_sums(seed):
    x = random_batch(seed)
    ret = returns(x.rewards, x.mask, 0.9)[:, 0]
    for b in range(B):
        want = sum(0.9**t * x.rewards[b, t].item() for t in range(T) if x.mask[b, t])
        assert ret[b].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_rloo_and_grpo_are_their_equations(seed):
    x = random_batch(seed)
    ret = returns(x.rewards, x.mask, 0.9)[:, 0]
    for b in range(B):
        same = [i for i in range(B) if x.group[i] == x.group[b]]
        others = [ret[i].item() for i in same if i != b]
        want = ret[b].item() - mean_of(others) if others else 0
        assert rloo(ret, x.group)[b].item() == pytest.approx(want, abs=1e-5)
        mine = [ret[i].item() for i in same]
        want = (ret[b].item() - mean_of(mine)) / (sample_std(mine) + 1e-6)
        assert grpo(ret, x.group)[b].item() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_gigpo_is_its_equation(seed, scale):
    x = random_batch(seed)
    ret = returns(x.rewards, x.mask)[:, 0]
    got = gigpo(ret, x.rewards, x.mask, x.group, x.state, gamma=0.8, weight=0.5, scale=scale)
    return_to_go = {
        (b, t): sum(0.8 ** (u - t) * x.rewards[b, u].item() for u in range(t, T) if x.mask[b, u])
        for b, t in turns_of(x)
    }
    for b, t in turns_of(x):
        episodes = [ret[i].item() for i in range(B) if x.group[i] == x.group[b]]
        steps = [
            return_to_go[i, u]
            for i, u in turns_of(x)
            if x.group[i] == x.group[b] and x.state[i, u] == x.state[b, t]
        ]
        episode = ret[b].item() - mean_of(episodes)
        step = return_to_go[b, t] - mean_of(steps)
        if scale:
            episode /= sample_std(episodes) + 1e-6
            step /= sample_std(steps) + 1e-6
        assert got[b, t].item() == pytest.approx(episode + 0.5 * step, abs=1e-4)
    assert not got[~x.mask].any()


def returns_to_go(x, gamma):
    return {
        (b, t): sum(gamma ** (u - t) * x.rewards[b, u].item() for u in range(t, T) if x.mask[b, u])
        for b, t in turns_of(x)
    }


@pytest.mark.parametrize("seed", range(6))
def test_gagpo_is_its_equation(seed):
    x = random_batch(seed)
    got = gagpo(x.rewards, x.mask, x.group, x.state, gamma=0.8, lam=0.6)
    to_go = returns_to_go(x, 0.8)

    def value(b, t):  # the mean return of the group's visits of the state; 0 after the end
        if (b, t) not in to_go:
            return 0.0
        return mean_of(
            [
                ret
                for (i, u), ret in to_go.items()
                if x.group[i] == x.group[b] and x.state[i, u] == x.state[b, t]
            ]
        )

    for b, t in turns_of(x):
        later = [u for i, u in to_go if i == b and u >= t]
        deltas = [x.rewards[b, u].item() + 0.8 * value(b, u + 1) - value(b, u) for u in later]
        want = sum(0.48**n * delta for n, delta in enumerate(deltas))
        assert got[b, t].item() == pytest.approx(want, abs=1e-4)
    assert not got[~x.mask].any()


@pytest.mark.parametrize("seed", range(6))
def test_hgpo_is_its_equation(seed):
    x = random_batch(seed, tasks=1)
    got = hgpo(x.rewards, x.mask, x.group, x.state, gamma=0.8, depth=2, alpha=2.0)
    to_go = returns_to_go(x, 0.8)

    def seen(b, t, k):  # the state and the k before it; None before the episode
        return [x.state[b, u].item() if u >= 0 else None for u in range(t - k, t + 1)]

    for b, t in turns_of(x):
        want = 0.0
        for k, weight in enumerate((1 / 14, 4 / 14, 9 / 14)):
            alike = [
                ret
                for (i, u), ret in to_go.items()
                if x.group[i] == x.group[b] and seen(i, u, k) == seen(b, t, k)
            ]
            want += weight * (to_go[b, t] - mean_of(alike)) / (sample_std(alike) + 1e-6)
        assert got[b, t].item() == pytest.approx(want, abs=1e-3)
    assert not got[~x.mask].any()


@pytest.mark.parametrize("seed", range(6))
def test_beacon_is_its_equation(seed):
    x = random_batch(seed)
    ret = returns(x.rewards, x.mask)[:, 0]
    got = beacon(ret, x.progress, x.mask, x.group, gamma=0.8)
    earned, behind = {}, {}
    for b in range(B):
        progress = [x.progress[b, t].item() for t in range(T) if x.mask[b, t]]
        best = [max(progress[:t], default=0.0) for t in range(len(progress))]
        milestones = [t for t, value in enumerate(progress) if value > max(best[t], 0.0)]
        for t in range(len(progress)):
            ahead = [m for m in milestones if m >= t]
            earned[b, t] = 10 * 0.8 ** (ahead[0] - t) if ahead else 0.0
            behind[b, t] = max(best[t], 0.0)
    for b, t in turns_of(x):
        episodes = [ret[i].item() for i in range(B) if x.group[i] == x.group[b]]
        turns = [
            earned[i, u]
            for i, u in turns_of(x)
            if x.group[i] == x.group[b] and behind[i, u] == behind[b, t]
        ]
        want = (ret[b].item() - mean_of(episodes)) / (sample_std(episodes) + 1e-6)
        want += (earned[b, t] - mean_of(turns)) / (sample_std(turns) + 1e-6)
        assert got[b, t].item() == pytest.approx(want, abs=1e-3)
    assert not got[~x.mask].any()


def test_limits_of_the_newer_group_methods():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    turns = x.rewards, x.mask, x.group, x.state
    at_states = gigpo(torch.zeros(B), *turns, gamma=0.8)
    torch.testing.assert_close(hgpo(*turns, gamma=0.8, depth=0), at_states)
    unscaled = gigpo(torch.zeros(B), *turns, gamma=0.8, scale=False)
    torch.testing.assert_close(gagpo(*turns, gamma=0.8, lam=1.0), unscaled)
    no_state_twice = torch.arange(B * T).view(B, T)
    assert not hgpo(*turns[:3], no_state_twice).any()
    assert gagpo(*turns[:3], no_state_twice).abs().max() < 1e-5  # every value is its return
    want = grpo(ret, x.group)[:, None] * x.mask
    torch.testing.assert_close(beacon(ret, 0 * x.progress, x.mask, x.group), want)


@pytest.mark.parametrize("t", range(T))
def test_the_newer_group_methods_take_episodes_of_any_length(t):
    x = random_batch()
    turns = x.rewards[:, : t + 1], x.mask[:, : t + 1], x.group, x.state[:, : t + 1]
    for method in (gagpo, hgpo):
        assert method(*turns).shape == (B, t + 1)
    assert beacon(x.rewards[:, 0], x.progress[:, : t + 1], *turns[1:3]).shape == (B, t + 1)


def test_a_group_of_one_has_no_advantage():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    alone = torch.arange(B)
    assert not rloo(ret, alone).any()
    assert not grpo(ret, alone).any()


def test_equal_returns_have_no_advantage_whatever_their_rounding():
    group = random_batch().group
    assert not grpo(torch.full((B,), 0.1), group).any()
    assert not group_normalize(torch.full((B,), 1e6) / 3, group).any()


def test_gigpo_without_its_second_term_is_grpo():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    arguments = ret, x.rewards, x.mask, x.group
    want = grpo(ret, x.group)[:, None] * x.mask
    no_state_twice = torch.arange(B * T).view(B, T)
    torch.testing.assert_close(gigpo(*arguments, no_state_twice), want)
    torch.testing.assert_close(gigpo(*arguments, x.state, weight=0.0), want)


def test_advantages_of_a_group_sum_to_zero():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    for advantages in (rloo(ret, x.group), grpo(ret, x.group)):
        for task in x.group.unique():
            assert abs(advantages[x.group == task].sum().item()) < 1e-4


def test_the_order_of_episodes_does_not_matter():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    other = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grpo(ret[other], x.group[other]), grpo(ret, x.group)[other])
    torch.testing.assert_close(
        gigpo(ret[other], x.rewards[other], x.mask[other], x.group[other], x.state[other]),
        gigpo(ret, x.rewards, x.mask, x.group, x.state)[other],
    )


def test_equal_states_of_two_tasks_are_not_compared():
    x = random_batch()
    ret = returns(x.rewards, x.mask)[:, 0]
    mine = x.group == 0
    torch.testing.assert_close(
        gigpo(ret, x.rewards, x.mask, x.group, x.state)[mine],
        gigpo(ret[mine], x.rewards[mine], x.mask[mine], x.group[mine], x.state[mine]),
    )


# ---- from methods to tokens --------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "hiper"])
def test_baselines_give_every_token_of_a_turn_its_advantage(method):
    x = random_batch()
    n = len(x.episode_idx)
    old = random_output(n)
    ret = returns(x.rewards, x.mask)[:, 0]
    advantages, target = gae(x.rewards, x.mask, x.to_grid(old.v_high), gamma=0.9, lam=0.6)
    turns = x.rewards, x.mask, x.group, x.state
    wanted = {
        "hgpo": hgpo(*turns),
        "gagpo": normalize(gagpo(*turns, lam=0.6), x.mask),
        "beacon": beacon(ret, x.progress, x.mask, x.group),
        "ppo": normalize(advantages, x.mask),
        "rloo": normalize(rloo(ret, x.group)[:, None] * x.mask, x.mask),
        "grpo": grpo(ret, x.group)[:, None] * x.mask,
        "gigpo": gigpo(ret, x.rewards, x.mask, x.group, x.state, gamma=0.95),
    }
    got = baseline_of(x, old, method)
    assert got.token_mask.all()
    assert got.advantages.shape == (n, 6)
    want = x.to_turns(wanted[method])[:, None].expand(n, 6)
    torch.testing.assert_close(got.advantages, want)
    assert list(got.targets) == (["high"] if method == "ppo" else [])
    if method == "ppo":
        torch.testing.assert_close(got.targets["high"][0], x.to_turns(target))


def test_ppo_bootstraps_truncated_episodes_where_it_is_asked_to():
    x = random_batch()
    old = random_output(len(x.episode_idx))
    ends = random_output(B, 2)
    plain = baseline_of(x, old, "ppo").raw["A"]
    asked = baseline_of(x, old, "ppo", end_values=ends).raw["A"]
    values = x.to_grid(old.v_high)
    end_value = ends.v_high * x.truncated
    want, _ = gae(x.rewards, x.mask, values, gamma=0.9, lam=0.6, end_value=end_value)
    torch.testing.assert_close(asked, want)
    assert torch.equal(plain[~x.truncated], asked[~x.truncated])
    assert not torch.equal(plain[x.truncated], asked[x.truncated])


@pytest.mark.parametrize("decision", DECISIONS)
def test_hiper_trains_each_decision_where_it_is_made(decision):
    x = random_batch()
    old = random_output(len(x.episode_idx))
    got = hiper_of(x, old)
    raw = getattr(hae_of(x, old), f"adv_{decision}")
    where = where_decided(x)[decision]
    tokens = tokens_of(decision)
    mask = x.to_turns(where)[:, None].expand(-1, 2)
    assert torch.equal(got.token_mask[:, tokens], mask)
    want = x.to_turns(normalize(raw, where))[:, None].expand(-1, 2)
    torch.testing.assert_close((got.advantages * got.token_mask)[:, tokens], want)


def test_hiper_s_value_targets():
    x = random_batch()
    old = random_output(len(x.episode_idx))
    targets, raw = hiper_of(x, old).targets, hae_of(x, old)
    assert list(targets) == ["high", "low", "switch"]
    assert torch.equal(targets["high"][1], x.to_turns(x.switch))
    assert targets["low"][1].all()
    for head, want in (("high", raw.ret_high), ("low", raw.ret_low), ("switch", raw.ret_switch)):
        torch.testing.assert_close(targets[head][0], x.to_turns(want))


@pytest.mark.parametrize("decisions", ["switch,subgoal,action", "switch,action", "subgoal"])
def test_jointly_scaled_advantages_keep_their_proportions(decisions):
    """Each decision is centred; one standard deviation of all that are trained divides them."""
    x = random_batch()
    old = random_output(len(x.episode_idx))
    got = hiper_of(x, old, normalize="jointly", decisions=decisions)
    raw = hae_of(x, old)
    centred = {}
    for decision, where in where_decided(x).items():
        advantages = getattr(raw, f"adv_{decision}")
        centred[decision] = (advantages - advantages[where].mean()) * where
    trained = decisions.split(",")
    chosen = torch.cat([centred[decision][where_decided(x)[decision]] for decision in trained])
    for decision in DECISIONS:
        want = x.to_turns(centred[decision] / chosen.square().mean().sqrt())
        want = want[:, None].expand(-1, 2) * (decision in trained)
        result = (got.advantages * got.token_mask)[:, tokens_of(decision)]
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("decisions", ["switch,subgoal", "action", "subgoal"])
def test_decisions_that_are_not_named_are_not_trained(decisions):
    x = random_batch()
    old = random_output(len(x.episode_idx))
    whole, part = hiper_of(x, old), hiper_of(x, old, decisions=decisions)
    for decision in DECISIONS:
        tokens = tokens_of(decision)
        if decision in decisions.split(","):
            assert torch.equal(part.token_mask[:, tokens], whole.token_mask[:, tokens])
        else:
            assert not part.token_mask[:, tokens].any()
    assert list(part.targets) == list(whole.targets)  # the critic learns all the same


def test_the_closed_form_needs_the_value_of_keeping():
    assert settings(switch_advantage="closed_form").needs_keep_value
    assert not settings(switch_advantage="value_head").needs_keep_value
    assert not settings("ppo", switch_advantage="closed_form").needs_keep_value


def test_the_closed_form_is_the_paper_s():
    x = random_batch()
    n = len(x.episode_idx)
    old = random_output(n)
    v_keep = torch.randn(n, generator=torch.Generator().manual_seed(3))
    p_written = old.logprobs[:, 0].exp()  # of the word that was written, without its tags
    beta = x.to_grid(torch.where(x.to_turns(x.switch), p_written, 1 - p_written))
    want = switch_gain(x.switch, beta, x.to_grid(old.v_high), x.to_grid(v_keep))
    got = hiper_of(x, old, v_keep=v_keep, switch_advantage="closed_form")
    later = where_decided(x)["switch"]
    torch.testing.assert_close(got.raw["A_switch"] * later, want * later)


def test_targets_td0_are_the_paper_s_one_step_targets():
    x = random_batch()
    old = random_output(len(x.episode_idx))
    got = hiper_of(x, old, value_target="td0")
    one_step = hae_of(x, old, lam_low=0.0, lam_high=0.0)
    torch.testing.assert_close(got.targets["low"][0], x.to_turns(one_step.ret_low))
    torch.testing.assert_close(got.targets["high"][0], x.to_turns(one_step.ret_high))
    assert torch.equal(got.raw["A_action"], hae_of(x, old).adv_action)  # the advantages stay


def test_imposed_segments_leave_no_switch_to_train():
    x = random_batch()
    got = hiper_of(x, random_output(len(x.episode_idx)), segments="fixed:2")
    assert not got.token_mask[:, :2].any()
    assert got.token_mask[:, 4:].all()


def test_ppo_values_every_turn():
    x = random_batch()
    targets = baseline_of(x, random_output(len(x.episode_idx)), "ppo").targets
    assert targets["high"][1].all()


def test_the_new_methods_defaults_are_what_they_say():
    x = random_batch()
    old = random_output(len(x.episode_idx))
    ret = returns(x.rewards, x.mask)[:, 0]
    turns = x.rewards, x.mask, x.group, x.state
    wanted = {
        "gigpo": gigpo(ret, *turns, gamma=0.95, weight=1.0),
        "hgpo": hgpo(*turns, gamma=0.95, depth=2, alpha=1.0),
        "gagpo": gagpo(*turns, gamma=0.95, lam=0.6),
        "beacon": beacon(ret, x.progress, x.mask, x.group, gamma=0.99),
    }
    for method, want in wanted.items():
        torch.testing.assert_close(baseline_of(x, old, method).raw["A"], want)


# ---- the flat response -------------------------------------------------------------------------


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
    assert (got.action, got.switch, got.subgoal) == (action, False, "")
    assert got.valid == (not error)
    assert got.error.startswith(error)


# ---- warnings ----------------------------------------------------------------------------------


def log_lines(success, switch_rate=0.3, valid=1.0):
    return [
        {"iteration": i, "success": s, "switch_rate": switch_rate, "valid_format_rate": valid}
        for i, s in enumerate(success)
    ]


def test_a_healthy_run_has_no_warning():
    assert collapse_warning(log_lines([0.5] * 9), True) is None
    assert collapse_warning(log_lines([0.5] * 3, 0.0), True) is None  # too early to say


def test_a_warning_names_a_collapse_once_when_it_begins():
    assert "hardly ever switches" in collapse_warning(log_lines([0.5] * 4, 0.0), True)
    assert collapse_warning(log_lines([0.5] * 5, 0.0), True) is None  # it has been said
    assert "every turn" in collapse_warning(log_lines([0.5] * 4, 0.99), True)
    assert "malformed" in collapse_warning(log_lines([0.5] * 4, valid=0.5), False)


def test_each_warning_names_its_entry_of_the_faq():
    """Headings become links as GitHub makes them: blanks to hyphens."""
    faq = (Path(__file__).parent.parent / "docs" / "faq.md").read_text()
    wrong = {
        "hardly ever switches": log_lines([0.5] * 4, 0.0),
        "switches at almost every turn": log_lines([0.5] * 4, 0.99),
        "writes malformed responses": log_lines([0.5] * 4, valid=0.5),
        "has lost 20 points of success": log_lines([0.8] * 6 + [0.5] * 3),
    }
    assert set(wrong) == set(ALARMS)
    for name, lines in wrong.items():
        said = collapse_warning(lines, True)
        assert f"the agent {name}, " in said
        assert said.endswith(f"(docs/faq.md#{name.replace(' ', '-')})")
        assert f"\n### {name}\n" in faq


def test_the_committed_runs_of_which_none_collapsed_have_no_warning():
    """Their lines hold success, and switches: a rate of theirs that is never above the true one."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "ablation.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(runs) == 55
    for run in runs:
        lines = log_lines(run["curve"])
        for line, switches in zip(lines, run["switches"], strict=True):
            line["switch_rate"] = switches / 14  # the choices of an episode of 15 turns, the most
        hierarchical = run["prompt"] == "plan-execute"
        warnings = [collapse_warning(lines[:end], hierarchical) for end in range(1, len(lines) + 1)]
        assert warnings == [None] * len(lines), (run["method"], run["prompt"], run["seed"])


def test_an_agent_without_switches_cannot_lose_them():
    assert collapse_warning(log_lines([0.5] * 4, 0.0), False) is None


def test_a_fall_of_success_is_named_where_it_begins():
    fall = log_lines([0.8] * 6 + [0.5] * 6)
    named = [i for i in range(1, 13) if collapse_warning(fall[:i], True)]
    assert named == [9]
    assert "20 points" in collapse_warning(fall[:9], True)


@pytest.mark.parametrize(
    "switch_rate, valid, warns",
    [
        (0.019, 1.0, True),
        (0.021, 1.0, False),
        (0.949, 1.0, False),
        (0.951, 1.0, True),
        (0.3, 0.81, False),
        (0.3, 0.79, True),
    ],
)
def test_where_a_warning_begins(switch_rate, valid, warns):
    lines = log_lines([0.5] * 4, switch_rate, valid)
    assert bool(collapse_warning(lines, True)) == warns


# ---- who plays ---------------------------------------------------------------------------------

CONFIG = tiny_config(max_new_tokens=6, num_envs=4)


def play(actor, tokenizer, tasks=range(4), config=CONFIG, frozen=None, **who):
    torch.manual_seed(0)
    with envs.EnvPool("household", "train", workers=1, max_steps=14) as pool:
        players = swap.Players(pool, tokenizer, config, frozen, temperature=1.0)
        roles = swap.overrides(players, **who)
        return collect(actor, tokenizer, pool, list(tasks), config, temperature=1.0, **roles)


@pytest.mark.parametrize("words", [["--planner", "me"], ["--actor", "expert"]])
def test_unknown_roles_are_refused(words, capsys):
    with pytest.raises(SystemExit) as exit:
        swap.main(["runs/none", *words])
    assert exit.value.code == 2
    assert "me" in capsys.readouterr().err


def test_roles_that_cannot_be_are_refused():
    env = envs.make("household")
    without_subgoals = SimpleNamespace(reset=lambda: ("page", {}))
    with pytest.raises(ConfigError, match="does not list its subgoals"):
        swap.check_roles("random", None, CONFIG, without_subgoals)
    with pytest.raises(ConfigError, match="no expert"):
        swap.check_roles(None, "expert", CONFIG, without_subgoals)
    with pytest.raises(ConfigError, match="flat prompt"):
        swap.check_roles("expert", None, tiny_config(method="ppo", prompt="flat"), env)
    swap.check_roles("expert", "frozen", CONFIG, env)
    swap.check_roles("random", "expert", CONFIG, env)


def test_an_expert_in_both_parts_wins_whatever_the_model_is(tiny_actor, tiny_tokenizer):
    both = play(tiny_actor, tiny_tokenizer, range(12), planner="expert", executor="expert")
    assert all(episode.success for episode in both)
    assert all(len(episode.turns) > 2 for episode in both)
    assert any(turn.is_segment_start for turn in both[0].turns[1:])
    assert not all(turn.is_segment_start for turn in both[0].turns)


@pytest.mark.parametrize(
    "planner, executor",
    [
        ("expert", None),
        (None, "expert"),
        ("expert", "random"),
        ("random", "frozen"),
        ("frozen", "expert"),
    ],
)
def test_an_expert_in_one_part_does_not_win(tiny_actor, tiny_tokenizer, planner, executor):
    """A random model's action does nothing, nor does its subgoal lead anywhere."""
    who = {"planner": planner, "executor": executor}
    episodes = play(tiny_actor, tiny_tokenizer, range(6), frozen=tiny_actor, **who)
    assert not all(episode.success for episode in episodes)


def test_a_random_planner_plans_only_what_can_be_had(tiny_actor, tiny_tokenizer):
    episodes = play(tiny_actor, tiny_tokenizer, range(6), planner="random", executor="expert")
    turns = [turn for episode in episodes for turn in episode.turns]
    verbs = {turn.subgoal.split()[0] for turn in turns if turn.decision.subgoal}
    assert len(verbs) >= 3
    assert verbs <= {"find", "drop", "make", "use", "put"}


@pytest.mark.parametrize(
    "segments, opens", [("single", [0]), ("every-turn", range(14)), ("fixed:4", [0, 4, 8, 12])]
)
def test_imposed_segments_are_written_for_the_agent(tiny_actor, tiny_tokenizer, segments, opens):
    config = tiny_config(max_new_tokens=12, segments=segments)
    [episode] = play(tiny_actor, tiny_tokenizer, [0], config)
    assert len(episode.turns) == 14
    for t, turn in enumerate(episode.turns):
        text = tiny_tokenizer.decode(turn.response)
        prefix = hiper.format_plan(turn.prev_subgoal, switch=False)
        assert text.startswith("<switch>SWITCH</switch>" if t in opens else prefix)
        assert turn.is_segment_start == (t in opens)
        assert turn.is_segment_start or turn.subgoal == turn.prev_subgoal


# ---- rewards -----------------------------------------------------------------------------------


def rewards_of(config, *turns):
    """Rewards of turns (decision, progress, won) of one agent."""
    state = AgentState(config, 0, "page", {"task": "x", "task_type": "y"})
    for decision, progress, won in turns:
        info = {"progress": progress}
        state.record_turn([], [], decision, ("page", float(won), won, False, info))
    return [turn.reward for turn in state.turns]


def decide(switch, subgoal, valid=True):
    return hiper.Decision(switch, subgoal, "x", valid, "")


def test_penalties():
    config = tiny_config(keep_penalties={"turn": 0.3, "drift": 0.2}, invalid_penalty=1.0)
    rewards = rewards_of(
        config,
        (decide(False, "a"), 0, False),  # turn 0 opens a segment whatever it says
        (decide(False, "a"), 0, False),
        (decide(False, "b"), 0, False),
        (decide(True, "b"), 0, False),
        (decide(False, "b", valid=False), 0, False),
        (decide(False, "b"), 0, True),
    )
    assert rewards == pytest.approx([0, -0.3, -0.5, 0, -1.0, 9.7])
    flat = tiny_config(keep_penalties={"turn": 0.3, "drift": 0.2}, method="ppo", prompt="flat")
    assert rewards_of(flat, *[(decide(False, ""), 0, False)] * 2) == [0, 0]


def test_the_ratio_penalty_takes_its_share_of_keep_turns_off_an_episode():
    """3.5 times 2 KEEP turns of 5 turns, spread over the two."""
    state = AgentState(tiny_config(keep_penalties={"ratio": 3.5}), 0, "page", {"task": "x"})
    for switch, valid in (
        (False, True),
        (False, True),
        (True, True),
        (False, False),
        (False, True),
    ):
        info = {"task": "x", "task_type": "y", "won": False, "score": 0.0}
        decision = decide(switch, "a", valid)
        state.record_turn([], [], decision, ("page", 0.0, False, False, info))
    rewards = [turn.reward for turn in state.to_episode([]).turns]
    malformed = -state.config.invalid_penalty
    assert rewards == pytest.approx([0, -0.7, 0, malformed, -0.7])
    assert sum(rewards) - malformed == pytest.approx(-3.5 * 2 / 5)
    flat = tiny_config(keep_penalties={"ratio": 3.5}, method="ppo", prompt="flat")
    state = AgentState(flat, 0, "page", {"task": "x"})
    for _ in range(2):  # the flat prompt knows no KEEP
        state.record_turn([], [], decide(False, ""), ("page", 0.0, False, False, info))
    assert [turn.reward for turn in state.to_episode([]).turns] == [0, 0]


def test_the_checklist_pays_a_subtask_once_and_all_of_it_as_much_as_winning():
    paid = rewards_of(
        tiny_config(checklist=0.4),
        (decide(True, "a"), 0.5, False),
        (decide(True, "a"), 0.0, False),
        (decide(True, "a"), 0.5, False),
        (decide(True, "a"), 1.0, True),
    )
    assert paid == pytest.approx([2.0, 0, 0, 2.0 + 6.0])


def test_progress_of_the_household_grows_with_its_subtasks():
    for index in range(24):
        env = household.make("train", index)
        _, info = env.reset()
        subgoal = ""
        seen = []
        while not env.done:
            seen.append(info["progress"])
            _, subgoal, action = env.expert(subgoal)
            *_, info = env.step(action)
        assert seen[0] == 0
        assert seen == sorted(seen)
        assert info["progress"] == 1
        assert info["won"]
        levels = {"look_at_obj_in_light": 3, "pick_and_place_simple": 3}
        assert len({*seen, 1.0}) == levels.get(info["task_type"], 4)


def test_a_kept_none_is_no_drift():
    config = tiny_config(keep_penalties={"drift": 0.2}, invalid_penalty=1.0)
    turns = (decide(False, "", valid=False), 0, False), (decide(False, "None"), 0, False)
    assert rewards_of(config, *turns) == [-1.0, 0.0]


# ---- the flat prompt, batches and benchmarks/alignment.py --------------------------------------


def test_the_flat_prompt_shows_no_plan_and_reads_none(tiny_actor, tiny_tokenizer):
    config = tiny_config(method="ppo", prompt="flat", max_new_tokens=12)
    [episode] = play(tiny_actor, tiny_tokenizer, [0], config)
    assert not any(turn.is_segment_start for turn in episode.turns[1:])
    assert "Subgoal" not in tiny_tokenizer.decode(episode.turns[3].prompt)
    with envs.EnvPool("household", "train", workers=1) as pool:
        shown = demonstrations(pool, range(3), config, random_subgoals=0.5)
    assert all(hiper.parse_flat(response).valid for _, response, *_ in shown)
    assert all("Subgoal" not in prompt for prompt, *_ in shown)


@pytest.mark.parametrize(
    "flag, changes",
    [("--method beacon", dict(method="beacon")), ("--checklist", dict(checklist=0.5))],
)
def test_what_needs_progress_is_refused_in_a_world_without(monkeypatch, flag, changes):
    monkeypatch.setattr(loading, "try_world", lambda config: {"task": ""})
    with pytest.raises(ConfigError, match=f"{flag} needs a world that reports subtasks"):
        loading.check_world_and_model(tiny_config(**changes))
    loading.check_world_and_model(tiny_config())


def test_a_batch_has_the_progress_after_each_turn(tiny_actor, tiny_tokenizer):
    episodes = play(tiny_actor, tiny_tokenizer, range(2), planner="expert", executor="expert")
    batch = make_batch(episodes, tiny_tokenizer)
    for b, episode in enumerate(episodes):
        progress = batch.progress[b, : len(episode.turns)]
        assert progress[0] == 0 and progress[-1] == 1


def test_a_batch_numbers_groups_and_states(tiny_actor, tiny_tokenizer):
    episodes = play(tiny_actor, tiny_tokenizer, [3, 3, 5, 5])
    batch = make_batch(episodes, tiny_tokenizer, group_size=2)
    assert batch.group.tolist() == [0, 0, 1, 1]
    pages = [[turn.observation for turn in episode.turns] for episode in episodes]
    for b, c in ((0, 2), (0, 1), (2, 2)):
        for t, u in ((0, 0), (3, 3), (2, 7)):
            equal = (batch.state[b, t] == batch.state[c, u]).item()
            assert equal == (pages[b][t] == pages[c][u])
    assert batch.state[0, 0] == batch.state[1, 0]


def test_alignment_is_the_cosine_with_a_truth_that_is_only_seen_through_noise():
    """No batch meets itself, lengths of unbiased estimators do not matter, a bias shows."""
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(40, dtype=torch.float64)
    truth[0] = 1.0

    def noisy(scale, sd):
        noise = torch.randn(3000, 40, generator=g, dtype=torch.float64)
        return scale * truth + sd * noise

    unbiased = [noisy(1.0, 0.5), noisy(5.0, 1.0)]
    one = noisy(2.0, 0.3)
    want = 2 / (4 + 40 * 0.09) ** 0.5
    assert abs(alignment(one, unbiased) - want) < 0.02
    assert abs(alignment(unbiased[0], unbiased) - 1 / (1 + 40 * 0.25) ** 0.5) < 0.02
    biased = one + 2 * truth.roll(1)
    assert abs(alignment(biased, unbiased) - 2 / (8 + 40 * 0.09) ** 0.5) < 0.02
