"""How much of each estimator's gradient is signal? `python benchmarks/alignment.py [--start runs/household-0/start]`, ten minutes.

Before any training: the start model plays K batches of tasks, eight episodes each, and every estimator gets the same batches, the same critic
(the start's, trained on as many episodes of other tasks, for flat PPO its V of all turns) and the loss of train.update at ratio 1. Shown is
    alignment   the cosine between one batch's gradient and the true one, of all the actor's parameters: what a step is worth
    steps       the square of the best over its own square: how many times the episodes a step of equal worth needs, nearly
The true gradient is not known, but its product with anything is: that with the gradients of *other* batches from two unbiased estimators,
flat GAE and HAE at lambda 1, each scaled to its own length. This is how the lambdas are chosen: on training tasks, for every method alike.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parent.parent
    )  # this folder's hae.py and rollout.py are not the library's

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import credit
import envs
import hiper
import train
from config import Config
from hae import normalize
from rollout import batch_of, collect, kept, micro_batches, score

HIPER, PPO, GIGPO = dict(method="hiper"), dict(method="ppo"), dict(method="gigpo")
ESTIMATORS = {
    "hiper, paper": dict(HIPER, lam_low=1.0, lam_high=0.95, whiten="each"),
    "hiper, gain": dict(HIPER, lam_low=1.0, lam_high=0.95, switch_advantage="gain"),
    **{
        f"hiper {low} {high}": dict(HIPER, lam_low=low, lam_high=high)
        for low, high in ((1.0, 0.95), (0.9, 0.7), (0.8, 0.5), (0.5, 0.5))
    },
    **{f"ppo {lam}": dict(PPO, lam=lam) for lam in (0.95, 0.8, 0.65, 0.5)},
    "rloo": dict(method="rloo"),
    "grpo": dict(method="grpo"),
    "gigpo": GIGPO,
    "gigpo, weight 3": dict(GIGPO, gigpo_weight=3.0),
    "gigpo, gamma 0.8": dict(GIGPO, gigpo_gamma=0.8),
}
UNBIASED = {"hiper 1 1": dict(HIPER, lam_low=1.0, lam_high=1.0), "ppo 1": dict(PPO, lam=1.0)}


def prepared(start, episodes, config):
    """-> (policy with a critic of its own that has seen `episodes` episodes of the last training tasks, tokenizer)"""
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    actor = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation=config.attends
    ).eval()
    policy = hiper.ActorCritic(actor, "separate")
    policy.heads.load_state_dict(torch.load(Path(start) / "heads.pt", weights_only=True))
    size = envs.size(config.env, "train")
    batch = batch_of(play(policy.actor, tokenizer, range(size - episodes, size), config), tokenizer)
    goal, everywhere = (
        batch.flat(credit.returns(batch.rewards, batch.mask, config.gamma)),
        batch.flat(batch.mask),
    )  # [N]
    nothing = torch.zeros_like(
        batch.samples.masks.action
    )  # no token is trained: the critic alone learns
    targets = {
        "high": (goal, batch.flat(batch.switch & batch.mask)),
        "low": (goal, everywhere),
        "switch": (goal, everywhere),
    }
    train.update(
        policy,
        train.optimizer_of(policy, config),
        batch.samples,
        score(policy, batch.samples),
        None,
        credit.Credit(nothing.float(), nothing, targets, {}),
        config,
        Accelerator(cpu=True),
        False,
    )
    return policy, tokenizer


def play(actor, tokenizer, tasks, config):
    with envs.Runner(config.env, "train", config.env_workers) as runner:
        return collect(
            actor,
            tokenizer,
            runner,
            list(tasks),
            slots=config.slots,
            temperature=config.temperature,
            style=config.style,
        )


def gradients(policy, tokenizer, tasks, config, estimators):
    """One batch: -> ({estimator: its gradient, flat}, share of episodes won)"""
    episodes = play(policy.actor, tokenizer, [task for task in tasks for _ in range(8)], config)
    batch, values = batch_of(episodes, tokenizer), ("values",)
    old, ends = score(policy, batch.samples), score(policy, batch.ends, parts=values)
    v_keep = score(
        policy,
        kept(
            batch.samples.prompts, [turn.carried for e in episodes for turn in e.turns], tokenizer
        ),
        parts=values,
    ).v_low
    credits = []
    for change in estimators.values():
        flat = change["method"] == "ppo"  # its V(s) is of every turn, as V_switch is
        credits.append(
            credit.assign(
                batch,
                old._replace(v_high=old.v_switch) if flat else old,
                replace(config, **change),
                normalize,
                ends._replace(v_high=ends.v_switch) if flat else ends,
                v_keep,
            )
        )
    params = list(policy.actor.parameters())
    total = [[torch.zeros_like(p) for p in params] for _ in credits]
    for part in micro_batches(
        [len(p) + len(r) for p, r in zip(batch.samples.prompts, batch.samples.responses)],
        config.tokens_per_batch,
    ):
        logp = policy(*batch.samples.rows(part, "cpu"), parts=("logp",)).logp  # [n, L]
        for k, c in enumerate(credits):
            loss = (logp * (c.adv * c.trained)[part, : logp.shape[1]]).sum() / c.trained.sum()
            for whole, g in zip(
                total[k], torch.autograd.grad(loss, params, retain_graph=k + 1 < len(credits))
            ):
                whole += g
    return {
        name: torch.cat([g.flatten() for g in parts]) for name, parts in zip(estimators, total)
    }, sum(e.won for e in episodes) / len(episodes)


def alignment(g, unbiased):
    """Cosine between one of g [K, D] and the true gradient, which the lists of [K, D] in `unbiased` estimate: no batch meets itself."""

    def between(a, b):  # mean over i != j of <a_i, b_j>
        return ((a.sum(0) @ b.sum(0)) - (a * b).sum()) / (len(a) * (len(a) - 1))

    lengths = [between(u, u).clamp(min=1e-12).sqrt() for u in unbiased]
    truth = sum(u / length for u, length in zip(unbiased, lengths))
    return float(
        between(g, truth)
        / (between(truth, truth).clamp(min=1e-12) * g.square().sum(1).mean()).sqrt()
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start", default="runs/household-0/start", help="the folder `start` of a run"
    )
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=8, help="of a batch")
    parser.add_argument("--critic", type=int, default=256, help="episodes that the critic has seen")
    parser.add_argument("--json", type=Path, help="write the alignments there")
    args = parser.parse_args()
    if not (Path(args.start) / "heads.pt").is_file():
        sys.exit(
            f"error: {args.start} is not the folder `start` of a run: give --start, or run python train.py first"
        )
    torch.manual_seed(0)
    config = Config()
    policy, tokenizer = prepared(args.start, args.critic, config)
    estimators, found, won = {**UNBIASED, **ESTIMATORS}, [], []
    for k in range(args.batches):
        g, share = gradients(
            policy, tokenizer, range(k * args.tasks, (k + 1) * args.tasks), config, estimators
        )
        found.append(g)
        won.append(share)
        print(f"batch {k + 1} of {args.batches}: {share:.0%} won", flush=True)
    stacked = {name: torch.stack([g[name] for g in found]) for name in estimators}  # [K, D] each
    unbiased = [stacked[name] for name in UNBIASED]
    aligned = {name: alignment(g, unbiased) for name, g in stacked.items()}
    best = max(aligned.values())
    print(
        f"{8 * args.tasks} episodes a batch, {sum(won) / len(won):.0%} won\nestimator             alignment  steps"
    )
    for name, cosine in sorted(aligned.items(), key=lambda item: -item[1]):
        print(
            f"{name:20s}{cosine:11.3f}{(best / cosine) ** 2 if cosine > 0 else float('inf'):7.2f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "start": str(args.start),
                    "batches": args.batches,
                    "episodes": 8 * args.tasks,
                    "won": sum(won) / len(won),
                    "alignment": aligned,
                },
                indent=1,
            )
            + "\n"
        )
    ours, flat = (
        max(cosine for name, cosine in aligned.items() if name.startswith(kind))
        for kind in ("hiper", "ppo")
    )
    print(
        f"HiPER's best against flat GAE's best, alignment squared\nalignment: {(ours / flat) ** 2:.1f}x"
    )


if __name__ == "__main__":
    main()
