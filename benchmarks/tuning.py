"""Equal tuning: the same values of learning rate, KL weight and lambdas for HiPER and PPO.

    python benchmarks/tuning.py            28 runs, about 80 minutes of an idle core
    python benchmarks/tuning.py --show     the table of what is there

Runs are those of horizon.py with one task per episode (64 episodes, 10 iterations), with seeds that
no other table reports. One value is changed at a time. What chooses is the mean success of the
training episodes, which play in rooms of the training split; success on 300 unseen tasks stands
beside it. Each run ends as one line in runs/benchmarks/tuning.jsonl. A line of the same commit is
not run again. Our own lines are in benchmarks/results/tuning.jsonl.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation import (
    ROOT,
    commit,
    read_lines,
    run_cells,
    run_training,
    show_ours,
    show_runs,
    version_of,
)
from benchmarks.horizon import make_clone, run_flags
from support.commit import short

OURS = ROOT / "benchmarks" / "results" / "tuning.jsonl"
POINT = (1, 0)
SEEDS = (8, 9)
ITERATIONS = 10
SHARED = {
    "as in configs/tiny.yaml": {},
    "lr 3e-4": {"lr": 3e-4},
    "lr 1.2e-3": {"lr": 1.2e-3},
    "kl_coef 0.1": {"kl_coef": 0.1},
    "kl_coef 0.4": {"kl_coef": 0.4},
}
VARIANTS = {
    "hiper": {
        **SHARED,
        "smaller lambdas": {"lam_low": 0.8, "lam_high": 0.5},
        "larger lambdas": {"lam_low": 0.95, "lam_high": 0.85},
    },
    "ppo": {
        **SHARED,
        "smaller lambdas": {"gae_lambda": 0.5},
        "larger lambdas": {"gae_lambda": 0.8},
    },
}


def cell_of(line):
    """(method, value), seed"""
    return (line["method"], line["variant"]), line["seed"]


def run(cell, start, work):
    """One run -> its line."""
    (method, variant), seed = cell
    flags = {**run_flags((method, POINT, seed), ITERATIONS), **VARIANTS[method][variant]}
    name = variant.replace(" ", "-").replace(".", "_")
    line = run_training(flags, work / f"tuning-{method}-{name}-{seed}", start)
    return {"variant": variant, **line}


def run_all(jobs, out):
    """Run what is missing; each ends as a line of out/tuning.jsonl -> what failed, as sentences."""
    work = out / "horizon" / short(commit())  # the clones of horizon.py
    work.mkdir(parents=True, exist_ok=True)
    path = out / "tuning.jsonl"
    this = commit(), ITERATIONS
    done = {cell_of(line) for line in read_lines(path) if version_of(line) == this}
    values = [(method, variant) for method, variants in VARIANTS.items() for variant in variants]
    cells = [(value, seed) for seed in SEEDS for value in values]
    return run_cells(
        [cell for cell in cells if cell not in done],
        make_start=lambda cell: make_clone((None, POINT, cell[1]), work),
        run_one=lambda cell, start: run(cell, start, work),
        jobs=jobs,
        path=path,
    )


def show_table(title, lines):
    """Per method and value: training and final success of each seed, in percent."""
    print(f"\n{title}")
    print("method  value                    n  training, mean  by seed      final, by seed")
    for method, names in VARIANTS.items():
        for name in names:
            some = [line for line in lines if cell_of(line)[0] == (method, name)]
            if not some:
                continue
            some = sorted(some, key=cell_of)
            training = [100 * statistics.mean(line["curve"]) for line in some]
            final = ", ".join(f"{100 * line['success_final']:.1f}" for line in some)
            by_seed = ", ".join(f"{value:.1f}" for value in training)
            mean = statistics.mean(training)
            print(f"{method:7s} {name:24s} {len(some)}  {mean:14.1f}  {by_seed:12s} {final}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args()
    out = args.out.resolve()
    failed = [] if args.show else run_all(args.jobs, out)
    show_ours(OURS, show_table)
    show_runs(out, "tuning", ITERATIONS, show_table)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
