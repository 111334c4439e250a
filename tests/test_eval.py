"""eval.py: it says what training said, and refuses what it cannot do."""

import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import eval as evaluation
import hiper
from conftest import tiny_config
from rollout import Episode, Turn, collect
from script_tools import assert_user_error, saved_log, script, tree
from support.loading import choose_tasks
from support.metrics import format_table, summarize, wilson_interval


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def turn(opened, valid):
    decision = hiper.Decision(opened, "", "", valid, "")
    return Turn([], [], decision, opened, "", "", "", 0.0)


def test_summary_and_table():
    two = [turn(True, False)] * 2
    three = [turn(True, True), turn(False, True), turn(True, False)]
    episodes = [
        Episode(0, "", "b", three, True, 1.0, False, [], 0),
        Episode(1, "", "a", [turn(True, True)], False, 0.5, True, [], 2),
        Episode(2, "", "b", two, False, 0.0, False, [], 0),
    ]
    got = summarize(episodes)
    assert got == {
        "episodes": 3,
        "success": 1 / 3,
        "score": 0.5,
        "success_by_type": {"a": 0.0, "b": 0.5},
        "episodes_by_type": {"a": 1, "b": 2},
        "episode_length": 2.0,
        "switches_per_episode": 2 / 3,
        "segment_length": 6 / 5,
        "switch_rate": 2 / 3,
        "valid_format_rate": 0.5,
        "truncation_rate": 1 / 3,
        "restarts": 2,
    }
    lines = format_table(got).splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "all"]
    assert "33.3 %" in lines[-1]
    assert "3 episodes" in lines[-1]


def test_wilson_s_interval():
    low, high = wilson_interval(5, 10)
    assert low == pytest.approx(0.2366, abs=1e-4)  # Wilson's own, tables agree
    assert high == pytest.approx(0.7634, abs=1e-4)
    assert wilson_interval(0, 8)[0] == 0.0
    assert wilson_interval(8, 8)[1] == 1.0


def test_evaluating_leaves_the_training_s_randomness_alone(tiny_actor, tiny_tokenizer):
    config = tiny_config(num_envs=3, max_new_tokens=4, env_options={"max_steps": 2})
    accelerator = Accelerator(cpu=True)

    def play(**changes):
        return evaluation.evaluate(
            tiny_actor, tiny_tokenizer, accelerator, config, "unseen", range(3), **changes
        )

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert play(temperature=1.0, seed=0) == play(temperature=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert play()["temperature"] == 0.4
    assert play()["seed"] == config.seed
    assert torch.equal(torch.get_rng_state(), state)


def test_other_players_may_take_the_agent_s_part(tiny_actor, tiny_tokenizer):
    """An executor that only looks around, with a planner that always switches."""
    config = tiny_config(num_envs=3, max_new_tokens=4, env_options={"max_steps": 3})

    def planner(agents, prompts):
        return [hiper.format_plan("look around", switch=True) for _ in agents]

    def executor(agents, prompts, decisions):
        assert all(decision.subgoal == "look around" for decision in decisions)
        return [state.info["admissible"][0] for state in agents.values()]

    result = evaluation.evaluate(
        tiny_actor,
        tiny_tokenizer,
        Accelerator(cpu=True),
        config,
        "unseen",
        range(3),
        planner=planner,
        executor=executor,
    )
    assert result["switch_rate"] == 1.0
    assert result["episodes"] == 3


def test_eval_says_what_training_said(trained, tmp_path):
    """The same tasks, seed and temperature: the same result to the last digit. The protocol and
    the table are printed, and nothing is written but --json."""
    before = tree(trained.out)
    words = (trained.out, "--episodes", 6, "--json", "result.json")
    done = script("eval.py", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    for word in (
        "protocol:",
        "split unseen",
        "6 of 300",
        "temperature 0.4",
        "seed 0",
        "checkpoint last",
    ):
        assert word in done.out
    assert "Warning" not in done.err
    got = json.loads((tmp_path / "result.json").read_text())
    last = saved_log(trained.out / "checkpoint")["evals"][-1]
    assert last.pop("iteration") == 3
    assert last["split"] == "unseen"
    assert {name: got[name] for name in last} == last
    assert got["episodes"] == 6
    assert got["protocol"]["split"] == "unseen"
    assert len(got["interval"]) == 2
    assert format_table(got) in done.out
    assert tree(trained.out) == before


def test_a_disk_that_fills_up_during_an_evaluation(trained, tmp_path, monkeypatch, capsys):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(SystemExit) as exit:
        evaluation.main([str(trained.out), "--episodes", "2", "--json", str(tmp_path / "x.json")])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and "2 episodes" in out
    assert err.startswith("error: ") and "No space left" in err and "Traceback" not in err


def test_eval_flags(trained, capsys):
    evaluation.main([str(trained.out), "--split", "seen", "--episodes", "2", "--greedy"])
    said = capsys.readouterr().out
    assert "split seen" in said
    assert "temperature 0.0" in said
    assert "2 episodes" in said
    evaluation.main([str(trained.out), "--episodes", "2", "--temperature", "1", "--seed", "7"])
    assert re.search("temperature 1.0, seed 7", capsys.readouterr().out)


def test_any_model_is_evaluated_without_a_run(tiny_actor, tiny_tokenizer, tmp_path, capsys):
    """Zero-shot: the world's settings for a pretrained model, and train.py's flags over them."""
    tiny_actor.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    words = ["--model", str(tmp_path / "model"), "--env", "household", "--episodes", "2"]
    evaluation.main([*words, "--max_new_tokens", "4", "--env_options", '{"max_steps": 2}'])
    said = capsys.readouterr().out
    assert "model in household, not trained, split unseen, tasks 2 of 300" in said
    assert "2 episodes" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "out"),
        ("run --model mine", "'run' and --model"),
        ("TRAINED --env household", "leave out --env"),
        ("TRAINED --lr 1", "leave out --lr"),
        ("--model mine --env moon", "moon"),
        ("--model mine --env household", "mine"),
        ("--model mine --episode 3", "--episode"),
        ("TRAINED --episodes many", "--episodes"),
        ("nowhere", "nowhere"),
        ("mine", "mine"),
        ("run", "run holds no finished"),
        ("typo.yaml", "typo.yaml"),
        ("TRAINED/actor", "actor"),
        ("run/best", "run/best"),
        ("TRAINED --split test", "unseen"),
        ("TRAINED --episodes 0", "--episodes"),
        ("TRAINED --episodes -3", "--episodes"),
        ("TRAINED --json no/folder/x.json", "no/folder"),
    ],
)
def test_evaluation_refuses_in_one_sentence(trained, place, capfd, words, said):
    words = words.replace("TRAINED", str(trained.out)).split()
    assert said in assert_user_error(evaluation.main, words, place, capfd)


def test_evaluate_plays_what_it_says(tiny_actor, tiny_tokenizer, monkeypatch):
    """Split, the world's options, share of the tasks, temperature and seed of one of two."""
    played = []

    def recorded(actor, tokenizer, pool, tasks, config, *, temperature, **roles):
        played.append((pool.split, list(tasks), temperature, torch.initial_seed()))
        return collect(actor, tokenizer, pool, tasks, config, temperature=temperature, **roles)

    monkeypatch.setattr(evaluation, "collect", recorded)
    monkeypatch.setattr(evaluation, "meet", lambda *_: None)
    second = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    config = tiny_config(num_envs=3, max_new_tokens=4, env_options={"max_steps": 2})
    words = tiny_actor, tiny_tokenizer, second, config, "unseen", [4, 6, 8, 9, 12]
    result = evaluation.evaluate(*words, temperature=0.7, seed=40)
    assert played == [("unseen", [6, 9], 0.7, 41)]
    assert (result["temperature"], result["seed"], result["episode_length"]) == (0.7, 40, 2.0)
    evaluation.evaluate(*words)
    assert played[1] == ("unseen", [6, 9], 0.4, config.seed + 1)


def test_the_evaluated_tasks_are_spread_over_the_split():
    tasks = choose_tasks(300, 30)
    assert tasks == sorted(set(tasks)) == choose_tasks(300, 30) and len(tasks) == 30
    assert tasks[0] < 60 and tasks[-1] > 240
    assert len({task % 10 for task in tasks}) > 4
    assert choose_tasks(300, 0) == choose_tasks(300, 400) == list(range(300))
