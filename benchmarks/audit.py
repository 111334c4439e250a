"""Is each number right with a real LLM? `python benchmarks/audit.py`, some minutes on a core.

One iteration of HiPER with the paper's settings (configs/alfworld-1.5b.yaml), small: four turns of
the household, SmolLM2-135M, two PPO epochs, a start model that is not the reference.

1. Each number of metrics.jsonl, and what it is made of, against benchmarks/audit_oracle.py: plain
   Hugging Face forward passes of each turn alone, and loops over floats.
2. The same in other ways, up to the first step: gradient checkpointing, eager attention, small
   micro-batches, two processes, bfloat16 autocast.

`--model` takes any causal LM. The last line says how many checks hold; exit code 1 if not all.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from transformers.utils import logging

from benchmarks import audit_lab as lab
from benchmarks import audit_oracle as oracle
from config import ConfigError
from support.distributed import fail
from support.gguf import SMOLLM2

WAYS = {  # name -> (settings, Accelerator's precision, processes, largest difference allowed)
    "gradient checkpointing": ({"gradient_checkpointing": True}, "no", 1, 1e-5),
    "eager attention": ({"attention": "eager"}, "no", 1, 1e-3),
    "one turn a micro-batch": ({"micro_batch_tokens": 1}, "no", 1, 1e-3),
    "two processes": ({}, "no", 2, 1e-3),
    "bfloat16 autocast": ({}, "bf16", 1, math.inf),  # shown; its gradient is to point the same way
}
COSINE = 0.9  # of the gradients, at least
COLUMNS = ("log-probs", "entropies", "values", "A", "A scaled", "gradient", "cosine")


# ---- comparisons -------------------------------------------------------------------------------


def largest_difference(ours, theirs):
    """Of two nested structures of numbers; None equals None only."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        ours, theirs = ours.values(), [theirs[key] for key in ours]
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    if isinstance(ours, int | float):
        return abs(ours - theirs)
    pairs = zip(ours, theirs, strict=True)
    return max((largest_difference(a, b) for a, b in pairs), default=0.0)


def relative_difference(ours, theirs):
    """|a - b| / |b| of two lists of tensors, and their cosine."""
    a, b = torch.cat(ours).double(), torch.cat(theirs).double()
    return float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()))


def check_numbers(made, policy, reference, tokenizer, config, accelerator, bound=1e-3):
    """-> [(name, ours, independent or "", difference, whether it holds)]"""
    metrics, rows = oracle.recompute(made, policy, reference, tokenizer, config, accelerator)
    turns = lab.turns_of(lab.digest(made))
    table = []
    for name in ("logprobs", "entropy", "values", "raw", "advantages"):
        difference = largest_difference([t[name] for t in turns], [row[name] for row in rows])
        table.append((PARTS[name], "", "", difference, difference <= bound))
    alone = copy.deepcopy(policy)
    with accelerator.autocast():
        oracle.gradients(rows, alone.actor, alone.critic, alone.value_heads, config)
    theirs = [lab.part(p.grad) for p in alone.parameters()]
    difference, _ = relative_difference(made["gradients"], theirs)
    table.append(("gradient of the first step, relative", "", "", difference, difference <= bound))
    if made["metrics"].keys() != metrics.keys():
        table.append(("the metrics' names", "", "", math.inf, False))
    for name, theirs in metrics.items():
        ours = made["metrics"].get(name, math.nan)
        difference = abs(ours - theirs)
        table.append((name, ours, theirs, difference, difference <= 1e-5 + bound * abs(theirs)))
    return table


PARTS = {
    "logprobs": "log-probabilities, each token",
    "entropy": "entropies, each token",
    "values": "V_high, V_low, V_switch, each turn",
    "raw": "A_switch, A_subgoal, A_action, each turn",
    "advantages": "normalised advantage, each token",
}


def compare(ours, theirs):
    """Two digests -> {what: largest difference}, the cosine of the gradients last."""
    figures = {
        key: largest_difference(
            [t[key] for t in lab.turns_of(ours)], [t[key] for t in lab.turns_of(theirs)]
        )
        for key in PARTS
    }
    figures["gradient"], figures["cosine"] = relative_difference(
        ours["gradients"], theirs["gradients"]
    )
    return figures


# ---- other ways, some in processes of their own -------------------------------------------------


def run_way(name, folder):
    """What one process of a way does: given.pt in, NAME.RANK.pt out."""
    given = torch.load(folder / "given.pt", weights_only=False)
    changes, precision, _, _ = WAYS[name]
    accelerator = make_accelerator(precision)
    config = replace(given["config"], epochs=1, **changes)
    actor, tokenizer = lab.load(config)
    models = lab.make_models(actor, accelerator)
    made = lab.iterate(*models, tokenizer, config, accelerator, given["episodes"])
    torch.save(lab.digest(made), folder / f"{name}.{accelerator.process_index}.pt")
    accelerator.end_training()


def start_way(name, folder):
    """`run_way` in processes of its own -> the digest of all of them."""
    processes = WAYS[name][2]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += [__file__, "--way", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    files = [folder / f"{name}.{rank}.pt" for rank in range(processes)]
    if not all(file.exists() for file in files):
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    ranks = [torch.load(file, weights_only=False) for file in files]
    parts = [rank["episodes"] for rank in ranks]
    episodes = [parts[n % processes][n // processes] for n in range(sum(map(len, parts)))]
    return {**ranks[0], "episodes": episodes}


def compare_ways(made, actor, models, tokenizer, config, accelerator):
    """(name, figures of `compare`, whether it holds) of each way; figures None: left out."""
    first = lab.digest(made)
    with tempfile.TemporaryDirectory() as folder:
        given = {"config": config, "episodes": made["episodes"]}
        torch.save(given, Path(folder) / "given.pt")
        for name, (changes, precision, processes, bound) in WAYS.items():
            if accelerator.device.type == "cuda" and torch.cuda.device_count() < processes:
                continue
            if precision == "no" and processes == 1:
                changed = replace(config, epochs=1, **changes)
                other = lab.iterate(*models, tokenizer, changed, accelerator, made["episodes"])
                figures = compare(lab.digest(other), first)
            else:
                figures = compare(start_way(name, Path(folder)), first)
            *differences, cosine = figures.values()
            yield name, figures, max(differences) <= bound and cosine >= COSINE


# ---- the command -------------------------------------------------------------------------------


def make_accelerator(precision):
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def show_number(name, ours, theirs, difference, holds):
    cells = [f"{x:.6g}" if isinstance(x, int | float) else x for x in (ours, theirs)]
    print(f"{name:45s}{cells[0]:>13}{cells[1]:>13}{difference:12.1e}   {verdict(holds)}")


def verdict(holds):
    return "ok" if holds else "NO"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SMOLLM2, help="a causal LM [%(default)s]")
    parser.add_argument("--out", default=os.devnull, help="file for the rows, as JSON lines")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.way:
        return run_way(args.way[0], Path(args.way[1]))
    accelerator = make_accelerator("no")
    try:
        config = lab.make_config(args.model)
        actor, tokenizer = lab.load(config)
    except ConfigError as error:
        sys.exit(fail(error))
    models = lab.make_models(actor, accelerator)
    made = lab.iterate(*models, tokenizer, config, accelerator)
    turns = len(made["old"].v_high)
    print(f"{args.model} on {accelerator.device}, float32, {turns} turns: ours, independent\n")
    held = []
    with open(args.out, "w") as file:
        for row in check_numbers(made, *models, tokenizer, config, accelerator):
            show_number(*row)
            print(json.dumps(dict(zip(("name", "ours", "theirs"), row, strict=False))), file=file)
            held.append(row[-1])
        print("\nlargest differences of the same iteration in another way, gradients relative")
        print(" " * 25 + "".join(f"{name:>12}" for name in COLUMNS))
        for name, figures, holds in compare_ways(
            made, actor, models, tokenizer, config, accelerator
        ):
            *differences, cosine = figures.values()
            cells = "".join(f"{x:12.1e}" for x in differences)
            print(f"{name:25s}{cells}{cosine:12.6f}   {verdict(holds)}", flush=True)
            print(json.dumps({"name": name, **figures}), file=file)
            held.append(holds)
    print(f"audit: {sum(held)} of {len(held)} hold")
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
