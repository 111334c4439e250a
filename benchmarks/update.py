"""How fast is one PPO update? `python benchmarks/update.py`, about two minutes on two CPU cores.

    --mixed          prompts of 100 to 700 tokens (real games) instead of 40 to 70 (the household); responses are 12 to 24 in both
    --model NAME     tiny (default), a name in plan.SHAPES, or a folder with a config.json; random weights; on a GPU, in bf16, where
                     there is one
    --turns N        turns of the update; --tokens T: of a micro-batch

Timed is `train.update`, AdamW steps included, on made-up turns: random ids, lengths uniform in the ranges above. The reference is the same
function with its economies taken away, some or all:
    everything       the last layer, the output projection, log-softmax and entropy of every position, [n, P + L, V] in float32; ours are
                     computed where the loss reads them
    longest          every row is right-padded to the longest turn, and micro-batches are equally many rows in no order, as many as
                     the same token limit allows; ours are sorted by length, and padded to their own longest
Loss and step are the same code in both; log-probs, values, padding and micro-batches are not. Both must give the same losses and
gradients, to 1e-4 of the largest, in float32. MFU: floating-point operations that the update cannot do without (`needed`) over what a
large matrix product reaches here in the same precision.
"""

import argparse
import copy
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # this folder's hae.py and rollout.py are not the library's

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import hiper
from support import plan
import rollout
import train
from config import Config
from credit import Credit

HEADS = "high", "low", "switch"


# ---- the reference ----


class Everything(hiper.ActorCritic):
    """The same scores, as they are commonly computed: everything of all positions, then the response's are picked."""

    def forward(self, ids, prompt_lengths, lengths, subgoal_end, parts):
        rows, offset = (
            torch.arange(len(ids), device=ids.device),
            torch.arange(int(lengths.max()), device=ids.device),
        )
        at = (prompt_lengths[:, None] - 1 + offset).clamp(max=ids.shape[1] - 2)  # [n, L]
        where = offset < lengths[:, None]
        logits = (
            self.actor(input_ids=ids, use_cache=False).logits.float() / self.temperature
        )  # [n, P + L, V]
        all_logp = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(all_logp.exp() * all_logp).sum(-1).gather(1, at) * where
        logp = all_logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).gather(1, at) * where
        values = [None] * 3
        if "values" in parts:
            hidden = self.critic(input_ids=ids, use_cache=False).last_hidden_state
            high, low, switch = self.heads(hidden).float().unbind(-1)  # [n, P + L] each
            values = (
                high[rows, prompt_lengths - 1],
                low[rows, prompt_lengths + subgoal_end],
                switch[rows, prompt_lengths - 1],
            )
        return hiper.Scores(logp, entropy, *values)


class Longest(rollout.Samples):
    """Every row as long as the longest of all."""

    def rows(self, index, device):
        ids, *rest = super().rows(index, device)
        return pad(ids, (0, longest(self) - ids.shape[1])), *rest


def longest(samples):
    return max(len(p) + len(r) for p, r in zip(samples.prompts, samples.responses))


def variant(policy, samples, full, unsorted):
    """-> (policy, samples, patch of train.micro_batches) of ours or of the reference."""
    if full:
        policy = copy.copy(policy)  # the same parameters
        policy.__class__ = Everything
    if not unsorted:
        return policy, samples, nullcontext()

    def equal(lengths, tokens):
        rows = max(1, tokens // longest(samples))
        return [list(range(n, min(n + rows, len(lengths)))) for n in range(0, len(lengths), rows)]

    samples = Longest(samples.prompts, samples.responses, samples.masks, samples.lengths)
    return policy, samples, mock.patch.object(train, "micro_batches", equal)


# ---- data and measuring ----


def turns(n, prompts, vocab, responses=(12, 24)):
    """n made-up turns, prompts and responses of so many tokens, each third of a response one decision's -> (Samples, Credit)."""
    g = torch.Generator().manual_seed(0)
    draw = lambda low, high: torch.randint(low, high + 1, (n,), generator=g)
    ids = lambda sizes: [torch.randint(vocab, (k,), generator=g).tolist() for k in sizes.tolist()]
    prompt_lengths, lengths = draw(*prompts), draw(*responses)
    offset = torch.arange(int(lengths.max()))
    spoken = offset < lengths[:, None]  # [N, L]
    kind = (3 * offset // lengths[:, None]).clamp(max=2)
    samples = rollout.Samples(
        ids(prompt_lengths),
        ids(lengths),
        hiper.Masks(*(spoken & (kind == k) for k in range(3))),
        lengths,
    )
    noise = lambda *shape: torch.randn(*shape, generator=g)
    credit = Credit(
        noise(n, 1) * spoken,
        spoken & (torch.rand(n, 1, generator=g) < 0.9),
        {head: (noise(n), torch.rand(n, generator=g) < 0.7) for head in HEADS},
        {},
    )
    return samples, credit


def alone(device, half):
    """One process's Accelerator, in bf16 or float32."""
    return SimpleNamespace(
        device=device,
        num_processes=1,
        reduce=lambda x, how: x,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16) if half else nullcontext(),
    )


class Recorder:
    """In an optimizer's place: keeps the gradients, moves nothing."""

    def __init__(self, policy):
        self.param_groups = [{"params": list(policy.parameters())}] * 2

    def step(self):
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


def check(policy, samples, credit, old, ref, config, device):
    """Losses and gradients of one step over all turns -> the largest difference to the reference's, as shares of the largest."""
    config = Config(**{**vars(config), "minibatch": 10**9, "max_grad_norm": 1e9})
    found = []
    for kind in ((False, False), (True, True)):
        recorder = Recorder(policy)
        some, mine, patch = variant(policy, samples, *kind)
        with patch:
            torch.manual_seed(0)
            losses = train.update(
                some, recorder, mine, old, ref, credit, config, alone(device, False), True
            )
        found.append((losses, recorder.grads))
    (ours, mine), (theirs, plain) = found
    off = max((a - b).abs().max() for a, b in zip(mine, plain)) / max(b.abs().max() for b in plain)
    apart = max(abs(ours[k] - theirs[k]) / max(1.0, abs(theirs[k])) for k in theirs)
    assert off < 1e-4 and apart < 1e-4, (
        f"the reference's gradients are {float(off):.1e} off, its losses {apart:.1e}"
    )
    return float(off), apart


def peak_flops(device, half):
    """Floating-point operations a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if half else torch.float32)
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(8))


def seconds(f, device):
    """Wall time of f(), the device waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def needed(s, samples, critic):
    """Floating-point operations of forward and backward without which there is no update: 6 a parameter and token, of which the last layer
    needs keys and values only but where it is read, and 6 Q l^2 a row of l tokens and layer for causal attention."""
    sizes = torch.tensor(
        [len(p) + len(r) for p, r in zip(samples.prompts, samples.responses)], dtype=torch.float64
    )
    spoken, seldom = (
        samples.lengths.sum(),
        s.critic_linear / s.layers - 2 * s.hidden * s.keys,
    )  # parameters of the last layer
    always = 6 * (
        (s.critic_linear - seldom) * sizes.sum() + s.layers * s.queries * sizes.square().sum()
    )
    return float(
        always
        + 6 * (seldom + s.actor_linear - s.critic_linear) * spoken
        + critic * (always + 6 * seldom * 2 * len(sizes))
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    shape = (
        plan.built_in(given.model)
        if given.model in plan.SHAPES
        else plan.configuration(given.model)[0]
    )
    s, prompts = plan.sizes(shape), (100, 700) if given.mixed else (40, 70)
    torch.manual_seed(0)
    with torch.device(device):  # eager where train.py has it
        attention = "eager" if given.model == "tiny" else "sdpa"
        actor = AutoModelForCausalLM.from_config(
            shape, dtype=torch.float32, attn_implementation=attention
        )
        policy = hiper.ActorCritic(actor.eval(), "separate")
        torch.nn.init.normal_(policy.heads.weight, std=0.1)
    samples, credit = turns(given.turns or (128 if given.mixed else 512), prompts, s.vocab)
    sizes = [len(p) + len(r) for p, r in zip(samples.prompts, samples.responses)]
    config = Config(lr=0.0, critic_lr=0.0, tokens_per_batch=given.tokens, minibatch=256)
    print(
        f"{given.model} ({s.actor / 1e6:.2f} M) with a critic of its own, {'bf16' if half else 'float32'} on {device.type}"
        f"{'' if half else f', {torch.get_num_threads()} threads'}: {len(sizes)} turns, prompts of {prompts[0]}-{prompts[1]} tokens, "
        f"{sum(sizes)} tokens in all, at most {given.tokens} a micro-batch"
    )
    old = rollout.score(policy, samples, tokens=given.tokens)
    ref = old._replace(
        logp=old.logp
        + 0.1
        * torch.randn(old.logp.shape, generator=torch.Generator().manual_seed(1))
        * (old.logp != 0)
    )
    off, apart = check(policy, samples, credit, old, ref, config, device)
    peak = peak_flops(device, half)
    print(
        f"same losses (to {apart:.0e}) and gradients (to {off:.0e} of the largest) as the reference; a matrix product reaches "
        f"{peak / 1e9:.0f} GFLOP/s"
    )

    optimizer, kinds = (
        train.optimizer_of(policy, config),
        {
            "ours": (False, False),
            "everything": (True, False),
            "longest": (False, True),
            "everything, longest": (True, True),
        },
    )
    best, padded, memory = {}, {}, {}
    for _ in range(3):  # in turns, so that a slow moment of the machine hits all
        for critic in (False, True):
            for name, kind in kinds.items():
                some, mine, patch = variant(policy, samples, *kind)
                what, count = credit if critic else credit._replace(targets={}), []
                hook = some.register_forward_pre_hook(
                    lambda module, args: count.append(args[0].numel())
                )
                if half:
                    torch.cuda.reset_peak_memory_stats()
                with patch:
                    took = seconds(
                        lambda: train.update(
                            some, optimizer, mine, old, ref, what, config, alone(device, half), True
                        ),
                        device,
                    )
                hook.remove()
                key = critic, name
                best[key], padded[key] = min(took, best.get(key, took)), 1 - sum(sizes) / sum(count)
                memory[key] = torch.cuda.max_memory_allocated() / 1e9 if half else 0.0
    print(
        "                                          seconds  tokens/s   MFU  padding  times ours"
        + "  peak GB" * half
    )
    for (critic, name), took in best.items():
        print(
            f"{'actor and critic' if critic else 'actor alone':16s}  {name:22s}{took:9.3f}{sum(sizes) / took:10.0f}"
            f"{needed(s, samples, critic) / took / peak:6.0%}{padded[critic, name]:9.1%}{took / best[critic, 'ours']:12.2f}"
            + f"{memory[critic, name]:9.1f}"
            * half
        )
    took = best[True, "ours"] - best[False, "ours"]
    print(
        f"critic, by difference                   {took:9.3f}{sum(sizes) / took:10.0f}"
        f"{(needed(s, samples, True) - needed(s, samples, False)) / took / peak:6.0%}"
    )
    print(f"update: {best[True, 'everything, longest'] / best[True, 'ours']:.1f}x")


if __name__ == "__main__":
    main()
