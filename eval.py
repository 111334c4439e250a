"""Evaluate a trained agent: `python eval.py OUT [--split unseen] [--episodes N] [--greedy] [--swap planner=expert] [--json FILE]`.

One pass over the split's tasks in their order, each played once; success is the world's own `won`. The protocol is printed with
the result. What is evaluated is the last checkpoint's actor; OUT/best is the one that won most in training, for use and not for tables.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import envs
import hiper
from config import Config
from support.metrics import summary, table, wilson
from rollout import Style, collect, generate


PAPER = {
    "alfworld": "success %, Qwen2.5-1.5B / 7B: PPO 68.2 / 82.8, GRPO 71.1 / 85.4, GiGPO 86.7 / 90.8, HiPER 95.3 / 97.4",
    "webshop": "success %, Qwen2.5-1.5B / 7B: PPO 51.5 / 68.7, GRPO 56.8 / 66.1, GiGPO 67.4 / 75.2, HiPER 71.4 / 83.3",
}


def evaluate(
    actor, tokenizer, runner, tasks, *, temperature, slots, style, seed=0, progress=None, **players
):
    """Play `tasks` once -> `summary`, without touching the training's random state. players: as in `collect`."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        episodes = collect(
            actor,
            tokenizer,
            runner,
            tasks,
            slots=slots,
            temperature=temperature,
            style=style,
            progress=progress,
            **players,
        )
    return summary(episodes)


def players(swaps, runner, frozen, tokenizer, style, temperature, seed=0):
    """{"planner": who, "executor": who} -> what `collect` takes: how much of the success is planning, how much execution?

    who: "expert", the world's own demonstrator (he switches when a subgoal is reached or hopeless; as an executor he pursues the
    agent's subgoal, and does anything admissible where it leads nowhere), "random" (a subgoal that one could have, at the
    expert's switches; any admissible action) or "frozen", the actor `frozen`.
    """
    rng = random.Random(seed)

    def speak(prompts, tag):
        said = generate(
            frozen,
            tokenizer,
            prompts,
            temperature=temperature,
            max_response=style.max_response,
            tag=tag,
        )
        return [hiper.response_text(ids, tokenizer) for ids in said]

    def plan(seats, prompts):  # -> the text each response begins with
        if swaps["planner"] == "frozen":
            return speak(prompts, b"</subgoal>")
        texts = []
        for (slot, advice), seat in zip(
            runner.expert({slot: seat.subgoal for slot, seat in seats.items()}).items(),
            seats.values(),
        ):
            switch, subgoal, _ = advice or (False, seat.subgoal, "")  # he may not know how to go on
            if switch and swaps["planner"] == "random":
                subgoal = rng.choice(seat.info["subgoals"])
            texts.append(hiper.keep_block(subgoal, "SWITCH" if switch else "KEEP"))
        return texts

    def act(seats, prompts, decisions):  # -> the action each does
        anything = [rng.choice(seat.info["admissible"]) for seat in seats.values()]
        if swaps["executor"] == "random":
            return anything
        if swaps["executor"] == "frozen":
            planned = [
                p
                + tokenizer(
                    hiper.keep_block(d.subgoal, "SWITCH" if d.switch else "KEEP"),
                    add_special_tokens=False,
                )["input_ids"]
                for p, d in zip(prompts, decisions)
            ]
            return [hiper.parse(text).action for text in speak(planned, b"</action>")]
        aims = {
            slot: d.subgoal if d.subgoal and (d.switch or not seat.turns) else seat.subgoal
            for (slot, seat), d in zip(seats.items(), decisions)
        }
        return [
            advice[2] if advice and not advice[0] else other
            for advice, other in zip(runner.expert(aims).values(), anything)
        ]

    return {name: play for name, play in (("planner", plan), ("executor", act)) if name in swaps}


def read_swaps(given, config, info):
    """["planner=expert", ...] -> {"planner": "expert"}; ValueError for what cannot be. info: of the world's reset."""
    swaps = dict(text.partition("=")[::2] for text in given)
    for role, who in swaps.items():
        if role not in ("planner", "executor") or who not in ("expert", "random", "frozen"):
            raise ValueError(
                f"--swap {role}={who}: it must be planner= or executor=, and expert, random or frozen"
            )
    if swaps and config.get("prompt") == "flat":
        raise ValueError(
            "--swap needs an agent that plans and executes, and this one has the flat prompt"
        )
    if swaps.get("planner") == "random" and not info.get("subgoals"):
        raise ValueError(
            f"--swap planner=random needs a world that lists its subgoals, and {config['env']} does not"
        )
    return swaps


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the --out folder of a training run, or best/ in it")
    parser.add_argument(
        "--split", help="default: the last split the world names (unseen, valid_unseen)"
    )
    parser.add_argument(
        "--episodes", type=int, help="play only the split's first N tasks; default: all"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.4, help="sampling temperature (paper: 0.4)"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="take the likeliest token instead of sampling"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64, help="episodes in play at once")
    parser.add_argument(
        "--swap",
        action="append",
        default=[],
        metavar="ROLE=WHO",
        help="let the expert, a random or the frozen start "
        "model play the planner or the executor: planner=expert, executor=frozen, ...; may be repeated",
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    best = args.out.name == "best" and not (args.out / "actor").exists()
    out, model = (args.out.parent, args.out) if best else (args.out, args.out / "actor")
    try:
        if args.slots < 1:
            raise ValueError("--slots must be 1 or more")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(
                f"--json: there is no folder {args.json.parent}"
            )  # rather now than after the evaluation
        config = json.loads((out / "config.json").read_text())
        module = envs.world(config["env"])
        split = args.split or module.SPLITS[-1]
        tasks = range(envs.size(config["env"], split))[: args.episodes]
        if not tasks or (args.episodes or 1) < 1:
            raise ValueError("no episodes: --episodes must be 1 or more")
        if not model.is_dir():
            raise FileNotFoundError  # or transformers asks the hub for it
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        with envs.Runner(config["env"], split, 1) as runner:
            swaps = read_swaps(args.swap, config, runner.reset({0: 0})[0][1])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = Config(
            model=config["model"], attention=config.get("attention", "")
        ).attends  # as in training
        load = lambda path: (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=attention)
            .to(device)
            .eval()
        )
        actor = load(model)
        frozen = (
            load(config["model"] or config.get("start") or out / "start")
            if "frozen" in swaps.values()
            else None
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError, KeyError))
        sys.exit(
            fail(
                f"{args.out} holds no finished training run (config.json and actor/): give the --out of train.py"
                if missing
                else error
            )
        )
    temperature = 0.0 if args.greedy else args.temperature
    style = Style(**{k: config[k] for k in Style.__dataclass_fields__ if k in config})
    with envs.Runner(config["env"], split, config["env_workers"]) as runner:
        result = evaluate(
            actor,
            tokenizer,
            runner,
            tasks,
            temperature=temperature,
            slots=args.slots,
            style=style,
            seed=args.seed,
            **players(swaps, runner, frozen, tokenizer, style, temperature, args.seed),
        )
    protocol = {
        "run": str(args.out),
        "env": config["env"],
        "split": split,
        "tasks": f"first {len(tasks)} of {envs.size(config['env'], split)}, each once",
        "temperature": temperature,
        "seed": args.seed,
        "history": style.history,
        "checkpoint": "best" if best else "last",
        **swaps,
    }
    print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()))
    print(table(result))
    if result["score"] != result["success"]:
        print(f"  task score (mean score x 100): {100 * result['score']:.1f}")
    if config["env"] in PAPER:
        print(f"  the paper's row, {PAPER[config['env']]}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "protocol": protocol,
                    **result,
                    "interval": wilson(
                        round(result["success"] * result["episodes"]), result["episodes"]
                    ),
                },
                indent=1,
            )
            + os.linesep
        )


def fail(sentence):
    """Say what is wrong and give exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
