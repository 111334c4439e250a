"""--track: the log in TensorBoard or another tracker, without effect on what is learnt."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import train
from config import ConfigError
from script_tools import assert_same_run, assert_user_error, flags, metrics_of, script
from support import stopping, tracking
from support.arguments import read_config, read_train_arguments
from support.metrics import summarize
from update_tools import make_episode, plain_config


class Recorder(GeneralTracker):
    """Keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__(_blank=True)
        self.settings, self.logged, self.finished = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **more):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_every_number_of_the_log_and_some_episodes_as_text(tiny_tokenizer, tmp_path):
    rng = random.Random(0)
    episodes = [make_episode(rng, tiny_tokenizer, turns) for turns in (3, 1)]
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    config = plain_config(out=str(tmp_path), env_options={"max_steps": 3}, save_every=2)
    tracking.start(accelerator, config, 4)
    assert recorder.settings["env_options"] == '{"max_steps": 3}'
    assert recorder.settings["lr"] == config.lr
    run = SimpleNamespace(config=config, accelerator=accelerator)
    metrics = {
        "iteration": 4,
        **summarize(episodes),
        "explained_variance": {"high": 0.5, "low": None, "switch": float("nan")},
    }
    advantages = SimpleNamespace(raw={"A_action": torch.tensor([[1.0, 2, 3], [4, 0, 0]])})
    tracking.log_iteration(run, metrics, episodes, advantages)
    (step, values), *texts = recorder.logged
    assert step == 5  # iterations done
    assert values["train/success"] == metrics["success"]
    assert values["train/explained_variance/high"] == 0.5
    assert not {"train/explained_variance/low", "train/explained_variance/switch"} & set(values)
    assert [list(values) for _, values in texts] == [["episode/0"], ["episode/1"]]
    text = texts[1][1]["episode/1"]
    assert episodes[1].task in text
    assert "A_action +4.00" in text
    assert all(line.startswith("    ") for line in text.splitlines())  # Markdown shows it as it is
    tracking.log_iteration(run, {**metrics, "iteration": 5}, episodes, advantages)
    assert len(recorder.logged) == 4  # numbers only
    tracking.log_evaluation(accelerator, {"split": "unseen", "success": 0.25}, 6)
    assert recorder.logged[-1] == (6, {"eval/success": 0.25})


def test_without_the_flag_nothing_is_tracked(tmp_path):
    accelerator = Accelerator(cpu=True)
    tracking.start(accelerator, plain_config(out=str(tmp_path)), 0)
    tracking.log_evaluation(accelerator, {"success": 0.25}, 0)
    assert accelerator.trackers == []


def test_the_flag_is_no_setting():
    config, plan, tracker = read_train_arguments(["--seed", "3"])
    assert (config.seed, plan, tracker) == (3, False, None)
    _, plan, tracker = read_train_arguments(["--plan", "--seed=3"])
    assert (plan, tracker) == (True, None)
    with pytest.raises(ConfigError, match="--track is no setting"):
        read_config(["--track", "wandb"])


@pytest.mark.parametrize("name, module", tracking.TRACKERS.items())
def test_a_missing_package_is_one_sentence(name, module, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    said = assert_user_error(train.main, ["--track", name], tmp_path, capfd)
    assert f"--track {name}: pip install {name}" in said


def test_other_trackers_are_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--track", "paper"], ["--track"]):
        said = assert_user_error(train.main, words, tmp_path, capfd)
        assert "--track" in said


def test_a_tracker_that_does_not_open_is_one_sentence(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(recorder, "start", lambda: 1 / 0)
    accelerator = Accelerator(cpu=True, log_with=recorder)
    with pytest.raises(ConfigError, match="the tracker cannot be opened: division by zero"):
        tracking.start(accelerator, plain_config(out=str(tmp_path)), 0)


def test_tensorboard(trained, tmp_path):
    """The same run with and without: the same weights and log, and TensorBoard's files hold it."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = script("train.py", *flags("run", track="tensorboard"), cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "run"
    folder = out / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    lines = metrics_of(out)
    logged = {event.step: event.value for event in events.Scalars("train/episode_length")}
    wanted = {line["iteration"] + 1: line["episode_length"] for line in lines}
    assert logged == pytest.approx(wanted)
    evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    logged = {event.step: event.value for event in events.Scalars("eval/success")}
    assert logged == pytest.approx({result["iteration"]: result["success"] for result in evals})
    [text] = events.Tensors("episode/0/text_summary")[0].tensor_proto.string_val
    assert b"task " in text
    assert "episode" in done.out
    folder.rename(tmp_path / "tensorboard")  # all that differs
    assert_same_run(out, trained.out)


def test_a_run_that_is_stopped_closes_its_tracker(tmp_path):
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    tracking.start(accelerator, plain_config(out=str(tmp_path)), 0)
    with pytest.raises(SystemExit):
        stopping.end_stopped(stopping.Stopped(15, "stopped"), accelerator)
    assert recorder.finished


def test_weights_and_biases_gets_a_table_of_episodes(monkeypatch):
    """Its tracker has `log_table`, whose text is searched and compared there."""
    rows = []
    recorder = Recorder()
    recorder.name = "wandb"
    monkeypatch.setattr(
        Recorder, "log_table", lambda self, *words, step: rows.append((words, step)), raising=False
    )
    accelerator = SimpleNamespace(trackers=[recorder])
    tracking.log_texts(accelerator, ["one", "two"], 7)
    columns = ["iterations", "episode"]
    assert rows == [(("episodes", columns, [[7, "one"], [7, "two"]]), 7)]
