"""Methods x prompts x seeds on the household: the paper's tables in miniature.

    python benchmarks/ablation.py            35 runs, about five hours of one core
    python benchmarks/ablation.py --quick    one seed of four methods: half an hour, and rough
    python benchmarks/ablation.py --show     tables of what is there

Runs take one thread each, `--jobs` of them at once. They start from one clone per (prompt, seed)
and differ in `--method` and `--prompt` alone. Success is that of the last iteration on 300 unseen
tasks, never the best. Each run ends as one line in runs/benchmarks/ablation.jsonl. A line of the
same commit and --iterations is not run again; a run that was killed goes on from its checkpoint.
Lines of other commits or iterations, and our own in benchmarks/results/ablation.jsonl, are shown in
tables of their own. Where tracked files differ from the commit, its name ends in -dirty-DIGEST.

Tuned on seed 0's training episodes, by the iteration at which 80 % of them succeed: the learning
rate (3e-4 or 6e-4; 6e-4 is as good or better for hiper, ppo, grpo and gigpo), and the lambdas of
hiper and ppo (benchmarks/alignment.py). All else is shared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.commit import checked_out_commit, short

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "benchmarks" / "results" / "ablation.jsonl"
METHODS = ("hiper", "ppo", "grpo", "gigpo", "rloo")
COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple")
QUICK = [(method, "plan-execute", 0) for method in METHODS[:4]]
FULL = [
    *[(method, "plan-execute", seed) for seed in range(5) for method in METHODS[:4]],
    *[("rloo", "plan-execute", seed) for seed in range(3)],
    *[(method, "flat", seed) for method in METHODS[1:] for seed in range(3)],
]
FAMILIES = ("simple", "look", "clean", "heat", "cool", "two")
CLONE = """
import sys
from pathlib import Path
from envs import EnvPool, world_options
from support.arguments import read_config
from support.cloning import clone_expert
from support.distributed import make_accelerator
config = read_config(sys.argv[2:])
with EnvPool(config.env, **world_options(config)) as pool:
    clone_expert(config, Path(sys.argv[1]), pool, make_accelerator())
"""


# ---- runs --------------------------------------------------------------------------------------


def python(*arguments, log):
    """A child process with one thread on the CPU. Its output goes to `log`. -> seconds"""
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    with open(log, "a") as file:
        code = subprocess.call(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    if code:
        raise RuntimeError(f"exit {code}, see {log}")
    return time.perf_counter() - start


def to_words(**flags):
    """Settings -> words of train.py's command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def make_clone(prompt, seed, work):
    """The start that all methods of this prompt and seed share, made once -> its folder."""
    return clone(work / f"clone-{prompt}-{seed}", prompt=prompt, seed=seed)


def clone(folder, **flags):
    """The clone that these settings make, in folder/start -> that folder."""
    if not (folder / "start").exists():
        folder.mkdir(exist_ok=True)
        python("-c", CLONE, folder, *to_words(**flags), log=folder.with_suffix(".log"))
    return folder / "start"


def train(method, prompt, seed, iterations, start, work):
    """One run -> its line."""
    out = work / f"{method}-{prompt}-{seed}-{iterations}"
    flags = {"method": method, "prompt": prompt, "seed": seed, "iterations": iterations}
    return run_training(flags, out, start)


def run_training(flags, out, start):
    """train.py with these flags from the clone in `start`, or on from its checkpoint -> a line."""
    if not (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start, out / "start")
    words = to_words(**flags, out=out)
    made_with = commit()  # now: another may be checked out meanwhile
    seconds = python("train.py", *words, log=out.with_suffix(".log"))
    config = json.loads((out / "config.json").read_text())
    metrics = read_lines(out / "metrics.jsonl")
    evals = read_lines(out / "evals.jsonl")
    curve = [line["success"] for line in metrics]
    return {
        "method": config["method"],
        "prompt": config["prompt"],
        "seed": config["seed"],
        "config": {name: value for name, value in config.items() if name != "out"},
        "commit": made_with,
        "success_start": evals[0]["success"],
        "success_final": evals[-1]["success"],
        "per_task_type": evals[-1]["success_by_type"],
        "iterations_to_80": first_reached(curve, 0.8),
        "episodes": sum(line["episodes"] for line in metrics),
        "seconds": sum(sum(line["seconds"].values()) for line in metrics),
        "seconds_of_this_call": seconds,
        "curve": [round(success, 4) for success in curve],
        "switches": [round(line["switches_per_episode"], 3) for line in metrics],
    }


def first_reached(curve, level, width=3):
    """The first iteration (from 1) at which a mean over `width` is `level`; None for never."""
    for end in range(width, len(curve) + 1):
        if sum(curve[end - width : end]) >= level * width:
            return end
    return None


def commit():
    """See `checked_out_commit`; "unknown" outside a git repository."""
    return checked_out_commit() or "unknown"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def version_of(line):
    """What lines of one table have in common: (commit, iterations)."""
    return line["commit"], line["config"]["iterations"]


def cell_of(line):
    return line["method"], line["prompt"], line["seed"]


def run_all(cells, iterations, jobs, out):
    """Run the cells, append their lines to out/ablation.jsonl -> what failed, as sentences."""
    work = out / "ablation" / short(commit())  # a run does not go on with other code
    work.mkdir(parents=True, exist_ok=True)
    return run_cells(
        cells,
        make_start=lambda cell: make_clone(*cell[1:], work),
        run_one=lambda cell, start: train(*cell, iterations, start, work),
        jobs=jobs,
        path=out / "ablation.jsonl",
    )


def run_cells(cells, make_start, run_one, jobs, path):
    """Run the cells, `jobs` at once; each ends as a line of `path` -> what failed, as sentences.

    Cells that differ in their first part alone share a start: make_start(cell) -> its folder, made
    by the first of them. run_one(cell, start) -> the cell's line.
    """
    locks = {cell[1:]: Lock() for cell in cells}

    def run(cell):
        with locks[cell[1:]]:
            start = make_start(cell)
        line = run_one(cell, start)
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        before, after = 100 * line["success_start"], 100 * line["success_final"]
        print(f"{' '.join(map(str, cell))}: {before:.1f} % -> {after:.1f} %", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {cell: pool.submit(run, cell) for cell in cells}
    errors = {cell: future.exception() for cell, future in futures.items()}
    return [f"{' '.join(map(str, cell))}: {error}" for cell, error in errors.items() if error]


# ---- tables and picture ------------------------------------------------------------------------


def show_table(title, lines):
    print(f"\n{title}")
    families = "  ".join(f"{family:>6s}" for family in FAMILIES)
    print(f"method  prompt        n  start  final        80 % at iteration  {families}  min")
    for method, prompt in dict.fromkeys(cell_of(line)[:2] for line in lines):
        some = [line for line in lines if cell_of(line)[:2] == (method, prompt)]
        some = sorted(some, key=cell_of)
        final = [100 * line["success_final"] for line in some]
        spread = statistics.stdev(final) if len(final) > 1 else float("nan")
        start = statistics.mean(100 * line["success_start"] for line in some)
        reached = [line["iterations_to_80"] or f">{len(line['curve'])}" for line in some]
        minutes = statistics.mean(line["seconds"] for line in some) / 60
        by_family = "  ".join(f"{family_success(some, family):6.1f}" for family in FAMILIES)
        print(
            f"{method:7s} {prompt:13s} {len(some)}  {start:5.1f}  {statistics.mean(final):5.1f} +- "
            f"{spread:4.1f}  {','.join(map(str, reached)):>17s}  {by_family}  {minutes:3.0f}"
        )


def family_success(lines, family):
    """Mean success % over the runs and the family's task types."""
    rates = [
        100 * rate
        for line in lines
        for task_type, rate in line["per_task_type"].items()
        if family in task_type
    ]
    return statistics.mean(rates) if rates else float("nan")


def plot(lines, path):
    """Training curves, mean and standard deviation over seeds; nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    prompts = sorted({cell_of(line)[1] for line in lines}, reverse=True)
    figure, axes = pyplot.subplots(
        1,
        len(prompts),
        figsize=(1 + 5 * len(prompts), 4.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    axes = axes[0]
    for axis, prompt in zip(axes, prompts, strict=True):
        for colour, method in zip(COLOURS, METHODS, strict=True):
            curves = [line["curve"] for line in lines if cell_of(line)[:2] == (method, prompt)]
            if not curves:
                continue
            points = [[100 * x for x in column] for column in zip(*curves, strict=False)]
            mean = [statistics.mean(column) for column in points]
            spread = [statistics.pstdev(column) for column in points]
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axis.plot(mean, color=colour, label=f"{method}, n = {len(curves)}")
            axis.fill_between(range(len(mean)), low, high, color=colour, alpha=0.1, linewidth=0)
        axis.set(title=f"{prompt} prompt", xlabel="iteration", ylim=(0, 100))
        axis.legend(frameon=False, loc="upper left")
    axes[0].set_ylabel("success in training, %, mean +- sd")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(out, iterations):
    """Tables of our lines, of other commits or iterations, and of these -> the lines of these."""
    show_ours(OURS, show_table)
    return show_runs(out, "ablation", iterations, show_table, plot)


def show_ours(path, show_table):
    """Tables of our committed lines, one per commit and iterations."""
    for (made_with, count), some in by_version(read_lines(path)).items():
        show_table(f"ours, in {path.name}: commit {short(made_with)}, {count} iterations", some)


def by_version(lines):
    """{(commit, iterations): its lines}"""
    tables = {}
    for line in lines:
        tables.setdefault(version_of(line), []).append(line)
    return tables


def show_runs(out, name, iterations, show_table, plot=None):
    """Tables of the lines in out/NAME.jsonl, one per commit and iterations; with `plot` a picture
    of this commit's with these iterations -> their lines."""
    tables = by_version(read_lines(out / f"{name}.jsonl"))
    mine = tables.pop((commit(), iterations), [])
    for (other, count), some in tables.items():
        which = "this" if other == commit() else "another"
        show_table(f"{out}, {which} commit: {short(other)}, {count} iterations", some)
    if mine:
        show_table(f"{out}, this commit: {short(commit())}, {iterations} iterations", mine)
        if plot:
            plot(mine, out / f"{name}.png")
    return mine


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="one seed of four methods")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    lines = read_lines(out / "ablation.jsonl")
    this = commit(), args.iterations
    done = {cell_of(line) for line in lines if version_of(line) == this}
    cells = [cell for cell in (QUICK if args.quick else FULL) if cell not in done]
    failed = [] if args.show else run_all(cells, args.iterations, args.jobs, out)
    lines = show(out, args.iterations)
    if failed:
        sys.exit("failed: " + "; ".join(failed))
    means = {}
    for method in ("hiper", "ppo"):
        final = [x["success_final"] for x in lines if cell_of(x)[:2] == (method, "plan-execute")]
        means[method] = statistics.mean(final) if final else 0.0
    if means["hiper"] and means["ppo"]:
        print("\nfinal success of HiPER over that of PPO, plan-execute prompt, this commit")
        print(f"ablation: {means['hiper'] / means['ppo']:.2f}x")


if __name__ == "__main__":
    main()
