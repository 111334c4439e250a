"""What a run survives: NaN weights, flipped bits, kills between two files, signals, a second run,
full disks. docs/reliability.md has the table; tests/long/ the longer forms."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import envs
import soak
import train
from config import ConfigError
from conftest import tiny_config
from random_play import play_episode
from reliability_tools import LOG, can_mount, fill_disks, kill_at_operations, make_tiny_run
from script_tools import (
    FLAGS,
    ROOT,
    actor_of,
    assert_same_run,
    environment,
    flags,
    metrics_of,
    saved_iteration,
    script,
    tree,
)
from support import checkpoint, cloning, files, stopping
from support.distributed import prepare
from support.loading import make_optimizer
from support.metrics import format_episode
from update_tools import make_run, plain_config, same

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def saved(tiny_policy, tiny_tokenizer, tmp_path, monkeypatch):
    """A run with two checkpoints, of iterations 1 and 2 -> (run, its folder)."""
    monkeypatch.setattr(checkpoint, "plot_curves", lambda *_: None)
    accelerator = Accelerator(cpu=True)
    config = plain_config()
    policy, optimizer = prepare(tiny_policy, make_optimizer(tiny_policy, config), accelerator)
    run = make_run(policy, config, accelerator, optimizer, tiny_tokenizer)
    for iteration in (1, 2):
        checkpoint.save_checkpoint(tmp_path, run, iteration, LOG)
    yield run, tmp_path
    accelerator.free_memory()


# ---- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(saved, bad):
    run, out = saved
    before = tree(out)
    with torch.no_grad():
        run.policy.value_heads.weight[0, 0] = bad
    with pytest.raises(FloatingPointError, match="value_heads.weight has become NaN or infinite"):
        checkpoint.save_checkpoint(out, run, 3, LOG)
    assert tree(out) == before


def test_every_flipped_bit_is_noticed(saved, capsys):
    """In any file, at any place: the checkpoint before is loaded, with a sentence that names the
    file. Flipped back, the newest is loaded again."""
    run, out = saved

    def load_the_one_before():
        assert checkpoint.load_checkpoint(out, run)[0] == 1
        (out / "checkpoint").rename(out / "checkpoint.old")  # as it was
        (out / "checkpoint.stale-0").rename(out / "checkpoint")

    rng = random.Random(0)
    paths = [path for path in sorted((out / "checkpoint").rglob("*")) if path.is_file()]
    assert {path.name for path in paths} > {"run.json", "optimizer.bin"}
    for path in paths:
        raw = path.read_bytes()
        for place in [0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(3))]:
            harmed = bytearray(raw)
            harmed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(harmed)
            capsys.readouterr()
            load_the_one_before()
            said = capsys.readouterr().out
            assert "checkpoint is damaged" in said
            assert path.name in said
        path.write_bytes(raw)
        assert checkpoint.load_checkpoint(out, run)[0] == 2
        path.unlink()
        load_the_one_before()
        path.write_bytes(raw)


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(saved):
    run, out = saved

    def load_state(folder, strict):
        raise RuntimeError("size mismatch")

    run.accelerator.load_state = load_state
    with pytest.raises(ConfigError, match="whole but does not fit this run: size mismatch"):
        checkpoint.load_checkpoint(out, run)


def test_a_checkpoint_runs_no_code(saved):
    """Someone has put a program into the optimizer's state, and a checksum that fits."""
    run, out = saved
    place = out / "ran"

    class Program:
        def __reduce__(self):
            return place.touch, ()

    file = out / "checkpoint" / "optimizer.bin"
    torch.save(Program(), file)
    content = checkpoint._read_run(out / "checkpoint")
    content["files"]["optimizer.bin"] = files.sha256(file)
    checkpoint._write_run(out / "checkpoint", content)
    with pytest.raises(ConfigError, match="whole but does not fit this run"):
        checkpoint.load_checkpoint(out, run)
    assert not place.exists()


def test_files_are_synced_before_they_take_a_place(saved, monkeypatch):
    """Each file of the checkpoint and of the actor, and their folders, before the rename; the
    folder that holds the names, after it."""
    run, out = saved
    synced = []
    renamed = {}
    monkeypatch.setattr(files, "sync", lambda path: synced.append(str(path)))
    rename = type(out).rename

    def watched(path, target):
        renamed[f"{path.name} {target.name}"] = list(synced)
        return rename(path, target)

    monkeypatch.setattr(type(out), "rename", watched)
    checkpoint.save_checkpoint(out, run, 3, LOG)
    for name, file in (("checkpoint", "optimizer.bin"), ("actor", "model.safetensors")):
        before = renamed[f"{name}.tmp {name}"]
        assert {str(out / f"{name}.tmp"), str(out / f"{name}.tmp" / file)} <= set(before)
    assert str(out / "checkpoint.tmp" / "run.json") in renamed["checkpoint.tmp checkpoint"]
    assert str(out) in synced[len(renamed["checkpoint.tmp checkpoint"]) :]


def test_a_clone_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    """What a clone that was cut short has left is not part of it."""
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    (tmp_path / "start.tmp").mkdir()
    (tmp_path / "start.tmp" / "half").write_text("x")
    with envs.EnvPool("household") as pool:
        cloning.clone_expert(tiny_config(bc_episodes=2), tmp_path, pool, Accelerator(cpu=True))
    assert {"model.safetensors", "tokenizer.json", "start.tmp"} <= set(synced)
    assert (tmp_path / "start" / "model.safetensors").exists()
    assert not (tmp_path / "start" / "half").exists()


def test_a_folder_that_cannot_be_removed_does_not_stop_a_save(saved, monkeypatch):
    """On NFS a folder with an open file stays. It is put aside, and removed once it can be."""
    run, out = saved
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for iteration in (3, 4):
        checkpoint.save_checkpoint(out, run, iteration, LOG)
        assert saved_iteration(out / "checkpoint") == iteration
        assert saved_iteration(out / "checkpoint.old") == iteration - 1
    assert list(out.glob("checkpoint.old.stale-*"))
    assert same(actor_of(out), run.model.actor.state_dict())
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoint.save_checkpoint(out, run, 5, LOG)
    assert not list(out.glob("*.stale-*"))


# ---- killed between two files ------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill(*_, **__):
    raise Killed


def test_killed_in_the_save_after_a_damaged_checkpoint_the_whole_one_is_left(saved, monkeypatch):
    """The newest is damaged, the one before is loaded, and the next save ends between its two
    swaps."""
    run, out = saved
    (out / "checkpoint" / "optimizer.bin").write_bytes(b"junk")
    assert checkpoint.load_checkpoint(out, run)[0] == 1
    assert saved_iteration(out / "checkpoint") == 1
    swap_in = checkpoint.swap_in

    def killed_at_the_second(new, place):
        if place.name == "checkpoint":
            raise Killed
        swap_in(new, place)

    monkeypatch.setattr(checkpoint, "swap_in", killed_at_the_second)
    with pytest.raises(Killed):
        checkpoint.save_checkpoint(out, run, 2, LOG)
    monkeypatch.setattr(checkpoint, "swap_in", swap_in)
    assert checkpoint.load_checkpoint(out, run)[0] == 1
    checkpoint.save_checkpoint(out, run, 2, LOG)
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint", "checkpoint.old"}


def test_killed_in_the_last_evaluation_nothing_is_trained_again(trained, stopped, monkeypatch):
    evaluate_run = train.evaluate_run
    monkeypatch.setattr(train, "evaluate_run", lambda *words: words[-1] and kill())
    shutil.copytree(trained.out / "checkpoint.old", stopped / "checkpoint")
    with pytest.raises(Killed):
        train.main(flags(stopped))
    assert saved_iteration(stopped / "checkpoint") == 3
    monkeypatch.setattr(train, "evaluate_run", evaluate_run)
    monkeypatch.setattr(train, "train_iteration", kill)
    shutil.copytree(trained.out / "best", stopped / "best", dirs_exist_ok=True)
    train.main(flags(stopped))
    assert_same_run(stopped, trained.out)


@pytest.mark.parametrize("name", ["write_log", "plot_curves"])
def test_killed_between_checkpoint_and_log(trained, stopped, monkeypatch, name):
    """The next start writes log and picture from the checkpoint."""
    drawn = []
    monkeypatch.setattr(checkpoint, "plot_curves", lambda out, log: drawn.append(log["evals"]))
    save_log = checkpoint.save_log

    def killed_early(*words):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, kill)
            save_log(*words)

    monkeypatch.setattr(checkpoint, "save_log", killed_early)
    shutil.copytree(trained.out / "checkpoint.old", stopped / "checkpoint")
    with pytest.raises(Killed):
        train.main(flags(stopped))
    monkeypatch.setattr(checkpoint, "save_log", save_log)
    train.main(flags(stopped))
    evals = [json.loads(line) for line in (stopped / "evals.jsonl").read_text().splitlines()]
    assert [result["iteration"] for result in evals] == [0, 3]
    assert len(metrics_of(stopped)) == 3
    assert drawn[-1] == evals


# ---- signals -----------------------------------------------------------------------------------


def start(out, **changes):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(out, **changes)],
        env=environment(),
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    limit = time.time() + 300
    while process.poll() is None and not path.exists() and time.time() < limit:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_iteration(trained, stopped, monkeypatch, capfd, number):
    """Saved, with a sentence and the shell's exit code; the same command goes on from there, and
    the end is that of a run that was not stopped."""
    train_iteration = train.train_iteration

    def signalled(run, iteration):
        if iteration == 1:
            os.kill(os.getpid(), number)
        return train_iteration(run, iteration)

    words = flags(stopped, save_every=3)
    settings = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps({**settings, "save_every": 3}))
    before = signal.getsignal(number)
    monkeypatch.setattr(train, "train_iteration", signalled)
    with pytest.raises(SystemExit) as exit:
        train.main(words)
    assert exit.value.code == 128 + number
    said = capfd.readouterr().err
    assert "stopping after this iteration" in said
    assert said.splitlines()[-1] == "stopped: the same command goes on from here"
    assert saved_iteration(stopped / "checkpoint") == 2
    assert not (stopped / "best").exists()  # no save that a run without the signal has not
    assert signal.getsignal(number) is before
    monkeypatch.setattr(train, "train_iteration", train_iteration)
    train.main(words)
    assert same(actor_of(stopped), actor_of(trained.out))
    assert len(metrics_of(stopped)) == 3


@pytest.mark.parametrize("done", [2, 3])
def test_a_signal_while_it_saves_ends_the_run_too(stopped, monkeypatch, capfd, done):
    """Without another iteration, or the last evaluation."""
    save_checkpoint = checkpoint.save_checkpoint

    def signalled(out, run, iteration, log):
        save_checkpoint(out, run, iteration, log)
        if iteration == done:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save_checkpoint", signalled)
    with pytest.raises(SystemExit) as exit:
        train.main(flags(stopped))
    assert exit.value.code == 143
    assert capfd.readouterr().err.endswith("stopped: the same command goes on from here\n")
    assert len(metrics_of(stopped)) == done
    assert len((stopped / "evals.jsonl").read_text().splitlines()) == 1


TWICE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
def signalled(run, iteration):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
train.train_iteration = signalled
train.main(sys.argv[1:])
"""


def test_the_second_signal_ends_the_run_at_once(trained, stopped):
    """The process ends in the middle of the iteration; the last checkpoint is what it was."""
    shutil.copytree(trained.out / "checkpoint.old", stopped / "checkpoint")
    before = tree(stopped / "checkpoint")
    code = TWICE.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, *flags(stopped)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130
    assert done.stderr.count("stopping after this iteration") == 1
    assert "Traceback" not in done.stderr
    assert tree(stopped / "checkpoint") == before


def test_a_signal_in_the_cloning_says_what_is_lost(tmp_path):
    out = tmp_path / "run"
    process = start(out, bc_episodes=5000)
    try:
        wait_for(out / "config.json", process)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "stopped before anything was saved" in said
    assert "Traceback" not in said
    assert {path.name for path in out.iterdir()} <= {"config.json", "lock"}


def test_all_processes_agree_to_stop(tmp_path, monkeypatch):
    """One process alone received the signal."""
    monkeypatch.setattr(stopping, "gather_object", lambda mine: [0, *mine, signal.SIGTERM])
    stopped = stopping.Stopping(tmp_path, Accelerator(cpu=True)).asked()
    assert stopped.code == 143


# ---- two runs in one folder --------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(trained, stopped, capfd):
    """Nothing is touched. The lock of a run that was killed is no obstacle."""
    shutil.copytree(trained.out / "checkpoint.old", stopped / "checkpoint")
    first = start(stopped, iterations=500)
    try:
        wait_for(stopped / "metrics.jsonl", first)
        with pytest.raises(SystemExit) as exit:
            train.main(flags(stopped, iterations=500))
        assert exit.value.code == 2
        assert "another run is writing to" in capfd.readouterr().err
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (stopped / "lock").exists()
    train.main(flags(stopped, iterations=saved_iteration(stopped / "checkpoint")))


def test_where_there_are_no_locks_a_run_is_not_stopped(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    checkpoint.lock(tmp_path).close()


# ---- the same run again ------------------------------------------------------------------------


def test_the_order_of_sets_shapes_no_run(trained, tmp_path):
    """Another process, in which Python hashes text in another way: the same clone, the same run."""
    done = script("train.py", *flags("run"), cwd=tmp_path, PYTHONHASHSEED="1")
    assert done.code == 0, done.err
    assert tree(tmp_path / "run" / "start") == tree(trained.out / "start")
    assert_same_run(tmp_path / "run", trained.out)


def test_the_lock_file_is_that_of_the_requirements():
    """The same versions, a hash for each package, and no address of an index."""
    text = (ROOT / "requirements.lock").read_text()
    wanted = re.findall(r"^\S+==[^\s#]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    packages = re.split(r"\n(?=[a-z])", text)[1:]
    assert {pin.lower() for pin in wanted} <= {package.split()[0] for package in packages}
    assert len(wanted) == 8
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in text
    assert "--index" not in text


# ---- hostile text ------------------------------------------------------------------------------


def test_nothing_of_a_world_steers_the_terminal():
    """Control characters of observations, tasks and actions are shown, not sent."""
    text = "\x1b[2J\x1b]0;title\x07 red\r\u202e\ud800"
    turn = SimpleNamespace(
        is_segment_start=True,
        subgoal=text,
        observation=text + "\nshelf é",
        decision=SimpleNamespace(action=text, error=text),
    )
    episode = SimpleNamespace(index=0, task=text, task_type=text, success=True, turns=[turn])
    shown = format_episode(episode, {"A_subgoal": [1.0], "A_action": [1.0]})
    assert not set("\x1b\x07\r\u202e\ud800") & set(shown)
    assert "\\x1b[2J" in shown
    assert "\nshelf é" in shown


# ---- bounded forms of tests/long, tests/random_play.py and tests/soak.py ------------------------


@pytest.mark.parametrize("world, episodes", [("household", 150), ("webshop", 25)])
def test_random_play(world, episodes, monkeypatch):
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)  # made-up products
    if world == "webshop":
        pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    played = Counter()
    for number in range(episodes):
        played.update(play_episode(world, number))
    assert played["won"] and played["steps"] > played["won"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_a_short_soak(tmp_path, monkeypatch):
    """A few iterations, seen from outside: nothing is left, and no file stays open."""
    monkeypatch.setattr(soak, "SETTINGS", {**FLAGS, "iterations": 8})
    rows, code, left = soak.soak(60, tmp_path / "run", ["--eval_episodes", "2"])
    seen = soak.summarize(rows, code, left)
    assert (seen["exit_code"], seen["processes_left"]) == (0, 0)
    assert seen["files"][1] <= seen["files"][0]
    assert seen["processes"][1] <= seen["processes"][0]


def test_the_soak_sees_what_stays_open_and_not_what_is_open_for_a_moment():
    times = [(iteration, part) for iteration in range(1, 10) for part in range(5)]

    def files(count):
        fixed = {"memory": 500.0, "threads": 4, "processes": 1}
        rows = [{"iteration": i, "files": count(i, part), **fixed} for i, part in times]
        before, after = soak.summarize(rows, 0, [])["files"]
        return after - before

    assert files(lambda iteration, part: 8 + 3 * (part == 4)) == 0
    assert files(lambda iteration, part: 4 if iteration < 3 else 8) == 0  # what the run needs
    assert files(lambda iteration, part: 8 + iteration // 3) == 1


@pytest.fixture
def tiny_run(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint, "plot_curves", lambda *_: None)
    run = make_tiny_run(tiny_tokenizer)
    yield run
    run.accelerator.free_memory()


def test_killed_at_file_operations_a_checkpoint_is_left(tiny_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for iteration in (1, 2):
        checkpoint.save_checkpoint(out, tiny_run, iteration, LOG)
    iterations, _ = kill_at_operations(out, tiny_run, random.Random(0).sample(range(1, 60), 8))
    assert set(iterations) <= {2, 3}


def test_real_disks_that_are_full(tiny_run, tmp_path):
    """One sentence, and what was saved before can be loaded."""
    if not can_mount(tmp_path):
        pytest.skip("may not mount a disk")
    results = fill_disks(tmp_path, tiny_run, (4, 300, 1100, 2900, 20_000))
    assert results[4] == 0
    assert results[20_000] == 3


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk is full: make room"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x (Read-only file system): make it"),
        (OSError(errno.EACCES, "Permission denied"), "(Permission denied): make it writable"),
        (Exception("No space left on device (os error 28)"), "disk is full"),
    ],
)
def test_what_is_said_of_a_disk(tmp_path, error, said):
    with pytest.raises(ConfigError) as raised, files.disk_errors(tmp_path):
        raise error
    assert said in str(raised.value)
    assert str(raised.value).endswith("the same command again; it goes on from the last checkpoint")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),  # the disk has room
        OSError(errno.EACCES, "Permission denied", "/elsewhere/data.json"),  # not ours to write
        FileNotFoundError(errno.ENOENT, "No such file"),
    ],
)
def test_other_errors_are_not_called_a_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as raised, files.disk_errors(tmp_path):
        raise error
    assert raised.value is error
