"""How fast is the WebShop engine in one process, and how many goals can a perfect buyer win?

    WEBSHOP_DATA=folder python benchmarks/webshop.py   # half a minute on one core

Plays the sessions of replays.jsonl if the folder has that file, else the scripted expert's on the
first 200 test goals. Without WEBSHOP_DATA it uses the made-up catalogue. The reference, in the same
run, is the same engine with a search that has no index: every query analyses all products again.
The cache of queries is cleared before each pass. The last line gives the ratio of the steps per
second.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from worlds import webshop
from worlds.webshop import WebShop
from worlds.webshop_search import K1, B, stored_length

ENVS = 64
PASSES = 9
REFERENCE_SESSIONS = 20  # the reference is slow


class Scan:
    """The ranking of `index` without its postings. texts: those that the index was made of."""

    def __init__(self, index, texts):
        self.index = index
        self.texts = texts

    def search(self, query, limit=50):
        counts = [Counter(self.index.terms(text)) for text in self.texts]
        lengths = [sum(count.values()) for count in counts]
        stored = np.array([stored_length(length) for length in lengths], np.float32)
        norms = K1 * ((1 - B) + B * stored / np.float32(np.mean(lengths)))
        scores = np.zeros(len(counts))
        for term, times in Counter(self.index.terms(query)).items():
            tf = np.array([count[term] for count in counts])
            n = np.count_nonzero(tf)
            idf = np.float32(np.log(1 + (len(counts) - n + 0.5) / (n + 0.5)))
            scores += idf * np.float32(times) * (tf / (tf + norms)).astype(np.float32)
        order = np.argsort(-scores.astype(np.float32), kind="stable")[:limit]
        return tuple(order[scores[order] > 0].tolist())


def play_expert(env):
    """-> (actions, score, won) of the expert, which here buys even where it cannot win."""
    env.reset()
    env.winnable = True
    actions = []
    subgoal = ""
    while not env.done:
        _, subgoal, action = env.expert(subgoal)
        actions.append(action)
        *_, info = env.step(action)
    return actions, info["score"], info["won"]


def load_sessions():
    """List of (goal, actions)."""
    replays = Path(os.environ.get("WEBSHOP_DATA", "")) / "replays.jsonl"
    sessions = []
    if replays.is_file():
        for line in replays.read_text().splitlines():
            replay = json.loads(line)
            sessions.append((replay["goal"], [step["action"] for step in replay["steps"]]))
    else:
        for index in range(200):
            env = webshop.make("test", index)
            actions, _, _ = play_expert(env)
            sessions.append((env.goal, actions))
    return sessions


def play_sessions(shop, sessions):
    """Play all sessions once -> (steps per second, all observations)."""
    observations = []
    start = time.perf_counter()
    for goal, actions in sessions:
        observations.append(shop.reset(goal))
        observations += [shop.step(action)[0] for action in actions]
    steps = len(observations) - len(sessions)
    return steps / (time.perf_counter() - start), observations


def peak_megabytes():
    """The process's peak memory until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_construction():
    """Make and play some envs -> their shared catalogue."""
    before = peak_megabytes()
    start = time.perf_counter()
    envs = [webshop.make("test", index) for index in range(ENVS)]
    seconds = time.perf_counter() - start
    catalogue = envs[0].shop.catalogue
    print(
        f"construct: {seconds:.2f} s for {len(catalogue.products)} products, "
        f"{len(catalogue.goals)} goals and {ENVS} envs"
    )
    for env in envs:
        play_expert(env)
    print(
        f"memory: {peak_megabytes():.0f} MB in all with {ENVS} envs played, "
        f"{before:.0f} MB of it Python and numpy"
    )
    return catalogue


def measure_speed(catalogue):
    """-> the steps per second with and without an index."""
    sessions = load_sessions()
    shop = WebShop(catalogue)
    rates = []
    for _ in range(PASSES):
        catalogue.index.search.cache_clear()
        rate, _ = play_sessions(shop, sessions)
        rates.append(rate)
    rate = statistics.median(rates)
    reference_rate = measure_reference(shop, sessions[:REFERENCE_SESSIONS])
    print(
        f"speed: {rate:,.0f} steps/s (median of {PASSES} passes, {min(rates):,.0f} to "
        f"{max(rates):,.0f}); without an index {reference_rate:,.1f} steps/s"
    )
    return rate, reference_rate


def measure_reference(shop, sessions):
    """Steps per second without an index. The observations must be the same."""
    _, expected = play_sessions(shop, sessions)
    catalogue = shop.catalogue
    index = catalogue.index
    catalogue.index = Scan(index, [product.text() for product in catalogue.order])
    rate, observations = play_sessions(shop, sessions)
    catalogue.index = index
    assert observations == expected, "the reference ranks differently"
    return rate


def measure_ceiling():
    """The expert's success on all goals of all splits."""
    scores = []
    wins = []
    for split in webshop.SPLITS:
        for index in range(webshop.size(split)):
            _, score, won = play_expert(webshop.make(split, index))
            scores.append(score)
            wins.append(won)
    print(
        f"expert: wins {np.mean(wins):.2%} of {len(wins)} goals, "
        f"mean score {np.mean(scores):.4f}: the ceiling"
    )


def main():
    catalogue = measure_construction()
    rate, reference_rate = measure_speed(catalogue)
    measure_ceiling()
    print(f"webshop: {rate / reference_rate:.0f}x")


if __name__ == "__main__":
    main()
