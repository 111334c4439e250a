"""Episodes without a world, and one update or iteration on them. For tests of the update."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import envs
import hae
import hiper
import train
from config import Config
from rollout import Episode, Turn, make_batch
from support import ppo
from support.distributed import normalize_global, prepare, prepare_reference
from support.loading import make_optimizer
from support.scoring import compute_logprobs_and_values

BIG = 10**6


def plain_config(**changes):
    """Settings under which one iteration is one optimizer step."""
    settings = dict(
        episodes=6,
        num_envs=4,
        iterations=10,
        gamma=0.9,
        lam_low=0.8,
        lam_high=0.7,
        bootstrap=False,
        normalize="per_decision",
        switch_advantage="value_head",
        value_target="lambda",
        lr=1.0,
        critic_lr=1.0,
        final_lr_fraction=0.1,
        minibatch_size=BIG,
        micro_batch_tokens=BIG,
        kl_coef=0.1,
        untrained_kl_coef=0.3,
        gradient_checkpointing=False,
    )
    return Config(**{**settings, **changes})


# ---- episodes ----------------------------------------------------------------------------------


def make_episode(rng, tokenizer, turns, truncated=False, switch=None):
    """Random ragged turns, some of them malformed; switch: what every later turn decides."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    made = []
    subgoal = ""
    for t in range(turns):
        switches = rng.random() < 0.4 if switch is None else switch
        aim = rng.choice(("find a mug", "open it", "x"))
        response = hiper.format_response(switches, aim, rng.choice(("go to desk 1", "look")))
        if switch is None and rng.random() < 0.15:
            response = rng.choice(("junk", "<switch>KEEP</switch>"))
        decision = hiper.parse(response)
        before = subgoal
        if (decision.switch or not t) and decision.subgoal:
            subgoal = decision.subgoal
        made.append(
            Turn(
                prompt=ids("Task: " + "a mug " * rng.randint(1, 9)),
                response=ids(response),
                decision=decision,
                is_segment_start=decision.switch or not t,
                prev_subgoal=before,
                subgoal=subgoal,
                observation="page",
                reward=rng.choice((0.0, -0.1, 1.0)),
            )
        )
    success = not truncated and rng.random() < 0.5
    return Episode(
        index=0,
        task="task",
        task_type=rng.choice("ab"),
        turns=made,
        success=success,
        task_score=float(success),
        truncated=truncated,
        final_prompt=ids("Task: the end " * rng.randint(1, 5)),
        restarts=0,
    )


def make_episodes(tokenizer, lengths=(3, 1, 5, 2, 4, 1), seed=0, **options):
    rng = random.Random(seed)
    return [
        make_episode(rng, tokenizer, length, truncated=n % 2 == 1, **options)
        for n, length in enumerate(lengths)
    ]


# ---- weights -----------------------------------------------------------------------------------


def plain_sgd(policy, lr=1.0):
    """The groups of `make_optimizer`, but a step is the gradient itself: -lr g."""
    groups = make_optimizer(policy, plain_config()).param_groups
    return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=lr)


def weights(module):
    """{name: copy of the whole parameter}, also where it is sharded (then on all processes)."""
    whole = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        whole[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return whole


def assert_close(ours, theirs, atol=1e-5):
    """Within atol, or within a few roundings of the tensor's largest entry: a sum of gradients of
    size 100 has no better float32."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max()
        bound = max(atol, 1e-6 * float(theirs[name].abs().max()))
        assert torch.allclose(ours[name], theirs[name], atol=bound), (name, difference)


def same(ours, theirs):
    """Equal to the last bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# ---- one update --------------------------------------------------------------------------------


def raw_hae(batch, old, end_values, config):
    """hae.HAE of a batch, called directly."""
    bootstraps = batch.truncated & config.bootstrap
    return hae.hae(
        rewards=batch.rewards,
        switch=batch.switch,
        mask=batch.mask,
        v_high=batch.to_grid(old.v_high),
        v_low=batch.to_grid(old.v_low),
        v_switch=batch.to_grid(old.v_switch),
        gamma=config.gamma,
        lam_low=config.lam_low,
        lam_high=config.lam_high,
        end_high=end_values.v_high * bootstraps,
        end_low=end_values.v_low * bootstraps,
    )


def estimate(batch, old, end_values, config, given=None):
    """-> (hae.HAE, [3] decisions' advantages [B, T] as tokens get them, TokenAdvantages).

    given: three [B, T] to take in place of the normalised ones.
    """
    used = []

    def normalize(adv, where, scale=True):
        used.append(given[len(used)] if given else normalize_global(adv, where, scale))
        return used[-1]

    advantages = hiper.hiper_advantages(
        batch, old, config, normalize, end_values=end_values if config.bootstrap else None
    )
    raw = raw_hae(batch, old, end_values, config)
    for kind in hiper.DECISIONS:
        assert torch.equal(advantages.raw[f"A_{kind}"], getattr(raw, f"adv_{kind}"))
    return raw, used, advantages


def make_run(policy, config, accelerator, optimizer, tokenizer=None, reference=None):
    """train.Run of a policy that is not prepared (one process)."""
    return train.Run(
        config=config,
        accelerator=accelerator,
        pool=SimpleNamespace(split="train"),
        tokenizer=tokenizer,
        policy=policy,
        model=accelerator.unwrap_model(policy),
        optimizer=optimizer,
        reference=reference,
    )


class Learned(NamedTuple):
    """What `learn` did."""

    losses: dict
    weights: dict  # after the update
    batch: object
    old: hiper.PolicyOutput
    ref_logprobs: torch.Tensor | None
    raw: hae.HAE
    decision_advantages: list  # three [B, T]
    token_mask: torch.Tensor  # bool [N, L], the tokens that are trained


def score(policy, samples, **options):
    everything = [list(range(len(samples.prompts)))]
    return compute_logprobs_and_values(policy, samples, everything, **options)


def learn(
    policy,
    tokenizer,
    episodes,
    accelerator,
    /,
    *,
    decision_advantages=None,
    actor_learns=True,
    optimizer=plain_sgd,
    shift=0.0,
    reference=None,
    max_grad_norm=1e9,
    **changes,
):
    """Score, estimate and update a copy of `policy` by HiPER -> Learned.

    decision_advantages: batch -> three [B, T]; shift: added to the old log-probabilities.
    """
    config = plain_config(**changes)
    policy = copy.deepcopy(policy)
    batch = make_batch(episodes, tokenizer, config.group_size)
    old = score(policy, batch.samples)
    end_values = score(policy, batch.final_states, logprobs=False)
    old = old._replace(logprobs=old.logprobs + shift)
    ref_logprobs = score(reference, batch.samples).logprobs if reference else None
    given = decision_advantages(batch) if decision_advantages else None
    raw, used, advantages = estimate(batch, old, end_values, config, given)
    run = make_run(policy, config, accelerator, optimizer(policy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "MAX_GRAD_NORM", max_grad_norm)
        minibatches = ppo.draw_minibatches(run, batch.samples)
        losses = ppo.update(
            run, batch.samples, minibatches, old, ref_logprobs, advantages, actor_learns
        )
    return Learned(
        losses, weights(policy), batch, old, ref_logprobs, raw, used, advantages.token_mask
    )


# ---- one iteration -----------------------------------------------------------------------------


class Iterated(NamedTuple):
    """What `iterate` did."""

    metrics: dict
    weights: dict  # after the update
    minibatches: list  # of this process
    fits: list  # arguments of explained_variance
    run: train.Run


def iterate(
    policy,
    tokenizer,
    episodes,
    accelerator,
    iteration=0,
    /,
    *,
    optimizer=plain_sgd,
    reference=None,
    max_grad_norm=1e9,
    minibatch_of=None,
    **changes,
):
    """train.train_iteration on a copy of `policy`, where task i plays episodes[i] -> Iterated.

    The k-th episode of a group plays episodes[i + k]. minibatch_of: response ids -> the number
    of their minibatch, 0 or 1, in place of random minibatches.
    """
    config = plain_config(**changes)
    policy = copy.deepcopy(policy)
    reference = copy.deepcopy(reference or policy)
    fits = []
    drawn = []
    explain = ppo.explained_variance
    draw = ppo.draw_minibatches

    def collect(actor, tokenizer, pool, tasks, config, progress=None):
        places = [task + n % config.group_size for n, task in enumerate(tasks)]
        return [replace(episodes[place % len(episodes)], index=place) for place in places]

    def draw_minibatches(run, samples):
        minibatches = draw(run, samples)
        if minibatch_of:
            rows = [row for minibatch in minibatches for micro in minibatch for row in micro]
            parts = [[n for n in rows if minibatch_of(samples.responses[n]) == k] for k in (0, 1)]
            minibatches = [[part] if part else [] for part in parts]
        drawn.extend(minibatches)
        return minibatches

    def explained_variance(values, targets):
        fits.append((values, targets))
        return explain(values, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "MAX_GRAD_NORM", max_grad_norm)
        patch.setattr(ppo, "explained_variance", explained_variance)
        patch.setattr(train, "draw_minibatches", draw_minibatches)
        patch.setattr(train, "collect", collect)
        patch.setattr(envs, "size", lambda *_: len(episodes))
        if config.gradient_checkpointing:
            for backbone in (policy.actor, policy.critic):
                if backbone is not None:
                    backbone.activation_checkpointing_enable()
        prepared, steps = prepare(policy, optimizer(policy), accelerator)
        reference = prepare_reference(hiper.ActorCritic(reference.actor, "none"), accelerator)
        run = make_run(prepared, config, accelerator, steps, tokenizer, reference)
        metrics, *_ = train.train_iteration(run, iteration)
    return Iterated(metrics, weights(run.model), drawn, fits, run)


def record_logprobs(monkeypatch):
    """-> the list to which each call of `hiper.policy_loss` adds its (new, old) log-probs."""
    pairs = []
    policy_loss = hiper.policy_loss

    def recorded(logprobs, old, *rest):
        pairs.append((logprobs.detach().clone(), old))
        return policy_loss(logprobs, old, *rest)

    monkeypatch.setattr(hiper, "policy_loss", recorded)
    return pairs


def steady(metrics):
    """The metrics that do not depend on the clock, flat."""
    flat = {}
    for name, value in metrics.items():
        if name in ("seconds", "turns_per_second"):
            continue
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": part for key, part in value.items()})
        else:
            flat[name] = value
    return flat


def sharded_accelerator(version=2, efficient=False):
    """What the checks of a run's processes ask of an Accelerator with FSDP."""
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    return SimpleNamespace(
        num_processes=1,
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
