"""Runs of train.py and eval.py as a user starts them, tiny, and looks into their folders."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from update_tools import same, steady

ROOT = Path(__file__).parent.parent
FLAGS = {
    "iterations": 3,
    "episodes": 4,
    "num_envs": 4,
    "bc_episodes": 6,
    "eval_episodes": 6,
    "max_new_tokens": 8,
    "critic_warmup": 1,
    "save_every": 1,
}


def flags(out, **changes):
    """Words of a command line for a tiny run into `out`."""
    values = {"out": out, **FLAGS, **changes}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def environment(**more):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true",
        **more,
    }


def script(name, *words, cwd, timeout=1200, **more):
    """Run a script of the repository -> .code, .out, .err."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


LAUNCHERS = {  # their words, the port last
    "torchrun": "torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port",
    "accelerate launch": "accelerate.commands.launch --multi_gpu --num_processes 2 "
    "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port",
}


def two_processes(*words, launcher="torchrun", timeout=1200, **more):
    """Run a script in two processes on the CPU -> .code, .out, .err."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(port), *map(str, words)]
    done = subprocess.run(
        command,
        env=environment(GLOO_SOCKET_IFNAME="lo", **more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def tree(folder):
    """Everything below a folder, with contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def actor_of(out, name="actor"):
    return AutoModelForCausalLM.from_pretrained(out / name).state_dict()


def saved_iteration(folder):
    return json.loads((folder / "run.json").read_text())["iteration"]


def saved_log(folder):
    return json.loads((folder / "run.json").read_text())["log"]


def saved_weights(folder):
    """The whole policy in a checkpoint folder of a run that is not sharded."""
    whole = folder / "pytorch_model.bin"
    if whole.exists():
        return torch.load(whole, weights_only=True)
    return load_file(folder / "model.safetensors")


def assert_same_run(out, other):
    """Both folders hold what one run would have left, but for times."""
    ours = [steady(line) for line in metrics_of(out)]
    assert ours == [steady(line) for line in metrics_of(other)]
    for name in ("actor", "best"):
        assert same(actor_of(out, name), actor_of(other, name))
    ours, theirs = out / "checkpoint", other / "checkpoint"
    assert same(saved_weights(ours), saved_weights(theirs))
    assert saved_iteration(ours) == saved_iteration(theirs)
    assert saved_log(ours)["evals"] == saved_log(theirs)["evals"]
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}


def assert_user_error(main, words, place, capfd):
    """`main` ends with exit code 2, one sentence, and nothing written -> the sentence."""
    before = tree(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert tree(place) == before
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err
