"""How fast the WebShop engine is in one process, what memory it needs, and how many of its goals a perfect buyer wins.

    WEBSHOP_DATA=folder python benchmarks/webshop.py          # half a minute on one core; without data: the made-up catalogue

Plays the walks of replays.jsonl where the folder has that file, else the oracle buyer's on the first 200 test goals. The reference, in
the same run, is the same engine with a search that has no index: each query analyses every product anew. Remembered queries are
forgotten before each pass. Last line: how many times the reference's steps per second.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(
    Path(__file__).parent.parent
)  # the project; and this file bears the name of a module there
import numpy as np

from worlds import webshop as webshop_env
from worlds.webshop_engine import WebShop
from worlds.webshop_search import B, K1, stored_length


class Scan:
    """`index`'s ranking without its postings; the texts must be those it was made of."""

    def __init__(self, index, texts):
        self.index, self.texts = index, texts

    def search(self, query, limit=50):
        counts = [Counter(self.index.terms(text)) for text in self.texts]
        lengths = [sum(count.values()) for count in counts]
        norms = K1 * (
            (1 - B)
            + B
            * np.array(list(map(stored_length, lengths)), np.float32)
            / np.float32(np.mean(lengths))
        )
        scores = np.zeros(len(counts))
        for term, times in Counter(self.index.terms(query)).items():
            tf = np.array([count[term] for count in counts])
            n = np.count_nonzero(tf)
            idf = np.float32(np.log(1 + (len(counts) - n + 0.5) / (n + 0.5)))
            scores += idf * np.float32(times) * (tf / (tf + norms)).astype(np.float32)
        order = np.argsort(-scores.astype(np.float32), kind="stable")[:limit]
        return tuple(order[scores[order] > 0].tolist())


def oracle(env):
    """(actions, score, won) of the oracle buyer, who here buys even where that cannot win."""
    env.reset()
    env.winnable, actions, subgoal = True, [], ""
    while not env.done:
        _, subgoal, action = env.expert(subgoal)
        actions.append(action)
        info = env.step(action)[-1]
    return actions, info["score"], info["won"]


def steps_per_second(shop, walks):
    """Plays all walks once -> (steps per second, all observations)."""
    seen, start = [], time.perf_counter()
    for goal, actions in walks:
        seen.append(shop.reset(goal))
        seen += [shop.step(action)[0] for action in actions]
    return (len(seen) - len(walks)) / (time.perf_counter() - start), seen


def megabytes():  # at the peak, until now
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


before, start = megabytes(), time.perf_counter()
envs = [webshop_env.make("test", index) for index in range(64)]
catalogue = envs[0].shop.catalogue
print(
    f"construct: {time.perf_counter() - start:.2f} s for {len(catalogue.products)} products, {len(catalogue.goals)} goals and 64 envs"
)
for env in envs:
    oracle(env)
print(
    f"memory: {megabytes():.0f} MB in all with 64 envs played, {before:.0f} MB of it Python and numpy"
)

replays = Path(os.environ.get("WEBSHOP_DATA", "")) / "replays.jsonl"
if replays.is_file():
    walks = [
        (r["goal"], [step["action"] for step in r["steps"]])
        for r in map(json.loads, replays.read_text().splitlines())
    ]
else:
    walks = [
        (env.goal, oracle(env)[0])
        for env in (webshop_env.make("test", index) for index in range(200))
    ]

shop, rates = WebShop(catalogue), []
for _ in range(9):
    catalogue.index.search.cache_clear()
    rates.append(steps_per_second(shop, walks)[0])
fast = statistics.median(rates)
few, index = walks[:20], catalogue.index  # the reference is slow
expected = steps_per_second(shop, few)[1]
catalogue.index = Scan(index, [product.text() for product in catalogue.order])
slow, seen = steps_per_second(shop, few)
assert seen == expected, "the reference ranks differently"
catalogue.index = index
print(
    f"speed: {fast:,.0f} steps/s (median of 9 passes, {min(rates):,.0f} to {max(rates):,.0f}); without an index {slow:,.1f} steps/s"
)

played = [
    oracle(webshop_env.make(split, index))[1:]
    for split in webshop_env.SPLITS
    for index in range(webshop_env.size(split))
]
scores, won = zip(*played)
print(
    f"oracle buyer: wins {np.mean(won):.2%} of {len(won)} goals, mean score {np.mean(scores):.4f}: the ceiling"
)
print(f"webshop: {fast / slow:.0f}x")
