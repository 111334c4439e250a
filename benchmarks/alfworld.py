"""How fast is ALFWorld with the engine's caches, compared to textworld's own engine?

    ALFWORLD_DATA=folder python benchmarks/alfworld.py         # about a minute on one core
    ALFWORLD_DATA=folder python benchmarks/alfworld.py --all   # and play every game's walkthrough

Both engines play the same random actions in one game of each task type of valid_unseen. Every
observation and every list of admissible actions must be the same. "first" is the reset of a game
that is new to the process. "again" is the reset of another env of the same game, as in the groups
of training. The last line gives the ratio of the steps per second. --all uses one process per core
and says how many walkthroughs win.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tqdm import tqdm

from worlds import alfworld, alfworld_engine

STEPS = 50  # per game


def timed(times, call, *args):
    """Call, and append the seconds it took to `times`."""
    start = time.perf_counter()
    result = call(*args)
    times.append(time.perf_counter() - start)
    return result


def random_walk(index, times):
    """Reset two envs of a game, one after the other, and walk in the second -> all outputs."""
    rng = random.Random(index)
    first = alfworld.make("valid_unseen", index, max_steps=STEPS)
    outputs = [timed(times["first"], first.reset)]
    first.close()
    env = alfworld.make("valid_unseen", index, max_steps=STEPS)
    outputs.append(timed(times["again"], env.reset))
    info = outputs[-1][-1]
    while len(outputs) < 2 + STEPS and not info["won"]:
        action = rng.choice(info["admissible"])
        outputs.append(timed(times["step"], env.step, action))
        info = outputs[-1][-1]
    env.close()
    return outputs


def measure(name, engine, indices, bar):
    """Walk in all games with an engine class -> (all outputs, {what: seconds of each call})."""
    times = {"first": [], "again": [], "step": []}
    outputs = []
    bar.set_description(name)
    with mock.patch.multiple(alfworld_engine, engine_class=lambda: engine, idle_engines=[]):
        for index in indices:
            outputs.append(random_walk(index, times))
            bar.update()
    return outputs, times


def compare():
    """-> {engine: {"first", "again", "step": median seconds, "rate": steps per second}}"""
    from textworld.envs.pddl import PddlEnv

    kinds = [alfworld.task_type(file) for file in alfworld.games("valid_unseen")]
    indices = [kinds.index(kind) for kind in alfworld.TASK_TYPES if kind in kinds]
    engines = {"ours": alfworld_engine.engine_class(), "stock": PddlEnv}
    outputs = {}
    results = {}
    with tqdm(total=2 * len(indices), unit="game", leave=False) as bar:
        for name, engine in engines.items():
            outputs[name], times = measure(name, engine, indices, bar)
            results[name] = {what: statistics.median(values) for what, values in times.items()}
            results[name]["rate"] = len(times["step"]) / sum(times["step"])
    assert outputs["ours"] == outputs["stock"], "the two engines' outputs differ"
    print(
        f"{len(times['step'])} steps in {len(indices)} games: "
        "every observation and list of actions is the same"
    )
    return results


def play_walkthrough(split, index):
    """-> (won, steps)"""
    env = alfworld.make(split, index, max_steps=1000)
    _, info = env.reset()
    actions = json.loads(Path(env.gamefile).read_text(encoding="utf-8"))["walkthrough"]
    for action in actions:
        *_, info = env.step(action)
    env.close()
    return info["won"], len(actions)


def play_all_walkthroughs(processes):
    start = time.perf_counter()
    splits = []
    indices = []
    for split in alfworld.SPLITS:
        number = alfworld.size(split)
        splits += [split] * number
        indices += range(number)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = pool.map(play_walkthrough, splits, indices)
        played = list(tqdm(results, total=len(indices), unit="game"))
    for split in alfworld.SPLITS:
        won = [won for where, (won, _) in zip(splits, played, strict=True) if where == split]
        print(f"{split}: {sum(won)} of {len(won)} walkthroughs win")
    print(
        f"all: {sum(won for won, _ in played)} of {len(played)} walkthroughs win, "
        f"{sum(steps for _, steps in played)} steps, "
        f"{time.perf_counter() - start:.0f} s in {processes} processes"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="also play every game's walkthrough")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for --all")
    args = parser.parse_args()
    results = compare()
    for name, result in results.items():
        print(
            f"{name:6s} reset: first {result['first']:.2f} s, again {result['again']:.2f} s; "
            f"step {1e3 * result['step']:.1f} ms (medians); {result['rate']:.0f} steps/s"
        )
    if args.all:
        play_all_walkthroughs(args.processes)
    print(f"alfworld: {results['ours']['rate'] / results['stock']['rate']:.1f}x")


if __name__ == "__main__":
    main()
