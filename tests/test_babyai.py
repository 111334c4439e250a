"""worlds/babyai.py: minigrid's levels in words, and its bot as demonstrator."""

import re

import pytest

import envs
from config import ConfigError
from conftest import tiny_config
from support import world_check
from support.loading import check_world_and_model
from worlds import babyai

pytest.importorskip("minigrid", reason="pip install -r requirements-babyai.txt")


def env(level="GoToLocal", index=0, split="train", **options):
    return babyai.make(split, index, level=level, **options)


def follow(env, turns=400, act=None):
    """Play the expert's decisions -> [(page, (switch, subgoal, action))], last info."""
    page, info = env.reset()
    shown, subgoal = [], ""
    for turn in range(turns):
        advice = env.expert(subgoal)
        subgoal = advice[1]
        shown.append((page, advice))
        action = (act or {}).get(turn, advice[2])
        page, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            break
    return shown, info


@pytest.mark.parametrize("level", ["GoToLocal", "PutNextLocal", "GoToSeqS5R2"])
def test_levels_keep_the_interface_and_the_bot_wins(level):
    faults, summary = world_check.check_world("babyai", tasks=3, level=level, one_word=True)
    assert faults == []
    assert "the expert wins 6 of 6" in summary and "20000 tasks in train, 300 tasks in u" in summary


@pytest.mark.parametrize("level", babyai.LEVELS)
def test_every_level_of_the_ladder_begins(level):
    page, info = env(level).reset()
    assert f"Moves {babyai.LEVELS[level]}." in page
    assert info["task"] and info["progress"] == 0.0


def test_the_page_says_where_things_are():
    """Its distances lead there: walk so far and the thing is in front."""
    for index in range(6):
        world = env(index=index, one_word=False)
        page, info = world.reset()
        listed = re.search(r"See (.*?)\.", page)[1].split(", ")
        straight = [re.fullmatch(r"(\w+ \w+) ahead (\d+)", words) for words in listed]
        for found in filter(None, straight[:1]):
            for _ in range(int(found[2]) - 1):
                page = world.step("go forward")[0]
            assert f"See {found[1]} ahead 1" in page and "Free ahead 0" in page


def test_turning_turns_the_page():
    world = env(index=3)
    world.reset()
    around = [world.step("turn right")[0] for _ in range(4)]
    left = [world.step("turn left")[0] for _ in range(4)]
    what = [
        re.sub(r"Moves \d+. |Unseen [^.]*. |Recall [^.]*. ", "", page) for page in around + left
    ]
    assert what[:4] == [*what[4:7][::-1], what[3]]
    assert len(set(what[:4])) > 1


def test_one_word_names_and_how_long_the_page_is():
    words = []
    for index in range(20):
        page, info = env(index=index, one_word=True).reset()
        assert not babyai.NAMES.search(page + info["task"])
        assert not any(" " in subgoal.removeprefix("go to ") for subgoal in info["subgoals"])
        words.append(len(page.split()))
    assert sum(words) / 20 < 50
    assert babyai.NAMES.search(env(index=0).reset()[1]["task"])


def test_tasks_are_the_same_every_time_and_splits_differ():
    def begin(split, n):
        world = env(index=n, split=split)
        return world.reset()[0], world.env.grid.encode().tobytes()

    assert begin("train", 5) == begin("train", 5)
    assert not {begin("train", n) for n in range(30)} & {begin("unseen", n) for n in range(30)}


def test_the_bot_s_stack_in_words():
    """Put next: go to the first thing, pick it up, go beside the second, drop it."""
    kinds = []
    for index in range(4):
        shown, info = follow(env("PutNextLocal", index))
        assert info["won"] and info["progress"] == 1.0
        subgoals = [advice[1] for _, advice in shown]
        kinds.append([" ".join(subgoal.split()[:2]) for subgoal in dict.fromkeys(subgoals)])
        for t, (_, (switch, subgoal, _)) in enumerate(shown):
            assert switch == (t == 0 or subgoal != subgoals[t - 1])
    assert all([kind for kind in ks if kind in ("go beside", "pick up", "drop")]
               == ["pick up", "go beside", "drop"] for ks in kinds)  # fmt: skip
    assert any("go to" in ks for ks in kinds)


def test_the_parts_of_a_mission_that_are_done():
    world = env("GoToSeqS5R2", 1)
    shown, info = follow(world)
    assert info["won"]
    done = [page.split("Done ")[1] for page, _ in shown]
    assert done[0] == "nothing." and done[-1].startswith("go to")
    parts = [part for part in re.split(r", then | and | after you ", info["task"])]
    assert all(part in info["task"] for text in done[1:] if text != "nothing."
               for part in text.rstrip(".").split(", "))  # fmt: skip
    assert len(parts) > 1


def test_the_bot_finds_its_way_back_after_wrong_actions():
    for index in range(5):
        wrong = {1: "turn left", 2: "turn left", 4: "go forward", 6: "turn right"}
        assert follow(env(index=index, max_steps=60), act=wrong)[1]["won"]


def test_another_subgoal_is_pursued_and_then_given_up():
    pursued = 0
    for index in range(6):
        world = env(index=index, max_steps=60)
        _, info = world.reset()
        own = world.expert("")[1]
        for subgoal in [s for s in info["subgoals"] if s != own][-1:]:
            turns = 0
            while (advice := world.expert(subgoal))[1] == subgoal and turns < 20:
                assert not advice[0] and advice[2] in babyai.ACTIONS[:3]
                if world.step(advice[2])[2]:
                    break
                turns += 1
            assert turns < 20
            pursued += turns > 0
    assert pursued > 1
    world.reset()
    assert world.expert("go to the moon")[0] is True


def test_an_action_that_cannot_be_done_costs_a_step_and_changes_nothing():
    world = env(index=2)
    before, info = world.reset()
    assert "drop" not in info["admissible"]
    for action in ("drop", "fly", ""):
        page, reward, terminated, truncated, _ = world.step(action)
        assert page.startswith("Nothing happens. Hold nothing.") and reward == 0.0
        assert re.sub(r"Moves \d+", "", page.removeprefix("Nothing happens. ")) == re.sub(
            r"Moves \d+", "", before
        )
    assert "Moves 17" in page and not (terminated or truncated)


def test_an_unknown_level_is_one_sentence():
    config = tiny_config(env="babyai", env_options={"level": "NoSuchLevel"})
    with pytest.raises(ConfigError, match="no level 'NoSuchLevel': choose GoToLocal, "):
        check_world_and_model(config)


def test_without_minigrid_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(babyai, "gymnasium", None)
    with pytest.raises(ConfigError, match="requirements-babyai.txt"):
        check_world_and_model(tiny_config(env="babyai"))


def test_the_tiny_agent_s_options():
    config = tiny_config(env="babyai")
    with envs.EnvPool("babyai", "train", **envs.world_options(config)) as pool:
        assert not babyai.NAMES.search(pool.reset({0: 0})[0][0])


@pytest.mark.parametrize(
    "reward, truncated, won", [(0, False, False), (0, True, False), (0.7, True, True)]
)
def test_only_a_reward_is_a_win_and_an_end_is_no_truncation(monkeypatch, reward, truncated, won):
    """A mission may end in failure; its end may come with the step limit."""
    world = babyai.make()
    world.reset()
    monkeypatch.setattr(world.env, "step", lambda number: (None, reward, True, truncated, {}))
    _, *outcome, info = world.step("turn left")
    assert outcome == [float(won), True, False]
    assert (info["won"], info["score"]) == (won, float(won))


@pytest.mark.parametrize("options, limit", [({}, 20), ({"max_steps": 5}, 5)])
def test_the_step_limit_is_the_ladder_s_or_the_option_s(options, limit):
    world = babyai.make(**options)
    page, _ = world.reset()
    assert f"Moves {limit}." in page
    ends = [world.step("fly")[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]


def test_what_the_mission_names_is_listed_first_and_recalled():
    recalled = 0
    for index in range(30):
        world = babyai.make(index=index)
        page, info = world.reset()
        wanted = re.sub("go to (the|a) ", "", info["task"]) + " "
        see = re.search(r"See (.*?)\.", page)[1]
        if wanted not in see:
            continue
        assert see.startswith(wanted)
        world.step("turn right")
        page = world.step("turn right")[0]
        see, recall = re.search(r"See (.*?)\. Recall (.*?)\.", page).groups()
        assert wanted in see + recall
        recalled += wanted in recall
    assert recalled


def test_doors_are_recalled():
    recalled = 0
    for index in range(10):
        world = babyai.make(index=index, level="GoTo")
        page, _ = world.reset()
        doors = set(re.findall(r"\w+ door", page))
        world.step("turn right")
        page = world.step("turn right")[0]
        see, recall = re.search(r"See (.*?)\. Recall (.*?)\.", page).groups()
        assert all(door in see + recall for door in doors)
        recalled += any(door in recall and door not in see for door in doors)
    assert recalled


def test_free_steps_are_counted_over_cells_that_were_seen():
    """At the beginning that is three cells to each side."""
    free = []
    for index in range(20):
        page, _ = babyai.make(index=index).reset()
        free += map(int, re.search(r"left (\d) right (\d)\. See", page).groups())
    assert max(free) == 3
