"""benchmarks/boundaries.py: agreement of the agent's segments with the demonstrator's."""

import json

import pytest

from benchmarks import boundaries
from config import ConfigError
from worlds import household


def agent(*subgoals):
    """Turns of an agent that switches where its subgoal changes; `!x` switches to x again."""
    turns = []
    for t, subgoal in enumerate(subgoals):
        starts = t == 0 or subgoal.startswith("!") or subgoal != subgoals[t - 1].strip("!")
        turns.append((starts, subgoal.strip("!")))
    return turns


def test_the_same_plan_agrees_wholly():
    result = boundaries.agreement([(agent("a", "a", "b", "b", "c"), list("aabbc"))])
    assert result["precision"] == result["recall"] == result["kappa"] == result["same"] == 1
    assert result["turns"] == 4 and result["agent_boundaries"] == 2


def test_boundaries_are_counted_turn_by_turn():
    pairs = [(agent("a", "b", "!b", "b", "b"), list("aabbb")), (agent("x", "x"), list("xy"))]
    result = boundaries.agreement(pairs)  # agent 1 and 2; demonstrator 2, and 1 of the other
    assert (result["agent_boundaries"], result["demonstrator_boundaries"]) == (2, 2)
    assert result["precision"] == result["recall"] == 0.5
    assert result["same"] == 3 / 5
    agreed, chance = 3 / 5, (2 * 2 + 3 * 3) / 25
    assert result["kappa"] == pytest.approx((agreed - chance) / (1 - chance))


def test_no_boundary_at_all_is_no_number():
    result = boundaries.agreement([(agent("a", "a"), ["a", "a"])])
    assert result["precision"] is None and result["recall"] is None and result["kappa"] is None


@pytest.mark.parametrize("pairs", [[(agent("a"), ["a"])], [(agent("a", "b"), [])]])
def test_nothing_to_compare_is_one_sentence(pairs):
    with pytest.raises(ConfigError, match="no episode has a second turn"):
        boundaries.agreement(pairs)


def test_the_demonstrator_s_plan_along_its_own_actions():
    env = household.make("unseen", 0)
    env.reset()
    shown, subgoal, over = [], "", False
    while not over:
        switch, subgoal, action = env.expert(subgoal)
        shown.append((switch, subgoal, action))
        over = env.step(action)[2]
    plan = boundaries.plan_of(household.make("unseen", 0), [action for *_, action in shown])
    assert plan == [subgoal for _, subgoal, _ in shown]


def test_a_run_is_measured_before_and_after(trained, capsys):
    boundaries.main([str(trained.out / "start"), str(trained.out), "--tasks", "3"])
    before, after = map(json.loads, capsys.readouterr().out.splitlines())
    boundaries.main([str(trained.out), "--tasks", "3", "--segments", "single", "every-turn"])
    single, every = map(json.loads, capsys.readouterr().out.splitlines())
    assert single["agent_boundaries"] == 0 and every["agent_boundaries"] == every["turns"] > 0
    assert before["tasks"] == after["tasks"] == 3
    assert before["run"].endswith("start") and before["turns"] > 3


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        boundaries.main([str(tmp_path)])
    assert exit.value.code == 2 and "holds no finished training run" in capsys.readouterr().err
