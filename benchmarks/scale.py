"""What an iteration costs on 1 to 64 GPUs: `python benchmarks/scale.py [CONFIG.yaml] [--measured gpu.jsonl]`, a second, on paper.

The parts are measured by `python benchmarks/gpu.py --out gpu.jsonl` on one GPU; without that file they are assumed as `ASSUMED` has them, for
an H200, and the first line says so. E episodes of T turns on average and M at most, S in play at once, prompts of P tokens, responses of R, G GPUs:

    rollout   N R a + E T (R b + P c) / G       a decode step costs a + b rows, a prompt token c: what `a` takes does not shrink with G;
                                                N turns come one after the other: M, and (E / G S - 1) T more where episodes wait
    worlds    E T w / (G K)                     w seconds a step on one of the K cores beside each GPU
    score     E T (P + R) / G / s, 1.5 times    s tokens/s through actor and critic; the reference is one backbone more
    update    E T (P + R) / G / u               u tokens/s of a PPO update of both
    exchange  replicated: float32 gradients once a minibatch, 2 (G - 1) / G of them over every GPU's link, after the backward pass;
              in shards: bf16 weights twice and float32 gradients once a micro-batch, besides the actor's for the rollout

A link passes `LINK` bytes a second: NVLink within a node, and beyond it a 400 Gb/s adapter for each of its eight GPUs. In shards is what does
not fit whole into 80 GB (`train.py --plan`). Left out: starting, saving, evaluation, and the wait for the GPU whose episodes are longest.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from support import plan
from config import read_config

GPUS = (1, 2, 4, 8, 16, 32, 64)
ASSUMED = dict(
    flops=790e12, mfu=0.4, bandwidth=4.0e12, reached=0.5, launch=0.9e-3
)  # bf16 matrices, HBM copies; s of Python a layer and step
LINK, MEMORY = 300e9, 80  # bytes/s of an all-reduce, of 450 or 8 x 50 GB/s; GB of a GPU


def assumed(s, given):
    """The parts of one GPU by formula, for plan.Sizes s."""
    forward = 2 * s.actor_linear / (ASSUMED["flops"] * ASSUMED["mfu"])  # seconds a token
    memory = ASSUMED["bandwidth"] * ASSUMED["reached"]
    a = max(ASSUMED["launch"] * s.layers, 2 * s.actor_linear / memory)
    backbones = (s.actor_linear + s.critic_linear) / s.actor_linear
    return SimpleNamespace(
        a=a,
        b=s.layers * s.keys * 8 * (given.prompt + given.response / 2) / memory,
        c=forward,
        s=1 / (backbones * forward),
        u=1 / (4 * backbones * forward),
    )  # backward twice a forward, one recomputed


def measured(path, s):
    """The same from gpu.py's rows; for another model than the rows' in proportion to its parameters."""
    rows = {row["part"]: row for row in map(json.loads, Path(path).read_text().splitlines())}
    few, many = sorted(
        (int(name.split()[1]), row)
        for name, row in rows.items()
        if name.startswith("generate") and name.endswith("slots")
    )
    b = (many[1]["ms a step"] - few[1]["ms a step"]) / (many[0] - few[0]) / 1e3
    scale = s.actor / 1e6 / rows["build"]["actor M"]
    return SimpleNamespace(
        a=(few[1]["ms a step"] / 1e3 - b * few[0]) * scale,
        b=b * scale,
        s=rows["update"]["scored tokens/s"] / scale,
        c=many[1]["ms prompts"] / 1e3 / many[0] / rows["build"]["tokens a prompt"] * scale,
        u=rows["update, checkpointing"]["tokens/s"] / scale,
    )


def cost(part, s, config, given, gpus, sharded):
    """-> {part of an iteration: seconds} on `gpus` GPUs."""
    turns, tokens = given.episodes * given.turns, given.prompt + given.response
    rounds = given.longest + max(0.0, given.episodes / gpus / config.slots - 1) * given.turns
    share, weights = (gpus - 1) / gpus, s.actor + s.critic + s.heads
    if sharded:
        passes = -(-turns * tokens // (gpus * config.tokens_per_batch)) * config.epochs
        moved = share * (
            passes * (2 * 2 + 4) * weights + passes * 1.5 * 2 * weights + 2 * s.actor
        )  # update; score; rollout
    else:
        moved = 2 * share * 4 * weights * -(-turns * config.epochs // config.minibatch)
    return {
        "rollout": rounds * given.response * part.a
        + turns / gpus * (given.response * part.b + given.prompt * part.c),
        "worlds": turns * given.world / (gpus * given.cores),
        "score": 1.5 * turns * tokens / gpus / part.s,
        "update": config.epochs * turns * tokens / gpus / part.u,
        "exchange": moved / LINK,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config",
        nargs="?",
        default=str(Path(sys.path[0]) / "configs" / "alfworld-1.5b.yaml"),
        help="settings of the run",
    )
    parser.add_argument(
        "--model", help="another model: one of plan.SHAPES, or a folder with a config.json"
    )
    parser.add_argument("--measured", help="rows of benchmarks/gpu.py --out")
    for name, default, text in (
        ("turns", 20.0, "on average"),
        ("longest", 50, "turns"),
        ("prompt", 750, "tokens"),
        ("response", 40, "tokens"),
        ("world", 0.004, "s a step of the world"),
        ("cores", 12, "beside each GPU"),
        ("episodes", 0, "an iteration; 0: the configuration's"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    given = parser.parse_args()
    config = read_config([given.config, *(["--model", given.model] if given.model else [])])
    given.episodes = given.episodes or config.episodes
    s = plan.sizes(
        plan.built_in(config.model)
        if config.model in plan.SHAPES
        else plan.configuration(config.model)[0]
    )
    part = measured(given.measured, s) if given.measured else assumed(s, given)
    holds = lambda gpus, sharded: (
        (found := plan.fits(s, config, MEMORY, gpus, sharded))[0] >= 0 or found[1] != ""
    )
    sharded = not holds(GPUS[-1], False)
    titles = ("rollout", "worlds", "score", "update", "exchange", "seconds", "speed-up", "turns/s")
    source = (
        f"measured: {given.measured}"
        if given.measured
        else "ASSUMED, not measured: " + ", ".join(f"{k} {v:g}" for k, v in ASSUMED.items())
    )
    print(
        f"{source}\n{config.model or 'tiny'}, {'in shards' if sharded else 'weights replicated'}; {given.episodes} episodes of {given.turns:g} turns, "
        f"{given.longest} at most; prompts of {given.prompt} tokens, responses of {given.response}\n\nGPUs   "
        + "".join(f"{name:>10s}" for name in titles)
    )
    one = None  # GPU-seconds of the fewest that hold the model
    for gpus in [
        n for n in GPUS if n <= given.episodes and (not sharded or n > 1 and holds(n, True))
    ]:
        seconds = cost(part, s, config, given, gpus, sharded)
        total = sum(seconds.values())
        one = one or gpus * total
        print(
            f"{gpus:4d}   "
            + "".join(f"{x:10.1f}" for x in (*seconds.values(), total))
            + f"{one / total:9.1f}x{given.episodes * given.turns / seconds['rollout']:10.0f}"
        )
    print(f"scale: {one / total:.1f}x")


if __name__ == "__main__":
    main()
