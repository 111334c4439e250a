"""The advantages of an iteration and its PPO update, against slow oracles, on one process."""

import copy
import math
import random
from itertools import compress

import pytest
import torch
from accelerate import Accelerator

import hae
import hiper
import train
from rollout import make_batch
from support import batch as batches
from support import ppo, scoring
from support.batch import append_keep_block
from support.distributed import normalize_global
from support.loading import make_optimizer
from update_tools import (
    BIG,
    assert_close,
    estimate,
    iterate,
    learn,
    make_episode,
    make_episodes,
    make_run,
    plain_config,
    plain_sgd,
    record_logprobs,
    same,
    score,
    steady,
    weights,
)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def reference(tiny_actor):
    """Another policy than the tiny one, near it."""
    other = hiper.ActorCritic(copy.deepcopy(tiny_actor), "none")
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter.add_(noise * 0.05)
    return other


# ---- advantages --------------------------------------------------------------------------------


def random_values(batch, seed=0):
    """-> (PolicyOutput of the turns, PolicyOutput of the final states), values only."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randn(3, len(batch.episode_idx), generator=generator)
    ends = torch.randn(3, len(batch.mask), generator=generator)
    return hiper.PolicyOutput(None, None, *turns), hiper.PolicyOutput(None, None, *ends)


def test_advantages_are_hae_normalised_over_the_turns_that_decide(tiny_tokenizer):
    batch = make_batch(make_episodes(tiny_tokenizer), tiny_tokenizer)
    old, end_values = random_values(batch)
    raw, advantages, _ = estimate(batch, old, end_values, plain_config())
    wanted = hae.hae(
        batch.rewards,
        batch.switch,
        batch.mask,
        *(batch.to_grid(value) for value in old[2:]),
        gamma=0.9,
        lam_low=0.8,
        lam_high=0.7,
    )
    assert all(torch.equal(a, b) for a, b in zip(raw, wanted, strict=True))
    turns = batch.mask.nonzero().tolist()
    opens = [(b, t) for b, t in turns if batch.switch[b, t]]
    decides = ([(b, t) for b, t in turns if t > 0], opens, turns)
    written = [  # a malformed turn may lack a block
        [batch.to_grid(mask.any(1))[b, t] for b, t in where]
        for mask, where in zip(batch.samples.masks, decides, strict=True)
    ]
    assert not all(written[0])
    decides = [list(compress(*pair)) for pair in zip(decides, written, strict=True)]
    estimates = (raw.adv_switch, raw.adv_subgoal, raw.adv_action)
    for got, values, where in zip(advantages, estimates, decides, strict=True):
        picked = [values[b, t].item() for b, t in where]
        mean = sum(picked) / len(picked)
        std = math.sqrt(sum((x - mean) ** 2 for x in picked) / len(picked))
        for (b, t), x in zip(where, picked, strict=True):
            assert got[b, t].item() == pytest.approx((x - mean) / std, abs=1e-4)
        assert got.count_nonzero() == len(where)
    assert not advantages[0][:, 0].any()  # at turn 0 there is no switch to decide on


@pytest.mark.parametrize("bootstrap", [False, True])
def test_truncation_bootstraps_where_it_is_asked_to(tiny_tokenizer, bootstrap):
    """A terminated episode never sees its end value; a truncated one as --bootstrap says."""
    rng = random.Random(0)
    episodes = [make_episode(rng, tiny_tokenizer, 2, truncated) for truncated in (False, True)]
    batch = make_batch(episodes, tiny_tokenizer)
    old, ends = random_values(batch)
    *_, advantages = estimate(batch, old, ends, plain_config(bootstrap=bootstrap))
    raw = advantages.raw
    ret_switch, _ = advantages.targets["switch"]
    for b in range(2):
        low = batch.to_grid(old.v_low)[b, 1]
        high = batch.to_grid(old.v_high)[b, 1]
        end_low = ends.v_low[b] if bootstrap and b else 0.0
        end_high = ends.v_high[b] if bootstrap and b else 0.0
        reward = batch.rewards[b, 1]
        wanted = (reward + 0.9 * end_low - low).item()
        assert raw["A_action"][b, 1].item() == pytest.approx(wanted, abs=1e-5)
        if batch.switch[b, 1]:
            wanted = (reward + 0.9 * end_high - high).item()
            assert raw["A_subgoal"][b, 1].item() == pytest.approx(wanted, abs=1e-5)
        wanted = (reward + 0.9 * end_high).item()
        assert batch.to_grid(ret_switch)[b, 1].item() == pytest.approx(wanted, abs=1e-5)


def test_a_turn_counts_once(tiny_tokenizer):
    """Other episodes in the batch do not change an episode's raw advantages."""
    episodes = make_episodes(tiny_tokenizer)
    alone = make_batch(episodes[:1], tiny_tokenizer)
    together = make_batch(episodes, tiny_tokenizer)
    old, ends = random_values(together)
    first_old = hiper.PolicyOutput(None, None, *(value[:3] for value in old[2:]))
    first_end = hiper.PolicyOutput(None, None, *(value[:1] for value in ends[2:]))
    a = estimate(alone, first_old, first_end, plain_config())[0]
    b = estimate(together, old, ends, plain_config())[0]
    assert all(torch.allclose(x[0], y[0, :3]) for x, y in zip(a, b, strict=True))


def test_global_normalisation_may_leave_the_scale(accelerator):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 5
    where = x > -2
    for scale in (True, False):
        assert torch.equal(normalize_global(x, where, scale), hae.normalize(x, where, scale))


# ---- update ------------------------------------------------------------------------------------


def oracle_loss(policy, tokenizer, learned, config):
    """The whole loss, turn by turn and token by token, from the full logits -> tensors."""
    batch = learned.batch
    closing = tokenizer.convert_tokens_to_ids("</subgoal>")
    sums = {name: [] for name in ("policy", "clipped", "entropy", "kl", "held", "high", "rest")}
    for n, (prompt, response) in enumerate(
        zip(batch.samples.prompts, batch.samples.responses, strict=True)
    ):
        b, t = batch.episode_idx[n], batch.turn_idx[n]
        ids = torch.tensor([prompt + response])
        logprobs = policy.actor(input_ids=ids).logits[0].log_softmax(-1)
        hidden = policy.critic(input_ids=ids).last_hidden_state[0]
        decides = (t > 0, batch.switch[b, t], True)
        for j, token in enumerate(response):
            new = logprobs[len(prompt) + j - 1]
            advantage = None
            for mask, own, takes in zip(
                batch.samples.masks, learned.decision_advantages, decides, strict=True
            ):
                if mask[n, j] and takes:
                    advantage = own[b, t]
            if advantage is not None:
                ratio = (new[token] - learned.old.logprobs[n, j]).exp()
                near = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
                sums["policy"].append(-torch.minimum(ratio * advantage, near * advantage))
                too_high = (ratio > 1 + config.clip_range) & (advantage > 0)
                too_low = (ratio < 1 - config.clip_range) & (advantage < 0)
                sums["clipped"].append((too_high | too_low).float())
                sums["entropy"].append(-(new.exp() * new).sum())
            if learned.ref_logprobs is not None:
                d = learned.ref_logprobs[n, j] - new[token]
                sums["kl"].append(d.exp() - d - 1)
                weight = config.untrained_kl_coef if advantage is None else config.kl_coef
                sums["held"].append(weight * sums["kl"][-1])
        ends = [j for j, token in enumerate(response) if token == closing]
        # `>` belongs to the tag's own token here, which begins before it
        low_at = len(prompt) + ends[0] if ends else len(prompt) - 1
        last = len(prompt) - 1
        v_high, _, v_switch = policy.value_heads(hidden[last])
        v_low = policy.value_heads(hidden[low_at])[1]
        raw = learned.raw
        if batch.switch[b, t]:
            sums["high"].append((v_high - raw.ret_high[b, t]) ** 2 / 2)
        low_error = (v_low - raw.ret_low[b, t]) ** 2
        sums["rest"].append((low_error + (v_switch - raw.ret_switch[b, t]) ** 2) / 2)
    means = {
        name: sum(terms) / len(terms) if terms else torch.tensor(0.0)
        for name, terms in sums.items()
    }
    spoken = sum(len(response) for response in batch.samples.responses)
    return {
        "policy_loss": sum(sums["policy"]) / spoken,
        "clip_fraction": means["clipped"],
        "entropy": means["entropy"],
        "kl_to_reference": means["kl"],
        "held": means["held"],
        "value_loss": means["high"] + means["rest"],
    }


@pytest.mark.parametrize("shift", [0.0, -0.3])
@pytest.mark.parametrize("tokens", [BIG, 120, 1])
def test_update_is_one_step_on_the_oracle_s_loss(
    tiny_policy, tiny_tokenizer, accelerator, reference, shift, tokens
):
    """Every token has the same weight, however the turns fall into micro-batches."""
    learned = learn(
        tiny_policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        shift=shift,
        reference=reference,
        micro_batch_tokens=tokens,
    )
    wanted = oracle_loss(tiny_policy, tiny_tokenizer, learned, plain_config())
    (wanted["policy_loss"] + wanted.pop("held") + wanted["value_loss"]).backward()
    stepped = {name: p.detach() - p.grad for name, p in tiny_policy.named_parameters()}
    assert_close(learned.weights, stepped)
    wanted = {name: term.item() for name, term in wanted.items()}
    wanted["skipped_steps"] = 0
    assert learned.losses == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert learned.losses["kl_to_reference"] > 0
    assert (learned.losses["clip_fraction"] > 0) == bool(shift)


def test_the_order_of_turns_does_not_matter(tiny_policy, tiny_tokenizer, accelerator):
    episodes = make_episodes(tiny_tokenizer)
    first = learn(tiny_policy, tiny_tokenizer, episodes, accelerator)
    torch.manual_seed(99)
    for tokens in (BIG, 200):
        again = learn(
            tiny_policy, tiny_tokenizer, episodes[::-1], accelerator, micro_batch_tokens=tokens
        )
        assert_close(first.weights, again.weights)
        assert again.losses == pytest.approx(first.losses, abs=1e-5)


def frozen_sgd(policy):
    return plain_sgd(policy, lr=0.0)


def test_minibatches_are_optimizer_steps_over_all_turns(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    """Each epoch takes every turn once, in ceil(turns / minibatch_size) steps; the metrics are
    means over them."""
    episodes = make_episodes(tiny_tokenizer)
    whole = learn(tiny_policy, tiny_tokenizer, episodes, accelerator, optimizer=frozen_sgd)
    passes = []
    steps = []
    model_inputs = batches.Samples.model_inputs
    optimizer_step = ppo.optimizer_step

    def spy_inputs(self, rows, device):
        passes.append(list(rows))
        return model_inputs(self, rows, device)

    def spy_step(*args):
        steps.append(len(passes))
        return optimizer_step(*args)

    monkeypatch.setattr(batches.Samples, "model_inputs", spy_inputs)
    monkeypatch.setattr(ppo, "optimizer_step", spy_step)
    parts = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes,
        accelerator,
        optimizer=frozen_sgd,
        minibatch_size=5,
        epochs=2,
        micro_batch_tokens=100,
    )
    assert len(steps) == 2 * math.ceil(16 / 5)
    taken = [  # the turns of all steps but the first
        [row for rows in passes[a:b] for row in rows]
        for a, b in zip(steps[:-1], steps[1:], strict=True)
    ]
    assert all(len(turns) == 4 for turns in taken)
    assert sorted(sum(taken[3:], [])) == list(range(16))
    assert len(set(sum(taken[:3], []))) == 12
    assert {frozenset(turns) for turns in taken[:3]} - {frozenset(turns) for turns in taken[3:]}
    assert parts.losses["entropy"] == pytest.approx(whole.losses["entropy"], rel=0.1)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("actor_learns", [False, True])
def test_critic_warm_up_leaves_the_actor_alone(
    tiny_policy, tiny_tokenizer, accelerator, reference, critic, actor_learns
):
    """Bit for bit, even where Adam has momentum. Where the backbone is shared only the heads
    learn."""
    policy = tiny_policy
    if critic == "shared":
        policy = hiper.ActorCritic(tiny_policy.actor, "shared")
    begun = {}

    def adam_with_momentum(policy):
        optimizer = make_optimizer(policy, plain_config(lr=1e-2, critic_lr=1e-2))
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        begun.update(weights(policy))
        return optimizer

    after = learn(
        policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        optimizer=adam_with_momentum,
        reference=reference,
        actor_learns=actor_learns,
    ).weights
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], begun[name])}
    wanted = {"value_heads"}
    if actor_learns:
        wanted.add("actor")
    if critic == "separate":
        wanted.add("critic")
    assert changed == wanted


def test_a_shared_backbone_feels_little_of_the_value_loss(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    """The gradient of all is linear in the weight; the critic of its own has weight 1."""
    shared = hiper.ActorCritic(tiny_policy.actor, "shared")
    shared.value_heads.load_state_dict(tiny_policy.value_heads.state_dict())
    before = weights(shared)

    def gradients(weight):
        monkeypatch.setattr(ppo, "SHARED_VALUE_WEIGHT", weight)
        after = learn(shared, tiny_tokenizer, make_episodes(tiny_tokenizer), accelerator).weights
        return {name: before[name] - after[name] for name in after}

    usual, without, whole = gradients(ppo.SHARED_VALUE_WEIGHT), gradients(0.0), gradients(1.0)
    expected = {n: without[n] + 0.01 * (whole[n] - without[n]) for n in usual}
    assert_close(usual, expected, atol=1e-4)
    assert not same(usual, without)


@pytest.mark.parametrize("actor_learns", [False, True])
def test_a_critic_only_iteration_does_without_gradients_of_the_actor(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch, actor_learns
):
    """And without the reference's log-probabilities, whose KL trains the actor alone."""
    seen = []
    loss_terms = ppo.loss_terms

    def recorded(run, *rest):
        seen.append({p.requires_grad for p in run.model.actor.parameters()})
        assert all(p.requires_grad for p in run.model.critic.parameters())
        return loss_terms(run, *rest)

    monkeypatch.setattr(ppo, "loss_terms", recorded)
    scored = []
    compute = scoring.compute_logprobs_and_values

    def compute_recorded(policy, *rest, **options):
        scored.append(policy)
        return compute(policy, *rest, **options)

    monkeypatch.setattr(scoring, "compute_logprobs_and_values", compute_recorded)
    episodes = make_episodes(tiny_tokenizer)
    warmup = int(not actor_learns)
    result = iterate(tiny_policy, tiny_tokenizer, episodes, accelerator, critic_warmup=warmup)
    assert seen == [{actor_learns}]
    assert (result.run.reference in scored) == actor_learns
    assert all(p.requires_grad for p in result.run.model.parameters())


def not_switched(batch):
    return ~batch.switch


def switched(batch):
    return batch.switch


def first_turn(batch):
    return (torch.arange(batch.mask.shape[1]) == 0).expand(batch.mask.shape)


def later_turns(batch):
    return ~first_turn(batch)


def all_turns(batch):
    return batch.mask


def only(decision, where):
    """Advantages of 1 for one decision at the turns `where(batch)`, else 0."""

    def advantages(batch):
        zero = torch.zeros(batch.mask.shape)
        chosen = (where(batch) & batch.mask).float()
        return [chosen if kind == decision else zero for kind in hiper.DECISIONS]

    return advantages


@pytest.mark.parametrize(
    "decision, where, learns",
    [
        ("subgoal", not_switched, False),  # q_t = 0: the words of a kept subgoal
        ("subgoal", switched, True),
        ("switch", first_turn, False),  # no switch is decided on at turn 0
        ("switch", later_turns, True),
        ("action", all_turns, True),
    ],
)
def test_what_a_decision_s_advantage_may_train(
    tiny_policy, tiny_tokenizer, accelerator, decision, where, learns
):
    after = learn(
        tiny_policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        decision_advantages=only(decision, where),
        kl_coef=0.0,
    ).weights
    before = weights(tiny_policy)
    actor = [name for name in after if name.startswith("actor.")]
    assert any(not torch.equal(after[name], before[name]) for name in actor) == learns


def test_tokens_that_decide_nothing_are_not_trained(tiny_policy, tiny_tokenizer, accelerator):
    """Neither kept subgoals nor turn 0's switch. At ratio 1 the policy loss is minus the sum of
    the trained tokens' advantages over the number of all response tokens."""
    learned = learn(
        tiny_policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer, switch=False),
        accelerator,
        decision_advantages=only("action", all_turns),
    )
    masks = learned.batch.samples.masks
    first = (learned.batch.turn_idx == 0)[:, None]
    trained = masks.action | (masks.subgoal & first) | (masks.switch & ~first)
    assert torch.equal(learned.token_mask, trained)
    wanted = -(masks.action.sum() / learned.batch.samples.lengths.sum()).item()
    assert learned.losses["policy_loss"] == pytest.approx(wanted, abs=1e-5)


def test_the_clip_of_the_gradient_is_the_whole_step_s(tiny_policy, tiny_tokenizer, accelerator):
    """Its norm over all micro-batches, for the actor and the critic each."""
    episodes = make_episodes(tiny_tokenizer)
    free = learn(tiny_policy, tiny_tokenizer, episodes, accelerator).weights
    held = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes,
        accelerator,
        max_grad_norm=0.01,
        micro_batch_tokens=100,
    ).weights
    before = weights(tiny_policy)
    for of_actor in (True, False):
        names = [name for name in before if name.startswith("actor.") == of_actor]
        moved, short = (
            torch.cat([(after[name] - before[name]).flatten() for name in names])
            for after in (free, held)
        )
        assert moved.norm() > 0.02
        assert short.norm().item() == pytest.approx(0.01, rel=1e-3)
        assert torch.allclose(short / short.norm(), moved / moved.norm(), atol=1e-4)


def test_gradients_are_clipped_at_norm_1():
    assert ppo.MAX_GRAD_NORM == 1.0


def test_value_clip_is_the_argument(tiny_policy, tiny_tokenizer, accelerator):
    """Old values far from the new: the loss is the worse of the free and the clipped value's."""
    config = plain_config(value_clip=0.5)
    batch = make_batch(make_episodes(tiny_tokenizer), tiny_tokenizer)
    old = score(tiny_policy, batch.samples)
    ends = score(tiny_policy, batch.final_states)
    far = old._replace(v_high=old.v_high + 9, v_low=old.v_low - 9, v_switch=old.v_switch + 9)
    raw, _, advantages = estimate(batch, old, ends, config)
    run = make_run(copy.deepcopy(tiny_policy), config, accelerator, plain_sgd(tiny_policy))
    minibatches = ppo.draw_minibatches(run, batch.samples)
    losses = ppo.update(run, batch.samples, minibatches, far, None, advantages, True)

    def worse(value, before, target):
        near = before + (value - before).clamp(-0.5, 0.5)
        return torch.maximum((value - target) ** 2, (near - target) ** 2) / 2

    high, low, switch = (
        worse(value, before, batch.to_turns(target))
        for value, before, target in zip(
            old[2:], far[2:], (raw.ret_high, raw.ret_low, raw.ret_switch), strict=True
        )
    )
    wanted = high[batch.to_turns(batch.switch)].mean() + low.mean() + switch.mean()
    assert losses["value_loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(
    tiny_policy, tiny_tokenizer, accelerator
):
    """In both backbones, in the update alone: generation and scoring are not in training mode."""
    runs = []
    episodes = make_episodes(tiny_tokenizer)
    for layer in (tiny_policy.actor.model.layers[0].mlp, tiny_policy.critic.layers[0].mlp):
        layer.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    plain = learn(tiny_policy, tiny_tokenizer, episodes, accelerator).weights
    once = sum(runs)
    runs.clear()
    for backbone in (tiny_policy.actor, tiny_policy.critic):
        backbone.activation_checkpointing_enable()
    after = learn(tiny_policy, tiny_tokenizer, episodes, accelerator).weights
    assert once == 2
    assert sum(runs) > once  # recomputed in the backward pass
    assert_close(after, plain, atol=1e-6)
    layer = tiny_policy.critic.layers[0]
    for on in (True, False):
        ppo.set_checkpointing(tiny_policy, on)
        assert layer.training == on
        assert not layer.mlp.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_first_step_has_ratio_1_and_a_fresh_reference_no_kl(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch, half, checkpointing
):
    """To the last bit, in many micro-batches: the old policy is scored in the update's own. The
    reference of a bfloat16 run is in bfloat16."""
    pairs = record_logprobs(monkeypatch)
    with torch.no_grad():
        for name, parameter in tiny_policy.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    reference = hiper.ActorCritic(copy.deepcopy(tiny_policy.actor), "none")
    if half:
        monkeypatch.setattr(accelerator, "native_amp", True)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "bf16")
        reference.bfloat16()
        tiny_policy.bfloat16().float()  # weights that bfloat16 can hold
    result = iterate(
        tiny_policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        reference=reference,
        micro_batch_tokens=120,
        gradient_checkpointing=checkpointing,
    )
    assert len(pairs) > 3
    assert all(torch.equal(new, old) for new, old in pairs)
    assert result.metrics["kl_to_reference"] == 0.0
    assert result.metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_the_optimizer_has_every_parameter_once(tiny_policy, critic):
    policy = hiper.ActorCritic(tiny_policy.actor, critic)
    config = plain_config(lr=0.5, critic_lr=0.25, adam_eps=1e-3)
    optimizer = make_optimizer(policy, config)
    actor, rest = (group["params"] for group in optimizer.param_groups)
    assert sorted(map(id, actor)) == sorted(map(id, policy.actor.parameters()))
    assert sorted(map(id, [*actor, *rest])) == sorted(map(id, policy.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_explained_variance_is_of_the_values_that_have_a_target():
    values, targets = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    where = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.5
    picked = values[where], targets[where]
    got = ppo.explained_variance(*picked)
    assert got == pytest.approx((1 - (picked[1] - picked[0]).var() / picked[1].var()).item())
    hidden = values.masked_fill(~where, 1e9)
    old = hiper.PolicyOutput(None, None, hidden, values, targets)
    unknown = targets.masked_fill(~where, math.nan)
    everywhere = torch.ones(24, dtype=torch.bool)
    fits = ppo.explained_variances(old, {"high": (unknown, where), "switch": (targets, everywhere)})
    assert fits == {"high": got, "switch": 1.0}
    assert ppo.explained_variance(targets, targets) == 1.0
    assert ppo.explained_variance(targets + 3, targets) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.zeros(24), targets) == pytest.approx(0.0)
    assert ppo.explained_variance(values[:0], targets[:0]) == 0.0
    # nothing to explain; not minus a million
    assert ppo.explained_variance(values, torch.full((24,), -1.7)) == 0.0


def test_the_clip_of_the_ratio_is_the_argument(tiny_policy, tiny_tokenizer, accelerator):
    """All ratios are e^0.3 = 1.35."""
    episodes = make_episodes(tiny_tokenizer)
    for clip_range, clips in ((0.3, True), (0.4, False)):
        changes = dict(shift=-0.3, clip_range=clip_range)
        losses = learn(tiny_policy, tiny_tokenizer, episodes, accelerator, **changes).losses
        assert (losses["clip_fraction"] > 0) == clips


# ---- an iteration ------------------------------------------------------------------------------


def test_explained_variance_is_given_the_turns_with_a_target(
    tiny_policy, tiny_tokenizer, accelerator
):
    """V_high has one at a segment's start alone."""
    episodes = make_episodes(tiny_tokenizer)
    result = iterate(tiny_policy, tiny_tokenizer, episodes, accelerator)
    turns = round(result.metrics["episode_length"] * 6)
    opened = round((result.metrics["switches_per_episode"] + 1) * 6)
    assert [len(targets) for _, targets in result.fits] == [opened, turns, turns]
    assert opened < turns
    assert set(result.metrics["explained_variance"]) == {"high", "low", "switch"}


@pytest.mark.parametrize(
    "iteration, warmup, learns", [(0, 1, False), (1, 1, True), (0, 0, True), (2, 3, False)]
)
def test_rates_fall_and_the_warm_up_ends(
    tiny_policy, tiny_tokenizer, accelerator, iteration, warmup, learns
):
    before = weights(tiny_policy)
    result = iterate(
        tiny_policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        iteration,
        critic_warmup=warmup,
        lr=0.5,
        critic_lr=0.2,
    )
    assert result.metrics["iteration"] == iteration
    fraction = 1 - 0.09 * iteration
    assert result.metrics["lr"] == pytest.approx(0.5 * fraction)
    rates = [group["lr"] for group in result.run.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * fraction, 0.2 * fraction])
    actor = [name for name in before if name.startswith("actor.")]
    assert any(not torch.equal(result.weights[n], before[n]) for n in actor) == learns


def test_iterations_depend_on_seed_and_number_alone(tiny_policy, tiny_tokenizer, accelerator):
    episodes = make_episodes(tiny_tokenizer)
    small = dict(minibatch_size=4, lr=0.01, critic_lr=0.01)  # or plain SGD diverges

    def play(iteration=0, **changes):
        return iterate(
            tiny_policy, tiny_tokenizer, episodes, accelerator, iteration, **small, **changes
        )

    first = play()
    assert all(value.isfinite().all() for value in first.weights.values())
    torch.manual_seed(77)
    random.seed(77)
    again = play()
    assert same(first.weights, again.weights)
    assert steady(first.metrics) == steady(again.metrics)
    assert not same(first.weights, play(seed=1).weights)
    assert not same(first.weights, play(1).weights)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("method", ["hiper", "ppo"])
def test_an_iteration_values_final_states_and_kept_subgoals(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch, method, bootstrap
):
    """The states after the last turns where they are asked for; V_low as if KEEP were written."""
    given = {}
    owner, name = {
        "hiper": (hiper, "hiper_advantages"),
        "ppo": (train, "baseline_advantages"),
    }[method]
    advantages = getattr(owner, name)

    def recorded(batch, *rest, **values):
        given.update(values, batch=batch)
        return advantages(batch, *rest, **values)

    monkeypatch.setattr(owner, name, recorded)
    changes = dict(method=method, bootstrap=bootstrap, switch_advantage="closed_form")
    iterate(tiny_policy, tiny_tokenizer, make_episodes(tiny_tokenizer), accelerator, **changes)
    batch = given["batch"]
    ends = score(tiny_policy, batch.final_states)
    if bootstrap:
        for head in ("high", "low"):
            assert torch.allclose(given["end_values"].value(head), ends.value(head), atol=1e-5)
    else:
        assert given["end_values"] is None
    if method == "hiper":
        kept = append_keep_block(batch.samples.prompts, batch.prev_subgoals, tiny_tokenizer)
        assert torch.allclose(given["v_keep"], score(tiny_policy, kept).v_low, atol=1e-5)


def test_the_warm_up_is_the_critic_s(tiny_policy, tiny_tokenizer, accelerator):
    """Without a critic there is none."""
    before = weights(tiny_policy.actor)
    policy = hiper.ActorCritic(tiny_policy.actor, "none")
    episodes = make_episodes(tiny_tokenizer)
    changes = dict(method="grpo", group_size=2, critic_warmup=1)
    after = iterate(policy, tiny_tokenizer, episodes, accelerator, **changes).weights
    assert any(not torch.equal(after[f"actor.{name}"], before[name]) for name in before)


def test_checkpointing_is_off_after_the_update(tiny_policy, tiny_tokenizer, accelerator):
    """A layer in training mode recomputes: it would generate without its cache."""
    episodes = make_episodes(tiny_tokenizer)
    result = iterate(
        tiny_policy, tiny_tokenizer, episodes, accelerator, gradient_checkpointing=True
    )
    assert not any(module.training for module in result.run.model.actor.modules())


# ---- gradients that are not finite -------------------------------------------------------------


def break_losses(monkeypatch, broken):
    """Make the policy loss NaN in the micro-batches whose number is in `broken`."""
    calls = []
    loss_terms = ppo.loss_terms

    def spoiled(*arguments):
        terms = loss_terms(*arguments)
        calls.append(1)
        if len(calls) - 1 in broken:
            terms["policy_loss"] = terms["policy_loss"] * torch.nan
        return terms

    monkeypatch.setattr(ppo, "loss_terms", spoiled)


def test_a_step_whose_gradient_is_not_finite_is_left_out(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch, capfd
):
    """It is counted, and said."""
    episodes = make_episodes(tiny_tokenizer)
    options = dict(optimizer=plain_sgd, minibatch_size=5)  # four steps of one micro-batch
    break_losses(monkeypatch, broken={1, 2})
    done = learn(tiny_policy, tiny_tokenizer, episodes, accelerator, **options)
    assert done.losses["skipped_steps"] == 2
    assert capfd.readouterr().out.count("a gradient is NaN or infinite") == 2
    assert done.losses["policy_loss"] is None  # and not NaN, which is no JSON
    assert math.isfinite(done.losses["entropy"])
    assert all(value.isfinite().all() for value in done.weights.values())


def test_three_such_steps_in_a_row_end_the_update_with_the_weights_before_them(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    runs = []
    optimizer_step = ppo.optimizer_step

    def spy_step(run, actor_learns):
        runs.append(run)
        return optimizer_step(run, actor_learns)

    monkeypatch.setattr(ppo, "optimizer_step", spy_step)
    break_losses(monkeypatch, broken={0, 1, 2})
    episodes = make_episodes(tiny_tokenizer)
    with pytest.raises(FloatingPointError, match="3 gradients in a row"):
        learn(tiny_policy, tiny_tokenizer, episodes, accelerator, minibatch_size=5)
    assert len(runs) == 3
    assert same(weights(runs[0].model), weights(tiny_policy))


def test_steps_left_out_end_the_update_only_in_a_row(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    break_losses(monkeypatch, broken={0, 1, 3})
    episodes = make_episodes(tiny_tokenizer)
    done = learn(tiny_policy, tiny_tokenizer, episodes, accelerator, minibatch_size=5)
    assert done.losses["skipped_steps"] == 3


def test_a_nan_of_the_critic_alone_leaves_the_step_out(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    value_loss = hiper.value_loss
    monkeypatch.setattr(hiper, "value_loss", lambda *rest: value_loss(*rest) * torch.nan)
    episodes = make_episodes(tiny_tokenizer)
    done = learn(tiny_policy, tiny_tokenizer, episodes, accelerator)
    assert done.losses["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in done.weights.values())


def test_a_step_on_turns_without_a_segment_s_start_is_made(
    tiny_policy, tiny_tokenizer, accelerator
):
    """Steps of one turn, where a mean may be over nothing."""
    episodes = make_episodes(tiny_tokenizer)
    losses = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes,
        accelerator,
        optimizer=lambda policy: plain_sgd(policy, lr=0.0),
        minibatch_size=1,
    ).losses
    assert losses["skipped_steps"] == 0 and math.isfinite(losses["value_loss"])


def test_adam_does_not_decay_weights_and_has_the_settings_eps(tiny_policy):
    optimizer = make_optimizer(tiny_policy, plain_config(adam_eps=1e-3))
    assert [(g["weight_decay"], g["eps"]) for g in optimizer.param_groups] == [(0.0, 1e-3)] * 2
