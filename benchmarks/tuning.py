"""Equal tuning: the same values of learning rate, KL weight and lambdas for HiPER and PPO.

    python benchmarks/tuning.py            28 runs, about 80 minutes of an idle core
    python benchmarks/tuning.py --show     the table of what is there

Runs are those of horizon.py with one task per episode (64 episodes, 10 iterations), with seeds that
no other table reports. One value is changed at a time. What chooses is the mean success of the
training episodes, which play in rooms of the training split; success on 300 unseen tasks stands
beside it. Each run ends as one line in runs/benchmarks/tuning.jsonl. A line of the same commit is
not run again.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation import ROOT, commit, read_lines, run_training
from benchmarks.horizon import POINTS, make_clone, shared_flags
from support.commit import short

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


def run(method, variant, seed, work):
    """One run, with the clone that is made for its seed if there is none -> its line."""
    cell = method, POINT, seed
    start = make_clone(cell, work)
    flags = {
        **shared_flags(cell),
        "method": method,
        "episodes": POINTS[POINT][1],
        "iterations": ITERATIONS,
        **VARIANTS[method][variant],
    }
    name = variant.replace(" ", "-").replace(".", "_")
    out = work / f"tuning-{method}-{name}-{seed}"
    return {"variant": variant, **run_training(flags, out, start)}


def run_all(jobs, out):
    """Run what is missing; each ends as a line of out/tuning.jsonl -> what failed, as sentences."""
    work = out / "horizon" / short(commit())
    work.mkdir(parents=True, exist_ok=True)
    path = out / "tuning.jsonl"
    done = {key_of(line) for line in read_lines(path) if line["commit"] == commit()}

    def run_seed(seed, todo):
        for method, variant in todo:
            line = run(method, variant, seed, work)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        futures = {}
        for seed in SEEDS:
            keys = [(method, name) for method, names in VARIANTS.items() for name in names]
            todo = [key for key in keys if (*key, seed) not in done]
            futures[seed] = pool.submit(run_seed, seed, todo)
    errors = {seed: future.exception() for seed, future in futures.items()}
    return [f"seed {seed}: {error}" for seed, error in errors.items() if error]


def key_of(line):
    return line["method"], line["variant"], line["seed"]


def show_table(lines):
    """Per method and value: training and final success of each seed, in percent."""
    print("method  value                    n  training, mean  by seed      final, by seed")
    for method, names in VARIANTS.items():
        for name in names:
            some = [line for line in lines if key_of(line)[:2] == (method, name)]
            if not some:
                continue
            some = sorted(some, key=key_of)
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
    failed = [] if args.show else run_all(args.jobs, args.out.resolve())
    lines = read_lines(args.out / "tuning.jsonl")
    for made_with in dict.fromkeys(line["commit"] for line in lines):
        print(f"\ncommit {short(made_with)}")
        show_table([line for line in lines if line["commit"] == made_with])
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
