"""--env gym:ID: Gymnasium's envs as worlds. Skipped where Gymnasium is not installed."""

import sys

import pytest

import envs
from config import Config, ConfigError
from conftest import tiny_config
from support import world_check
from support.loading import check_world_and_model
from worlds import adapter_rules, babyai, gym_adapter

gymnasium = pytest.importorskip("gymnasium", reason="pip install -r requirements-babyai.txt")

COUNT = '''\
import gymnasium
from gymnasium import spaces


class Count(gymnasium.Env):
    """Reach a number."""

    observation_space = spaces.Text(50)
    action_space = spaces.Discrete(2)
    ACTION_NAMES = ("Up", "Down")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = int(self.np_random.integers(2, 6))
        self.at = 0
        return self.page(), {"mission": f"reach {self.goal}"}

    def step(self, action):
        self.at += 1 - 2 * action
        won = self.at == self.goal
        return self.page(), 0.3 * won, won, False, {}

    def page(self):
        return f"at {self.at}"

    def expert(self, subgoal):
        return subgoal != "go up", "go up", "up"


class Dict(Count):
    """Texts in a dict; success and score are said."""

    action_space = spaces.Text(10)

    def page(self):
        return {"text": f"at {self.at}", "legal_actions": ["up", "down"]}

    def step(self, action):
        page, _, _, _, _ = super().step(1 - (action == "up"))
        return page, 0.0, self.at == self.goal, False, {"is_success": self.at == 3, "score": 0.5}


class Timed(Count):
    """Runs to its limit; says there whether it was a success. Each step pays."""

    def step(self, action):
        page, *_ = super().step(action)
        return page, 0.5, False, False, {"is_success": self.at > 2} if self.goal > 3 else {}


class Numbers(Count):
    observation_space = spaces.Discrete(99)
    ACTION_NAMES = None

    def page(self):
        return self.at + 50


class Words(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return f"number {observation}"


def judge(observation, info, reward, ended):
    return {"task": "be judged", "won": ended and reward > 0, "subgoals": ["wait"]}


for kind in (Count, Dict, Timed, Numbers):
    name = f"Testing{kind.__name__}-v0"
    gymnasium.register(name, entry_point=kind, max_episode_steps=7)
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "testing_gym.py").write_text(COUNT)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("testing_gym", None)
    for kind in ("Count", "Dict", "Timed", "Numbers"):
        gymnasium.registry.pop(f"Testing{kind}-v0", None)


@pytest.mark.parametrize(
    "name, options",
    [
        ("Count", {}),
        ("Count", {"rules": "testing_gym:judge"}),
        ("Dict", {}),
        ("Numbers", {"wrapper": "testing_gym:Words", "actions": ["more", "less"]}),
    ],
)
def test_it_keeps_the_interface(name, options):
    faults, summary = world_check.check_world(f"gym:testing_gym:Testing{name}-v0", **options)
    if name == "Numbers":
        assert faults and all("expert" in fault for fault in faults)  # it says `up`, not `more`
    elif name == "Dict":
        assert faults and all("does not win" in fault for fault in faults)
    else:
        assert faults == []
        assert "10000 tasks in train, 300 tasks in unseen" in summary
        assert "truncated after 7 steps" in summary and "the expert wins 8 of 8" in summary


def play(env, action, steps=9):
    outcomes = [env.reset()]
    for _ in range(steps):
        outcomes.append(env.step(action))
        if outcomes[-1][2] or outcomes[-1][3]:
            break
    return outcomes


def test_the_documented_rules():
    env = envs.make("gym:testing_gym:TestingCount-v0", "train", 0)
    (text, info), *_, last = play(env, "up")
    goal = int(info["task"].removeprefix("reach "))
    assert text == "at 0" and info["admissible"] == ["up", "down"] and not info["won"]
    assert last[:4] == (f"at {goal}", 1.0, True, False)
    assert (last[4]["won"], last[4]["score"], last[4]["task"]) == (True, 1.0, info["task"])
    assert info["task_type"] == "testing_gym:TestingCount-v0"
    assert play(env, "down")[-1][1:4] == (0.0, False, True)

    tasks = {envs.make("gym:testing_gym:TestingCount-v0", "train", n).reset()[1]["task"]
             for n in range(20)}  # fmt: skip
    assert len(tasks) == 4


def test_success_and_score_that_info_tells():
    won = []
    for index in range(12):
        env = envs.make("gym:testing_gym:TestingDict-v0", "train", index)
        (text, info), *_, last = play(env, "up")
        assert text == "at 0" and info["admissible"] == ["up", "down"]
        assert last[4]["won"] == (info["task"] == "reach 3") == bool(last[1])
        assert last[4]["score"] == 0.5
        won.append(last[4]["won"])
    assert any(won) and not all(won)


def test_an_env_that_only_runs_out_of_steps_is_won_where_it_says_so():
    """That step is then terminated. The reward alone says nothing at a limit."""
    seen = set()
    for index in range(12):
        env = envs.make("gym:testing_gym:TestingTimed-v0", "train", index)
        for action, says_so in (("up", True), ("down", False)):
            (_, info), *before, last = play(env, action)
            won = says_so and int(info["task"].removeprefix("reach ")) > 3
            assert last[1:4] == (float(won), won, not won) and last[4]["won"] == won
            assert len(before) == 6 and not any(step[2] or step[4]["won"] for step in before)
            seen.add(won)
    assert seen == {True, False}


def test_a_longer_limit_than_the_env_s():
    name = "gym:testing_gym:TestingTimed-v0"
    for options, limit in (
        ({"max_steps": 3}, 3),
        ({"max_steps": 9}, 7),
        ({"kwargs": {"max_episode_steps": 9}, "max_steps": 9}, 9),
    ):
        with envs.EnvPool(name, "train", **options) as pool:
            pool.reset({0: 0})
            steps = 1
            while not pool.step({0: "down"})[0][3]:
                steps += 1
        assert steps == limit


def test_the_user_s_rules_and_wrapper():
    options = {"rules": "testing_gym:judge", "wrapper": "testing_gym:Words"}
    env = envs.make("gym:testing_gym:TestingNumbers-v0", "unseen", 3, **options)
    text, info = env.reset()
    assert text == "number 50" and info["task"] == "be judged" and info["subgoals"] == ["wait"]
    assert info["admissible"] == ["0", "1"]


def test_another_action_costs_a_step_and_changes_nothing():
    env = envs.make("gym:testing_gym:TestingCount-v0", "train", 0)
    env.reset()
    env.step("up")
    assert env.step("fly")[:4] == ("Nothing happens. at 1", 0.0, False, False)
    assert env.step("up")[0] == "at 2"
    with envs.EnvPool("gym:testing_gym:TestingCount-v0", "train") as pool:
        pool.reset({0: 0})
        assert [pool.step({0: "fly"})[0][3] for _ in range(7)] == [False] * 6 + [True]


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("gym:NoSuch-v0", {}, "no world 'gym:NoSuch-v0': Environment `NoSuch` doesn't exist"),
        ("gym:no_such_module:X-v0", {}, "No module named 'no_such_module'"),
        ("gym:testing_gym:TestingNumbers-v0", {}, "shows Discrete.99., not text: name a wrapper"),
        ("gym:testing_gym:TestingCount-v0", {"actions": ["up"]}, "2 actions, and `actions` must"),
        ("gym:testing_gym:TestingCount-v0", {"rules": "testing_gym:x"}, "rules 'testing_gym:x' is"),
        ("gym:testing_gym:TestingCount-v0", {"kwargs": {"x": 1}}, "cannot be made: .*takes no arg"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_world_and_model(tiny_config(env=name, env_options=options))
    assert "\n" not in str(caught.value)


def test_without_gymnasium_the_command_that_brings_it(monkeypatch):
    from worlds import gym_adapter

    monkeypatch.setattr(gym_adapter, "gymnasium", None)
    with pytest.raises(ValueError, match="pip install gymnasium"):
        envs.world("gym:testing_gym:TestingCount-v0")


def test_its_folder_has_a_file_name():
    assert Config(env="gym:a/B-v0", seed=2).out == "runs/gym-a-B-v0-2"
    assert Config(env="openenv:http://127.0.0.1:80").out == "runs/openenv-http-127.0.0.1-80-0"
    assert Config(env="my.worlds_2").out == "runs/my.worlds_2-0"


def test_actions_count_from_the_start_of_their_space():
    class FromFive(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2, start=5)
        taken = []

        def reset(self, seed=None, options=None):
            return "begin", {}

        def step(self, action):
            self.taken.append(action)
            return "on", 0.0, False, False, {}

    env = gym_adapter.GymEnv(FromFive(), "gym:FromFive", 0, ["up", "down"], None)
    env.reset()
    env.step("down")
    env.step("up")
    assert FromFive.taken == [6, 5]


@pytest.mark.parametrize("module", [adapter_rules, babyai], ids=lambda module: module.__name__)
def test_no_seed_is_in_both_splits(module):
    ranges = [range(first, first + count) for first, count in module.SEEDS.values()]
    assert not set(ranges[0]) & set(ranges[1])


def test_the_text_is_the_observation_s_and_other_facts_are_info_s_first():
    observation = {"text": "a page", "task": "old", "metadata": {"score": 0.5}}
    info = {"message": "debug", "task": "new"}
    text, found = adapter_rules.translate(
        observation, info, 0.0, False, False, task="", task_type="t", admissible=[]
    )
    assert (text, found["task"], found["score"]) == ("a page", "new", 0.5)


def test_an_env_without_a_step_limit_gets_100():
    gymnasium.register("TestingEndless-v0", entry_point=lambda: None)
    assert envs.world("gym:TestingEndless-v0").MAX_STEPS == 100
    gymnasium.registry.pop("TestingEndless-v0")
