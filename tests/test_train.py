"""train.py and eval.py: credit and update against slow oracles, N processes against one, and the scripts as a user runs them."""

import copy
import errno
import importlib.util
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import checkpoint
import envs
import eval as evaluation
import hae
import hiper
import rollout
from support import sharding as shard
import train
from config import Config, read_config
from credit import DECISIONS, assign
from rollout import Episode, Style, Turn, batch_of, score

ROOT = Path(__file__).parent.parent
BIG = 10**6


@pytest.fixture(scope="session")
def accelerator():
    return Accelerator(cpu=True)


def config_of(**changes):
    """Settings under which one iteration is one optimizer step; whatever a test is about is given by it."""
    plain = dict(
        episodes=6,
        slots=4,
        iterations=10,
        gamma=0.9,
        lam_low=0.8,
        lam_high=0.7,
        bootstrap=False,
        lr=1.0,
        critic_lr=1.0,
        lr_end=0.1,
        critic_warmup=0,
        epochs=1,
        minibatch=BIG,
        tokens_per_batch=BIG,
        clip=0.2,
        value_clip=0.0,
        kl=0.1,
        kl_rest=0.3,
        max_grad_norm=1e9,
        temperature=1.0,
        seed=0,
        cpu=True,
        whiten="each",
    )
    return Config(**{**plain, **changes})


# ---- episodes without a world -----------------------------------------------------------------------------------------


def episode_of(rng, tokenizer, turns, truncated=False, switch=None):
    """Ragged random turns, some of them nonsense; `switch`: every later turn KEEP (False) or SWITCH (True)."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    made, subgoal = [], ""
    for t in range(turns):
        q = rng.random() < 0.4 if switch is None else switch
        said = hiper.response(
            q, rng.choice(("find a mug", "open it", "x")), rng.choice(("go to desk 1", "look"))
        )
        said = (
            rng.choice(("junk", "<switch>KEEP</switch>"))
            if switch is None and rng.random() < 0.15
            else said
        )
        decision = hiper.parse(said)
        subgoal = decision.subgoal if (decision.switch or not t) and decision.subgoal else subgoal
        made.append(
            Turn(
                ids("Task: " + "a mug " * rng.randint(1, 9)),
                ids(said),
                decision,
                decision.switch or not t,
                subgoal,
                "page",
                rng.choice((0.0, -0.1, 1.0)),
            )
        )
    won = not truncated and rng.random() < 0.5
    return Episode(
        0,
        "task",
        rng.choice("ab"),
        made,
        won,
        float(won),
        truncated,
        ids("Task: the end " * rng.randint(1, 5)),
    )


def episodes_of(tokenizer, lengths=(3, 1, 5, 2, 4, 1), seed=0, **kwargs):
    rng = random.Random(seed)
    return [
        episode_of(rng, tokenizer, n, truncated=i % 2 == 1, **kwargs) for i, n in enumerate(lengths)
    ]


def sgd_of(policy):
    """Groups as optimizer_of makes them, but the step is the gradient itself: -lr g."""
    groups = train.optimizer_of(policy, config_of()).param_groups
    return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=1.0)


def weights(module):
    return {
        name: x.clone()
        for name, x in shard.whole(
            {name: x.detach() for name, x in module.named_parameters()}, True
        ).items()
    }


def close(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=atol), (
            name,
            (ours[name] - theirs[name]).abs().max(),
        )


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def credit_of(batch, old, ends, config, accelerator, advantages=None):
    """-> (hae.HAE, the three advantages [B, T] as tokens get them, Credit). advantages: given ones instead of normalised ones."""
    truncated = batch.truncated & config.bootstrap
    raw = hae.hae(
        batch.rewards,
        batch.switch,
        batch.mask,
        *(batch.grid(v) for v in old[2:]),
        gamma=config.gamma,
        lam_low=config.lam_low,
        lam_high=config.lam_high,
        end_high=ends.v_high * truncated,
        end_low=ends.v_low * truncated,
    )
    normal, given, used = train.whitener(accelerator), iter(advantages or ()), []
    credit = assign(
        batch,
        old,
        config,
        lambda *x: used.append(next(given) if advantages else normal(*x)) or used[-1],
        ends,
    )
    assert all(
        torch.equal(credit.shown[f"A_{name}"], getattr(raw, f"adv_{name}")) for name in DECISIONS
    )
    return raw, tuple(used), credit


def learn(
    policy,
    tokenizer,
    episodes,
    accelerator,
    *,
    advantages=None,
    actor_learns=True,
    optimizer=None,
    shift=0.0,
    reference=None,
    **changes,
):
    """Score, credit, update a copy -> (metrics, its weights, (batch, old, ref, raw, advantages)). shift: added to the old log-probs."""
    config, policy = config_of(**changes), copy.deepcopy(policy)
    batch = batch_of(episodes, tokenizer)
    old, ends = score(policy, batch.samples), score(policy, batch.ends, parts=("values",))
    old = old._replace(logp=old.logp + shift)
    ref = score(reference, batch.samples, parts=("logp",)) if reference else None
    raw, advantages, credit = credit_of(
        batch, old, ends, config, accelerator, advantages and advantages(batch)
    )
    losses = train.update(
        policy,
        optimizer(policy) if optimizer else sgd_of(policy),
        batch.samples,
        old,
        ref,
        credit,
        config,
        accelerator,
        actor_learns,
    )
    return losses, weights(policy), (batch, old, ref, raw, advantages)


@pytest.fixture
def reference(tiny_actor):
    """Another policy than the tiny one, near it."""
    other = hiper.ActorCritic(copy.deepcopy(tiny_actor))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return other


# ---- credit -----------------------------------------------------------------------------------------------------------


def values_of(batch, seed=0):
    make = torch.Generator().manual_seed(seed)
    values = lambda n: hiper.Scores(None, None, *torch.randn(3, n, generator=make))
    return values(len(batch.row)), values(len(batch.mask))


def test_credit_is_hae_normalised_over_the_turns_that_decide(tiny_tokenizer, accelerator):
    batch = batch_of(episodes_of(tiny_tokenizer), tiny_tokenizer)
    old, ends = values_of(batch)
    raw, advantages, _ = credit_of(batch, old, ends, config_of(), accelerator)
    want = hae.hae(
        batch.rewards,
        batch.switch,
        batch.mask,
        *(batch.grid(v) for v in old[2:]),
        gamma=0.9,
        lam_low=0.8,
        lam_high=0.7,
    )
    assert all(torch.equal(a, b) for a, b in zip(raw, want))
    decides = [(b, t) for b, t in batch.mask.nonzero().tolist() if t > 0]
    opens = [(b, t) for b, t in batch.mask.nonzero().tolist() if batch.switch[b, t]]
    for got, raws, where in zip(
        advantages,
        (raw.adv_switch, raw.adv_subgoal, raw.adv_action),
        (decides, opens, batch.mask.nonzero().tolist()),
    ):
        picked = [raws[b, t].item() for b, t in where]
        mean = sum(picked) / len(picked)
        std = math.sqrt(sum((x - mean) ** 2 for x in picked) / len(picked))
        for (b, t), x in zip(where, picked):
            assert got[b, t].item() == pytest.approx((x - mean) / std, abs=1e-4)
        assert got.count_nonzero() == len(where)
    assert not advantages[0][:, 0].any()  # at turn 0 there is no switch to decide on


@pytest.mark.parametrize("bootstrap", [False, True])
def test_truncation_bootstraps_where_it_is_asked_to(tiny_tokenizer, accelerator, bootstrap):
    """A terminated episode never sees `ends`; a truncated one does, or not, as --bootstrap says."""
    rng = random.Random(0)
    batch = batch_of(
        [episode_of(rng, tiny_tokenizer, 2, truncated) for truncated in (False, True)],
        tiny_tokenizer,
    )
    old, ends = values_of(batch)
    *_, credit = credit_of(batch, old, ends, config_of(bootstrap=bootstrap), accelerator)
    shown, (ret_switch, _) = credit.shown, credit.targets["switch"]
    for b in range(2):
        low, high = (batch.grid(v)[b, 1] for v in (old.v_low, old.v_high))
        end_low, end_high = (v[b] if bootstrap and b else 0.0 for v in (ends.v_low, ends.v_high))
        assert shown["A_action"][b, 1].item() == pytest.approx(
            (batch.rewards[b, 1] + 0.9 * end_low - low).item(), abs=1e-5
        )
        if batch.switch[b, 1]:
            assert shown["A_subgoal"][b, 1].item() == pytest.approx(
                (batch.rewards[b, 1] + 0.9 * end_high - high).item(), abs=1e-5
            )
        assert batch.grid(ret_switch)[b, 1].item() == pytest.approx(
            (batch.rewards[b, 1] + 0.9 * end_high).item(), abs=1e-5
        )


def test_a_turn_counts_once(tiny_tokenizer, accelerator):
    """Episodes of other tasks in the batch do not change this one's raw credit, whatever their number and length."""
    episodes = episodes_of(tiny_tokenizer)
    alone, together = batch_of(episodes[:1], tiny_tokenizer), batch_of(episodes, tiny_tokenizer)
    old, ends = values_of(together)
    first = (
        hiper.Scores(None, None, *(v[:3] for v in old[2:])),
        hiper.Scores(None, None, *(v[:1] for v in ends[2:])),
    )
    a = credit_of(alone, *first, config_of(), accelerator)[0]
    b = credit_of(together, old, ends, config_of(), accelerator)[0]
    assert all(torch.allclose(x[0], y[0, :3]) for x, y in zip(a, b))


# ---- update -----------------------------------------------------------------------------------------------------------


def oracle_loss(policy, batch, old, ref, raw, advantages, config):
    """The whole loss, turn by turn and token by token, from the full logits. -> dict of losses, as tensors."""
    policy_sum, clipped_sum, entropy_sum, kl_sum, held_sum, high_sum, rest_sum = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    for n, (prompt, answer) in enumerate(zip(batch.samples.prompts, batch.samples.responses)):
        b, t = batch.row[n], batch.col[n]
        ids = torch.tensor([prompt + answer])
        logp = (policy.actor(input_ids=ids).logits[0] / policy.temperature).log_softmax(-1)
        hidden = policy.critic(input_ids=ids).last_hidden_state[0]
        for j, token in enumerate(answer):
            new = logp[len(prompt) + j - 1]
            adv = None
            for mask, own, decides in zip(
                batch.samples.masks, advantages, (t > 0, batch.switch[b, t], True)
            ):
                if mask[n, j] and decides:
                    adv = own[b, t]
            if adv is not None:
                ratio = (new[token] - old.logp[n, j]).exp()
                policy_sum.append(
                    -torch.minimum(ratio * adv, ratio.clamp(1 - config.clip, 1 + config.clip) * adv)
                )
                clipped_sum.append(
                    (
                        (ratio > 1 + config.clip) & (adv > 0)
                        | (ratio < 1 - config.clip) & (adv < 0)
                    ).float()
                )
                entropy_sum.append(-(new.exp() * new).sum())
            if ref:
                d = ref.logp[n, j] - new[token]
                kl_sum.append(d.exp() - d - 1)
                held_sum.append((config.kl if adv is not None else config.kl_rest) * kl_sum[-1])
        ends = [j for j in range(len(answer)) if batch.samples.masks.subgoal[n, j]]
        at = len(prompt) + ends[-1] if ends else len(prompt) - 1
        v_high, v_low, v_switch = (
            policy.heads(hidden[i])[k]
            for i, k in ((len(prompt) - 1, 0), (at, 1), (len(prompt) - 1, 2))
        )
        if batch.switch[b, t]:
            high_sum.append((v_high - raw.ret_high[b, t]) ** 2 / 2)
        rest_sum.append(
            ((v_low - raw.ret_low[b, t]) ** 2 + (v_switch - raw.ret_switch[b, t]) ** 2) / 2
        )
    mean = lambda terms: sum(terms) / len(terms) if terms else torch.tensor(0.0)
    return {
        "policy_loss": mean(policy_sum),
        "clip_fraction": mean(clipped_sum),
        "entropy": mean(entropy_sum),
        "kl": mean(kl_sum),
        "held": mean(held_sum),
        "value_loss": mean(high_sum) + mean(rest_sum),
    }


@pytest.mark.parametrize("shift", [0.0, -0.3])
@pytest.mark.parametrize("tokens", [BIG, 120, 1])
def test_update_is_one_step_on_the_oracle_s_loss(
    tiny_policy, tiny_tokenizer, accelerator, reference, shift, tokens
):
    """Every token has the same weight, however the turns fall into micro-batches."""
    losses, after, (*data, advantages) = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes_of(tiny_tokenizer),
        accelerator,
        shift=shift,
        reference=reference,
        tokens_per_batch=tokens,
    )
    want = oracle_loss(tiny_policy, *data, advantages, config_of())
    (want["policy_loss"] + want.pop("held") + want["value_loss"]).backward()
    close(after, {name: p.detach() - p.grad for name, p in tiny_policy.named_parameters()})
    assert losses == pytest.approx({name: x.item() for name, x in want.items()}, rel=1e-5, abs=1e-5)
    assert losses["kl"] > 0 and (losses["clip_fraction"] > 0) == bool(shift)


def test_the_order_of_turns_does_not_matter(tiny_policy, tiny_tokenizer, accelerator):
    episodes = episodes_of(tiny_tokenizer)
    losses, after, _ = learn(tiny_policy, tiny_tokenizer, episodes, accelerator)
    torch.manual_seed(99)
    for tokens in (BIG, 200):
        again, other, _ = learn(
            tiny_policy, tiny_tokenizer, episodes[::-1], accelerator, tokens_per_batch=tokens
        )
        close(after, other)
        assert again == pytest.approx(losses, abs=1e-5)


def test_minibatches_are_optimizer_steps_over_all_turns(
    tiny_policy, tiny_tokenizer, accelerator, monkeypatch
):
    """Each epoch every turn once, in ceil(turns / minibatch) steps; the metrics are means over them."""
    seen, steps = [], []
    rows, step = rollout.Samples.rows, train.step
    monkeypatch.setattr(
        rollout.Samples,
        "rows",
        lambda self, index, device: seen.append(list(index)) or rows(self, index, device),
    )
    monkeypatch.setattr(train, "step", lambda *args: steps.append(len(seen)) or step(*args))
    frozen = lambda policy: torch.optim.SGD(
        [{"params": g["params"]} for g in sgd_of(policy).param_groups], lr=0.0
    )
    whole, *_ = learn(
        tiny_policy, tiny_tokenizer, episodes_of(tiny_tokenizer), accelerator, optimizer=frozen
    )
    seen.clear(), steps.clear()
    parts, *_ = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes_of(tiny_tokenizer),
        accelerator,
        optimizer=frozen,
        minibatch=5,
        epochs=2,
        tokens_per_batch=100,
    )
    assert len(steps) == 2 * math.ceil(16 / 5)
    taken = [
        [i for part in seen[a:b] for i in part] for a, b in zip(steps, steps[1:])
    ]  # by all steps but the first
    assert all(len(turns) == 4 for turns in taken) and sorted(sum(taken[3:], [])) == list(range(16))
    assert len({*sum(taken[:3], [])}) == 12 and {*map(frozenset, taken[:3])} - {
        *map(frozenset, taken[3:])
    }
    assert parts["entropy"] == pytest.approx(whole["entropy"], rel=0.1)


def test_critic_warm_up_leaves_the_actor_alone(tiny_policy, tiny_tokenizer, accelerator, reference):
    """Bit for bit, even where Adam has momentum; and where the backbone is shared only the heads learn."""
    for policy in (tiny_policy, hiper.ActorCritic(copy.deepcopy(tiny_policy.actor), "shared")):
        optimizers = []

        def warm(policy):
            optimizers.append(train.optimizer_of(policy, config_of(lr=1e-2, critic_lr=1e-2)))
            for p in policy.parameters():
                p.grad = torch.ones_like(p)
            optimizers[-1].step()
            optimizers[-1].zero_grad()
            moved.update(weights(policy))
            return optimizers[-1]

        for actor_learns in (False, True):
            moved = {}
            _, after, _ = learn(
                policy,
                tiny_tokenizer,
                episodes_of(tiny_tokenizer),
                accelerator,
                optimizer=warm,
                reference=reference,
                actor_learns=actor_learns,
            )
            changed = {
                name.split(".")[0] for name in after if not torch.equal(after[name], moved[name])
            }
            assert changed == {
                "heads",
                *["actor"] * actor_learns,
                *["critic"] * (policy.critic is not None),
            }


def only(k, where):
    """Advantages of 1 for decision k (switch, subgoal, action) at the turns `where(batch)`, else 0."""
    return lambda batch: tuple(
        (where(batch) & batch.mask).float() if i == k else torch.zeros(batch.mask.shape)
        for i in range(3)
    )


@pytest.mark.parametrize(
    "k, where, learns",
    [
        (1, lambda b: ~b.switch, False),  # q_t = 0: the words of a kept subgoal
        (1, lambda b: b.switch, True),
        (
            0,
            lambda b: torch.arange(b.mask.shape[1]) == 0,
            False,
        ),  # no switch is decided on at turn 0
        (0, lambda b: torch.arange(b.mask.shape[1]) > 0, True),
        (2, lambda b: b.mask, True),
    ],
)
def test_what_a_decision_s_advantage_may_train(
    tiny_policy, tiny_tokenizer, accelerator, k, where, learns
):
    _, after, _ = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes_of(tiny_tokenizer),
        accelerator,
        advantages=only(k, where),
        kl=0.0,
    )
    actor = {
        name
        for name in after
        if name.startswith("actor.") and not torch.equal(after[name], weights(tiny_policy)[name])
    }
    assert bool(actor) == learns


def test_tokens_that_decide_nothing_are_not_in_the_mean(tiny_policy, tiny_tokenizer, accelerator):
    """At ratio 1 the policy loss is minus the mean advantage; its denominator leaves out kept subgoals and turn 0's switch."""
    episodes = episodes_of(tiny_tokenizer, switch=False)
    losses, _, (batch, *_) = learn(
        tiny_policy, tiny_tokenizer, episodes, accelerator, advantages=only(2, lambda b: b.mask)
    )
    masks, first = batch.samples.masks, (batch.col == 0)[:, None]
    count = masks.action.sum() + (masks.subgoal & first).sum() + (masks.switch & ~first).sum()
    assert losses["policy_loss"] == pytest.approx(-(masks.action.sum() / count).item(), abs=1e-5)


def test_the_clip_of_the_gradient_is_the_whole_step_s(tiny_policy, tiny_tokenizer, accelerator):
    """Its norm over all micro-batches, for the actor and the critic each."""
    _, free, _ = learn(tiny_policy, tiny_tokenizer, episodes_of(tiny_tokenizer), accelerator)
    _, held, _ = learn(
        tiny_policy,
        tiny_tokenizer,
        episodes_of(tiny_tokenizer),
        accelerator,
        max_grad_norm=0.01,
        tokens_per_batch=100,
    )
    before = weights(tiny_policy)
    for own in (True, False):
        moved = [
            torch.cat(
                [(after[n] - before[n]).flatten() for n in before if n.startswith("actor.") == own]
            )
            for after in (free, held)
        ]
        assert moved[0].norm() > 0.02 and moved[1].norm().item() == pytest.approx(0.01, rel=1e-3)
        assert torch.allclose(moved[1] / moved[1].norm(), moved[0] / moved[0].norm(), atol=1e-4)


def test_value_clip_is_the_argument(tiny_policy, tiny_tokenizer, accelerator):
    """Old values far from the new ones: the loss is the worse of the free and the clipped value."""
    config, batch = config_of(value_clip=0.5), batch_of(episodes_of(tiny_tokenizer), tiny_tokenizer)
    old, ends = score(tiny_policy, batch.samples), score(tiny_policy, batch.ends)
    far = old._replace(v_high=old.v_high + 9, v_low=old.v_low - 9, v_switch=old.v_switch + 9)
    raw, _, credit = credit_of(batch, old, ends, config, accelerator)
    losses = train.update(
        copy.deepcopy(tiny_policy),
        sgd_of(tiny_policy),
        batch.samples,
        far,
        None,
        credit,
        config,
        accelerator,
        True,
    )
    worse = lambda v, o, y: torch.maximum((v - y) ** 2, (o + (v - o).clamp(-0.5, 0.5) - y) ** 2) / 2
    high, low, switch = (
        worse(v, o, batch.flat(y))
        for v, o, y in zip(old[2:], far[2:], (raw.ret_high, raw.ret_low, raw.ret_switch))
    )
    want = high[batch.flat(batch.switch)].mean() + low.mean() + switch.mean()
    assert losses["value_loss"] == pytest.approx(want.item(), rel=1e-4)


def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(
    tiny_policy, tiny_tokenizer, accelerator
):
    """In both backbones, in the update alone: Hugging Face recomputes in training mode only, and generation is not."""
    runs, episodes = [], episodes_of(tiny_tokenizer)
    for layer in (tiny_policy.actor.model.layers[0].mlp, tiny_policy.critic.layers[0].mlp):
        layer.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    _, plain, _ = learn(tiny_policy, tiny_tokenizer, episodes, accelerator)
    once = sum(runs)
    runs.clear()
    for backbone in (tiny_policy.actor, tiny_policy.critic):
        backbone.gradient_checkpointing_enable()
    _, after, _ = learn(tiny_policy, tiny_tokenizer, episodes, accelerator)
    assert once == 2 and len(runs) - runs.count(False) > once  # recomputed in the backward pass
    close(after, plain, atol=1e-6)
    layer = tiny_policy.critic.layers[0]
    for on in (True, False):
        train.checkpointing(tiny_policy, on)
        assert layer.training == on and not layer.mlp.training


def test_optimizer_of_has_every_parameter_once(tiny_policy):
    for policy in (tiny_policy, hiper.ActorCritic(tiny_policy.actor, "shared")):
        actor, critic = (
            group["params"]
            for group in train.optimizer_of(policy, config_of(lr=1.0, critic_lr=2.0)).param_groups
        )
        assert sorted(map(id, actor)) == sorted(map(id, policy.actor.parameters()))
        assert sorted(map(id, [*actor, *critic])) == sorted(map(id, policy.parameters()))


def test_moments_in_8_bits_learn_and_go_on(trained, tmp_path):
    """bitsandbytes' AdamW in PyTorch's place: the whole script, and a run that is taken up again ends with the same bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole, again, words = (
        tmp_path / "whole",
        tmp_path / "again",
        dict(optimizer="adamw8bit", start=trained.out / "start"),
    )
    train.main(flags(whole, **words))
    assert any(
        x.dtype == torch.uint8
        for state in torch.load(whole / "checkpoint.pt", weights_only=True)["optimizer"][
            "state"
        ].values()
        for part in state.values()
        if isinstance(part, dict)
        for x in part.values()
        if torch.is_tensor(x)
    )
    shutil.copytree(whole, again)
    (again / "checkpoint.old.pt").replace(again / "checkpoint.pt")
    train.main(flags(again, **words))
    ours, theirs = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (again, whole))
    begun = torch.load(whole / "checkpoint.old.pt", weights_only=True)
    assert ours["iteration"] == theirs["iteration"] == 3 and same(ours["policy"], theirs["policy"])
    assert not same(begun["policy"], theirs["policy"])


def test_an_optimizer_that_cannot_be_had_is_refused(monkeypatch, tmp_path, capsys):
    for there, sharded, word in ((None, False, "pip install bitsandbytes"), ("spec", True, "FSDP")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
        monkeypatch.setattr(train.shard, "wanted", lambda accelerator: sharded)
        with pytest.raises(SystemExit) as exit:
            train.main(flags(tmp_path / "run", optimizer="adamw8bit"))
        assert (
            exit.value.code == 2
            and word in capsys.readouterr().err
            and not (tmp_path / "run").exists()
        )


def test_explained_variance_is_over_the_turns_with_a_target():
    values, targets = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    where = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    got = train.explained_variance(values, targets, where)
    assert got == pytest.approx((1 - (targets - values)[where].var() / targets[where].var()).item())
    assert (
        train.explained_variance(
            values.masked_fill(~where, 1e9), targets.masked_fill(~where, math.nan), where
        )
        == got
    )
    assert train.explained_variance(targets, targets, where) == 1.0
    assert train.explained_variance(targets + 3, targets, where) == pytest.approx(1.0)
    assert train.explained_variance(torch.zeros(4, 6), targets, where) == pytest.approx(0.0)
    assert train.explained_variance(values, targets, torch.zeros(4, 6).bool()) == 0.0
    assert (
        train.explained_variance(values, torch.full((4, 6), -1.7), where) == 0.0
    )  # nothing to explain; not minus a million


# ---- an iteration, with one process and with two ----------------------------------------------------------------------


def iterated(policy, tokenizer, episodes, accelerator, iteration=0, **changes):
    """train.iterate where playing task i gives episodes[i] -> (metrics, weights, arguments of explained_variance)."""
    fits = []
    with pytest.MonkeyPatch.context() as patch:
        spy = train.explained_variance
        patch.setattr(train, "explained_variance", lambda *args: fits.append(args) or spy(*args))
        patch.setattr(
            train,
            "collect",
            lambda actor, tokenizer, runner, tasks, **_: [
                replace(episodes[i], index=i) for i in tasks
            ],
        )
        patch.setattr(envs, "size", lambda *_: len(episodes))
        policy, reference = (shard.place(copy.deepcopy(policy), accelerator) for _ in range(2))
        if changes.get("gradient_checkpointing"):
            for backbone in (policy.actor, policy.critic):
                backbone.gradient_checkpointing_enable()
        metrics, *_ = train.iterate(
            policy,
            tokenizer,
            reference,
            sgd_of(policy),
            SimpleNamespace(split="train"),
            config_of(**changes),
            accelerator,
            iteration,
        )
    return metrics, weights(policy), fits


def steady(metrics):
    """The metrics that do not depend on the clock, flat."""
    flat = {}
    for name, x in metrics.items():
        if name not in ("seconds", "turns_per_second"):
            flat.update(
                {f"{name}.{k}": v for k, v in x.items()} if isinstance(x, dict) else {name: x}
            )
    return flat


WORKER = """
import copy, pickle, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from support import sharding as shard
from accelerate import Accelerator
from test_train import iterated
policy, tokenizer, episodes, ways = pickle.load(open({given!r}, "rb"))
accelerator = Accelerator(cpu=True)
mine = sum(p.to_local().numel() if {sharded} else p.numel() for p in shard.place(copy.deepcopy(policy), accelerator).parameters())
assert {sharded} == (mine < 0.6 * sum(p.numel() for p in policy.parameters()))
answers = [iterated(policy, tokenizer, episodes, accelerator, **changes)[:2] for changes in ways]
pickle.dump(answers, open(f"{{sys.argv[1]}}.{{accelerator.process_index}}", "wb"))
shard.leave(accelerator)
"""


def two_processes(*words, **more):
    """Run a script in two processes on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(port),
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", **more),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
def test_two_processes_make_the_step_of_one(
    tiny_policy, tiny_tokenizer, accelerator, tmp_path, sharded
):
    """Unequal numbers of turns and so of micro-batches, the same gradient, the same clip, the same metrics."""
    given, episodes = (
        tmp_path / "given.pkl",
        episodes_of(tiny_tokenizer, lengths=(9, 1, 4, 2, 6, 3, 1, 2)),
    )
    ways = (
        {},
        dict(max_grad_norm=0.01, tokens_per_batch=100, gradient_checkpointing=True),
        dict(critic_warmup=1, tokens_per_batch=1),
        dict(method="ppo", prompt="flat", kl=0.0),
    )
    given.write_bytes(pickle.dumps((tiny_policy, tiny_tokenizer, episodes, ways)))
    (tmp_path / "worker.py").write_text(
        WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), given=str(given), sharded=sharded)
    )
    two_processes(tmp_path / "worker.py", tmp_path / "out", ACCELERATE_USE_FSDP=str(sharded))
    ranks = [pickle.loads((tmp_path / f"out.{rank}").read_bytes()) for rank in range(2)]
    for k, changes in enumerate(ways):
        metrics, after, _ = iterated(tiny_policy, tiny_tokenizer, episodes, accelerator, **changes)
        assert not same(after, weights(tiny_policy))
        for theirs, weight in (rank[k] for rank in ranks):
            close(after, weight)
            assert steady(theirs) == pytest.approx(steady(metrics), abs=1e-4)
        assert same(ranks[0][k][1], ranks[1][k][1])


def test_explained_variance_is_given_the_turns_with_a_target(
    tiny_policy, tiny_tokenizer, accelerator
):
    """V_high has one at a segment's start alone; off the mask nobody has."""
    episodes = episodes_of(tiny_tokenizer)
    metrics, _, fits = iterated(tiny_policy, tiny_tokenizer, episodes, accelerator)
    turns, opened = int(metrics["turns"] * 6 + 0.5), round((metrics["switches"] + 1) * 6)
    assert [int(where.sum()) for *_, where in fits] == [opened, turns, turns] and opened < turns
    assert set(metrics["explained_variance"]) == {"high", "low", "switch"}


def test_rates_fall_and_the_warm_up_ends(tiny_policy, tiny_tokenizer, accelerator):
    episodes, before = episodes_of(tiny_tokenizer), weights(tiny_policy)
    for iteration, warmup, learns in ((0, 1, False), (1, 1, True), (0, 0, True), (2, 3, False)):
        metrics, after, _ = iterated(
            tiny_policy,
            tiny_tokenizer,
            episodes,
            accelerator,
            iteration,
            critic_warmup=warmup,
            lr=0.5,
        )
        assert metrics["iteration"] == iteration and metrics["lr"] == pytest.approx(
            0.5 * (1 - 0.09 * iteration)
        )
        assert (
            any(not torch.equal(after[n], before[n]) for n in after if n.startswith("actor."))
            == learns
        )


def test_iterations_depend_on_seed_and_number_alone(tiny_policy, tiny_tokenizer, accelerator):
    episodes, small = (
        episodes_of(tiny_tokenizer),
        dict(minibatch=4, lr=0.01, critic_lr=0.01),
    )  # or plain SGD diverges
    first = iterated(tiny_policy, tiny_tokenizer, episodes, accelerator, **small)[1]
    assert all(x.isfinite().all() for x in first.values())
    torch.manual_seed(77), random.seed(77)
    assert same(first, iterated(tiny_policy, tiny_tokenizer, episodes, accelerator, **small)[1])
    assert not same(
        first, iterated(tiny_policy, tiny_tokenizer, episodes, accelerator, **small, seed=1)[1]
    )
    assert not same(
        first, iterated(tiny_policy, tiny_tokenizer, episodes, accelerator, 1, **small)[1]
    )


# ---- evaluation -------------------------------------------------------------------------------------------------------


def test_summary_and_table():
    turn = lambda opened, valid: Turn(
        [], [], hiper.Decision(opened, "", "", valid, ""), opened, "", "", 0.0
    )
    made = [
        Episode(
            0,
            "",
            "b",
            [turn(True, True), turn(False, True), turn(True, False)],
            True,
            1.0,
            False,
            [],
        ),
        Episode(1, "", "a", [turn(True, True)], False, 0.5, True, []),
        Episode(2, "", "b", [turn(True, False)] * 2, False, 0.0, False, []),
    ]
    got = evaluation.summary(made)
    assert got == {
        "episodes": 3,
        "success": 1 / 3,
        "score": 0.5,
        "success_by_type": {"a": 0.0, "b": 0.5},
        "episodes_by_type": {"a": 1, "b": 2},
        "turns": 2.0,
        "switches": 2 / 3,
        "segment_length": 6 / 5,
        "switch_rate": 2 / 3,
        "valid_format": 0.5,
        "truncated": 1 / 3,
        "lost": 0,
    }
    lines = evaluation.table(got).splitlines()
    assert (
        [line.split()[0] for line in lines] == ["a", "b", "all"]
        and "33.3 %" in lines[-1]
        and "3 episodes" in lines[-1]
    )
    low, high = evaluation.wilson(5, 10)
    assert (low, high) == (
        pytest.approx(0.2366, abs=1e-4),
        pytest.approx(0.7634, abs=1e-4),
    )  # Wilson's own, tables agree
    assert evaluation.wilson(0, 8)[0] == 0.0 and evaluation.wilson(8, 8)[1] == 1.0


def test_evaluating_leaves_the_training_s_randomness_alone(tiny_actor, tiny_tokenizer):
    with envs.Runner("household", "unseen", 1, max_steps=2) as runner:
        play = lambda seed: evaluation.evaluate(
            tiny_actor,
            tiny_tokenizer,
            runner,
            range(3),
            temperature=1.0,
            slots=3,
            style=Style(history=0, brief=True, max_response=4),
            seed=seed,
        )
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert play(0) == play(0) and torch.equal(torch.get_rng_state(), state)


# ---- the configuration ------------------------------------------------------------------------------------------------


def test_every_field_is_read_and_explained():
    """A knob that turns nothing is worse than none."""
    code = "\n".join(
        path.read_text() for path in ROOT.glob("*.py") if path.name != "config.py"
    )  # its own checks do not count
    for field in fields(Config):
        assert field.metadata["help"], field.name
        style = field.name in Style.__dataclass_fields__
        assert (
            re.search(
                r"\b(style|config)\.%s\b" % field.name if style else r"\bconfig\.%s\b" % field.name,
                code,
            )
            or f"self.{field.name} " in (ROOT / "config.py").read_text()
        ), field.name  # read by a property that others read
    assert Style.__dataclass_fields__.keys() <= {field.name for field in fields(Config)}


def test_a_config_file_and_flags_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-4\nbrief: false\nmodel: some/name\nepisodes: 7\nbootstrap: yes\neval_split: seen\n"
    )
    got = read_config([str(file), "--episodes", "9", "--seed", "3"])
    assert (got.lr, got.brief, got.model, got.episodes, got.bootstrap, got.eval_split) == (
        1e-4,
        False,
        "some/name",
        9,
        True,
        "seen",
    )
    assert got.out == "runs/household-3" and read_config([str(file), "--out", "x"]).out == "x"
    assert replace(read_config([]), out="") == Config()
    (tmp_path / "run.json").write_text(json.dumps({"lr": 0.5}))
    assert read_config([str(tmp_path / "run.json")]).lr == 0.5
    file.write_text("")
    assert replace(read_config([str(file)]), out="") == Config()
    file.write_text("out:\n")  # YAML's null is not a folder called None
    assert read_config([str(file)]).out == "runs/household-0"


# ---- the scripts, as a user runs them ---------------------------------------------------------------------------------

FLAGS = {
    "iterations": 3,
    "episodes": 4,
    "slots": 4,
    "demos": 6,
    "eval_episodes": 6,
    "clone_epochs": 1,
    "max_response": 8,
    "critic_warmup": 1,
    "save_every": 1,
    "show_every": 2,
    "env_workers": 1,
    "cpu": True,
}


def flags(out, **changes):
    return [
        word
        for name, x in {"out": out, **FLAGS, **changes}.items()
        for word in (f"--{name}", str(x))
    ]


def environment(**more):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def script(name, *words, cwd, timeout=120):
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def tree(folder):
    """Everything below a folder, with contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def actor_of(out, name="actor"):
    return AutoModelForCausalLM.from_pretrained(out / name).state_dict()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A whole run of the script -> its folder; .said is what it printed. Not to be changed: copy it."""
    home = tmp_path_factory.mktemp("trained")
    done = script("train.py", *flags("run"), cwd=home)
    assert done.code == 0, done.err
    return SimpleNamespace(home=home, out=home / "run", said=done.out + done.err)


@pytest.fixture
def stopped(trained, tmp_path):
    """A run of the same flags that was stopped after the cloning -> its folder."""
    out = tmp_path / "run"
    shutil.copytree(trained.out / "start", out / "start")
    shutil.copy(trained.out / "config.json", out)
    return out


def assert_same_run(out, trained):
    assert [steady(line) for line in lines_of(out)] == [
        steady(line) for line in lines_of(trained.out)
    ]
    assert same(actor_of(out), actor_of(trained.out)) and same(
        actor_of(out, "best"), actor_of(trained.out, "best")
    )
    ours, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, trained.out)
    )
    assert same(ours["policy"], theirs["policy"]) and ours["iteration"] == theirs["iteration"]
    assert ours["log"]["evals"] == theirs["log"]["evals"]
    assert {path.name for path in out.iterdir()} == {path.name for path in trained.out.iterdir()}


def test_training_writes_what_it_promises(trained):
    assert {path.name for path in trained.out.iterdir()} - {"curve.png"} == {
        "config.json",
        "metrics.jsonl",
        "evals.jsonl",
        "checkpoint.pt",
        "checkpoint.old.pt",
        "actor",
        "best",
        "start",
    }
    assert json.loads((trained.out / "config.json").read_text()) == {
        **vars(Config()),
        **FLAGS,
        "out": "run",
    }
    if "curve.png" in os.listdir(trained.out):
        assert (trained.out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        "task " in trained.said and "A_subgoal" in trained.said and "A_action" in trained.said
    )  # one episode in full
    assert (
        "unseen, 6 tasks, temperature 0.4, iteration 3" in trained.said
        and "Traceback" not in trained.said
    )


def test_metrics_have_every_key(trained):
    lines = lines_of(trained.out)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert set(line) >= {
            "success",
            "success_by_type",
            "turns",
            "switches",
            "segment_length",
            "valid_format",
            "policy_loss",
            "value_loss",
            "kl",
            "clip_fraction",
            "entropy",
            "explained_variance",
            "seconds",
            "turns_per_second",
        }
        assert set(line["explained_variance"]) == {"high", "low", "switch"} and set(
            line["seconds"]
        ) >= {"rollout", "score", "update"}
        assert (
            line["episodes"] == 4
            and 1 <= line["turns"] <= 18
            and all(math.isfinite(x) for x in steady(line).values())
        )
        assert all(x > 0 for x in line["seconds"].values()) and all(
            x <= 1 for x in line["explained_variance"].values()
        )
    assert (
        abs(lines[0]["kl"]) < 1e-6 and abs(lines[1]["kl"]) < 1e-6 < lines[2]["kl"]
    )  # the first step is the critic's


def test_the_actor_is_a_hugging_face_model_with_the_training_s_tokenizer(trained):
    tokenizer, start = (
        AutoTokenizer.from_pretrained(trained.out / name) for name in ("actor", "start")
    )
    texts = [
        "Task: put a hot mug in desk.\nDawn. At drawer 1 closed: nothing. Hold mug 2 hot. Unseen box 1.",
        "é 苹果  two  spaces\n",
        hiper.response(True, "find mug", "go to desk 1"),
    ]
    assert tokenizer(texts)["input_ids"] == start(texts)["input_ids"] and len(tokenizer) == len(
        start
    )
    assert [tokenizer.decode(ids) for ids in tokenizer(texts)["input_ids"]] == texts
    assert len(tokenizer("<subgoal>")["input_ids"]) == 1
    assert (
        tokenizer.eos_token_id == start.eos_token_id
        and tokenizer.pad_token_id == start.pad_token_id is not None
    )
    saved = torch.load(trained.out / "checkpoint.pt", weights_only=True)
    actor = actor_of(trained.out)
    assert all(torch.equal(x, saved["policy"][f"actor.{name}"]) for name, x in actor.items())
    begun = AutoModelForCausalLM.from_pretrained(trained.out / "start").state_dict()
    assert not same(actor, begun)


def test_eval_says_what_training_said(trained, tmp_path):
    """The same tasks, seed and temperature: the same result to the last digit; protocol and table are printed."""
    before = tree(trained.out)
    done = script(
        "eval.py", trained.out, "--episodes", 6, "--slots", 4, "--json", "result.json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    for word in (
        "protocol:",
        "split unseen",
        "first 6 of 300",
        "temperature 0.4",
        "seed 0",
        "checkpoint last",
    ):
        assert word in done.out
    got = json.loads((tmp_path / "result.json").read_text())
    last = torch.load(trained.out / "checkpoint.pt", weights_only=True)["log"]["evals"][-1]
    assert last["iteration"] == 3 and last["split"] == "unseen"
    assert {k: v for k, v in last.items() if k in got} == {
        k: v for k, v in got.items() if k in last
    } and got["episodes"] == 6
    assert got["protocol"]["split"] == "unseen" and len(got["interval"]) == 2
    assert evaluation.table(got) in done.out and tree(trained.out) == before


def test_eval_flags(trained, capsys, tmp_path):
    evaluation.main([str(trained.out), "--split", "seen", "--episodes", "2", "--greedy"])
    assert (
        "split seen" in (said := capsys.readouterr().out)
        and "temperature 0.0" in said
        and "2 episodes" in said
    )


def test_the_same_command_again_does_no_harm(trained):
    before = tree(trained.out)
    done = script("train.py", *flags("run"), cwd=trained.home)
    assert done.code == 0, done.err
    after = tree(trained.out)
    assert after.keys() == before.keys()
    for name in ("metrics.jsonl", "config.json", "actor/model.safetensors", "actor/tokenizer.json"):
        assert after[name] == before[name], name
    assert "nothing" in done.out + done.err and "Traceback" not in done.err


class Stop(Exception):
    pass


def test_a_run_stopped_between_iterations_goes_on_as_if_it_had_not(trained, stopped, monkeypatch):
    """Twice: before the first checkpoint, and after one."""
    iterate, left = train.iterate, [0, 2]
    with pytest.MonkeyPatch.context() as patch:

        def fragile(*args):
            if args[-1] >= left[0]:
                raise Stop
            return iterate(*args)

        patch.setattr(train, "iterate", fragile)
        while left:
            with pytest.raises(Stop):
                train.main(flags(stopped))
            left.pop(0)
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["iteration"] == 2
    torch.manual_seed(5), random.seed(5)
    train.main(flags(stopped))
    assert_same_run(stopped, trained)


def test_a_run_goes_on_in_shards_as_it_would_have_whole(trained, tmp_path, capfd):
    """From two processes' checkpoint, through rollout, update and evaluation, to the same one, which any number of processes can load."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    (tmp_path / "run.yaml").write_text(
        f"start: {trained.out / 'start'}\n"
    )  # torchrun takes --start for its own
    train_in_two = lambda out, shards: two_processes(
        ROOT / "train.py",
        tmp_path / "run.yaml",
        *flags(out),
        ACCELERATE_USE_FSDP=shards,
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
    )  # accelerate's default
    train_in_two(whole, "false")
    shutil.copytree(whole, sharded)
    (sharded / "checkpoint.old.pt").replace(
        sharded / "checkpoint.pt"
    )  # the one after two iterations
    assert "67%" in train_in_two(sharded, "true")
    ours, theirs = (
        torch.load(out / "checkpoint.pt", weights_only=True) for out in (sharded, whole)
    )
    assert ours["iteration"] == 3 and not same(
        theirs["policy"], torch.load(sharded / "checkpoint.old.pt", weights_only=True)["policy"]
    )
    close(ours["policy"], theirs["policy"])
    close(
        {
            (i, name): x
            for i, state in ours["optimizer"]["state"].items()
            for name, x in state.items()
        },
        {
            (i, name): x
            for i, state in theirs["optimizer"]["state"].items()
            for name, x in state.items()
        },
    )
    for a, b in zip(lines_of(sharded), lines_of(whole), strict=True):
        assert steady(a) == pytest.approx(steady(b), abs=1e-4)
    assert (sharded / "actor" / "model.safetensors").stat().st_size == (
        whole / "actor" / "model.safetensors"
    ).stat().st_size
    train.main([str(tmp_path / "run.yaml"), *flags(sharded)])
    assert "nothing is left to do" in capfd.readouterr().out
    assert (sharded / "best" / "model.safetensors").exists()
    evaluation.main([str(sharded), "--episodes", "2"])


def test_many_processes_leave_without_taking_python_apart(monkeypatch):
    """Once all are done and what they said is out; a single one returns."""
    for processes, wanted in ((1, ["wait", "end"]), (2, ["wait", "end", 0])):
        did = []
        monkeypatch.setattr(os, "_exit", did.append)
        shard.leave(
            SimpleNamespace(
                num_processes=processes,
                wait_for_everyone=lambda: did.append("wait"),
                end_training=lambda: did.append("end"),
            )
        )
        assert did == wanted


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained, stopped):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(stopped)],
        env=environment(),
        cwd=stopped.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.time() + 60
        while (
            process.poll() is None
            and not (stopped / "metrics.jsonl").exists()
            and time.time() < limit
        ):
            time.sleep(0.02)
        time.sleep(random.random())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    train.main(flags(stopped))
    assert_same_run(stopped, trained)


# what really comes up when the disk is full: Python's open, torch's zip writer, safetensors
FULL = {
    "open": OSError(errno.ENOSPC, "No space left on device"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
}


def test_no_space_left(trained, stopped, monkeypatch, capfd):
    """Exit code 2 and one sentence; the checkpoint of before still loads, and with room again the run goes on from it."""
    save = torch.save
    for error in FULL.values():

        def full(things, file):
            if things["iteration"] == 2:
                Path(file).write_bytes(b"half")
                raise error
            save(things, file)

        monkeypatch.setattr(torch, "save", full)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.main(flags(stopped))
        said = [
            line
            for line in capfd.readouterr().err.splitlines()
            if line.startswith(("error:", "Traceback"))
        ]
        assert (
            exit.value.code == 2
            and len(said) == 1
            and "room" in said[0]
            and "same command" in said[0]
        )
        assert torch.load(stopped / "checkpoint.pt", weights_only=True)["iteration"] == 1
        assert actor_of(stopped)
    monkeypatch.setattr(torch, "save", save)
    train.main(flags(stopped))
    assert_same_run(stopped, trained)


def test_the_best_actor_is_that_of_the_save_before_which_most_was_won(
    trained, stopped, monkeypatch, capsys, tmp_path
):
    """On average, in training, at saves after 2, 4 and 5 iterations; stopped wherever, it is the same, and eval.py plays it."""
    iterate, left, won = train.iterate, [3, 4], (0.1, 0.3, 0.5, 0.0, 0.2)  # 0.2, 0.25, 0.2

    def given(*args):
        if left and args[-1] == left[0]:
            left.pop(0)
            raise Stop
        metrics, *rest = iterate(*args)
        return {**metrics, "success": won[args[-1]]}, *rest

    monkeypatch.setattr(train, "iterate", given)
    start = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps({**start, "iterations": 5, "save_every": 2}))
    for step in (2, 4, 5):
        with pytest.raises(Stop) if left else nullcontext():
            train.main(flags(stopped, iterations=5, save_every=2))
        saved = {
            torch.load(stopped / name, weights_only=True)["iteration"]: torch.load(
                stopped / name, weights_only=True
            )["policy"]
            for name in ("checkpoint.pt", "checkpoint.old.pt")
            if (stopped / name).exists()
        }
        assert max(saved) == step
        assert all(
            torch.equal(x, saved[min(step, 4)][f"actor.{name}"])
            for name, x in actor_of(stopped, "best").items()
        )
    assert not same(actor_of(stopped, "best"), actor_of(stopped))
    capsys.readouterr()
    evaluation.main([str(stopped / "best"), "--episodes", "2", "--swap", "executor=frozen"])
    assert "checkpoint best" in capsys.readouterr().out
    assert [checkpoint.best_yet([{"success": x} for x in won[:n]], 2) for n in (2, 4, 5)] == [
        True,
        True,
        False,
    ]
    shutil.copytree(stopped, tmp_path / "best")
    evaluation.main([str(tmp_path / "best"), "--episodes", "2"])  # a run of that name is a run
    assert "checkpoint last" in capsys.readouterr().out


def test_save_is_whole_at_any_moment(tiny_policy, tiny_tokenizer, tmp_path, monkeypatch):
    """Stop at each step of the disk: a checkpoint of before or after loads, and a second save puts everything right."""
    log, optimizer = (
        {"lines": [{"iteration": 0}], "evals": []},
        train.optimizer_of(tiny_policy, config_of()),
    )
    monkeypatch.setattr(checkpoint, "picture", lambda *_: None)
    checkpoint.save(tmp_path, tiny_policy, tiny_tokenizer, optimizer, 1, log, best=True)
    for owner, name in (
        (torch, "save"),
        (type(tiny_policy.actor), "save_pretrained"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_text"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(Stop))
            with pytest.raises(Stop):
                checkpoint.save(tmp_path, tiny_policy, tiny_tokenizer, optimizer, 2, log, best=True)
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] in (1, 2)
        checkpoint.save(tmp_path, tiny_policy, tiny_tokenizer, optimizer, 1, log, best=True)
        assert same(actor_of(tmp_path), tiny_policy.actor.state_dict()) and same(
            actor_of(tmp_path, "best"), actor_of(tmp_path)
        )
        assert {path.name for path in tmp_path.iterdir()} == {
            "actor",
            "best",
            "checkpoint.pt",
            "checkpoint.old.pt",
            "metrics.jsonl",
            "evals.jsonl",
        }


@pytest.mark.parametrize(
    "harm",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw[:3000] + bytes(3000) + raw[6000:],
    ],
    ids=["cut", "empty", "altered"],
)
def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path, capfd, harm):
    """The one before is taken, and the run ends as it would have; with none left it says so and touches nothing."""
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    (out / "checkpoint.pt").write_bytes(harm((out / "checkpoint.pt").read_bytes()))
    train.main(flags(out))
    assert "checkpoint.pt is damaged" in capfd.readouterr().out
    assert_same_run(out, trained)
    for name in ("checkpoint.pt", "checkpoint.old.pt"):
        (out / name).write_bytes(b"junk")
    before = tree(out)
    with pytest.raises(SystemExit) as exit:
        train.main(flags(out))
    assert (
        exit.value.code == 2
        and tree(out) == before
        and "error: no checkpoint of" in capfd.readouterr().err.splitlines()[-1]
    )


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working directory with a run, a folder that is none, and two configurations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(trained.out / "config.json", tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years of work")
    (tmp_path / "typo.yaml").write_text("learning_rate: 1e-4\n")
    (tmp_path / "broken.yaml").write_text("lr: [1\n")
    (tmp_path / "number.yaml").write_text("5\n")
    return tmp_path


def assert_user_error(main, words, place, capfd):
    before = tree(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == "" and tree(place) == before
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "words, said",
    [
        ("--env moon", "moon"),
        ("--model no/such/model", "no/such/model"),
        ("--model ./nothing", "./nothing"),
        ("--model mine", "mine"),
        ("--learning_rate 1", "--learning_rate"),
        ("--lr much", "much"),
        ("--iteration 4", "'iterations'"),
        ("typo.yaml", "learning_rate"),
        ("missing.yaml", "missing.yaml"),
        ("broken.yaml", "broken.yaml"),
        ("number.yaml", "number.yaml"),
        ("--iterations 0", "--iterations"),
        ("--episodes 0", "--episodes"),
        ("--slots 0", "--slots"),
        ("--gamma 1.5", "--gamma"),
        ("--method magic", "magic"),
        ("--critic none", "none"),
        ("--demos 0", "--demos"),
        ("--eval_split test", "unseen"),
        ("--temperature 0", "--temperature"),
        ("--eval_episodes -1", "--eval_episodes"),
        ("--lr -1", "--lr"),
        ("--history -1", "--history"),
        ("--out run --lr 0.123", "0.123"),
        ("--out mine", "mine"),
        ("--out typo.yaml", "typo.yaml"),
        ("--method grpo --group 1", "at least 2"),
        ("--method grpo --group 3", "multiple"),
        ("--prompt flat", "no switches"),
        ("--method ppo --segments single", "--method hiper"),
        ("--segments fixed:0", "fixed:K"),
        ("--decisions plan", "--decisions"),
        ("--start mine", "--start mine"),
        ("--heads 4", "2 or 3"),
        ("--checklist 2", "--checklist"),
        ("--page true", "--page"),
        ("--disguises 1", "--disguises"),
        ("--blunders 2", "--blunders"),
        ("--method grpo --group 4 --episodes 0", "--episodes"),
    ],
)
def test_training_refuses_in_one_sentence(place, capfd, words, said):
    small = [
        word
        for name, x in {**FLAGS, "iterations": 1}.items()
        if f"--{name}" not in words
        for word in (f"--{name}", x)
    ]
    assert said in assert_user_error(train.main, [*words.split(), *small], place, capfd)


@pytest.mark.parametrize(
    "words, said",
    [
        ("nowhere", "nowhere"),
        ("mine", "mine"),
        ("run", "run holds no finished"),
        ("typo.yaml", "typo.yaml"),
        ("TRAINED/actor", "actor"),
        ("run/best", "run/best"),
        ("TRAINED --split test", "unseen"),
        ("TRAINED --episodes 0", "--episodes"),
        ("TRAINED --episodes -3", "--episodes"),
        ("TRAINED --slots 0", "--slots"),
        ("TRAINED --json no/folder/x.json", "no/folder"),
    ],
)
def test_evaluation_refuses_in_one_sentence(trained, place, capfd, words, said):
    assert said in assert_user_error(
        evaluation.main, words.replace("TRAINED", str(trained.out)).split(), place, capfd
    )


def test_the_scripts_themselves_refuse_with_exit_code_2(place):
    before = tree(place)
    for done in (
        script("train.py", "--env", "moon", cwd=place),
        script("eval.py", "mine", cwd=place),
    ):
        assert (
            done.code == 2
            and done.err.startswith("error: ")
            and len(done.err.splitlines()) == 1
            and done.out == ""
        )
    assert tree(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "--method ppo",
        "--method grpo --group 2",
        "--method rloo --group 4",
        "--method gigpo --group 2 --prompt flat",
        "--method ppo --prompt flat",
        "--switch_advantage gain --heads 2 --targets td0",
        "--segments fixed:2 --keep_penalty 0.1 --drift_penalty 0.1 --checklist 0.5",
        "--decisions switch,subgoal --segments every-turn",
    ],
)
def test_every_method_and_switch_trains(trained, tmp_path, words):
    """One iteration from another run's clone ends well, and eval.py reads it. (What it learns is tested where credit is.)"""
    more = {"iterations": 1, "critic_warmup": 0, "start": trained.out / "start", "eval_episodes": 2}
    train.main(flags(tmp_path / "run", **more) + words.split())
    assert not (tmp_path / "run" / "start").exists() and actor_of(tmp_path / "run")
    (line,) = lines_of(tmp_path / "run")
    heads = {
        "ppo": {"high"},
        "hiper": {"high", "low"} if "heads" in words else {"high", "low", "switch"},
    }
    method = words.split()[1] if "--method" in words else "hiper"
    assert set(line["explained_variance"]) == heads.get(method, set()) and line["episodes"] == 4
    assert (line["value_loss"] > 0) == (method in heads)
    evaluation.main([str(tmp_path / "run"), "--episodes", "2"])


def test_swaps_from_the_command_line(trained, capsys):
    """The expert in both parts wins every task."""
    evaluation.main(
        [
            str(trained.out),
            "--episodes",
            "6",
            "--swap",
            "planner=expert",
            "--swap",
            "executor=expert",
        ]
    )
    said = capsys.readouterr().out
    assert "planner expert, executor expert" in said and re.search(r"all +100.0 %", said)
    evaluation.main(
        [
            str(trained.out),
            "--episodes",
            "2",
            "--swap",
            "planner=frozen",
            "--swap",
            "executor=random",
        ]
    )


def test_very_few_demonstrations(tmp_path):
    """Fewer turns than a batch of cloning: they are cloned all the same."""
    with envs.Runner("household", "train", 1) as runner:
        train.clone(Config(**{**FLAGS, "demos": 1}), tmp_path, runner, Accelerator(cpu=True))
    assert (tmp_path / "start" / "config.json").exists()
