"""How fast is one PPO update? `python benchmarks/update.py`, about two minutes on two CPU cores.

`support.ppo.update`, AdamW steps included, on made-up turns: random ids, lengths uniform in a
range. The reference is the same update without its two economies, which are also shown one by one:

    all positions    logits, log-softmax and entropy of every position, [n, P + L, V] in float32;
                     ours are computed at the response tokens only
    unsorted         rows in random order, each padded to the longest of all, as many as the same
                     token limit allows; ours are sorted by length and padded to their own longest

All must give the same losses and gradients, to 1e-4 of the largest, which is checked first. They
take turns, round after round, so that a slow moment of the machine meets all of them.
`--mixed`: prompts of 100 to 700 tokens (real games) instead of 40 to 70 (the household).
"""

import argparse
import copy
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from accelerate import Accelerator
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import hiper
from config import Config
from support import ppo
from support.batch import Samples
from support.loading import make_optimizer
from support.memory_plan import SHAPES, built_in
from support.scoring import compute_logprobs_and_values
from train import Run

VARIANTS = {  # name -> (all positions, unsorted)
    "ours": (False, False),
    "all positions": (True, False),
    "unsorted": (False, True),
    "both": (True, True),
}


# ---- the reference -----------------------------------------------------------------------------


class AllPositions(hiper.ActorCritic):
    """The same output, as it is commonly computed: of all positions, then the response's."""

    def forward(
        self, ids, prompt_lengths, response_lengths, subgoal_pos, *, logprobs=True, values=True
    ):
        rows = torch.arange(len(ids), device=ids.device)
        column = torch.arange(int(response_lengths.max()), device=ids.device)
        in_response = column < response_lengths[:, None]  # [n, L]
        pos = (prompt_lengths[:, None] - 1 + column).clamp(max=ids.shape[1] - 2)  # [n, L]
        logits = self.actor(input_ids=ids, use_cache=False).logits.float()  # [n, P + L, V]
        everything = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(everything.exp() * everything).sum(-1).gather(1, pos) * in_response
        chosen = everything[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        token_logprobs = chosen.gather(1, pos) * in_response
        hidden = self.critic(input_ids=ids, use_cache=False).last_hidden_state
        v_high, v_low, v_switch = self._values(hidden.flatten(0, 1))
        last_prompt = rows * ids.shape[1] + prompt_lengths - 1
        return hiper.PolicyOutput(
            token_logprobs,
            entropy,
            v_high[last_prompt],
            v_low[last_prompt + 1 + subgoal_pos],
            v_switch[last_prompt],
        )


class PaddedSamples(Samples):
    """Every row is as long as the longest of all."""

    def model_inputs(self, rows, device):
        ids, *rest = super().model_inputs(rows, device)
        return pad(ids, (0, max(self.total_lengths()) - ids.shape[1])), *rest


def unsorted_minibatches(run, samples):
    """As `ppo.draw_minibatches`, with equally many rows in each micro-batch, in no order."""
    lengths = samples.total_lengths()
    rows = max(1, run.config.micro_batch_tokens // max(lengths))
    count = math.ceil(len(lengths) / run.config.minibatch_size)
    parts = torch.randperm(len(lengths)).tensor_split(count)
    return [[micro.tolist() for micro in part.split(rows)] for part in parts]


def make_variant(run, samples, all_positions, unsorted):
    """-> (run, samples, function that draws minibatches); the parameters are the same."""
    draw = ppo.draw_minibatches
    if all_positions:
        policy = copy.copy(run.policy)
        policy.__class__ = AllPositions
        run = replace(run, policy=policy, model=policy)
    if unsorted:
        samples = PaddedSamples(**vars(samples))
        draw = unsorted_minibatches
    return run, samples, draw


# ---- data and measuring ------------------------------------------------------------------------


def made_up_turns(count, prompt_range, response_range, vocab):
    """-> (Samples, TokenAdvantages) of turns whose responses are a third each decision's."""
    g = torch.Generator().manual_seed(0)

    def lengths_in(low, high):
        return torch.randint(low, high + 1, (count,), generator=g)

    def random_ids(lengths):
        return [torch.randint(vocab, (n,), generator=g).tolist() for n in lengths.tolist()]

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    prompts = random_ids(lengths_in(*prompt_range))
    lengths = lengths_in(*response_range)
    column = torch.arange(int(lengths.max()))
    in_response = column < lengths[:, None]  # [N, L]
    decision = (3 * column // lengths[:, None]).clamp(max=2)
    samples = Samples(
        prompts=prompts,
        responses=random_ids(lengths),
        lengths=lengths,
        masks=hiper.Masks(*(in_response & (decision == k) for k in range(3))),
        switch_word=in_response & (decision == 0),
        subgoal_pos=2 * lengths // 3 - 1,
    )
    advantages = hiper.TokenAdvantages(
        advantages=noise(count, 1) * in_response,
        token_mask=in_response & (torch.rand(count, 1, generator=g) < 0.9),
        targets={
            head: (noise(count), torch.rand(count, generator=g) < 0.7)
            for head in ("high", "low", "switch")
        },
        raw={},
    )
    return samples, advantages


def make_run(policy, config, accelerator, optimizer=None):
    """A train.Run that can update, and nothing else."""
    return Run(
        config=config,
        accelerator=accelerator,
        pool=None,
        tokenizer=None,
        policy=policy,
        model=policy,
        optimizer=optimizer or make_optimizer(policy, config),
        reference=None,
    )


def score(run, samples):
    """-> (old PolicyOutput, reference log-probs that differ a little)."""
    batches = [rows for micro in ppo.draw_minibatches(run, samples) for rows in micro]
    old = compute_logprobs_and_values(run.model, samples, batches)
    g = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(old.logprobs.shape, generator=g)
    return old, old.logprobs + noise * samples.response_mask()


class GradientRecorder:
    """In an optimizer's place: keeps the gradients, changes nothing."""

    def __init__(self, policy):
        self.parameters = list(policy.parameters())
        self.param_groups = [{"params": []}, {"params": []}]  # nothing is clipped

    def step(self):
        self.gradients = [p.grad.clone() for p in self.parameters]

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def check(run, samples, advantages, old, ref_logprobs):
    """One step over all turns -> the largest difference between the variants, as a share."""
    config = replace(run.config, minibatch_size=len(samples.lengths))
    results = []
    for kind in VARIANTS.values():
        recorder = GradientRecorder(run.policy)
        some = make_run(run.policy, config, run.accelerator, recorder)
        some, mine, draw = make_variant(some, samples, *kind)
        losses = ppo.update(some, mine, draw(some, mine), old, ref_logprobs, advantages, True)
        results.append((torch.tensor(list(losses.values())), *recorder.gradients))
    worst = 0.0
    largest = max(float(gradient.abs().max()) for gradient in results[0][1:])
    for losses, *gradients in results[1:]:
        worst = max(worst, float((losses - results[0][0]).abs().max()))
        for mine, ours in zip(gradients, results[0][1:], strict=True):
            worst = max(worst, float((mine - ours).abs().max()) / largest)
    assert worst < 1e-4, f"the reference differs by {worst:.1e}"
    return worst


def timed_update(run, samples, advantages, old, ref_logprobs, kind):
    """-> (seconds of one update, tokens that went through the model, padding included)."""
    run, samples, draw = make_variant(run, samples, *kind)
    minibatches = draw(run, samples)
    tokens = []
    hook = run.policy.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    taken = seconds(
        lambda: ppo.update(run, samples, minibatches, old, ref_logprobs, advantages, True),
        run.accelerator.device,
    )
    hook.remove()
    return taken, sum(tokens)


def seconds(function, device):
    """Wall time of function(), the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixed", action="store_true", help="long prompts of mixed length")
    parser.add_argument("--model", default="tiny", choices=SHAPES, help="shape, random weights")
    parser.add_argument("--turns", type=int, help="of the update [512, with --mixed 128]")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision="no")
    prompt_range = (100, 700) if args.mixed else (40, 70)
    torch.manual_seed(0)
    attention = "eager" if args.model == "tiny" else "sdpa"  # as in train.py
    with accelerator.device:
        shape = built_in(args.model)
        actor = AutoModelForCausalLM.from_config(shape, attn_implementation=attention)
        policy = hiper.ActorCritic(actor.float().eval(), "separate")
        torch.nn.init.normal_(policy.value_heads.weight, std=0.1)
    count = args.turns or (128 if args.mixed else 512)
    samples, advantages = made_up_turns(count, prompt_range, (12, 24), shape.vocab_size)
    config = Config(lr=0.0, critic_lr=0.0, micro_batch_tokens=args.tokens)
    run = make_run(policy, config, accelerator)
    old, ref_logprobs = score(run, samples)
    worst = check(run, samples, advantages, old, ref_logprobs)
    needed = sum(samples.total_lengths())
    print(
        f"{args.model} with a separate critic, float32 on {accelerator.device}, "
        f"{torch.get_num_threads()} threads: {count} turns, prompts of {prompt_range[0]} to "
        f"{prompt_range[1]} tokens, {needed} tokens\n"
        f"losses and gradients are the same to {worst:.0e}\n"
        f"                 seconds  tokens/s  padding  times ours"
    )
    times = {name: [] for name in VARIANTS}
    passed = {}
    for _ in range(args.rounds):
        for name, kind in VARIANTS.items():
            taken, passed[name] = timed_update(run, samples, advantages, old, ref_logprobs, kind)
            times[name].append(taken)
    best = {name: min(taken) for name, taken in times.items()}
    for name, taken in best.items():
        print(
            f"{name:15s}{taken:9.2f}{needed / taken:10.0f}{1 - needed / passed[name]:9.1%}"
            f"{taken / best['ours']:12.2f}"
        )
    print(f"update: {best['both'] / best['ours']:.1f}x")


if __name__ == "__main__":
    main()
