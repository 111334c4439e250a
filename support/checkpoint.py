"""The files of a run, so that one that was killed goes on as if it had not been.

    config.json                     the settings, the versions of what the run is made with, and
                                    how many processes and threads it has
    checkpoint/                     Accelerate's state (weights, optimizer); run.json has iteration,
                                    log and checksums; checkpoint.old/ is the one before
    actor/, best/                   the actor in Hugging Face's format: of the last save, and of the
                                    save before which most training episodes succeeded
    metrics.jsonl, evals.jsonl      the log; curve.png shows it
    lock                            empty; locked while the run lives

Each is complete and on the disk before it takes its predecessor's place. Random states need no
saving: every iteration seeds itself.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import pickle
import platform
import shutil
from importlib import metadata
from pathlib import Path
from statistics import mean

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from config import FIELDS, ConfigError
from support.arguments import read_settings
from support.commit import checked_out_commit
from support.files import make_way, remove_stale, sha256, swap_in, write_whole
from support.loading import start_folder
from support.lora import save_merged
from support.model_check import find_not_finite
from support.plots import plot_curves

# Settings that do not change what is learnt: a run goes on with others.
FREE = {"out", "iterations", "micro_batch_tokens", "num_envs", "save_every", "eval_episodes"}
# Settings that shape the clone in OUT/start. Until the first checkpoint only these must stay.
CLONED = {"env", "env_options", "model", "prompt", "history", "short_prompt", "max_prompt_tokens"}
CLONED |= {"seed", "gamma", "bc_episodes", "lora", "attention"}


@contextlib.contextmanager
def run_dir(out, config, accelerator):
    """The folder of a run, kept from other runs during the block. Called by all processes."""
    held = refusal = None
    if accelerator.is_main_process:
        try:
            held = prepare_run_dir(out, config, accelerator.num_processes)
        except ConfigError as error:
            refusal = str(error)
    [refusal] = broadcast_object_list([refusal])
    if refusal:
        raise ConfigError(refusal)
    with held or contextlib.nullcontext():
        yield


def prepare_run_dir(out, config, processes=1):
    """Make the folder of a new run, or accept the folder of the same run -> its locked file.

    ConfigError, with nothing touched, otherwise. A new run's folder may hold `start/`, the clone
    of another run, from which it then begins.
    """
    try:
        return _prepare_run_dir(out, config, processes)
    except (OSError, ValueError) as error:  # no permission, a file in the way, a name too long
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {out} cannot be made or written: {reason}") from None


def _prepare_run_dir(out, config, processes):
    mine = dataclasses.asdict(config)
    counts = {"processes": processes, "threads": torch.get_num_threads()}
    path = out / "config.json"
    if path.is_file():
        differs = differences(path, mine)
        fixed = fixed_settings(out)
        refused = [text for name, text in differs.items() if name in fixed]
        if refused:
            raise ConfigError(
                f"{out} holds another run ({'; '.join(refused)}): give another --out, or remove it"
            )
        done = _saved_iterations(out)
        if config.iterations < done:
            raise ConfigError(
                f"{out} has {done} iterations already, more than --iterations {config.iterations}"
            )
        if differs:
            text = "; ".join(differs.values())
            if "iterations" in differs and config.final_lr_fraction < 1:
                text += ". With --iterations the schedule of the learning rate changes"
            tqdm.write(f"{out} goes on with other settings: {text}")
        if fixed:
            say_other_counts(out, json.loads(path.read_text()).get("counts", counts), counts)
    elif out.exists():
        names = {"config.tmp", "start", "lock"}
        if not out.is_dir() or {entry.name for entry in out.iterdir()} - names:
            raise ConfigError(f"{out} exists and is not a run of this script: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    record = {**mine, "versions": versions(), "counts": counts}
    write_whole(path, json.dumps(record, indent=1))
    return held


def say_other_counts(out, before, now):
    """Say where a run goes on with other numbers of processes or threads."""
    others = [
        f"{count} {name} ({before.get(name)} before)"
        for name, count in now.items()
        if count != before.get(name)
    ]
    if others:
        tqdm.write(
            f"warning: {out} goes on with {' and '.join(others)}. From here on it is another run: "
            "sums are added in another order, and each process draws its own actions"
        )


def versions():
    """{package: version} of what a run is made with, and this repository's commit, if any."""
    names = ("torch", "transformers", "accelerate", "numpy")
    found = {"python": platform.python_version()}
    found.update({name: metadata.version(name) for name in names})
    commit = checked_out_commit()
    return {**found, "commit": commit} if commit else found


def lock(out):
    """OUT/lock, open and locked. The lock ends with the process, also where it is killed.

    ConfigError where another run holds it. Where the system has no such locks (Windows, some
    network file systems) nothing is locked.
    """
    file = open(out / "lock", "a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"another run is writing to {out}: wait for its end, stop it, or give another --out"
        ) from None
    except (ImportError, OSError):
        pass
    return file


def differences(path, mine):
    """{setting: what it was and is}. A setting that a later version added had its default."""
    theirs = dataclasses.asdict(read_settings(path))
    return {
        name: f"{name} {theirs[name]!r} before, {value!r} now"
        for name, value in mine.items()
        if theirs[name] != value and name != "out"
    }


def fixed_settings(out):
    """The settings that have shaped what the folder holds."""
    if any((out / name).exists() for name in ("checkpoint", "checkpoint.old")):
        return FIELDS.keys() - FREE
    return CLONED if (out / "start").exists() else set()


def save_checkpoint(out, run, iteration, log):
    """Everything that `load_checkpoint` needs, and the actor. Called by all processes.

    run: train.Run; log: {"lines": metrics of each iteration, "evals": evaluations}.
    FloatingPointError, with nothing written, where a weight is NaN or infinite.
    """
    accelerator, config = run.accelerator, run.config
    temporary = out / "checkpoint.tmp"
    weights = accelerator.get_state_dict(run.policy)
    refuse_not_finite(weights, out)
    if accelerator.is_main_process:
        remove_stale(out)
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    # With torch 2.13 Accelerate's safetensors fail where embedding and output layer are tied.
    accelerator.save_state(str(temporary), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {
            str(path.relative_to(temporary)): sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        _write_run(temporary, {"iteration": iteration, "log": log, "files": files})
        _save_actor(out, "actor", run, weights)
        is_regular = iteration % config.save_every == 0 or iteration == config.iterations
        if is_regular and is_best(log["lines"], config.save_every):
            _save_actor(out, "best", run, weights)
        if (out / "checkpoint").exists():
            swap_in(out / "checkpoint", out / "checkpoint.old")
        swap_in(temporary, out / "checkpoint")
        write_log(out, log)
        plot_curves(out, log)
    accelerator.wait_for_everyone()


def refuse_not_finite(weights, out):
    """FloatingPointError on all processes where a weight of the main process is not finite."""
    [bad] = broadcast_object_list([find_not_finite(weights.items())])
    if bad:
        raise FloatingPointError(
            f"{bad} has become NaN or infinite: it is not saved, and the last checkpoint "
            f"in {out} is what it was. Try a smaller --lr"
        )


def save_log(out, run, log):
    """Another log in the last checkpoint, whose weights stay. Called by all processes."""
    if run.accelerator.is_main_process:
        _write_run(out / "checkpoint", {**_read_run(out / "checkpoint"), "log": log})
        write_log(out, log)
        plot_curves(out, log)
    run.accelerator.wait_for_everyone()


def _save_actor(out, name, run, weights):
    """The actor and the tokenizer in Hugging Face's format, in place of what was there."""
    actor, folder = run.model.actor, out / name
    names = [name for name, _ in actor.named_parameters()]  # tied weights once
    state = {name: weights[f"actor.{name}"] for name in names}
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if run.config.lora:
        save_merged(temporary, start_folder(run.config, out), run.config, state)
    else:
        actor.save_pretrained(temporary, state_dict=state)
    run.tokenizer.save_pretrained(temporary)
    swap_in(temporary, folder)


def is_best(lines, every):
    """Whether more training episodes succeeded since the last save than between any two before."""
    successes = [
        mean(line["success"] for line in lines[start : start + every])
        for start in range(0, len(lines), every)
    ]
    return successes[-1] > max(successes[:-1], default=-1)


def load_checkpoint(out, run):
    """Load the last whole checkpoint into the run -> (iteration, log); (0, empty) for none.

    The log and its picture are written from it, should they be older. A whole one takes the place
    of a damaged newer one, which the next save removes. Called by all processes.
    ConfigError where checkpoints exist and none is whole, or where it does not fit the run.
    """
    accelerator = run.accelerator
    found = _find_checkpoint(out) if accelerator.is_main_process else None
    [(folder, saved, damaged)] = broadcast_object_list([found])
    if folder is None and damaged:
        raise ConfigError(
            f"no checkpoint of {out} can be read: give another --out, or remove "
            f"{' and '.join(map(str, damaged))} to begin anew"
        )
    if folder is None:
        return 0, {"lines": [], "evals": []}
    try:
        accelerator.load_state(str(folder), strict=not run.config.lora)  # frozen: not saved
    except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder} is whole but does not fit this run: {reason}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if damaged:  # else the next save would move it over the whole one
            make_way(out / "checkpoint")
            folder.rename(out / "checkpoint")
        write_log(out, saved["log"])
        plot_curves(out, saved["log"])
    return saved["iteration"], saved["log"]


def _find_checkpoint(out):
    """-> (folder or None, content of its run.json, damaged folders)"""
    damaged = []
    for folder in (out / "checkpoint", out / "checkpoint.old"):
        if folder.exists():
            try:
                content = _read_run(folder)
                _check_files(folder, content["files"])
                return folder, content, damaged
            except (OSError, ValueError) as error:
                damaged.append(folder)
                tqdm.write(f"warning: {folder} is damaged ({error}): trying the one before")
    return None, None, damaged


def _saved_iterations(out):
    """Of the newest checkpoint that can be read; 0 for none."""
    for folder in (out / "checkpoint", out / "checkpoint.old"):
        with contextlib.suppress(OSError, ValueError):
            return _read_run(folder)["iteration"]
    return 0


def _write_run(folder, content):
    """run.json: iteration, log, {file: its checksum}, and the checksum of all that."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    write_whole(folder / "run.json", json.dumps({**content, "sha256": digest}))


def _read_run(folder):
    """The content of run.json. ValueError where it is damaged."""
    try:
        content = json.loads((folder / "run.json").read_text())
        digest = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("run.json cannot be read") from None
    if digest != hashlib.sha256(json.dumps(content).encode()).hexdigest():
        raise ValueError("run.json is not what was written")
    return content


def _check_files(folder, files):
    """ValueError where one of {file: its checksum} is damaged. It reads all of them."""
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")


def write_log(out, log):
    """metrics.jsonl and evals.jsonl, each replaced as a whole."""
    for name, part in {"metrics.jsonl": "lines", "evals.jsonl": "evals"}.items():
        write_whole(Path(out) / name, "".join(json.dumps(line) + "\n" for line in log[part]))
