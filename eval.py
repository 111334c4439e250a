"""Evaluate a trained agent: `python eval.py OUT [--split unseen] [--episodes N] [--greedy] [--json FILE]`.

One pass over the split's tasks in their order, each played once; success is the world's own `won`. The protocol is printed with
the result. What is evaluated is the last checkpoint's actor, never the best of several.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import envs
from rollout import Style, collect


def wilson(wins, n, z=1.96):
    """The 95 % interval of a success rate, Wilson's: honest near 0 and 1. -> (low, high)"""
    p, centre = wins / n, wins / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def summary(episodes):
    """What a list of Episode says, as plain numbers; rates from 0 to 1."""
    turns = [turn for e in episodes for turn in e.turns]
    by_type = {}
    for e in episodes:
        by_type.setdefault(e.task_type, []).append(e.won)
    segments = sum(turn.opened for turn in turns)
    return {"episodes": len(episodes), "success": sum(e.won for e in episodes) / len(episodes),
            "score": sum(e.score for e in episodes) / len(episodes),
            "success_by_type": {kind: sum(won) / len(won) for kind, won in sorted(by_type.items())},
            "episodes_by_type": {kind: len(won) for kind, won in sorted(by_type.items())},
            "turns": len(turns) / len(episodes),
            "switches": (segments - len(episodes)) / len(episodes),         # per episode, the forced one at turn 0 not counted
            "segment_length": len(turns) / segments,
            "switch_rate": (segments - len(episodes)) / max(1, len(turns) - len(episodes)),
            "valid_format": sum(turn.decision.valid for turn in turns) / len(turns),
            "truncated": sum(e.truncated for e in episodes) / len(episodes)}


def evaluate(actor, tokenizer, runner, tasks, *, temperature, slots, style, seed=0, progress=None):
    """Play `tasks` once -> `summary`, without touching the training's random state."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        episodes = collect(actor, tokenizer, runner, tasks, slots=slots, temperature=temperature, style=style, progress=progress)
    return summary(episodes)


def table(result):
    """A summary as lines of text."""
    rows = [(kind, result["success_by_type"][kind], n) for kind, n in result["episodes_by_type"].items()]
    lines = []
    for kind, rate, n in rows + [("all", result["success"], result["episodes"])]:
        low, high = wilson(round(rate * n), n)
        lines.append(f"  {kind:34s} {100 * rate:5.1f} %   [{100 * low:5.1f}, {100 * high:5.1f}]   {n:4d} episodes")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the --out folder of a training run")
    parser.add_argument("--split", help="default: the last split the world names (unseen, valid_unseen)")
    parser.add_argument("--episodes", type=int, help="play only the split's first N tasks; default: all")
    parser.add_argument("--temperature", type=float, default=0.4, help="sampling temperature (paper: 0.4)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64, help="episodes in play at once")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        if args.slots < 1:
            raise ValueError("--slots must be 1 or more")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: there is no folder {args.json.parent}")      # rather now than after the evaluation
        config = json.loads((args.out / "config.json").read_text())
        module = envs.world(config["env"])
        split = args.split or module.SPLITS[-1]
        tasks = range(envs.size(config["env"], split))[:args.episodes]
        if not tasks or (args.episodes or 1) < 1:
            raise ValueError("no episodes: --episodes must be 1 or more")
        if not (args.out / "actor").is_dir():
            raise FileNotFoundError                                         # or transformers asks the hub for it
        tokenizer = AutoTokenizer.from_pretrained(args.out / "actor", padding_side="left")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        actor = AutoModelForCausalLM.from_pretrained(args.out / "actor", dtype="auto").to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError, KeyError))
        sys.exit(fail(f"{args.out} holds no finished training run (config.json and actor/): give the --out of train.py"
                      if missing else error))
    temperature = 0.0 if args.greedy else args.temperature
    style = Style(**{k: config[k] for k in Style.__dataclass_fields__})
    with envs.Runner(config["env"], split, config["env_workers"]) as runner:
        result = evaluate(actor, tokenizer, runner, tasks, temperature=temperature, slots=args.slots, style=style, seed=args.seed)
    protocol = {"run": str(args.out), "env": config["env"], "split": split, "tasks": f"first {len(tasks)} of "
                f"{envs.size(config['env'], split)}, each once", "temperature": temperature, "seed": args.seed,
                "history": style.history, "checkpoint": "last"}
    print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps({"protocol": protocol, **result, "interval": wilson(
            round(result["success"] * result["episodes"]), result["episodes"])}, indent=1) + os.linesep)


def fail(sentence):
    """Say what is wrong and give exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
