"""Checkpoints: all that a run needs to go on, so that one that was killed ends as if it had not been.

    checkpoint.pt        weights, moments, iteration and log: what `restore` takes; checkpoint.old.pt is the one before
    actor/, best/        the actor in Hugging Face's format, of the last save and of the save before which most training episodes were won
    metrics.jsonl, evals.jsonl      the log; curve.png shows it

Everything is complete before it takes its predecessor's place. Random states need no saving: an iteration seeds itself.
"""

import errno
import json
import pickle
import shutil
import zipfile
from statistics import mean

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from support import sharding as shard
from config import UserError
from support.metrics import picture


def save(out, policy, tokenizer, optimizer, iteration, log, best=False, main=True):
    """A checkpoint and the actor in Hugging Face's format, each complete before it takes the old one's place. By all processes.

    best: the actor is kept in out/best as well.
    """
    state = shard.whole({"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, main)
    if not main:
        return
    actor = {
        name: state["policy"][f"actor.{name}"] for name, _ in policy.actor.named_parameters()
    }  # tied ones once
    folders = [out / "actor", out / "best"][: 1 + best]
    try:
        torch.save({**state, "iteration": iteration, "log": log}, out / "checkpoint.tmp")
        for folder in folders:
            policy.actor.save_pretrained(
                folder.with_suffix(".tmp"), state_dict=dict(actor)
            )  # which it empties
            tokenizer.save_pretrained(folder.with_suffix(".tmp"))
    except (
        RuntimeError,
        SafetensorError,
    ) as error:  # of torch and safetensors where the disk is full
        raise OSError(errno.ENOSPC, str(error)) from None
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".tmp").rename(folder)
    if (out / "checkpoint.pt").exists():
        (out / "checkpoint.pt").replace(out / "checkpoint.old.pt")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
    write_log(out, log)
    picture(out, log)


def best_yet(lines, every):
    """Whether more training episodes were won since the last save than between any two before; at the first, there is no other."""
    won = [
        mean(line["success"] for line in lines[k : k + every]) for k in range(0, len(lines), every)
    ]
    return won[-1] > max(won[:-1], default=-1)


def load(out, mmap=False):
    """The last checkpoint that can be read, or None where none was written; mmap: left on disk. UserError where all are damaged."""
    damaged = []
    for path in (out / "checkpoint.pt", out / "checkpoint.old.pt"):
        if not path.exists():
            continue
        try:
            if zipfile.is_zipfile(path):  # or torch tries older formats on it
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ):  # of torch where bytes were altered
            pass
        damaged.append(path)
        tqdm.write(f"warning: {path} is damaged: looking for the one before")
    if damaged:
        raise UserError(
            f"no checkpoint of {out} can be read: give another --out, or remove "
            f"{' and '.join(map(str, damaged))} to begin anew"
        )


def restore(policy, optimizer, saved):
    """A checkpoint's weights and moments into these, which may be in shards -> its (iteration, log)."""
    policy.load_state_dict(
        {name: shard.like(saved["policy"][name], p) for name, p in policy.state_dict().items()}
    )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: shard.like(x, params[i]) for name, x in state.items()}
        for i, state in saved["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**saved["optimizer"], "state": moments})
    return saved["iteration"], saved["log"]


def write_log(out, log):
    for name, part in {"metrics.jsonl": "lines", "evals.jsonl": "evals"}.items():
        (out / "log.tmp").write_text("".join(json.dumps(line) + "\n" for line in log[part]))
        (out / "log.tmp").replace(out / name)
