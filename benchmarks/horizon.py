"""Success against the horizon: does hierarchical credit matter more in longer episodes?

    python benchmarks/horizon.py                   the grid, many core-hours; stop it when you like
    python benchmarks/horizon.py --seeds 1         the first seed of every cell
    python benchmarks/horizon.py --show            tables and picture of what is there

A point is a household with `chain` tasks per episode and `routine` steps between decisions (see
worlds/household_chain.py). All methods of one point and seed start from one clone and play equally
many episodes, with the settings of configs/tiny.yaml. A run is smaller than a default one, and
longer episodes come in smaller numbers: a run takes 4 to 10 minutes of an idle core, longer
episodes more (four tasks took 35 minutes of a shared one).

`hiper` has the settings of configs/tiny.yaml, which were tuned on single tasks. `hiper-paper` has
the paper's lambdas and its normalisation per decision instead.

Most informative cells first: hiper and ppo, one task and four, then the rest, seed after seed: 8
seeds of hiper and ppo, 4 of the others. Each run ends as one line in
runs/benchmarks/horizon.jsonl. A line of the same commit and --iterations is not run again; a run
that was killed goes on from its checkpoint. Lines of other commits or iterations, and our own in
benchmarks/results/horizon.jsonl, are shown in tables of their own.

    start, final   success on 300 unseen tasks, never the best of several
    training       mean success of the training episodes, all iterations: the area under the curve
    80 %           the first iteration at which a mean over three is 80 %
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation import (
    ROOT,
    clone,
    commit,
    read_lines,
    run_cells,
    run_training,
    show_ours,
    show_runs,
    version_of,
)
from support.commit import short

OURS = ROOT / "benchmarks" / "results" / "horizon.jsonl"
POINTS = {  # (chain, routine) -> episodes of the clone, and of an iteration
    (1, 0): (3200, 64),
    (2, 0): (1200, 48),
    (4, 0): (600, 32),
    (1, 1): (1200, 48),
}
METHODS = ("hiper", "ppo", "hiper-paper", "gigpo", "grpo", "gagpo")
PAPER = {"method": "hiper", "lam_low": 1.0, "lam_high": 0.95, "normalize": "per_decision"}
COLOURS = ("tab:red", "tab:blue", "tab:brown", "tab:orange", "tab:green", "tab:purple")
ROUNDS = [  # (methods, points, seeds), in this order for each seed
    (METHODS[:2], [(4, 0), (1, 0)], 8),
    (METHODS[:2], [(2, 0), (1, 1)], 8),
    (METHODS[2:], list(POINTS), 4),
]
NUMBERS = ("success_start", "success_final", "training")


# ---- runs --------------------------------------------------------------------------------------


def cells(seeds):
    """(method, point, seed), most informative first."""
    return [
        (method, point, seed)
        for methods, points, most in ROUNDS
        for seed in range(min(seeds, most))
        for point in points
        for method in methods
    ]


def cell_of(line):
    return line["method"], (line["chain"], line["routine"]), line["seed"]


def shared_flags(cell):
    """The settings that all methods of the cell's point and seed have in common."""
    _, (chain, routine), seed = cell
    options = json.dumps({"chain": chain, "routine": routine})
    return {"seed": seed, "bc_episodes": POINTS[chain, routine][0], "env_options": options}


def make_clone(cell, work):
    """The start of all methods of the cell's point and seed, made once -> its folder."""
    _, (chain, routine), seed = cell
    return clone(work / f"clone-{chain}-{routine}-{seed}", **shared_flags(cell))


def run_flags(cell, iterations):
    """All settings of the cell's run."""
    method, point, _ = cell
    return {
        **shared_flags(cell),
        **(PAPER if method == "hiper-paper" else {"method": method}),
        "episodes": POINTS[point][1],
        "iterations": iterations,
    }


def run_cell(cell, iterations, start, work):
    """One run -> its line."""
    method, (chain, routine), seed = cell
    out = work / f"{method}-{chain}-{routine}-{seed}-{iterations}"
    line = run_training(run_flags(cell, iterations), out, start)
    return {"chain": chain, "routine": routine, **line, "method": method}


def run_all(todo, iterations, jobs, out):
    """Run the cells, append their lines to out/horizon.jsonl -> what failed, as sentences."""
    work = out / "horizon" / short(commit())  # a run does not go on with other code
    work.mkdir(parents=True, exist_ok=True)
    return run_cells(
        todo,
        make_start=lambda cell: make_clone(cell, work),
        run_one=lambda cell, start: run_cell(cell, iterations, start, work),
        jobs=jobs,
        path=out / "horizon.jsonl",
    )


# ---- tables and picture ------------------------------------------------------------------------


def numbers_of(line):
    """The line's successes in percent."""
    training = statistics.mean(line["curve"])
    values = (line["success_start"], line["success_final"], training)
    return dict(zip(NUMBERS, (100 * value for value in values), strict=True))


def interval(values, draws=10_000):
    """95 % bootstrap interval of the mean over seeds; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40]


def summary(values):
    low, high = interval(values)
    spread = f" [{low:.1f}, {high:.1f}]" if low == low else ""
    return f"{statistics.mean(values):.1f}{spread}"


def show_table(title, lines):
    print(f"\n{title}\nMeans over seeds, [95 % bootstrap interval over seeds].")
    print(
        f"{'chain routine method':26s} n  {'start':20s} {'final':20s} worst  "
        f"{'training':20s} 80 % at iteration"
    )
    for point in POINTS:
        for method in METHODS:
            some = [line for line in lines if cell_of(line)[:2] == (method, point)]
            if not some:
                continue
            some = sorted(some, key=cell_of)
            found = {name: [numbers_of(line)[name] for line in some] for name in NUMBERS}
            reached = [str(line["iterations_to_80"] or "-") for line in some]
            print(
                f"{point[0]:5d} {point[1]:7d} {method:11s} {len(some):2d}  "
                f"{summary(found['success_start']):20s} {summary(found['success_final']):20s} "
                f"{min(found['success_final']):5.1f}  {summary(found['training']):20s} "
                f"{', '.join(reached)}"
            )
    for other in METHODS[1:]:
        for point in POINTS:
            pairs = differences(lines, point, other)
            if pairs:
                final, training = zip(*pairs, strict=True)
                print(
                    f"hiper minus {other}, chain {point[0]}, routine {point[1]}, "
                    f"{len(pairs)} pairs: final {summary(final)}, training {summary(training)}"
                )


def differences(lines, point, other):
    """hiper minus `other`, final and training success of each seed that both have played."""
    ours, theirs = [
        {line["seed"]: numbers_of(line) for line in lines if cell_of(line)[:2] == (method, point)}
        for method in ("hiper", other)
    ]
    return [
        tuple(ours[seed][name] - theirs[seed][name] for name in NUMBERS[1:])
        for seed in sorted(ours)
        if seed in theirs
    ]


def plot(lines, path):
    """Final and training success against the chain's length; nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, title in zip(
        axes, NUMBERS[1:], ("300 unseen tasks, at the end", "training episodes, mean"), strict=True
    ):
        for n, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=True)):
            found = {}  # chain -> values
            for line in lines:
                if line["method"] == method and not line["routine"]:
                    found.setdefault(line["chain"], []).append(numbers_of(line)[name])
            if not found:
                continue
            chains = sorted(found)
            places = [math.log2(chain) + 0.04 * n for chain in chains]
            means = [statistics.mean(found[chain]) for chain in chains]
            counts = ", ".join(str(len(found[chain])) for chain in chains)
            axis.plot(places, means, color=colour, label=f"{method}, n = {counts}")
            for place, chain in zip(places, chains, strict=True):
                axis.plot([place] * len(found[chain]), found[chain], ".", color=colour)
                axis.vlines(place, *interval(found[chain]), color=colour)
        axis.set(title=title, xlabel="tasks per episode", ylim=(0, 100))
        axis.set_xticks([0, 1, 2], ["1", "2", "4"])
        axis.legend(frameon=False, loc="lower left")
    axes[0].set_ylabel("success %, seeds, 95 % interval of the mean")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(out, iterations):
    """Tables of our lines, of other commits or iterations, and of these -> the lines of these."""
    show_ours(OURS, show_table)
    return [] if out == OURS.parent else show_runs(out, "horizon", iterations, show_table, plot)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, default=8, help="of each cell, at most")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    failed = []
    if not args.show:
        lines = read_lines(out / "horizon.jsonl")
        this = commit(), args.iterations
        done = {cell_of(line) for line in lines if version_of(line) == this}
        todo = [cell for cell in cells(args.seeds) if cell not in done]
        failed = run_all(todo, args.iterations, args.jobs, out)
    lines = show(out, args.iterations)
    if failed:
        sys.exit("failed: " + "; ".join(failed))
    pairs = differences(lines, (4, 0), "ppo")
    if pairs:
        gain = statistics.mean(final for final, _ in pairs)
        print(f"\nhorizon: hiper minus ppo at four tasks, final success: {gain:+.1f} points")


if __name__ == "__main__":
    main()
