"""The files of a run, so that one that was killed goes on as if it had not been.

    config.json                     the settings
    checkpoint/                     Accelerate's state (weights, optimizer), iteration and log;
                                    checkpoint.old/ is the one before
    actor/, best/                   the actor in Hugging Face's format: of the last save, and of the
                                    save before which most training episodes succeeded
    metrics.jsonl, evals.jsonl      the log; curve.png shows it

Each is complete before it takes its predecessor's place. Random states need no saving: every
iteration seeds itself.
"""

import dataclasses
import errno
import json
import pickle
import shutil
from pathlib import Path
from statistics import mean

from safetensors import SafetensorError
from tqdm import tqdm

from config import Config, ConfigError
from support.plots import plot_curves

# Settings that do not change what is learnt: a run goes on with others.
FREE = {"out", "iterations", "micro_batch_tokens", "num_envs", "save_every", "eval_episodes"}


def prepare_run_dir(out, config):
    """Make the folder of a new run, or accept the folder of the same run.

    ConfigError, with nothing touched, otherwise. A new run's folder may hold `start/`, the clone
    of another run, from which it then begins.
    """
    mine = dataclasses.asdict(config)
    path = out / "config.json"
    if path.is_file():
        differs = differences(path, mine)
        refused = [text for name, text in differs.items() if name not in FREE]
        if refused and has_learnt(out):
            raise ConfigError(
                f"{out} holds another run ({'; '.join(refused)}): give another --out, or remove it"
            )
        if differs:
            tqdm.write(f"{out} goes on with other settings: {'; '.join(differs.values())}")
    elif out.exists():
        if not out.is_dir() or {entry.name for entry in out.iterdir()} - {"config.tmp", "start"}:
            raise ConfigError(f"{out} exists and is not a run of this script: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.tmp").write_text(json.dumps(mine, indent=1))
    (out / "config.tmp").replace(path)


def differences(path, mine):
    """{setting: what it was and is}. A setting that a later version added had its default."""
    try:
        theirs = {**dataclasses.asdict(Config()), **json.loads(path.read_text())}
    except (ValueError, TypeError):
        raise ConfigError(f"{path} cannot be read: give another --out, or remove it") from None
    return {
        name: f"{name} {theirs[name]!r} before, {value!r} now"
        for name, value in mine.items()
        if theirs[name] != value and name != "out"
    }


def has_learnt(out):
    """Whether the folder holds anything that its settings have shaped."""
    return any((out / name).exists() for name in ("start", "checkpoint", "checkpoint.old"))


def save_checkpoint(out, run, iteration, log):
    """Everything that `load_checkpoint` needs, and the actor. Called by all processes.

    run: train.Run; log: {"lines": metrics of each iteration, "evals": evaluations}.
    """
    accelerator = run.accelerator
    temporary = out / "checkpoint.tmp"
    try:
        accelerator.save_state(str(temporary), safe_serialization=False)  # files with checksums
        weights = accelerator.get_state_dict(run.policy)
        if accelerator.is_main_process:
            (temporary / "run.json").write_text(json.dumps({"iteration": iteration, "log": log}))
            folders = [out / "actor"]
            if is_best(log["lines"], run.config.save_every):
                folders.append(out / "best")
            for folder in folders:
                _save_actor(folder, run, weights)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors, where a disk is full
        raise OSError(errno.ENOSPC, str(error)) from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (out / "checkpoint").exists():
            shutil.rmtree(out / "checkpoint.old", ignore_errors=True)
            (out / "checkpoint").rename(out / "checkpoint.old")
        temporary.rename(out / "checkpoint")
        write_log(out, log)
        plot_curves(out, log)
    accelerator.wait_for_everyone()


def _save_actor(folder, run, weights):
    """The actor and the tokenizer in Hugging Face's format, in place of what was there."""
    actor = run.model.actor
    names = [name for name, _ in actor.named_parameters()]  # tied weights once
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    actor.save_pretrained(temporary, state_dict={name: weights[f"actor.{name}"] for name in names})
    run.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def is_best(lines, every):
    """Whether more training episodes succeeded since the last save than between any two before."""
    successes = [
        mean(line["success"] for line in lines[start : start + every])
        for start in range(0, len(lines), every)
    ]
    return successes[-1] > max(successes[:-1], default=-1)


def load_checkpoint(out, run):
    """Load the last readable checkpoint into the run -> (iteration, log); (0, empty) for none.

    ConfigError where checkpoints exist and none can be read.
    """
    damaged = []
    for folder in (out / "checkpoint", out / "checkpoint.old"):
        if not folder.exists():
            continue
        try:
            saved = json.loads((folder / "run.json").read_text())
            run.accelerator.load_state(str(folder))
            return saved["iteration"], saved["log"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            pickle.UnpicklingError,
            SafetensorError,
        ):
            damaged.append(folder)
            tqdm.write(f"warning: {folder} is damaged: trying the one before")
    if damaged:
        raise ConfigError(
            f"no checkpoint of {out} can be read: give another --out, or remove "
            f"{' and '.join(map(str, damaged))} to begin anew"
        )
    return 0, {"lines": [], "evals": []}


def write_log(out, log):
    """metrics.jsonl and evals.jsonl, each replaced as a whole."""
    for name, part in {"metrics.jsonl": "lines", "evals.jsonl": "evals"}.items():
        temporary = Path(out) / "log.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in log[part]))
        temporary.replace(Path(out) / name)
