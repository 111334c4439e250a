"""household_chain.py: chains of tasks, routine steps, and the plain game where there is neither."""

import copy
import hashlib
import random

import pytest

import envs
from conftest import tiny_config
from support.cloning import demonstrations, train_tokenizer
from support.world_check import check_world
from worlds import household
from worlds.household import SPLITS, make

KNOBS = [dict(chain=4), dict(chain=2, routine=2), dict(routine=1)]
PLAIN = "e822557bb921c847"


def transcript(env, choose):
    """Everything that an episode says, with choose(env, info, step) -> action."""
    observation, info = env.reset()
    said = [repr((observation, info))]
    while not env.done:
        outcome = env.step(choose(env, info))
        info = outcome[-1]
        said.append(repr(outcome))
    return said


def at_random(seed):
    rng = random.Random(seed)
    return lambda env, info: rng.choice(info["admissible"])


class Expert:
    """Follows the expert of an environment."""

    def __init__(self):
        self.subgoal = ""

    def __call__(self, env, info):
        _, self.subgoal, action = env.expert(self.subgoal)
        return action


def test_one_task_without_routine_is_the_plain_game_bit_for_bit():
    """The hash is of the version before there were chains."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(30):
            for choose in (at_random(index), Expert()):
                plain = transcript(make(split, index), choose)
                digest.update("\n".join(plain).encode())
            again = transcript(make(split, index, chain=1, routine=0), at_random(index))
            assert again == transcript(make(split, index), at_random(index))
    assert digest.hexdigest().startswith(PLAIN)


@pytest.mark.parametrize("options", KNOBS, ids=str)
def test_the_interface_is_kept_and_the_expert_wins(options):
    faults, summary = check_world("household", tasks=6, **options)
    assert not faults
    assert "the expert wins 18 of 18 tasks" in summary


@pytest.mark.parametrize("split", SPLITS)
def test_a_chain_is_its_tasks_one_after_the_other(split):
    """Each is given when the one before is done; only the last success is rewarded."""
    env = make(split, 299, chain=3)
    names = [room.task for room in env.rooms]
    assert names[0] == make(split, 299).task
    observation, info = env.reset()
    subgoal, shown, rewards, progress = "", [], [], [info["progress"]]
    while not env.done:
        shown.append(observation.split(". ")[0])
        _, subgoal, action = env.expert(subgoal)
        assert action in info["admissible"]
        observation, reward, terminated, truncated, info = env.step(action)
        assert info["task"] == "do 3 tasks" and info["task_type"] == "chain_of_3"
        rewards.append(reward)
        progress.append(info["progress"])
    assert list(dict.fromkeys(shown)) == [f"Task {n + 1}: {name}" for n, name in enumerate(names)]
    assert (terminated, truncated, info["won"], info["score"]) == (True, False, True, 1.0)
    assert rewards[-1] == 1 and not any(rewards[:-1])
    assert progress == sorted(progress) and progress[-1] == 1 and 1 / 3 in progress


def test_the_expert_plays_each_task_of_a_chain_as_it_plays_it_alone():
    alone = sum(len(transcript(make("train", i), Expert())) - 1 for i in (5, 106, 207, 308))
    assert len(transcript(make("train", 5, chain=4), Expert())) - 1 == alone


def test_the_step_limit_grows_with_chain_and_routine():
    for options, limit in ((dict(chain=4), 60), (dict(routine=1), 30), (dict(chain=2), 30)):
        env = make("train", 0, **options)
        said = transcript(env, lambda env, info: "no such action")
        assert len(said) - 1 == limit
    assert len(transcript(make("train", 0, 5, chain=2), at_random(0))) - 1 == 10


def test_the_page_tells_day_and_time():
    """Each day is as long as one task, in the same six words."""
    env = make("train", 0, chain=2, routine=1)
    times = [env.reset()[0].split(". ")[1]]
    while not env.done:
        times.append(env.step("no such action")[0].split(". ")[2])
    words = household.TIMES_OF_DAY
    assert list(dict.fromkeys(times)) == [f"{word} day {day}" for day in (1, 2) for word in words]
    assert [times.count(f"{word} day 1") for word in words] == [5] * 6


def test_a_routine_step_is_no_decision():
    env = make("train", 0, routine=2)
    env.reset()
    _, _, _, _, info = env.step("go to sink 1")
    assert info["admissible"] == ["wait"]
    observation, _, _, _, info = env.step("go to fridge 1")
    assert observation.startswith("Nothing happens. Dawn wait 2. At sink 1")
    assert env.expert("find egg") == (False, "find egg", "wait")
    first = env.step("wait")[0]
    second, _, _, _, info = env.step("wait")
    assert first.startswith("Dawn wait 1. At sink 1")
    assert second.split(". ", 1)[1] == first.split(". ", 1)[1]
    assert "wait" not in info["admissible"] and "go to fridge 1" in info["admissible"]


def test_with_routine_the_same_decisions_lead_to_the_same_pages():
    plain, slow = make("train", 7), make("train", 7, routine=2)
    rng = random.Random(0)
    _, info = plain.reset()
    slow.reset()
    while not plain.done:
        action = rng.choice(info["admissible"])
        *want, info = plain.step(action)
        *got, there = slow.step(action)
        for _ in range(2 * (not plain.done)):
            *got, there = slow.step("wait")
        assert got[0].split(". ", 1)[1] == want[0].split(". ", 1)[1]
        if not plain.done:
            assert there == info


@pytest.mark.parametrize("options", KNOBS, ids=str)
def test_a_copy_in_the_middle_goes_on_by_itself(options):
    env = make("train", 3, **options)
    env.reset()
    expert = Expert()
    for _ in range(12):
        env.step(expert(env, None))
    then = copy.deepcopy(vars(env))
    twin = copy.deepcopy(env)
    rest = []
    while not twin.done:
        rest.append(twin.step(twin.expert(expert.subgoal)[2]))
        expert.subgoal = twin.expert(expert.subgoal)[1] if not twin.done else ""
    assert env.steps == then["steps"] == 12 and env.page == then["page"]
    assert rest and not env.done


@pytest.mark.parametrize("options", KNOBS, ids=str)
def test_demonstrations_show_days_tasks_and_waits_as_one_token_each(options):
    with envs.EnvPool("household", "train", workers=1, **options) as pool:
        examples = demonstrations(pool, range(6), tiny_config(), **household.DEMONSTRATOR)
    assert any(left is not None for *_, left in examples)
    text = " ".join(prompt + response for prompt, response, *_ in examples)
    tokenizer = train_tokenizer([part for *texts, _ in examples for part in texts])
    if "chain" in options:
        assert "Task 1: " in text and len(tokenizer.tokenize(" day 1")) == 1
    if "routine" in options:
        assert "<action>wait</action>" in text and len(tokenizer.tokenize(" wait 1")) == 1


@pytest.mark.parametrize("options", [dict(chain=0), dict(chain="4"), dict(routine=-1)], ids=str)
def test_other_numbers_are_refused(options):
    with pytest.raises(ValueError, match=f"household's {next(iter(options))} must be a whole"):
        make("train", 0, **options)


def test_the_tasks_of_a_chain_are_tasks_of_its_split():
    rooms = household.make("unseen", 299, chain=3).rooms
    alone = [household.make("unseen", index) for index in (299, 100, 201)]
    assert [room.home for room in rooms] == [room.home for room in alone]


def test_reset_ends_a_routine():
    env = household.make("train", 0, routine=2)
    first = env.reset()
    env.step("go to sink 1")
    assert env.admissible() == ["wait"]
    assert env.reset() == first
