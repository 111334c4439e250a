"""How fast is ALFWorld through alfworld_env, against textworld's engine as it comes; and does every game's walkthrough win?

    ALFWORLD_DATA=folder python benchmarks/alfworld.py             # about a minute on one core
    ALFWORLD_DATA=folder python benchmarks/alfworld.py --all       # and every game of every split, one process per core

Both play the same random actions in one game of each task type of valid_unseen; every observation and every list of admissible
actions must be the same. "first" is the reset of a game that is new to the process, "again" that of another env of the same game,
as the groups of training need it. Last line: how many times the steps per second of textworld's engine.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # the project; and this file bears the name of a package
from tqdm import tqdm

from worlds import alfworld as alfworld_env

STEPS = 50  # per game


def clocked(times, call, *args):
    start = time.perf_counter()
    result = call(*args)
    times.append(time.perf_counter() - start)
    return result


def random_walk(index, times):
    """Reset two envs of a game, one after the other, and walk about in the second -> all that was seen."""
    rng, seen = random.Random(index), []
    for reset in ("first", "again"):
        env = alfworld_env.make("valid_unseen", index, max_steps=STEPS)
        seen.append(clocked(times[reset], env.reset))
        if reset == "first":
            env.close()
    while len(seen) < 2 + STEPS and not seen[-1][-1]["won"]:
        seen.append(clocked(times["step"], env.step, rng.choice(seen[-1][-1]["admissible"])))
    env.close()
    return seen


def walkthrough(split, index):
    """Plays a game's walkthrough -> (won, steps)."""
    env = alfworld_env.make(split, index, max_steps=1000)
    _, info = env.reset()
    steps = json.loads(Path(env.gamefile).read_text(encoding="utf-8"))["walkthrough"]
    for action in steps:
        info = env.step(action)[-1]
    env.close()
    return info["won"], len(steps)


def compare():
    """-> {path: median seconds of "first", "again" and "step", and the steps per second}, ours and the stock engine's."""
    from textworld.envs.pddl import PddlEnv

    kinds = [alfworld_env.task_type(file) for file in alfworld_env.games("valid_unseen")]
    indices, seen, medians = (
        [kinds.index(kind) for kind in alfworld_env.TASK_TYPES if kind in kinds],
        {},
        {},
    )
    bar = tqdm(total=2 * len(indices), unit="game", leave=False)
    for path, engine in (("ours", alfworld_env._engine_class()), ("stock", PddlEnv)):
        times, seen[path] = {"first": [], "again": [], "step": []}, []
        with mock.patch.multiple(alfworld_env, _engine_class=lambda: engine, _idle=[]):
            for index in indices:
                seen[path].append(random_walk(index, times))
                bar.update()
        medians[path] = {kind: statistics.median(values) for kind, values in times.items()}
        medians[path]["rate"] = len(times["step"]) / sum(times["step"])
    bar.close()
    assert seen["ours"] == seen["stock"], "the two engines do not say the same"
    print(
        f"{len(times['step'])} steps in {len(indices)} games: every observation and list of actions is the same"
    )
    return medians


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--all", action="store_true", help="play the walkthrough of every game of every split"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for --all")
    args = parser.parse_args()
    medians = compare()
    for path, took in medians.items():
        print(
            f"{path:6s} reset: first {took['first']:.2f} s, again {took['again']:.2f} s; "
            f"step {1e3 * took['step']:.1f} ms (medians); {took['rate']:.0f} steps/s"
        )
    if args.all:
        tasks = [
            (split, index)
            for split in alfworld_env.SPLITS
            for index in range(alfworld_env.size(split))
        ]
        start = time.perf_counter()
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            played = list(tqdm(pool.map(walkthrough, *zip(*tasks)), total=len(tasks), unit="game"))
        for split in alfworld_env.SPLITS:
            won = [won for (where, _), (won, _) in zip(tasks, played) if where == split]
            print(f"{split}: {sum(won)} of {len(won)} walkthroughs win")
        print(
            f"all: {sum(won for won, _ in played)} of {len(played)} walkthroughs win, {sum(n for _, n in played)} steps, "
            f"{time.perf_counter() - start:.0f} s in {args.processes} processes"
        )
    print(f"alfworld: {medians['ours']['rate'] / medians['stock']['rate']:.1f}x")
