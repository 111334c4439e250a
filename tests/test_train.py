"""train.py as a user runs it: whole runs, killed runs, full disks, refusals. In this process where
that is enough, else in one of its own."""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import eval as evaluation
import hiper
import train
from config import ConfigError
from conftest import tiny_config
from script_tools import (
    FLAGS,
    ROOT,
    actor_of,
    assert_same_run,
    assert_user_error,
    environment,
    flags,
    metrics_of,
    saved_iteration,
    saved_weights,
    script,
    tree,
)
from support import checkpoint, cloning, files
from support.arguments import read_config
from support.check_config import check_processes
from support.checkpoint import is_best
from support.cloning import HEADS
from support.distributed import make_accelerator, prepare
from support.loading import load_policy, load_run, make_optimizer
from update_tools import make_run, plain_config, same, sharded_accelerator, steady

pytestmark = pytest.mark.usefixtures("on_the_cpu")


# ---- a whole run -------------------------------------------------------------------------------


def test_training_writes_what_it_promises(trained):
    assert {path.name for path in trained.out.iterdir()} - {"curve.png"} == {
        "config.json",
        "metrics.jsonl",
        "evals.jsonl",
        "checkpoint",
        "checkpoint.old",
        "actor",
        "best",
        "start",
        "episodes.html",
        "lock",
    }
    settings = json.loads((trained.out / "config.json").read_text())
    versions = settings.pop("versions")
    assert {"python", "torch", "transformers", "accelerate", "numpy"} <= versions.keys()
    assert versions["torch"] == torch.__version__
    assert settings.pop("counts") == {"processes": 1, "threads": 1}
    assert settings == dataclasses.asdict(read_config(flags("run")))
    assert settings.items() >= {**FLAGS, "out": "run"}.items()
    if "curve.png" in os.listdir(trained.out):
        assert (trained.out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for word in ("task ", "A_subgoal", "A_action"):  # one episode in full
        assert word in trained.said
    assert "settings of tiny.yaml; all in run" in trained.said
    assert "unseen, 6 tasks, temperature 0.4, iteration 3" in trained.said
    for word in ("Traceback", "Warning", "WARNING"):
        assert word not in trained.said


def test_metrics_have_every_key(trained):
    lines = metrics_of(trained.out)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert set(line) >= {
            "success",
            "success_by_type",
            "episode_length",
            "switches_per_episode",
            "segment_length",
            "valid_format_rate",
            "policy_loss",
            "value_loss",
            "kl_to_reference",
            "clip_fraction",
            "entropy",
            "explained_variance",
            "seconds",
            "turns_per_second",
        }
        assert set(line["explained_variance"]) == {"high", "low", "switch"}
        assert set(line["seconds"]) >= {"rollout", "score", "update"}
        assert line["episodes"] == 4
        assert 1 <= line["episode_length"] <= 18
        assert all(math.isfinite(value) for value in steady(line).values())
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert all(share <= 1 for share in line["explained_variance"].values())
    # the first step is the critic's
    assert abs(lines[0]["kl_to_reference"]) < 1e-6
    assert abs(lines[1]["kl_to_reference"]) < 1e-6 < lines[2]["kl_to_reference"]


def test_the_actor_is_a_hugging_face_model_with_the_training_s_tokenizer(trained):
    tokenizer, start = (
        AutoTokenizer.from_pretrained(trained.out / name) for name in ("actor", "start")
    )
    texts = [
        "Task: put a hot mug in desk.\nDawn. At drawer 1 closed: nothing. Hold mug 2 hot. "
        "Unseen box 1.",
        "é 苹果  two  spaces\n",
        hiper.format_response(True, "find mug", "go to desk 1"),
    ]
    assert tokenizer(texts)["input_ids"] == start(texts)["input_ids"]
    assert len(tokenizer) == len(start)
    assert [tokenizer.decode(ids) for ids in tokenizer(texts)["input_ids"]] == texts
    assert len(tokenizer("<subgoal>")["input_ids"]) == 1
    assert tokenizer.eos_token_id == start.eos_token_id
    assert tokenizer.pad_token_id == start.pad_token_id
    assert tokenizer.pad_token_id is not None
    saved = saved_weights(trained.out / "checkpoint")
    actor = actor_of(trained.out)
    untied = [name for name in actor if f"actor.{name}" in saved]
    assert {*actor} - {*untied} <= {"lm_head.weight"}  # tied weights may be saved once
    assert all(torch.equal(actor[name], saved[f"actor.{name}"]) for name in untied)
    begun = AutoModelForCausalLM.from_pretrained(trained.out / "start").state_dict()
    assert not same(actor, begun)


def test_the_same_command_again_does_no_harm(trained):
    before = tree(trained.out)
    done = script("train.py", *flags("run"), cwd=trained.home)
    assert done.code == 0, done.err
    after = tree(trained.out)
    assert after.keys() == before.keys()
    for name in ("metrics.jsonl", "config.json", "actor/model.safetensors", "actor/tokenizer.json"):
        assert after[name] == before[name], name
    assert "nothing is left to do" in done.out + done.err
    assert "Traceback" not in done.err


# ---- stopped runs ------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop(*_, **__):
    raise Stop


def test_a_run_stopped_between_iterations_goes_on_as_if_it_had_not(trained, stopped):
    """Twice: before the first checkpoint, and after one."""
    train_iteration = train.train_iteration
    for last in (0, 2):

        def fragile(run, iteration, last=last):
            if iteration >= last:
                raise Stop
            return train_iteration(run, iteration)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_iteration", fragile)
            with pytest.raises(Stop):
                train.main(flags(stopped))
    assert saved_iteration(stopped / "checkpoint") == 2
    torch.manual_seed(5)
    random.seed(5)
    train.main(flags(stopped))
    assert_same_run(stopped, trained.out)


def test_fewer_iterations_than_are_done_are_refused(trained, tmp_path, capfd):
    """An evaluation under a smaller number would be a false one."""
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    before = tree(out)
    with pytest.raises(SystemExit) as exit:
        train.main(flags(out, iterations=2))
    assert exit.value.code == 2
    assert (
        capfd.readouterr().err
        == f"error: {out} has 3 iterations already, more than --iterations 2\n"
    )
    assert tree(out) == before


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained, stopped):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(stopped)],
        env=environment(),
        cwd=stopped.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.time() + 120
        while (
            process.poll() is None
            and not (stopped / "metrics.jsonl").exists()
            and time.time() < limit
        ):
            time.sleep(0.02)
        time.sleep(random.random())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    train.main(flags(stopped))
    assert_same_run(stopped, trained.out)


# What comes up when the disk is full: Python's open, torch's zip writer, safetensors.
FULL = [
    (torch, "save", OSError(errno.ENOSPC, "No space left on device")),
    (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")),
    (safetensors.torch, "serialize_file", SafetensorError("I/O error: No space left on device")),
    (Path, "write_text", OSError(errno.ENOSPC, "No space left on device")),
]


def test_no_space_left(trained, stopped, monkeypatch, capfd):
    """Exit code 2 and one sentence. The checkpoint of before still loads, and with room again the
    run goes on from it."""
    save_checkpoint = checkpoint.save_checkpoint
    for owner, name, error in FULL:

        def write_half(things, file, *_, error=error, **__):
            file = file if isinstance(things, (dict, list)) else things
            with open(file, "wb") as half:
                half.write(b"half")
            raise error

        def on_a_full_disk(out, run, iteration, log, owner=owner, name=name, write=write_half):
            with pytest.MonkeyPatch.context() as patch:
                if iteration == 2:
                    patch.setattr(owner, name, write)
                save_checkpoint(out, run, iteration, log)

        monkeypatch.setattr(checkpoint, "save_checkpoint", on_a_full_disk)
        capfd.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(files, "has_room", lambda folder: False)
            train.main(flags(stopped))
        err = capfd.readouterr().err
        said = [line for line in err.splitlines() if line.startswith(("error:", "Traceback"))]
        assert exit.value.code == 2
        assert len(said) == 1
        assert "room" in said[0]
        assert "same command" in said[0]
        assert saved_iteration(stopped / "checkpoint") == 1
        assert actor_of(stopped)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    train.main(flags(stopped))
    assert_same_run(stopped, trained.out)


SUCCESSES = (0.1, 0.3, 0.5, 0.0, 0.2)  # between saves after 2, 4 and 5: 0.2, 0.25, 0.2


def test_the_best_actor_is_that_of_the_save_before_which_most_succeeded(
    trained, stopped, monkeypatch, capsys, tmp_path
):
    """On average, in training. Stopped wherever, it is the same, and eval.py plays it."""
    train_iteration = train.train_iteration
    stops = [3, 4]

    def given(run, iteration):
        if stops and iteration == stops[0]:
            stops.pop(0)
            raise Stop
        metrics, *rest = train_iteration(run, iteration)
        return {**metrics, "success": SUCCESSES[iteration]}, *rest

    monkeypatch.setattr(train, "train_iteration", given)
    settings = json.loads((stopped / "config.json").read_text())
    settings.update(iterations=5, save_every=2)
    (stopped / "config.json").write_text(json.dumps(settings))
    for step in (2, 4, 5):
        with pytest.raises(Stop) if stops else nullcontext():
            train.main(flags(stopped, iterations=5, save_every=2))
        folders = [stopped / name for name in ("checkpoint", "checkpoint.old")]
        saved = {saved_iteration(f): saved_weights(f) for f in folders if f.exists()}
        assert max(saved) == step
        best = saved[min(step, 4)]
        names = [name.removeprefix("actor.") for name in best if name.startswith("actor.")]
        actor = actor_of(stopped, "best")
        assert all(torch.equal(actor[name], best[f"actor.{name}"]) for name in names)
    assert not same(actor_of(stopped, "best"), actor_of(stopped))
    capsys.readouterr()
    evaluation.main([str(stopped / "best"), "--episodes", "2"])
    assert "checkpoint best" in capsys.readouterr().out
    lines = [{"success": success} for success in SUCCESSES]
    assert [checkpoint.is_best(lines[:n], 2) for n in (2, 4, 5)] == [True, True, False]
    shutil.copytree(stopped, tmp_path / "best")
    evaluation.main([str(tmp_path / "best"), "--episodes", "2"])  # a run of that name is a run
    assert "checkpoint last" in capsys.readouterr().out


def test_a_save_is_whole_at_any_moment(tiny_policy, tiny_tokenizer, tmp_path, monkeypatch):
    """Stop at each step of the disk: a checkpoint of before or after loads, and a second save puts
    everything right."""
    log = {"lines": [{"iteration": 0, "success": 1.0}], "evals": []}
    monkeypatch.setattr(checkpoint, "plot_curves", lambda *_: None)
    accelerator = Accelerator(cpu=True)
    config = plain_config(save_every=1)
    policy, optimizer = prepare(tiny_policy, make_optimizer(tiny_policy, config), accelerator)
    run = make_run(policy, config, accelerator, optimizer, tiny_tokenizer)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    checkpoint.save_checkpoint(tmp_path, run, 1, log)
    for owner, name in (
        (torch, "save"),
        (type(tiny_policy.actor), "save_pretrained"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_text"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(Stop):
                checkpoint.save_checkpoint(tmp_path, run, 2, log)
        with torch.no_grad():
            policy.value_heads.weight.zero_()
        iteration, saved = checkpoint.load_checkpoint(tmp_path, run)
        assert iteration in (1, 2)
        assert saved == log
        assert same(policy.state_dict(), before)
        checkpoint.save_checkpoint(tmp_path, run, 1, log)
        assert same(actor_of(tmp_path), policy.actor.state_dict())
        assert same(actor_of(tmp_path, "best"), actor_of(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} == {
            "actor",
            "best",
            "checkpoint",
            "checkpoint.old",
            "metrics.jsonl",
            "evals.jsonl",
        }
    accelerator.free_memory()


def cut(raw):
    return raw[: len(raw) // 2]


def empty(raw):
    return b""


def altered(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes(3000) + raw[middle + 3000 :]


def damage(out, part, harm):
    names = {"weights": ("model.safetensors", "pytorch_model.bin"), "optimizer": ("optimizer.bin",)}
    [file] = [out / "checkpoint" / n for n in names[part] if (out / "checkpoint" / n).exists()]
    file.write_bytes(harm(file.read_bytes()))


@pytest.mark.parametrize("harm", [cut, empty, altered])
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_damage_is_noticed(trained, tmp_path, capfd, part, harm):
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    damage(out, part, harm)
    folder, saved, damaged = checkpoint._find_checkpoint(out)
    assert (folder, saved["iteration"], damaged) == (
        out / "checkpoint.old",
        2,
        [out / "checkpoint"],
    )
    assert "checkpoint is damaged" in capfd.readouterr().out


@pytest.mark.parametrize("part, harm", [("weights", altered), ("optimizer", cut)])
def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path, capfd, part, harm):
    """The one before is taken, and the run ends as it would have. With none left it says so and
    touches nothing."""
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    damage(out, part, harm)
    train.main(flags(out))
    assert "checkpoint is damaged" in capfd.readouterr().out
    assert_same_run(out, trained.out)
    for name in ("checkpoint", "checkpoint.old"):
        (out / name / "run.json").write_text("junk")
    before = tree(out)
    with pytest.raises(SystemExit) as exit:
        train.main(flags(out))
    assert exit.value.code == 2
    assert tree(out) == before
    assert "error: no checkpoint of" in capfd.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_with_more_iterations(trained, tmp_path, capfd):
    """What does not change what is learnt may change; all else is another run."""
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    with pytest.raises(SystemExit):
        train.main(flags(out, iterations=4, gamma=0.5))
    assert "gamma 0.95 before, 0.5 now" in capfd.readouterr().err
    train.main(flags(out, iterations=4, num_envs=2))
    said = capfd.readouterr().out
    assert "iterations 3 before, 4 now" in said
    assert "the schedule of the learning rate changes" in said
    assert [line["iteration"] for line in metrics_of(out)] == [0, 1, 2, 3]
    assert metrics_of(out)[:3] == metrics_of(trained.out)
    assert json.loads((out / "config.json").read_text())["iterations"] == 4


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("--env moon", "moon"),
        ("--model no/such/model", "no/such/model"),
        ("--model ./nothing", "./nothing"),
        ("--model mine", "mine"),
        ("--learning_rate 1", "--learning_rate"),
        ("--lr much", "much"),
        ("--iteration 4", "'--iterations'"),
        ("typo.yaml", "learning_rate"),
        ("missing.yaml", "missing.yaml"),
        ("broken.yaml", "broken.yaml"),
        ("number.yaml", "number.yaml"),
        ("--iterations 0", "--iterations"),
        ("--episodes 0", "--episodes"),
        ("--num_envs 0", "--num_envs"),
        ("--gamma 1.5", "--gamma"),
        ("--method magic", "magic"),
        ("--critic none", "none"),
        ("--bc_episodes 0", "--bc_episodes"),
        ("--eval_split test", "eval_split"),
        ("--eval_episodes -1", "--eval_episodes"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--history -1", "--history"),
        ("--out run --lr 0.123", "0.123"),
        ("--out mine", "mine"),
        ("--out typo.yaml", "typo.yaml"),
        ("--method grpo --group_size 1", "at least 2"),
        ("--method grpo --group_size 3", "multiple"),
        ("--prompt flat", "no switches"),
        ("--method ppo --segments single", "--method hiper"),
        ("--segments fixed:0", "fixed:K"),
        ("--decisions plan", "--decisions"),
        ("--checklist 2", "--checklist"),
        ("--method grpo --group_size 4 --episodes 0", "--episodes"),
        ('--env_options {"page":true}', "page"),
        ("--optimizer adam", "adamw"),
    ],
)
def test_training_refuses_in_one_sentence(place, capfd, words, said):
    small = [
        word
        for name, value in {**FLAGS, "iterations": 1}.items()
        if f"--{name}" not in words
        for word in (f"--{name}", value)
    ]
    assert said in assert_user_error(train.main, [*words.split(), *small], place, capfd)


@pytest.mark.parametrize(
    "spec, sharded, said", [(None, False, "pip install bitsandbytes"), ("spec", True, "FSDP")]
)
def test_an_optimizer_that_cannot_be_had_is_refused(
    monkeypatch, tmp_path, capsys, spec, sharded, said
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    if sharded:
        monkeypatch.setattr(train, "make_accelerator", lambda *_, **__: sharded_accelerator())
    with pytest.raises(SystemExit) as exit:
        train.main(flags(tmp_path / "run", optimizer="adamw8bit"))
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_processes_than_groups_are_refused(tmp_path):
    many = SimpleNamespace(num_processes=5)
    with pytest.raises(ConfigError, match="5 processes"):
        check_processes(read_config(flags(tmp_path / "run")), many)


def test_the_scripts_themselves_refuse_with_exit_code_2(place):
    before = tree(place)
    for done in (
        script("train.py", "--env", "moon", cwd=place),
        script("eval.py", "mine", cwd=place),
    ):
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert len(done.err.splitlines()) == 1
        assert done.out == ""
    assert tree(place) == before


def test_training_plays_the_first_split_with_the_world_s_options(monkeypatch, tmp_path):
    class Opened(Exception):
        pass

    def open_pool(*words, **options):
        raise Opened(words, options)

    monkeypatch.setattr(envs, "EnvPool", open_pool)
    config = tiny_config(env_options={"max_steps": 3})
    with pytest.raises(Opened) as opened:
        train.train(config, None, tmp_path)
    assert opened.value.args == (("household", "train"), {"max_steps": 3})


# ---- every method ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--method ppo",
        "--method ppo --critic shared",
        "--method grpo --group_size 2",
        "--method rloo --group_size 4",
        "--method gigpo --group_size 2 --prompt flat",
        "--method ppo --prompt flat",
        "--method hgpo --group_size 2",
        "--method gagpo --group_size 2",
        """--method beacon --group_size 2 --env_options {"chain":2,"routine":1,"max_steps":4}""",
        "--switch_advantage closed_form --value_target td0 --normalize per_decision",
        "--critic shared --gradient_checkpointing true --kl_coef 0 --untrained_kl_coef 0",
        """--segments fixed:2 --keep_penalties {"turn":0.1,"drift":0.1} --checklist 0.5""",
        "--decisions switch,subgoal --segments every-turn",
    ],
)
def test_every_method_trains(trained, tmp_path, words):
    """One iteration from another run's clone ends well, and eval.py reads it."""
    out = tmp_path / "run"
    shutil.copytree(trained.out / "start", out / "start")
    before = tree(out / "start")
    train.main([*flags(out, iterations=1, critic_warmup=0, eval_episodes=2), *words.split()])
    assert tree(out / "start") == before  # the clone that was there is used
    assert actor_of(out)
    [line] = metrics_of(out)
    method = words.split()[1] if "--method" in words else "hiper"
    heads = {"ppo": {"high"}, "hiper": {"high", "low", "switch"}}.get(method, set())
    assert set(line["explained_variance"]) == heads
    assert line["episodes"] == 4
    assert (line["value_loss"] > 0) == bool(heads)
    evaluation.main([str(out), "--episodes", "2"])


def test_very_few_demonstrations(tmp_path):
    """Fewer turns than a batch of cloning: they are cloned all the same."""
    config = tiny_config(**{**FLAGS, "bc_episodes": 1})
    with envs.EnvPool("household", "train", workers=1) as pool:
        cloning.clone_expert(config, tmp_path, pool, make_accelerator())
    assert (tmp_path / "start" / "config.json").exists()


def test_moments_in_8_bits_learn_and_go_on(trained, tmp_path):
    """bitsandbytes' AdamW in PyTorch's place: the whole script, and a run that is taken up again
    ends with the same bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole = tmp_path / "whole"
    again = tmp_path / "again"
    shutil.copytree(trained.out / "start", whole / "start")
    train.main(flags(whole, optimizer="adamw8bit"))
    saved = torch.load(whole / "checkpoint" / "optimizer.bin", weights_only=True)
    moments = [part for state in saved["state"].values() for part in state.values()]
    nested = [value for part in moments if isinstance(part, dict) for value in part.values()]
    tensors = [value for value in [*moments, *nested] if torch.is_tensor(value)]
    assert any(value.dtype == torch.uint8 for value in tensors)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint")
    (again / "checkpoint.old").rename(again / "checkpoint")
    begun = saved_weights(again / "checkpoint")
    train.main(flags(again, optimizer="adamw8bit"))
    ours = saved_weights(again / "checkpoint")
    assert saved_iteration(again / "checkpoint") == 3
    assert same(ours, saved_weights(whole / "checkpoint"))
    assert not same(begun, ours)


def test_training_begins_with_the_clone_s_value_heads(trained):
    config, *_ = load_run(trained.out)
    policy, *_ = load_policy(config, trained.out, None, Accelerator(cpu=True))
    heads = safetensors.torch.load_file(trained.out / "start" / HEADS)
    assert heads["weight"].abs().max() > 0
    assert same(policy.value_heads.state_dict(), heads)


def test_of_equal_saves_the_first_is_the_best():
    lines = [{"success": success} for success in (0.25, 0.25, 0.5, 0.5)]
    assert [is_best(lines[:n], 1) for n in (1, 2, 3, 4)] == [True, False, True, False]
