"""How much of a gradient is signal? `python benchmarks/alignment.py [--start DIR]`, ten minutes.

Before any training: the start model plays K batches of tasks, eight episodes each. Every estimator
gets the same batches and the same critic, which was trained on as many episodes of other tasks.

    alignment    cosine between one batch's gradient and the true one, over all actor parameters:
                 what a step is worth
    steps        (best alignment / own alignment)^2: how many times the episodes a step of equal
                 worth needs, nearly

The true gradient is not known, but its products are: with the gradients of *other* batches from an
unbiased estimator, flat GAE at lambda 1. (HAE at lambda 1 is none: it bootstraps from a learnt
critic at every boundary.)

DIR is the folder `start` of a run of the household, see `python train.py`.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.utils import logging

import baselines
import envs
import hiper
from hae import normalize
from rollout import collect, make_batch
from support import ppo
from support.arguments import read_config
from support.batch import append_keep_block
from support.cloning import HEADS
from support.loading import load_actor, load_tokenizer, make_optimizer
from support.scoring import compute_logprobs_and_values, micro_batches
from train import Run

GROUP = 8  # episodes of a task


def hiper_settings(low, high, **changes):
    return dict(method="hiper", lam_low=low, lam_high=high, **changes)


ESTIMATORS = {
    "hiper, paper": hiper_settings(
        1.0, 0.95, switch_advantage="closed_form", normalize="per_decision"
    ),
    "hiper, closed form": hiper_settings(1.0, 0.95, switch_advantage="closed_form"),
    "hiper 1.0 0.95": hiper_settings(1.0, 0.95),
    "hiper 0.9 0.7": hiper_settings(0.9, 0.7),
    "hiper 0.8 0.5": hiper_settings(0.8, 0.5),
    "hiper 0.5 0.5": hiper_settings(0.5, 0.5),
    "ppo 0.95": dict(method="ppo", gae_lambda=0.95),
    "ppo 0.8": dict(method="ppo", gae_lambda=0.8),
    "ppo 0.65": dict(method="ppo", gae_lambda=0.65),
    "ppo 0.5": dict(method="ppo", gae_lambda=0.5),
    "rloo": dict(method="rloo"),
    "grpo": dict(method="grpo"),
    "gigpo": dict(method="gigpo"),
}
UNBIASED = {"ppo 1": dict(method="ppo", gae_lambda=1.0)}


def play(policy, tokenizer, tasks, config):
    """-> Batch, share of episodes with success"""
    with envs.EnvPool(config.env) as pool:
        episodes = collect(policy.actor, tokenizer, pool, tasks, config)
    success = sum(episode.success for episode in episodes) / len(episodes)
    return make_batch(episodes, tokenizer, GROUP), success


def score(policy, samples, config, logprobs=True):
    batches = micro_batches(samples.total_lengths(), config.micro_batch_tokens)
    return compute_logprobs_and_values(policy, samples, batches, logprobs=logprobs)


def start_policy(start, episodes, config):
    """-> (policy whose critic has learnt from `episodes` episodes of the last tasks, tokenizer)"""
    tokenizer = load_tokenizer(start)
    policy = hiper.ActorCritic(load_actor(start, config, torch.float32), "separate")
    policy.value_heads.load_state_dict(load_file(Path(start) / HEADS))
    size = envs.size(config.env, "train")
    batch, _ = play(policy, tokenizer, range(size - episodes, size), config)
    ret = batch.to_turns(baselines.returns(batch.rewards, batch.mask, config.gamma))  # [N]
    everywhere = batch.to_turns(batch.mask)
    targets = {
        "high": (ret, batch.to_turns(batch.switch & batch.mask)),
        "low": (ret, everywhere),
        "switch": (ret, everywhere),
    }
    nothing = torch.zeros_like(batch.samples.masks.action)  # no token is trained, only values
    run = Run(
        config=config,
        accelerator=Accelerator(cpu=True),
        pool=None,
        tokenizer=tokenizer,
        policy=policy,
        model=policy,
        optimizer=make_optimizer(policy, config),
        reference=None,
    )
    ppo.update(
        run,
        batch.samples,
        ppo.draw_minibatches(run, batch.samples),
        score(policy, batch.samples, config),
        None,
        hiper.TokenAdvantages(nothing.float(), nothing, targets, {}),
        actor_learns=False,
    )
    return policy, tokenizer


def advantages_of(batch, old, end_values, v_keep, config):
    """TokenAdvantages of `config.method`. Flat PPO's V(s) is the head that knows every turn."""
    if config.method == "hiper":
        return hiper.hiper_advantages(
            batch, old, config, normalize, end_values=end_values, v_keep=v_keep
        )
    old = old._replace(v_high=old.v_switch)
    if end_values is not None:
        end_values = end_values._replace(v_high=end_values.v_switch)
    return baselines.baseline_advantages(batch, old, config, normalize, end_values=end_values)


def gradients(policy, tokenizer, tasks, config, estimators):
    """One batch -> ({estimator: its gradient, flat}, share of episodes with success)"""
    each_group = [task for task in tasks for _ in range(GROUP)]
    batch, success = play(policy, tokenizer, each_group, config)
    old = score(policy, batch.samples, config)
    end_values = None
    if config.bootstrap:
        end_values = score(policy, batch.final_states, config, logprobs=False)
    kept = append_keep_block(batch.samples.prompts, batch.prev_subgoals, tokenizer)
    v_keep = score(policy, kept, config, logprobs=False).v_low
    everyone = [
        advantages_of(batch, old, end_values, v_keep, replace(config, **changes))
        for changes in estimators.values()
    ]
    parameters = list(policy.actor.parameters())
    totals = [[torch.zeros_like(p) for p in parameters] for _ in everyone]
    for rows in micro_batches(batch.samples.total_lengths(), config.micro_batch_tokens):
        logprobs = policy(*batch.samples.model_inputs(rows, "cpu"), values=False).logprobs
        for total, estimate in zip(totals, everyone, strict=True):
            weights = (estimate.advantages * estimate.token_mask)[rows, : logprobs.shape[1]]
            loss = (logprobs * weights).sum() / batch.samples.lengths.sum()  # at ratio 1
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            for whole, part in zip(total, parts, strict=True):
                whole += part
    flat = [torch.cat([part.flatten() for part in total]) for total in totals]
    return dict(zip(estimators, flat, strict=True)), success


def alignment(g, unbiased):
    """Cosine between one row of g [K, D] and the true gradient. No batch meets itself.

    unbiased: a list of [K, D], each an unbiased estimate up to its length.
    """

    def product(a, b):  # mean over i != j of <a_i, b_j>
        return ((a.sum(0) @ b.sum(0)) - (a * b).sum()) / (len(a) * (len(a) - 1))

    lengths = [product(u, u).clamp(min=1e-12).sqrt() for u in unbiased]
    truth = sum(u / length for u, length in zip(unbiased, lengths, strict=True))
    norms = product(truth, truth).clamp(min=1e-12) * g.square().sum(1).mean()
    return float(product(g, truth) / norms.sqrt())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, default="runs/household-0/start")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=8, help="of a batch")
    parser.add_argument("--critic", type=int, default=256, help="episodes the critic learns from")
    parser.add_argument("--json", type=Path, help="write the alignments to this file")
    args = parser.parse_args()
    if not (args.start / HEADS).is_file():
        sys.exit(f"error: {args.start} is no folder `start` of a run: run python train.py first")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = read_config([])
    policy, tokenizer = start_policy(args.start, args.critic, config)
    estimators = {**UNBIASED, **ESTIMATORS}
    found, successes = [], []
    for k in tqdm(range(args.batches), unit="batch"):
        tasks = range(k * args.tasks, (k + 1) * args.tasks)
        by_estimator, success = gradients(policy, tokenizer, tasks, config, estimators)
        found.append(by_estimator)
        successes.append(success)
    stacked = {name: torch.stack([g[name] for g in found]) for name in estimators}  # [K, D] each
    unbiased = [stacked[name] for name in UNBIASED]
    aligned = {name: alignment(g, unbiased) for name, g in stacked.items()}
    success = sum(successes) / len(successes)
    best = max(aligned.values())
    print(f"{GROUP * args.tasks} episodes a batch, {success:.0%} with success")
    print("estimator             alignment  steps")
    for name, cosine in sorted(aligned.items(), key=lambda item: -item[1]):
        steps = (best / cosine) ** 2 if cosine > 0 else float("inf")
        print(f"{name:20s}{cosine:11.3f}{steps:7.2f}")
    if args.json:
        result = {"start": str(args.start), "batches": args.batches, "success": success}
        result |= {"episodes": GROUP * args.tasks, "alignment": aligned}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    ours = max(cosine for name, cosine in aligned.items() if name.startswith("hiper"))
    flat = max(cosine for name, cosine in aligned.items() if name.startswith("ppo"))
    print("HiPER's best against flat GAE's best, alignment squared")
    print(f"alignment: {(ours / flat) ** 2:.1f}x")


if __name__ == "__main__":
    main()
