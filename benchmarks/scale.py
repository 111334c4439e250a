"""What an iteration costs on 1 to 64 GPUs, computed: `python benchmarks/scale.py [CONFIG.yaml]`.

Takes a second. The parts are those that `python benchmarks/gpu.py --out FILE` measured on one GPU
(`--measured FILE`); without it they are ASSUMED for an H200, and the first line says so.

With E episodes of T turns (M at most), S at once per GPU, prompts of P and responses of R tokens,
on G GPUs:

    rollout     N R a + E T (R b + P c) / G    a decode step takes a + b rows, a prompt token c;
                                               N turns follow each other: M, and T (E / G S - 1)
                                               more where episodes wait for a slot
    worlds      E T w / (G K)                  w seconds a step, on K cores beside each GPU
    score       f E T (P + R) / G / s          s tokens/s through actor and critic; f is 1.5 with
                                               the reference, 2 where V(s_t, o_{t-1}) is needed
    update      E T (P + R) / G / u            u tokens/s of a PPO update of both
    exchange    replicated: float32 gradients, once a minibatch. In shards: bf16 weights twice and
                float32 gradients once in each micro-batch

A model that does not fit whole into 80 GB is taken in shards. Left out: starting, saving,
evaluation, and waiting for the GPU whose episodes are longest. The last line is the speed-up from
the fewest GPUs to the most.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.arguments import read_config
from support.memory_plan import count_sizes, fits, model_shape

GPUS = (1, 2, 4, 8, 16, 32, 64)
ASSUMED = {
    "flops": 790e12,  # bf16 matrix products
    "mfu": 0.4,
    "bandwidth": 4.0e12,  # bytes/s of a copy
    "reached": 0.5,  # share of it in decoding
    "launch": 0.9e-3,  # seconds of Python in one layer and step
}
LINK = 300e9  # bytes/s of an all-reduce: NVLink, or eight 400 Gb/s adapters a node
MEMORY = 80  # GB of a GPU


class Parts(NamedTuple):
    """What one GPU does, in the letters of the docstring."""

    a: float
    b: float
    c: float
    s: float
    u: float


def assumed_parts(sizes, prompt, response):
    """By formula, for memory_plan.Sizes."""
    forward = 2 * sizes.actor_linear / (ASSUMED["flops"] * ASSUMED["mfu"])  # seconds a token
    bandwidth = ASSUMED["bandwidth"] * ASSUMED["reached"]
    backbones = (sizes.actor_linear + sizes.critic_linear) / sizes.actor_linear
    return Parts(
        a=max(ASSUMED["launch"] * sizes.layers, 2 * sizes.actor_linear / bandwidth),
        b=sizes.layers * sizes.keys * 6 * (prompt + response / 2) / bandwidth,
        c=forward,
        s=1 / (backbones * forward),
        u=1 / (4 * backbones * forward),  # backward twice a forward, one is recomputed
    )


def measured_parts(path, sizes):
    """From gpu.py's rows. A model of another size takes time in proportion to its parameters."""
    rows = {row["part"]: row for row in map(json.loads, Path(path).read_text().splitlines())}
    generation = {
        int(name.split()[1]): row
        for name, row in rows.items()
        if name.startswith("generate") and name.endswith("envs")
    }
    few, many = sorted(generation)
    step = {n: row["ms a step"] / 1e3 for n, row in generation.items()}
    b = (step[many] - step[few]) / (many - few)
    prefill = generation[many]["ms prompts"] / 1e3
    factor = sizes.actor / 1e6 / rows["build"]["actor M"]
    return Parts(
        a=(step[few] - b * few) * factor,
        b=b * factor,
        c=prefill / many / rows["build"]["tokens a prompt"] * factor,
        s=rows["update, checkpointing"]["scored tokens/s"] / factor,
        u=rows["update, checkpointing"]["tokens/s"] / factor,
    )


def cost(parts, sizes, config, args, gpus, sharded):
    """-> {part of an iteration: seconds} on `gpus` GPUs. args: the script's flags."""
    turns = args.episodes * args.turns
    tokens = turns * (args.prompt + args.response)
    waiting = max(0.0, args.episodes / gpus / config.num_envs - 1) * args.turns
    weights = sizes.actor + sizes.critic + sizes.heads
    share = (gpus - 1) / gpus
    scored = 1.5 + 0.5 * config.needs_keep_value  # times actor and critic
    if sharded:
        micro_batches = math.ceil(tokens / (gpus * config.micro_batch_tokens))
        update = micro_batches * config.epochs * (2 * 2 + 4) * weights
        score = micro_batches * scored * 2 * weights
        moved = share * (update + score + 2 * sizes.actor)  # the last for the rollout
    else:
        minibatches = math.ceil(turns * config.epochs / config.minibatch_size)
        moved = 2 * share * 4 * weights * minibatches
    decoding = turns / gpus * (args.response * parts.b + args.prompt * parts.c)
    return {
        "rollout": (args.longest + waiting) * args.response * parts.a + decoding,
        "worlds": turns * args.world / (gpus * args.cores),
        "score": scored * tokens / gpus / parts.s,
        "update": config.epochs * tokens / gpus / parts.u,
        "exchange": moved / LINK,
    }


def fits_on(sizes, config, gpus, sharded):
    """Whether it fits, if need be with the flags that memory_plan offers."""
    spare, flags = fits(sizes, config, MEMORY, gpus, sharded)
    return spare >= 0 or flags != ""


def read_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "alfworld-1.5b.yaml"))
    parser.add_argument("--model", help="another model than the configuration's")
    parser.add_argument("--measured", help="rows of benchmarks/gpu.py --out")
    parser.add_argument("--turns", type=float, default=20.0, help="of an episode, on average")
    parser.add_argument("--longest", type=int, default=50, help="turns of the longest episode")
    parser.add_argument("--prompt", type=int, default=750, help="tokens")
    parser.add_argument("--response", type=int, default=40, help="tokens")
    parser.add_argument("--world", type=float, default=0.004, help="seconds a step of the world")
    parser.add_argument("--cores", type=int, default=12, help="beside each GPU")
    parser.add_argument("--episodes", type=int, help="an iteration; default: the configuration's")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv)
    config = read_config([args.config, *(["--model", args.model] if args.model else [])])
    args.episodes = args.episodes or config.episodes
    shape, source = model_shape(config.model)
    sizes = count_sizes(shape)
    if args.measured:
        parts = measured_parts(args.measured, sizes)
        print(f"measured: {args.measured}")
    else:
        parts = assumed_parts(sizes, args.prompt, args.response)
        values = ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items())
        print(f"ASSUMED, not measured: {values}")
    sharded = not fits_on(sizes, config, GPUS[-1], False)
    counts = [gpus for gpus in GPUS if gpus <= args.episodes]
    if sharded:
        counts = [gpus for gpus in counts if gpus > 1 and fits_on(sizes, config, gpus, True)]
    print(
        f"{source}; {'in shards' if sharded else 'weights replicated'}\n{args.episodes} episodes "
        f"of {args.turns:g} turns, {args.longest} at most; prompts of {args.prompt} tokens, "
        f"responses of {args.response}\n"
    )
    names = ("rollout", "worlds", "score", "update", "exchange", "seconds", "speed-up", "turns/s")
    print("GPUs   " + "".join(f"{name:>10s}" for name in names))
    fewest = None  # GPU-seconds of the fewest GPUs that hold the model
    for gpus in counts:
        seconds = cost(parts, sizes, config, args, gpus, sharded)
        total = sum(seconds.values())
        fewest = fewest or gpus * total
        cells = "".join(f"{x:10.1f}" for x in (*seconds.values(), total))
        speed = args.episodes * args.turns / seconds["rollout"]
        print(f"{gpus:4d}   {cells}{fewest / total:9.1f}x{speed:10.0f}")
    print(f"scale: {fewest / total:.1f}x")


if __name__ == "__main__":
    main()
