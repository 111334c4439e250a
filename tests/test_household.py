"""household.py on fixed seeds: what a room contains, the rules, the six tasks, the expert."""

import copy
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from worlds import household, household_rooms
from worlds.household import SPLITS, TASK_TYPES, make, size
from worlds.household_rooms import kind

ROOT = Path(__file__).parent.parent
SAMPLE = {  # task indices for the slower tests: 607 + 300 + 300
    "train": range(0, 20_000, 33),
    "seen": range(300),
    "unseen": range(300),
}
TIME = "|".join(household.TIMES_OF_DAY)
TIME_OF_DAY = re.compile(rf"({TIME})\. ")
PAGE = re.compile(
    rf"(Nothing happens\. )?(?:{TIME})\. At ([^.:]+): ([^.]+)\. Hold ([^.]+)\. "
    r"Unseen ([^.]+)\. Seen ([^.]+)\. Lamp ([^.]+)\. Recall ([^.]+)\."
)


def random_walk(env, rng, steps):
    """Yield (observation, info) at reset and after each random step, until `steps` or the end."""
    observation, info = env.reset()
    yield observation, info
    for _ in range(steps):
        if env.done:
            return
        observation, _, _, _, info = env.step(rng.choice(info["admissible"]))
        yield observation, info


def after_random_walk(env, rng, steps):
    """The info after a random walk of at most `steps` steps."""
    *_, (_, info) = random_walk(env, rng, steps)
    return info


def find_names(text):
    return re.findall(r"[a-z]+ \d", text)


def read_page(page):
    """-> (agent's place, {held things}, [places not seen], {place: [things]}), without states."""
    _, at, around, held, unseen, seen, lamp, recalled = PAGE.fullmatch(page).groups()
    things_at = {place: [] for place in find_names(seen)}
    if lamp != "nothing":
        things_at[lamp].append("lamp 1")
    for part in recalled.split(", "):
        if part != "nothing":
            thing, place = find_names(part)
            things_at[place].append(thing)
    at = at.removesuffix(" closed")
    assert at not in things_at, "the current place must not be repeated under Seen"
    if at in find_names(unseen) or kind(at) not in household_rooms.STORAGE:
        assert around == "nothing"
    else:
        things_at[at] = find_names(around)
    return at, set(find_names(held)), find_names(unseen), things_at


def without_time(page):
    return TIME_OF_DAY.sub("", page)


def room_state(env):
    """A copy of all that the env knows of the room, without the step counter."""
    state = {
        name: value for name, value in vars(env).items() if name not in ("steps", "done", "won")
    }
    return copy.deepcopy(state)


def follow_expert(env, subgoal=""):
    """Play on with the expert -> (rewards, switches, last step's outcome)."""
    rewards = []
    switches = []
    ended = False
    while not ended:
        switch, subgoal, action = env.expert(subgoal)
        assert action in env.admissible()
        outcome = env.step(action)
        _, reward, terminated, truncated, _ = outcome
        rewards.append(reward)
        switches.append(switch)
        ended = terminated or truncated
    return rewards, switches, outcome


def room_for(task_type):
    """A fixed room with two mugs for the task, to be put in a table.

    The lamp is on the desk. Drawer and box are closed.
    """
    env = make("train", TASK_TYPES.index(task_type))
    env.places = ["desk 1", "drawer 1", "table 1", "table 2", "box 1"]
    env.lamp = "desk 1"
    env.home = {"mug 1": "desk 1", "mug 2": "drawer 1", "pen 1": "desk 1", "egg 1": "drawer 1"}
    env.obj = "mug"
    env.dest = "table"
    env.reset()
    return env


def play(env, *actions):
    """Do the actions, all of which must be admissible -> whether the task is won then."""
    for action in actions:
        assert action in env.admissible(), action
        assert not env.won, f"won before {action!r}"
        env.step(action)
    return env.won


# ---- rooms ----


@pytest.fixture(scope="module")
def rooms():
    return {split: [make(split, index) for index in range(size(split))] for split in SPLITS}


def room_key(env):
    return tuple(env.places), tuple(sorted(env.home.items())), env.lamp, env.task


def pairs(env, only_targets=False):
    """(object kind, storage kind): where objects start, and where the task wants one."""
    found = set(re.findall(r"put .*?(\w+) in (\w+)", env.task))
    for obj, place in env.home.items():
        if not only_targets or kind(obj) == env.obj:
            found.add((kind(obj), kind(place)))
    return found


def layout(env):
    return tuple(sorted(map(kind, env.places)))


def test_no_room_occurs_twice(rooms):
    train = {room_key(env) for env in rooms["train"]}
    assert not train & {room_key(env) for env in rooms["seen"]}
    assert len(train) > 19_900


@pytest.mark.parametrize("split", SPLITS)
def test_all_families_equally_often(rooms, split):
    count = Counter(env.task_type for env in rooms[split])
    assert set(count) == set(TASK_TYPES)
    assert max(count.values()) - min(count.values()) <= 1


def test_unseen_layouts_are_in_unseen_only(rooms):
    train = {layout(env) for env in rooms["train"]}
    seen = {layout(env) for env in rooms["seen"]}
    unseen = {layout(env) for env in rooms["unseen"]}
    assert seen <= train
    assert not train & unseen
    assert (len(train), len(unseen)) == (67, 14)  # no object fits in seven more


def test_held_out_pairs_are_in_unseen_only(rooms):
    train = set()
    for env in [*rooms["train"], *rooms["seen"]]:
        train |= pairs(env)
    unseen = set()
    for env in rooms["unseen"]:
        unseen |= pairs(env, only_targets=True)
    assert not train & unseen
    # Four and two of six places for each of nine object kinds.
    assert (len(train), len(unseen)) == (4 * 9, 2 * 9)


@pytest.mark.parametrize("split", SPLITS)
def test_rooms_are_sound(rooms, split):
    for env in rooms[split]:
        kinds = [kind(place) for place in env.places]
        assert len(set(env.places)) == 4
        assert max(map(kinds.count, kinds)) <= 2
        assert set(env.home.values()) <= set(env.places)
        assert env.lamp in env.places
        has_surface = any(place in household_rooms.OPEN for place in kinds)
        assert not has_surface or kind(env.lamp) in household_rooms.OPEN
        targets = [obj for obj in env.home if kind(obj) == env.obj]
        assert len(targets) == (2 if env.task_type == "pick_two_obj_and_place" else 1)
        assert len({kind(obj) for obj in env.home}) == len(env.home) - len(targets) + 1
        assert env.dest in kinds
        assert env.dest not in {kind(env.home[obj]) for obj in targets}
        assert {name[-1] for name in [*env.home, *env.places]} <= {"1", "2"}


@pytest.mark.parametrize(
    "split, task, home",
    [
        (
            "train",
            "put a clean plate in shelf",
            {"plate 2": "cabinet 1", "egg 1": "shelf 2", "soap 1": "box 1"},
        ),
        (
            "seen",
            "put a clean plate in desk",
            {"plate 2": "cabinet 1", "knife 2": "shelf 2", "watch 2": "shelf 1"},
        ),
        (
            "unseen",
            "put a clean egg in drawer",
            {"egg 2": "desk 1", "cloth 1": "desk 1", "watch 2": "drawer 2"},
        ),
    ],
)
def test_the_rooms_never_change(split, task, home):
    """Results are reported on these rooms. Other rooms would be another benchmark."""
    env = make(split, 8)
    assert (env.task, env.home) == (task, home)


TRANSCRIPTS = """
import random
from worlds.household import SPLITS, make
for split in SPLITS:
    for index in range(12):
        env = make(split, index)
        rng = random.Random(index)
        output = env.reset()
        print(output)
        while not env.done:
            info = output[-1]
            output = env.step(rng.choice(info["admissible"]))
            print(output)
"""


def test_same_transcripts_in_every_process():
    def run(hash_seed):
        finished = subprocess.run(
            [sys.executable, "-c", TRANSCRIPTS],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        return finished.stdout

    first = run("1")
    assert len(first) > 100_000
    assert first == run("2")


def test_reset_starts_over_whatever_the_seed():
    for index in range(12):
        env = make("train", index)
        fresh = make("train", index)
        first = list(random_walk(env, random.Random(0), 24))
        env.reset()
        follow_expert(env)
        assert env.reset(seed=7) == fresh.reset(seed=8) == first[0]
        assert room_state(env) == room_state(fresh)
        assert list(random_walk(env, random.Random(0), 24)) == first


# ---- splits, limits, errors ----


def test_unknown_splits_and_tasks_say_what_there_is():
    for call in (size, make):
        with pytest.raises(ValueError, match="no split 'valid': choose one of train, seen, unseen"):
            call("valid")
    for index in (300, -1):
        with pytest.raises(IndexError, match=f"'seen' has tasks 0 to 299, not {index}"):
            make("seen", index)
    assert [size(split) for split in SPLITS] == [20_000, 300, 300]


def test_step_needs_a_running_episode():
    env = make("train", 0, max_steps=1)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("go to sink 1")
    for _ in range(2):
        env.reset()
        env.step("go to sink 1")
        with pytest.raises(RuntimeError, match="call reset"):
            env.step("go to sink 1")


def test_step_limit_truncates():
    env = make("train", 0, max_steps=3)
    env.reset()
    ends = [env.step(action)[2:4] for action in ("go to sink 1", "sing", "go to fridge 1")]
    assert ends == [(False, False), (False, False), (False, True)]


def test_a_win_on_the_last_step_is_no_truncation():
    env = room_for("pick_and_place_simple")
    env.max_steps = 4
    play(env, "go to desk 1", "take mug 1 from desk 1", "go to table 1")
    _, reward, terminated, truncated, info = env.step("move mug 1 to table 1")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["won"], info["score"]) == (True, 1.0)


def test_nothing_is_won_at_reset(rooms):
    for split in SPLITS:
        for env in rooms[split][:3000]:
            _, info = env.reset()
            assert not info["won"]
            assert info["score"] == 0
            assert not env._solved()


# ---- rules ----

EPISODE = [  # action, page without the time of day, admissible actions other than `go to`
    (
        "go to drawer 1",
        "At drawer 1 closed: nothing. Hold nothing. "
        "Unseen desk 1 drawer 1 table 1 table 2 box 1. Seen nothing. Lamp nothing. Recall nothing.",
        ["open drawer 1"],
    ),
    (
        "open drawer 1",
        "At drawer 1: mug 2 egg 1. Hold nothing. "
        "Unseen desk 1 table 1 table 2 box 1. Seen nothing. Lamp nothing. Recall nothing.",
        ["close drawer 1", "take mug 2 from drawer 1", "take egg 1 from drawer 1"],
    ),
    (
        "take mug 2 from drawer 1",
        "At drawer 1: egg 1. Hold mug 2. "
        "Unseen desk 1 table 1 table 2 box 1. Seen nothing. Lamp nothing. Recall nothing.",
        ["close drawer 1", "move mug 2 to drawer 1"],
    ),
    (
        "close drawer 1",
        "At drawer 1 closed: egg 1. Hold mug 2. "
        "Unseen desk 1 table 1 table 2 box 1. Seen nothing. Lamp nothing. Recall nothing.",
        ["open drawer 1"],
    ),
    (
        "go to sink 1",
        "At sink 1: nothing. Hold mug 2. "
        "Unseen desk 1 table 1 table 2 box 1. Seen drawer 1. Lamp nothing. Recall nothing.",
        ["clean mug 2 with sink 1"],
    ),
    (
        "clean mug 2 with sink 1",
        "At sink 1: nothing. Hold mug 2 clean. "
        "Unseen desk 1 table 1 table 2 box 1. Seen drawer 1. Lamp nothing. Recall nothing.",
        ["clean mug 2 with sink 1"],
    ),
    (
        "go to desk 1",
        "At desk 1: lamp 1 mug 1 pen 1. Hold mug 2 clean. "
        "Unseen table 1 table 2 box 1. Seen drawer 1. Lamp nothing. Recall nothing.",
        ["move mug 2 to desk 1", "use lamp 1"],
    ),
    (
        "move mug 2 to desk 1",
        "At desk 1: lamp 1 mug 1 mug 2 clean pen 1. Hold nothing. "
        "Unseen table 1 table 2 box 1. Seen drawer 1. Lamp nothing. Recall nothing.",
        [
            "take mug 1 from desk 1",
            "take mug 2 from desk 1",
            "take pen 1 from desk 1",
            "use lamp 1",
        ],
    ),
    (
        "close desk 1",
        "Nothing happens. "
        "At desk 1: lamp 1 mug 1 mug 2 clean pen 1. Hold nothing. "
        "Unseen table 1 table 2 box 1. Seen drawer 1. Lamp nothing. Recall nothing.",
        [
            "take mug 1 from desk 1",
            "take mug 2 from desk 1",
            "take pen 1 from desk 1",
            "use lamp 1",
        ],
    ),
    (
        "go to table 2",
        "At table 2: nothing. Hold nothing. "
        "Unseen table 1 box 1. Seen drawer 1 desk 1. "
        "Lamp desk 1. Recall mug 1 desk 1, mug 2 desk 1 clean.",
        [],
    ),
]


def test_pages_of_an_episode():
    env = room_for("pick_clean_then_place_in_recep")
    page, info = env.reset()
    assert page == (
        "Dawn. At the middle: nothing. Hold nothing. "
        "Unseen desk 1 drawer 1 table 1 table 2 box 1. Seen nothing. Lamp nothing. Recall nothing."
    )
    go_commands = [f"go to {p}" for p in (*env.places, "sink 1", "microwave 1", "fridge 1")]
    assert info["admissible"] == go_commands
    for action, expected_page, other_commands in EPISODE:
        page, reward, terminated, truncated, info = env.step(action)
        assert without_time(page) == expected_page
        assert TIME_OF_DAY.search(page)
        go_elsewhere = [command for command in go_commands if command != f"go to {env.at}"]
        assert info["admissible"] == go_elsewhere + other_commands
        assert (reward, terminated, truncated) == (0.0, False, False)


def test_delivered_objects_are_marked_and_not_recalled():
    """The first of two objects; with a single object, delivering it wins."""
    envs = (make("train", index) for index in range(5, 600, 6))
    env = next(env for env in envs if len(set(env.home.values())) > 1)
    assert env.task_type == "pick_two_obj_and_place"
    env.reset()
    page, *_ = env.step("wait")
    subgoal = ""
    while not env._delivered():
        _, subgoal, action = env.expert(subgoal)
        page, *_ = env.step(action)
    (first,) = env._delivered()
    assert f"{first} done" in page
    page, *_ = env.step("go to sink 1")
    assert first not in page
    page, *_ = env.step(f"go to {env.where[first]}")
    assert f"{first} done" in page


@pytest.mark.parametrize("split", SPLITS)
def test_random_walks_obey_the_rules(split):
    """Checked from the pages: one thing in hand at most, and things move only by hand."""
    for index in range(100):
        env = make(split, index)
        known = {}  # thing -> its place, or None when held
        for page, info in random_walk(env, random.Random(index), 24):
            known = check_page(env, page, known)
            assert len(page.split()) <= 66
            assert len(set(info["admissible"])) == len(info["admissible"])


def check_page(env, page, known):
    """Compare a page with `known`, {thing: place or None}, of the page before -> the new one."""
    at, held, unseen, things_at = read_page(page)
    # Elsewhere only the task's objects are recalled, and not those that are delivered.
    useless = {obj for obj in env.home if kind(obj) != env.obj} | set(env._delivered())
    not_recalled = {obj for obj in useless if env.where[obj] not in (at, None)}
    now = {obj: None for obj in held}
    for place, things in things_at.items():
        now.update({thing: place for thing in things if thing != "lamp 1"})
    listed = [thing for things in things_at.values() for thing in things if thing != "lamp 1"]
    listed += held
    assert len(held) <= 1
    assert len(set(listed)) == len(listed)
    assert set(known) - not_recalled <= set(listed)
    assert not not_recalled & set(listed)
    assert sorted([*unseen, *things_at]) == sorted(env.places)
    for obj, place in now.items():
        if obj not in known:  # seen for the first time, where the agent stands
            assert place == env.home[obj] == at
        elif place != known[obj]:  # taken or put down, where the agent stands
            assert {place, known[obj]} == {None, at}
    for obj, place in env.home.items():
        assert obj in now or place not in things_at or obj in not_recalled
    assert sum("lamp 1" in things for things in things_at.values()) == (env.lamp in things_at)
    return {**known, **now}


def test_the_time_of_day_shows_how_much_of_the_step_limit_is_used():
    env = make("train", 0)
    page, _ = env.reset()
    times = [TIME_OF_DAY.search(page)[1]]
    while not env.done:
        page, *_ = env.step("wait")
        times.append(TIME_OF_DAY.search(page)[1])
    assert times == sorted(times, key=household.TIMES_OF_DAY.index)
    assert set(times) == set(household.TIMES_OF_DAY)


def test_closed_places_hide_what_is_in_them():
    for index in range(200):
        env = make("train", index)
        env.reset()
        for place in env.places:
            if kind(place) not in household_rooms.CLOSED:
                continue
            page, *_, info = env.step(f"go to {place}")
            _, _, unseen, _ = read_page(page)
            assert f". At {place} closed: nothing." in page
            assert place in unseen
            assert "take" not in " ".join(info["admissible"])
            assert f"open {place}" in info["admissible"]
            page, *_ = env.step(f"open {place}")
            _, _, _, things_at = read_page(page)
            lamp = ["lamp 1"] if env.lamp == place else []
            assert things_at[place] == lamp + [o for o, p in env.home.items() if p == place]


def test_only_these_admissible_actions_do_nothing():
    """The lamp without the target in hand, or once more; a treatment that an object has already."""
    without_effect = Counter()
    for index in range(60):
        env = make(SPLITS[index % 3], index)
        for _, info in random_walk(env, random.Random(index), 24):
            if env.done:
                continue
            before = room_state(env)
            for action in info["admissible"]:
                other = copy.deepcopy(env)
                page = other.step(action)[0]
                assert not page.startswith("Nothing happens")
                if room_state(other) == before:
                    verb = action.split()[0]
                    without_effect[verb] += 1
                    state = {"clean": "clean", "heat": "hot", "cool": "cool"}.get(verb)
                    assert verb == "use" or f" {state}. Unseen" in page, action
            assert room_state(env) == before, "a copy changed the original"
    assert set(without_effect) == {"use", "clean", "heat", "cool"}


def test_inadmissible_actions_change_nothing_but_the_step_count():
    everything = {"", "sing", "go to", "take mug 1", "GO TO SINK 1", "go to sink 1 "}
    for index in range(60):
        for _, info in random_walk(make("train", index), random.Random(index), 24):
            everything.update(info["admissible"])
    for index in range(12):
        env = make("train", index, max_steps=1000)
        rng = random.Random(index)
        for page, info in random_walk(env, rng, 8):
            if env.done:
                continue
            before = room_state(env)
            page = without_time(page.removeprefix("Nothing happens. "))
            for action in rng.sample(sorted(everything - set(info["admissible"])), 30):
                steps = env.steps
                answer, *rest = env.step(action)
                assert without_time(answer) == "Nothing happens. " + page
                assert rest == [0.0, False, False, info]
                assert room_state(env) == before
                assert env.steps == steps + 1


# ---- the six tasks: what wins, and what almost does ----

TAKE = ("go to desk 1", "take mug 1 from desk 1")
PUT = ("go to table 1", "move mug 1 to table 1")
RETAKE = ("take mug 1 from table 1",)
SINK = ("go to sink 1", "clean mug 1 with sink 1")
MICROWAVE = ("go to microwave 1", "heat mug 1 with microwave 1")
FRIDGE = ("go to fridge 1", "cool mug 1 with fridge 1")


def test_place():
    env = room_for("pick_and_place_simple")
    pen_in_table = (
        "go to desk 1",
        "take pen 1 from desk 1",
        "go to table 1",
        "move pen 1 to table 1",
    )
    assert not play(env, *pen_in_table)  # not a mug
    assert not play(env, *TAKE, "go to box 1", "open box 1", "move mug 1 to box 1")  # not a table
    assert not play(env, "take mug 1 from box 1", *SINK, "go to table 2")  # still in hand
    assert play(env, "move mug 1 to table 2")  # any table


@pytest.mark.parametrize(
    "family, treat, others",
    [
        ("pick_clean_then_place_in_recep", SINK, (MICROWAVE, FRIDGE)),
        ("pick_heat_then_place_in_recep", MICROWAVE, (SINK, FRIDGE)),
        ("pick_cool_then_place_in_recep", FRIDGE, (SINK, MICROWAVE)),
    ],
)
def test_treat_and_place(family, treat, others):
    env = room_for(family)
    env.max_steps = 100
    env.goal_state = household.NEEDS[family]
    treat_and_put_pen = [action.replace("mug", "pen") for action in (*treat, *PUT)]
    assert not play(env, "go to desk 1", "take pen 1 from desk 1", *treat_and_put_pen)
    assert not play(env, *TAKE, *PUT)  # untreated
    for other in others:
        assert not play(env, *RETAKE, *other, *PUT)  # another treatment
        assert not play(env, *RETAKE, *treat, *other, *PUT)  # another treatment afterwards
    assert not play(env, *RETAKE, *treat)  # not delivered
    assert not play(env, "go to box 1", "open box 1", "move mug 1 to box 1")  # another place
    untreated_mug = (
        "go to drawer 1",
        "open drawer 1",
        "take mug 2 from drawer 1",
        "go to table 1",
        "move mug 2 to table 1",
    )
    assert not play(env, *untreated_mug)
    assert play(env, "go to box 1", "take mug 1 from box 1", *PUT)


def test_look_under_the_lamp():
    env = room_for("look_at_obj_in_light")
    assert not play(env, "go to desk 1", "use lamp 1")  # empty hands
    assert not play(env, "take mug 1 from desk 1")  # the lamp before, the mug after
    assert not play(env, *PUT)
    pen_under_lamp = (
        "go to desk 1",
        "take pen 1 from desk 1",
        "use lamp 1",
        "move pen 1 to desk 1",
    )
    assert not play(env, *pen_under_lamp)  # not a mug
    assert not play(env, "go to table 1", "take mug 1 from table 1")
    assert "use lamp 1" not in env.admissible()  # no lamp here
    assert play(env, "go to desk 1", "use lamp 1")


def test_the_lamp_wins_no_other_task():
    for family in TASK_TYPES:
        if family != "look_at_obj_in_light":
            assert not play(room_for(family), *TAKE, "use lamp 1")


def test_two():
    env = room_for("pick_two_obj_and_place")
    env.max_steps = 30
    assert not play(env, *TAKE, *PUT)
    assert not play(env, *RETAKE, "go to table 2", "move mug 1 to table 2")  # the same one twice
    pen_in_table = (
        "go to desk 1",
        "take pen 1 from desk 1",
        "go to table 2",
        "move pen 1 to table 2",
    )
    assert not play(env, *pen_in_table)
    take_second = ("go to drawer 1", "open drawer 1", "take mug 2 from drawer 1", "go to table 1")
    assert not play(env, *take_second)
    assert play(env, "move mug 2 to table 1")  # another table will do


@pytest.mark.parametrize("family", TASK_TYPES)
def test_the_task_says_what_wins(family):
    env = make("train", TASK_TYPES.index(family))
    _, info = env.reset()
    words = {
        "pick_clean_then_place_in_recep": "clean",
        "pick_heat_then_place_in_recep": "hot",
        "pick_cool_then_place_in_recep": "cool",
        "pick_two_obj_and_place": "two",
        "look_at_obj_in_light": "under the lamp",
    }
    assert info["task"] == env.task
    assert info["task_type"] == family
    assert env.obj in env.task
    for other_family, word in words.items():
        assert (word in env.task) == (family == other_family)
    assert (f"in {env.dest}" in env.task) == (family != "look_at_obj_in_light")


# ---- the expert ----


@pytest.mark.parametrize("split", SPLITS)
def test_expert_wins_and_is_rewarded_once(split):
    for index in SAMPLE[split]:
        env = make(split, index)
        env.reset()
        rewards, switches, (_, _, terminated, truncated, info) = follow_expert(env)
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
        assert terminated
        assert not truncated
        assert info["won"]
        assert info["score"] == 1.0
        assert switches[0]
        assert 1 <= sum(switches) <= 6


def test_expert_recovers_from_up_to_eight_random_actions():
    for index in range(200):
        env = make(SPLITS[index % 3], index, max_steps=60)
        rng = random.Random(index)
        env.reset()
        subgoal = ""
        for _ in range(rng.randint(1, 8)):
            if not env.done:
                _, subgoal, _ = env.expert(subgoal)
                env.step(rng.choice(env.admissible()))
        if not env.won:
            _, _, (_, _, terminated, _, _) = follow_expert(env, subgoal)
            assert terminated


def test_expert_keeps_a_subgoal_until_it_is_reached():
    """Any listed subgoal is kept, useful or not, and ends. Any other one gives way to a listed."""
    for index in range(90):
        env = make(SPLITS[index % 3], index, max_steps=1000)
        rng = random.Random(index)
        info = after_random_walk(env, rng, rng.randint(0, 12))
        if env.done:
            continue
        for wanted in info["subgoals"]:
            check_pursuit(copy.deepcopy(env), wanted)
        switch, subgoal, action = env.expert("sing")
        assert switch
        assert subgoal in info["subgoals"]
        assert action in info["admissible"]
        assert env.expert(subgoal) == (False, subgoal, action)


def check_pursuit(env, wanted):
    """The expert keeps `wanted` for 1 to 16 turns and then switches to another listed subgoal."""
    turns = 0
    while not env.done:
        switch, subgoal, action = env.expert(wanted)
        if switch:
            break
        assert subgoal == wanted
        assert action in env.admissible()
        env.step(action)
        turns += 1
    assert 1 <= turns <= 16
    assert env.done or (subgoal != wanted and subgoal in env.subgoals())


def test_expert_knows_only_what_was_seen():
    """The advice is the same wherever unseen objects and an unseen lamp lie."""
    for index in range(180):
        env = make(SPLITS[index % 3], index)
        rng = random.Random(index)
        info = after_random_walk(env, rng, rng.randint(0, 10))
        hidden = [place for place in env.places if place not in env.seen]
        if env.done or not hidden:
            continue
        for subgoal in ["", *info["subgoals"]]:
            other = copy.deepcopy(env)
            for obj, place in env.where.items():
                if place in hidden:
                    other.where[obj] = rng.choice(hidden)
            if env.lamp in hidden:
                other.lamp = rng.choice(hidden)
            assert other.expert(subgoal) == env.expert(subgoal)


def test_expert_changes_nothing():
    env = make("unseen", 4)
    env.reset()
    before = room_state(env)
    assert env.expert("") == env.expert("")
    assert room_state(env) == before


def test_expert_has_no_advice_where_no_episode_runs():
    for index in range(60):
        env = make("train", index)
        assert env.expert("") is None
        env.reset()
        follow_expert(env)
        assert env.expert("") is None
