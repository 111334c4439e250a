"""All that a GPU has to say about this project: `python benchmarks/gpu.py`, under eight minutes.

Qwen2.5-1.5B's shape, random weights, bf16 autocast as in train.py. A row is printed as each part
ends, and written as JSON to `--out`. A part that fails says so in its row and the others go on. No
part begins after `--limit` seconds; 45 seconds later the last is broken off. `--model tiny` with
small sizes runs all of it on a CPU, except peaks of memory and the compiled part.

    audit        benchmarks/audit.py: each number of an iteration against an independent
                 computation, and in other ways (bfloat16, checkpointing, eager attention)
    hae          the estimator: the same as on the CPU (to 1e-5 of the largest), and both times
    log-probs    largest differences of the old log-probs to a second pass and to the update's
                 forward in the same micro-batches (0: the first ratio is exactly 1), to a pass in
                 smaller micro-batches, and to generation's own
    generate     one turn of all slots: float32 weights under autocast, a bf16 copy of them, and a
                 static cache. floor: ms to read bf16 weights and cache once
    rollout      `rollout.collect` against the same episodes in lockstep, as in
                 benchmarks/rollout.py, on a made-up world. Random weights never write a tag, so
                 every response has all its tokens
    update       `support.ppo.update` with a separate critic, against the plain update of
                 benchmarks/update.py on a quarter of the turns. MFU: 6 FLOP a parameter and token
                 that passes through it
    plan         measured peaks of memory against those of `train.py --plan`
    compiled     the static cache with its decode step compiled: what may take long comes last

QWEN_TOKENIZER names a folder with Qwen2.5's tokenizer; without it one is trained on the prompts.
The last line: turns/s of `rollout.collect` over those of lockstep.
"""

import time

START = time.perf_counter()

import argparse
import json
import math
import os
import signal
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers.utils import logging

from benchmarks import gpu_parts as parts
from benchmarks.gpu_lab import Lab
from benchmarks.rollout import lockstep, slot_refill


def schedule(args, gpu):
    """(name, function of a Lab) of all parts, what matters most first."""
    few, many = args.tokens
    least, most = sorted(args.num_envs)
    yield "environment", parts.environment
    yield "audit", parts.audit
    yield "build", parts.build
    for episodes in (128, 4096):
        yield f"hae, {episodes} x 50", partial(parts.advantages, episodes=episodes)
    yield "log-probs", partial(parts.logprobs, rows=min(32, most), tokens=few)
    static = {"half": True, "cache_implementation": "static"}
    for n in (most, least):
        generation = partial(parts.generation, num_envs=n)
        yield f"generate, {n} envs", generation
        yield f"generate, {n} envs, bf16 copy", partial(generation, half=True)
        plain = partial(generation, disable_compile=True, **static)
        yield f"generate, {n} envs, bf16 copy, static", plain
    for n in (most, least):
        yield f"rollout, {n} envs", partial(parts.play, num_envs=n, method=slot_refill)
        yield f"rollout, {n} envs, lockstep", partial(parts.play, num_envs=n, method=lockstep)
    copied = partial(parts.play, num_envs=most, method=slot_refill, half=True)
    yield f"rollout, {most} envs, bf16 copy", copied
    update = partial(parts.update, tokens=few)
    yield "update", partial(update, turns=args.turns, checkpointing=False)
    yield "update, checkpointing", partial(update, turns=args.turns, checkpointing=True)
    quarter = max(1, args.turns // 4)
    plain = partial(update, turns=quarter, checkpointing=True, plain=True)
    yield "update, checkpointing, plain", plain
    for n, tokens, on in ((most // 4, few, True), (most // 2, many, True), (most // 8, few, False)):
        n = max(1, n)
        name = f"plan, {n} envs, {tokens} tokens{', checkpointing' if on else ''}"
        yield name, partial(parts.planned, num_envs=n, tokens=tokens, checkpointing=on)
    if gpu:
        compiled = partial(parts.generation, num_envs=most, **static)
        yield f"generate, {most} envs, bf16 copy, static, compiled", compiled


def run_part(part, lab, limit):
    """-> its figures and the seconds it took; what failed is a figure, too."""
    start = time.perf_counter() - START
    try:
        if start > limit:
            raise TimeoutError("left out: no time is left")
        signal.alarm(math.ceil(limit + 45 - start))
        figures = part(lab)
    except Exception as error:
        sentence = (str(error).splitlines() or [""])[0][:160]
        figures = {"failed": f"{type(error).__name__}: {sentence}"}
    signal.alarm(0)
    with suppress(Exception):  # a broken CUDA context raises for everything
        lab.clean()
    known = {name: figure for name, figure in figures.items() if figure == figure}  # no nan
    return {**known, "took": time.perf_counter() - START - start}


def break_off(*_):
    raise TimeoutError("broken off: no time is left")


class Table:
    """Prints rows, with a header wherever the columns change, and writes them to a file."""

    def __init__(self, path):
        self.file = open(path, "w")
        self.widths = {}

    def add(self, name, figures):
        print(json.dumps({"part": name, **figures}), file=self.file, flush=True)
        cells = {key: self.text(figure) for key, figure in figures.items()}
        if "failed" not in cells and list(cells) != list(self.widths):
            self.widths = {key: max(len(key), len(cell), 6) for key, cell in cells.items()}
            header = "  ".join(f"{key:>{width}}" for key, width in self.widths.items())
            print(f"\n{'':42s}{header}")
        row = "  ".join(f"{cell:>{self.widths.get(key, 0)}}" for key, cell in cells.items())
        print(f"{name:42s}{row}", flush=True)

    @staticmethod
    def text(figure):
        if not isinstance(figure, float):
            return str(figure)
        return f"{figure:.3g}" if abs(figure) < 100 else f"{figure:.0f}"


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="one of memory_plan.SHAPES"
    )
    parser.add_argument(
        "--num_envs", type=int, nargs=2, default=[64, 128], help="episodes: as many as the most"
    )
    parser.add_argument("--prompt", type=int, default=750, help="tokens, about")
    parser.add_argument("--response", type=int, default=40, help="tokens, at least 2")
    parser.add_argument("--longest", type=int, default=8, help="turns of an episode")
    parser.add_argument("--turns", type=int, default=256, help="of the update")
    parser.add_argument(
        "--tokens", type=int, nargs=2, help="of a micro-batch [8192 16384; 2048 8192 below 120 GB]"
    )
    parser.add_argument("--limit", type=int, default=420, help="seconds; no part begins later")
    parser.add_argument("--audit", help="the audit's model [SmolLM2, else Qwen2.5-0.5B's shape]")
    parser.add_argument("--out", default=os.devnull, help="file for the rows, as JSON lines")
    return parser.parse_args()


def main():
    args = read_arguments()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    signal.signal(signal.SIGALRM, break_off)
    table = Table(args.out)
    lab = Lab(args)
    args.tokens = args.tokens or lab.tokens_that_fit()
    if not lab.gpu:
        print("no GPU here: peaks of memory and the compiled part are left out")
    rows = {}
    for name, part in schedule(args, lab.gpu):
        rows[name] = run_part(part, lab, args.limit)
        table.add(name, rows[name])
    most = max(args.num_envs)
    speed = {name: figures.get("turns/s", 0.0) for name, figures in rows.items()}
    generate = [name for name in speed if name.startswith(f"generate, {most} envs")]
    failed = sum("failed" in figures for figures in rows.values())
    fastest = max(generate, key=speed.get)
    taken = time.perf_counter() - START
    table.add("all", {"fastest": fastest, "failed parts": failed, "took": taken})
    ours, reference = (speed[f"rollout, {most} envs{name}"] for name in ("", ", lockstep"))
    print(f"gpu: {ours / reference:.1f}x" if ours and reference else "gpu: not measured")


if __name__ == "__main__":
    main()
