"""Evaluate a trained agent: `python eval.py OUT [--split unseen] [--episodes N] [--greedy]`.

One pass over the split's tasks, each played once; success is what the world says. The protocol
is printed with the result. OUT holds the last checkpoint's actor; OUT/best is the one that
succeeded most in training, for use and not for tables.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads: idle threads sleep

import torch
from accelerate.utils import gather_object

import envs
from config import EVAL_TEMPERATURE, ConfigError
from rollout import collect
from support.distributed import make_accelerator
from support.loading import choose_tasks, load_actor, load_run, load_tokenizer
from support.metrics import format_table, summarize, wilson_interval

PAPER = {  # success %, Qwen2.5-1.5B / 7B
    "alfworld": "PPO 68.2 / 82.8, GRPO 71.1 / 85.4, GiGPO 86.7 / 90.8, HiPER 95.3 / 97.4",
    "webshop": "PPO 51.5 / 68.7, GRPO 56.8 / 66.1, GiGPO 67.4 / 75.2, HiPER 71.4 / 83.3",
}


def evaluate(
    actor,
    tokenizer,
    accelerator,
    config,
    split,
    tasks,
    *,
    temperature=EVAL_TEMPERATURE,
    seed=None,
    **roles,
):
    """Play `tasks` once, shared among the processes -> summary, with split and temperature.

    The random state of training is left alone. roles: planner and executor of `collect`.
    """
    mine = tasks[accelerator.process_index :: accelerator.num_processes]
    seed = config.seed if seed is None else seed
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        envs.EnvPool(config.env, split, **envs.world_options(config)) as pool,
    ):
        torch.manual_seed(seed + accelerator.process_index)
        episodes = collect(actor, tokenizer, pool, mine, config, temperature=temperature, **roles)
    everyone = gather_object(episodes)
    return {"split": split, "temperature": temperature, "seed": seed, **summarize(everyone)}


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the --out folder of a training run, or its best/")
    parser.add_argument("--split", help="default: the last split of the world")
    parser.add_argument("--episodes", type=int, help="N tasks of the split; default: all")
    parser.add_argument("--temperature", type=float, default=EVAL_TEMPERATURE, help="(paper: 0.4)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable tokens")
    parser.add_argument("--seed", type=int, help="default: the run's, as in training")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv)
    try:
        if args.json and not args.json.absolute().parent.is_dir():
            raise ConfigError(f"--json: there is no folder {args.json.parent}")
        if args.episodes is not None and args.episodes < 1:
            raise ConfigError("--episodes must be 1 or more")
        config, folder, which = load_run(args.out)
        split = args.split or envs.world(config.env).SPLITS[-1]
        size = envs.size(config.env, split)
        tasks = choose_tasks(size, args.episodes)
        accelerator = make_accelerator()
        tokenizer = load_tokenizer(folder)
        actor = load_actor(folder, config, torch.float32).to(accelerator.device)
        with accelerator.autocast():
            result = evaluate(
                actor,
                tokenizer,
                accelerator,
                config,
                split,
                tasks,
                temperature=0.0 if args.greedy else args.temperature,
                seed=args.seed,
            )
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        sys.exit(fail(error))
    protocol = {
        "run": f"{args.out} in {config.env}",
        "split": split,
        "tasks": f"{len(tasks)} of {size}, each once",
        "temperature": result["temperature"],
        "seed": result["seed"],
        "checkpoint": which,
    }
    print("protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()))
    print(format_table(result))
    if result["score"] != result["success"]:
        print(f"  task score (mean score x 100): {100 * result['score']:.1f}")
    if config.env in PAPER:
        print(f"  the paper's success %, Qwen2.5-1.5B / 7B: {PAPER[config.env]}")
    if args.json:
        successes = round(result["success"] * result["episodes"])
        interval = wilson_interval(successes, result["episodes"])
        text = json.dumps({"protocol": protocol, **result, "interval": interval}, indent=1)
        args.json.write_text(text + "\n")


def fail(sentence):
    """Print what is wrong and return exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
