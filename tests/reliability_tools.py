"""Harm done to checkpoints: flipped bits, kills at file operations, full disks. The bounded forms
are in test_reliability.py, the long ones in long/."""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import torch
from accelerate import Accelerator

import hiper
from config import ConfigError
from support import checkpoint, cloning
from support.distributed import prepare
from support.files import disk_errors
from support.loading import make_optimizer
from update_tools import make_run, plain_config

LOG = {"lines": [{"iteration": 0, "success": 1.0}], "evals": [{"iteration": 0, "success": 0.5}]}
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # Python's audit events


def make_tiny_run(tokenizer):
    """A run with a tiny policy that can be saved and loaded."""
    torch.manual_seed(0)
    actor = cloning.tiny_model(tokenizer, hidden=32, layers=1).eval()
    policy = hiper.ActorCritic(actor, "separate")
    accelerator = Accelerator(cpu=True)
    config = plain_config()
    policy, optimizer = prepare(policy, make_optimizer(policy, config), accelerator)
    return make_run(policy, config, accelerator, optimizer, tokenizer)


def found(out):
    """The iteration of the checkpoint that would be loaded, None for none; damaged folders."""
    _, saved, damaged = checkpoint._find_checkpoint(out)
    return saved and saved["iteration"], damaged


def flip_bits(out, count):
    """Flip one random bit of a random file of OUT/checkpoint, `count` times -> unnoticed flips."""
    rng = random.Random(0)
    paths = [path for path in sorted((out / "checkpoint").rglob("*")) if path.is_file()]
    unnoticed = []
    for _ in range(count):
        path = rng.choice(paths)
        raw = path.read_bytes()
        place = rng.randrange(len(raw))
        harmed = bytearray(raw)
        harmed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(harmed)
        if found(out) != (1, [out / "checkpoint"]):
            unnoticed.append((path.name, place))
        path.write_bytes(raw)
    assert found(out) == (2, [])
    return unnoticed


def kill_at_operations(out, run, operations):
    """Save iteration 3 over 1 and 2 in a process that ends at the n-th file operation below `out`,
    for each n of `operations` -> (iterations found afterwards, those of runs that came to an end).
    """
    before = out.with_name("before")
    shutil.copytree(out, before)
    iterations, whole = Counter(), 0
    for n in operations:
        shutil.rmtree(out)
        shutil.copytree(before, out)
        child = os.fork()
        if child == 0:
            _end_at(n, str(out))
            checkpoint.save_checkpoint(out, run, 3, LOG)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        whole += code == 0
        iteration, damaged = found(out)
        assert not damaged, (n, damaged)
        iterations[iteration] += 1
        checkpoint.save_checkpoint(out, run, 3, LOG)
        names = {path.name for path in out.iterdir()}
        assert not any(".tmp" in name or "stale" in name for name in names), (n, names)
    return iterations, whole


def _end_at(n, out):
    """This process ends at its n-th file operation below `out`."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        writes = event in WRITES and any(out in str(argument) for argument in arguments)
        if writes:
            count += 1
            if count == n:
                os._exit(9)

    sys.addaudithook(hook)


def fill_disks(folder, run, sizes):
    """Save three times on a real disk of each size (kilobytes; needs the right to mount) ->
    {size: saves that succeeded}. Every failure is the one sentence, and what was saved stays."""
    results = {}
    for size in sizes:
        place = folder / f"disk{size}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True)
        out = place / "run"
        saves = 0
        try:
            try:
                with disk_errors(out), checkpoint.run_dir(out, run.config, run.accelerator):
                    for saves in range(3):
                        checkpoint.save_checkpoint(out, run, saves + 1, LOG)
                saves = 3
            except ConfigError as error:
                assert "the disk is full: make room, then" in str(error), error
            iteration, damaged = found(out)
            assert not damaged
            assert iteration in ((saves, saves + 1) if saves else (None, 1)), (size, iteration)
        finally:
            subprocess.run(["umount", place], check=True)
        results[size] = saves
    return results


def can_mount(folder):
    """Whether this process may mount a disk at a folder."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", folder], check=True)
    return True
