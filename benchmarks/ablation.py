"""Methods x prompts x seeds on the household world: the paper's tables in miniature.

    python benchmarks/ablation.py                    what is missing of the full grid: 35 runs, about 3 hours on two cores
    python benchmarks/ablation.py --quick            one seed of four methods: half an hour, and as rough as that
    python benchmarks/ablation.py --show             table and picture of what is there

Runs stand beside each other on one thread each (`--jobs`), start from one clone per (prompt, seed), play equally many episodes and
differ in `--method` and `--prompt` alone. Each ends as one line in benchmarks/results/ablation.jsonl; what is there is not run again, and
a run that was killed goes on from its checkpoint. Success is that of the last iteration on `unseen`, 300 tasks, never the best.

What was tuned, on seed 0's runs of the training split, by the iteration at which 80 % of its episodes are won: the learning rate, 3e-4 or
6e-4, for hiper, ppo, grpo and gigpo (6e-4 is the earlier, or as good, for each); the lambdas of hiper and of ppo, by the alignment of the
gradient before training (benchmarks/alignment.py). HiPER's own normalisation was found on the way (`--whiten`); all else is shared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FULL = [
    (method, "plan-execute", seed)
    for pair in ((0, 1), (2, 3), (4,))
    for method in ("hiper", "ppo", "grpo", "gigpo")
    for seed in pair
] + [
    (method, prompt, seed)
    for method, prompt in [
        ("rloo", "plan-execute"),
        ("ppo", "flat"),
        ("gigpo", "flat"),
        ("grpo", "flat"),
        ("rloo", "flat"),
    ]
    for seed in range(3)
]
QUICK = [(method, "plan-execute", 0) for method in ("hiper", "ppo", "grpo", "gigpo")]
PAPER = {
    ("hiper", "plan-execute"): 95.3,
    ("ppo", "plan-execute"): 81.3,
    ("grpo", "plan-execute"): 69.8,
    ("ppo", "flat"): 68.2,
    ("grpo", "flat"): 71.1,
    ("gigpo", "flat"): 86.7,
}  # ALFWorld, Qwen2.5-1.5B, seen split
FAMILIES = ("simple", "look", "clean", "heat", "cool", "two")
CLONE = (
    "import sys, train, config, envs; from pathlib import Path; from accelerate import Accelerator;"
    "c = config.read_config(sys.argv[2:]); r = envs.Runner(c.env, 'train');"
    "train.clone(c, Path(sys.argv[1]), r, Accelerator(cpu=True))"
)


def python(*arguments, log):
    """A child of one thread; what it says goes to `log`. -> seconds"""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    began = time.perf_counter()
    with open(log, "a") as file:
        code = subprocess.call(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=env, stdout=file, stderr=file
        )
    if code:
        raise RuntimeError(f"exit {code}, see {log}")
    return time.perf_counter() - began


def clone(prompt, seed, work):
    """The start that all methods of this prompt and seed share, made once."""
    folder = work / f"clone-{prompt}-{seed}"
    folder.mkdir(exist_ok=True)
    if not (folder / "start").exists():
        method = "ppo" if prompt == "flat" else "hiper"
        python(
            "-c",
            CLONE,
            folder,
            "--prompt",
            prompt,
            "--seed",
            seed,
            "--method",
            method,
            "--cpu",
            "true",
            log=work / f"{folder.name}.log",
        )


def one(method, prompt, seed, iterations, work):
    """Train one cell -> its line."""
    out = work / f"{method}-{prompt}-{seed}-{iterations}"
    seconds = python(
        "train.py",
        "--method",
        method,
        "--prompt",
        prompt,
        "--seed",
        seed,
        "--iterations",
        iterations,
        "--cpu",
        "true",
        "--start",
        work / f"clone-{prompt}-{seed}" / "start",
        "--out",
        out,
        log=work / f"{out.name}.log",
    )
    config = json.loads((out / "config.json").read_text())
    metrics, evals = (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evals.jsonl")
    )
    return {
        "method": method,
        "prompt": prompt,
        "seed": seed,
        "config": {k: v for k, v in config.items() if k not in ("out", "start")},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "success_start": evals[0]["success"],
        "success_final": evals[-1]["success"],
        "per_task_type": evals[-1]["success_by_type"],
        "iterations_to_80": reached([line["success"] for line in metrics]),
        "episodes": sum(line["episodes"] for line in metrics),
        "seconds": sum(sum(line["seconds"].values()) for line in metrics),
        "seconds_of_this_call": seconds,
        "curve": [round(line["success"], 4) for line in metrics],
        "switches": [round(line["switches"], 3) for line in metrics],
    }


def reached(curve, level=0.8, width=3):
    """The first iteration at which success in training, a mean over `width`, is `level`; None if it never is."""
    return next(
        (
            i + 1
            for i in range(width - 1, len(curve))
            if sum(curve[i - width + 1 : i + 1]) >= level * width
        ),
        None,
    )


def table(lines):
    print(
        f"{'method':7s} {'prompt':13s} n  start      final       80 % at iteration  {'  '.join(f'{f:>6s}' for f in FAMILIES)}  minutes  paper"
    )
    for method, prompt in dict.fromkeys((line["method"], line["prompt"]) for line in lines):
        cell = sorted(
            (line for line in lines if (line["method"], line["prompt"]) == (method, prompt)),
            key=lambda line: line["seed"],
        )
        percent = lambda key: [100 * line[key] for line in cell]
        sd = statistics.stdev(percent("success_final")) if len(cell) > 1 else float("nan")
        to80 = [line["iterations_to_80"] or f">{len(line['curve'])}" for line in cell]
        family = [
            statistics.mean(
                100 * rate
                for line in cell
                for kind, rate in line["per_task_type"].items()
                if f in kind
            )
            for f in FAMILIES
        ]
        print(
            f"{method:7s} {prompt:13s} {len(cell)}  {statistics.mean(percent('success_start')):5.1f}  "
            f"{statistics.mean(percent('success_final')):5.1f} +- {sd:4.1f}  {','.join(map(str, to80)):>19s}  "
            f"{'  '.join(f'{x:6.1f}' for x in family)}  {statistics.mean(line['seconds'] for line in cell) / 60:7.1f}  "
            f"{PAPER.get((method, prompt), '')}"
        )


def picture(lines, path):
    try:
        import matplotlib
    except ModuleNotFoundError:
        return print("no picture without matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, prompt in zip(axes, ("plan-execute", "flat")):
        for color, method in zip(
            ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple"),
            ("hiper", "ppo", "grpo", "gigpo", "rloo"),
        ):
            curves = [
                line["curve"]
                for line in lines
                if (line["method"], line["prompt"]) == (method, prompt)
            ]
            if curves:
                at = [
                    [100 * c[i] for c in curves if i < len(c)] for i in range(max(map(len, curves)))
                ]
                mean, sd = [statistics.mean(x) for x in at], [statistics.pstdev(x) for x in at]
                axis.plot(
                    mean,
                    color=color,
                    label=f"{method}, {len(curves)} seed{'s' * (len(curves) > 1)}",
                )
                axis.fill_between(
                    range(len(at)),
                    [m - s for m, s in zip(mean, sd)],
                    [m + s for m, s in zip(mean, sd)],
                    color=color,
                    alpha=0.1,
                    linewidth=0,
                )
        axis.set(title=f"{prompt} prompt", xlabel="iteration (128 episodes each)", ylim=(0, 100))
        if axis.lines:
            axis.legend(frameon=False, loc="upper left")
    axes[0].set_ylabel("success in training, %, temperature 1, mean +- sd")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed of four methods")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, each on one thread"
    )
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "ablation", help="where the runs stand"
    )
    args = parser.parse_args()
    grid = QUICK if args.quick else FULL
    file = RESULTS / ("ablation-quick.jsonl" if args.quick else "ablation.jsonl")
    RESULTS.mkdir(parents=True, exist_ok=True)
    read = lambda: (
        [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    )
    done = {(line["method"], line["prompt"], line["seed"]) for line in read()}
    todo = [] if args.show else [cell for cell in grid if cell not in done]
    args.work.mkdir(parents=True, exist_ok=True)
    locks = {(prompt, seed): Lock() for _, prompt, seed in todo}

    def cell(method, prompt, seed):
        with locks[prompt, seed]:  # the first of them makes the clone
            clone(prompt, seed, args.work.resolve())
        line = one(method, prompt, seed, args.iterations, args.work.resolve())
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
        print(
            f"{method} {prompt} {seed}: {100 * line['success_start']:.1f} % -> {100 * line['success_final']:.1f} %",
            flush=True,
        )

    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        futures = [pool.submit(cell, *key) for key in todo]
        failed = [
            f"{key}: {future.exception()}"
            for key, future in zip(todo, futures)
            if future.exception()
        ]
    if not read():
        sys.exit("nothing is there yet")
    table(read())
    picture(read(), file.with_suffix(".png"))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
