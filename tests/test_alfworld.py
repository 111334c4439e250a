"""ALFWorld: the adapter on real games, and its errors on made-up ones.

What plays a game needs ALFWORLD_DATA and textworld and is skipped without them; the rest always runs."""

import functools
import importlib.util
import json
import os
import random
import re
import sys
import types
from pathlib import Path

import pytest

from worlds import alfworld as alfworld_env
from worlds.alfworld import SPLITS, TASK_TYPES, AlfworldEnv, games, make, names, size, task_type
from worlds.alfworld_expert import Demonstrator, disguise, parts, subgoal_of
from worlds.alfworld_page import Page

MISSING = (
    "ALFWORLD_DATA is not set"
    if not os.environ.get("ALFWORLD_DATA")
    else "textworld is not installed"
    if not importlib.util.find_spec("textworld")
    else "textworld fails on Python 3.13 and newer"
    if sys.version_info >= (3, 13)
    else ""
)
plays = pytest.mark.skipif(bool(MISSING), reason=MISSING)
KEYS = {"task", "task_type", "admissible", "won", "score", "gamefile", "subgoals", "page"}


def walkthrough(env):
    return json.loads(Path(env.gamefile).read_text())["walkthrough"]


def first_of(split, kind, **kwargs):
    """An env of the first game of that task type."""
    return make(split, [task_type(file) for file in games(split)].index(kind), **kwargs)


def play(env, actions):
    """Everything an episode returns: the reset's pair, then one 5-tuple per action."""
    return [env.reset(), *map(env.step, actions)]


@pytest.fixture
def env():
    world = make("valid_seen", 0)
    yield world
    world.close()


# --- playing ---------------------------------------------------------------------------------------------------------


@plays
@pytest.mark.parametrize("split", SPLITS)
def test_walkthroughs_win_and_reward_once(split):
    first = 2 * SPLITS.index(split)  # two task types per split, all six over the three
    for kind in TASK_TYPES[first : first + 2]:
        env = first_of(split, kind)
        _, *steps = play(env, walkthrough(env))
        assert [reward for _, reward, *_ in steps] == [0.0] * (len(steps) - 1) + [1.0]
        assert [terminated for _, _, terminated, *_ in steps] == [False] * (len(steps) - 1) + [True]
        assert not any(truncated for *_, truncated, _ in steps)
        assert (
            steps[-1][-1]["won"]
            and steps[-1][-1]["score"] == 1.0
            and steps[-1][-1]["task_type"] == kind
        )
        with pytest.raises(RuntimeError, match="reset"):
            env.step("look")
        env.close()


@plays
def test_first_observation_and_info(env):
    observation, info = env.reset(seed=7)
    assert observation.startswith("You are in the middle of a room.") and "\n" not in observation
    assert "Your task" not in observation and "Welcome" not in observation
    assert set(info) == KEYS and not info["won"] and info["score"] == 0.0
    assert info["gamefile"] == games("valid_seen")[0] and info["task_type"] in TASK_TYPES
    assert re.fullmatch(r"[a-z ]+\.", info["task"])
    assert "look" in info["admissible"] and "help" not in info["admissible"]
    again = env.step("look")[-1]
    assert (
        set(again) == KEYS
        and again["gamefile"] == info["gamefile"]
        and again["task"] == info["task"]
    )


@plays
def test_an_inadmissible_action_costs_a_step_and_changes_nothing(env):
    env.max_steps = 2
    _, before = env.reset()
    observation, reward, terminated, truncated, info = env.step("dance with mug 1")
    assert (observation, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
    assert info.pop("page") == "Nothing happens. " + before.pop("page") and info == before
    assert env.step("dance with mug 1")[3]


@plays
def test_the_step_limit_truncates_and_a_win_on_the_last_step_does_not(env):
    plan = walkthrough(env)
    env.max_steps = len(plan) - 1
    *_, terminated, truncated, info = play(env, plan[:-1])[-1]
    assert truncated and not terminated and not info["won"]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(plan[-1])
    env.max_steps = len(plan)
    *_, terminated, truncated, info = play(env, plan)[-1]
    assert terminated and not truncated and info["won"]


@plays
def test_deterministic_also_with_a_used_engine_and_beside_another_env(env):
    plan = walkthrough(env)
    alone = play(env, plan)
    env.close()  # its engine goes to `other`, and `env` gets a new one at its next reset
    other = make("train", 0)
    other.reset(seed=1)
    beside = [env.reset(seed=2)]
    for action in plan:
        other.step("look")
        beside.append(env.step(action))
    other.close()
    assert alone == beside


@plays
def test_argv_and_stdout_are_left_alone(env, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1"])
    env.reset()
    env.reset()
    assert sys.argv == ["train.py", "--seed", "1"]
    assert capfd.readouterr().out == ""


# --- what the engine remembers ---------------------------------------------------------------------------------------


@plays
def test_remembering_changes_nothing(monkeypatch):
    """Random walks in two games side by side: every observation and action list is what textworld's own engine says."""
    from textworld.envs.pddl import PddlEnv

    def walk():
        monkeypatch.setattr(alfworld_env, "_idle", [])
        rng, envs = random.Random(3), [make("valid_unseen", 0), make("valid_unseen", 100)]
        seen = [env.reset() for env in envs]
        for _ in range(20):
            for env in envs:
                action = rng.choice([*seen[-2][-1]["admissible"], "dance"])
                seen.append((action, *env.step(action)))
        return seen

    ours = walk()
    monkeypatch.setattr(alfworld_env, "_engine_class", lambda: PddlEnv)
    assert walk() == ours
    assert len({action.split()[0] for action, *_ in ours[2:]}) > 3


@plays
def test_a_game_is_translated_once_and_textworld_left_as_it_is(monkeypatch):
    import fast_downward
    from textworld.envs.pddl import textgen

    calls, translate = [], fast_downward.pddl2sas
    monkeypatch.setattr(
        fast_downward,
        "pddl2sas",
        lambda *args, **kwargs: calls.append(args) or translate(*args, **kwargs),
    )
    monkeypatch.setattr(alfworld_env, "_idle", [])
    monkeypatch.setattr(
        alfworld_env, "_engine_class", functools.lru_cache(alfworld_env._engine_class.__wrapped__)
    )
    before = [vars(place).copy() for place in (fast_downward, textgen, textgen.Rule)]
    one, other = make("valid_seen", 3), make("valid_seen", 3)
    pages = [one.reset(), one.reset(), other.reset()]
    assert one.step("look") == other.step("look") and pages == [pages[0]] * 3
    assert len(calls) == 1
    assert [dict(vars(place)) for place in (fast_downward, textgen, textgen.Rule)] == before


# --- the expert ------------------------------------------------------------------------------------------------------


@plays
@pytest.mark.parametrize("kind", ["pick_two_obj_and_place", "look_at_obj_in_light"])
def test_the_expert_wins_and_switches_once_per_deed(kind):
    env = first_of("valid_unseen", kind)
    env.reset()
    subgoal, switches, info = "", 0, {"won": False}
    while not info["won"]:
        switch, wanted, action = env.expert(subgoal)
        assert switch or wanted == subgoal
        subgoal, switches, info = wanted, switches + switch, env.step(action)[-1]
    assert switches == sum(
        action.split()[0] in ("take", "move", "clean", "heat", "cool", "use")
        for action in walkthrough(env)
    )
    assert env.expert(subgoal) is None
    env.close()


@plays
def test_the_expert_finds_back_from_whatever_was_done(kind="pick_two_obj_and_place"):
    """Every third action is another's: strays, things put down elsewhere, doors shut."""
    env = first_of("valid_unseen", kind, max_steps=200)
    rng, (_, info), subgoal = random.Random(0), env.reset(), ""
    while not info["won"]:
        _, subgoal, action = env.expert(subgoal)
        info = env.step(
            rng.choice([*info["admissible"], "dance with mug 1"]) if rng.random() < 0.3 else action
        )[-1]
    env.close()


@plays
def test_the_expert_pursues_what_he_is_told_whether_or_not_it_helps():
    """Heat what should be clean, put it down too early: he does it, and then does what is needed."""
    env = first_of("valid_unseen", "pick_clean_then_place_in_recep", max_steps=200)
    _, info = env.reset()
    (find,) = info["subgoals"]
    assert find.startswith("find and take ") and env.expert("")[:2] == (True, find)
    while info["subgoals"] == [find]:
        switch, said, action = env.expert(find)
        assert (switch, said) == (False, find)
        info = env.step(action)[-1]
    treat, *_, put = info["subgoals"]
    assert treat == find.replace("find and take", "clean") and put.startswith(
        find.replace("find and take", "put") + " in "
    )
    assert env.expert(find)[:2] == (True, treat)
    while put in info["subgoals"]:  # too early
        switch, said, action = env.expert(put)
        assert (switch, said) == (False, put)
        info = env.step(action)[-1]
    assert not info["won"] and env.expert(put)[:2] == (True, find)
    subgoal, told = put, []
    while not info["won"]:
        switch, subgoal, action = env.expert(subgoal)
        told += [subgoal] * switch
        info = env.step(action)[-1]
    assert told == [find, treat, put]
    env.close()


def test_the_page_sums_up_what_was_seen():
    page, said = Page(["bed 1", "desk 1", "drawer 1", "shelf 1"], "put a clean mug in shelf."), []
    for action, observation in (
        ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 2, and a pen 1."),
        ("take mug 2 from shelf 1", "You pick up the mug 2 from the shelf 1."),
        ("dance", "Nothing happens."),
        ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed."),
        (
            "open drawer 1",
            "You open the drawer 1. The drawer 1 is open. In it, you see a egg 1, and a mug 1.",
        ),
        ("close drawer 1", "You close the drawer 1."),
        ("heat mug 2 with microwave 1", "You heat the mug 2 using the microwave 1."),
        ("clean mug 2 with sinkbasin 1", "You clean the mug 2 using the sinkbasin 1."),
        ("cool mug 2 with fridge 1", "You cool the mug 2 using the fridge 1."),
        ("look", "You are facing the drawer 1."),
        ("go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing."),
        ("move mug 2 to desk 1", "You move the mug 2 to the desk 1."),
        ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a pen 1."),
    ):
        said.append(str(page))
        page.follow(*parts(action), observation)
    assert said + [str(page)] == [
        "In the middle. Hold nothing. Named shelf 1. Unseen bed 1, desk 1, drawer 1, shelf 1.",
        "At shelf 1: mug 2. Hold nothing. Named shelf 1 with mug 2. Unseen bed 1, desk 1, drawer 1.",
        "At shelf 1: nothing. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1, drawer 1.",
        "Nothing happens. At shelf 1: nothing. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1, drawer 1.",
        "At drawer 1 closed. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1: mug 1. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1 closed. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1 closed. Hold mug 2 heat. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1 closed. Hold mug 2 heat clean. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1 closed. Hold mug 2 clean cool. Named shelf 1. Unseen bed 1, desk 1.",
        "At drawer 1 closed. Hold mug 2 clean cool. Named shelf 1. Unseen bed 1, desk 1.",
        "At desk 1: nothing. Hold mug 2 clean cool. Seen mug 1 at drawer 1. Named shelf 1. Unseen bed 1.",
        "At desk 1: mug 2. Hold nothing. Seen mug 1 at drawer 1. Named shelf 1. Unseen bed 1.",
        "At shelf 1: nothing. Hold nothing. Seen mug 1 at drawer 1, mug 2 at desk 1. Named shelf 1. Unseen bed 1.",
    ]


def test_what_is_unseen_is_named_from_where_one_stands():
    page = Page(["bed 1", "desk 1", "desk 2", "drawer 1", "shelf 1"], "put a mug in shelf.")
    page.follow("go", "", "desk 1", "You arrive at desk 1. On the desk 1, you see nothing.")
    assert str(page).endswith("Unseen desk 2, drawer 1, shelf 1, bed 1.")


def test_what_lies_where_it_shall_stands_apart_and_so_does_the_lamp():
    page = Page(["bed 1", "desk 1", "desk 2"], "put two mug in desk.")
    page.follow(
        "go",
        "",
        "bed 1",
        "You arrive at bed 1. On the bed 1, you see a mug 1, a desklamp 1, and a mug 2.",
    )
    page.follow("take", "mug 1", "bed 1", "You pick up the mug 1 from the bed 1.")
    page.follow("move", "mug 1", "desk 2", "You move the mug 1 to the desk 2.")
    assert (
        str(page)
        == "At bed 1: mug 2. Hold nothing. Named desk 1, desk 2 with mug 1. Unseen desk 1, desk 2."
    )
    page.words |= {"desklamp"}
    page.follow("go", "", "desk 1", "You arrive at desk 1. On the desk 1, you see a floorlamp 1.")
    assert str(page) == (
        "At desk 1: nothing. Hold nothing. Seen mug 2 at bed 1. Named desk 1, desk 2 with mug 1. Lamp desklamp 1 at bed 1. "
        "Unseen desk 2."
    )


def test_the_expert_puts_down_where_one_can():
    places = ["bed 1", "coffeemachine 1", "desk 1"]
    page, demonstrator = (
        Page(places, "put a mug in desk."),
        Demonstrator(
            "a/b/game.tw-pddl", ["go to bed 1", "take mug 1 from bed 1", "move mug 1 to desk 1"]
        ),
    )
    demonstrator.reset(page)
    page.follow(
        "go",
        "",
        "coffeemachine 1",
        "You arrive at coffeemachine 1. On the coffeemachine 1, you see nothing.",
    )
    page.follow("take", "pen 1", "coffeemachine 1", "")
    advice = lambda *admissible: demonstrator.advise("put down pen", admissible)
    assert advice("go to bed 1", "go to desk 1") == (False, "put down pen", "go to desk 1")
    assert advice("go to bed 1", "open coffeemachine 1") == (
        False,
        "put down pen",
        "open coffeemachine 1",
    )
    assert advice("go to desk 1", "move pen 1 to coffeemachine 1") == (
        False,
        "put down pen",
        "move pen 1 to coffeemachine 1",
    )


@plays
def test_the_page_tells_no_more_than_the_engine_has():
    """Every name on it stood in what the engine said, or in its list of actions, before."""
    env, rng = make("valid_unseen", 3, max_steps=60), random.Random(0)
    said, info = env.reset()
    heard, ended = said + " ".join(info["admissible"]), False
    while not ended:
        assert set(re.findall(r"[a-z]+ \d+", info["page"])) <= set(re.findall(r"[a-z]+ \d+", heard))
        said, _, won, truncated, info = env.step(rng.choice(info["admissible"]))
        heard, ended = heard + " " + said, won or truncated
        assert all(
            f"Hold {parts(action)[1]}" in info["page"]
            for action in info["admissible"]
            if action.startswith("move ")
        )
    env.close()


def test_a_search_does_not_depend_on_where_the_data_lies():
    """And begins at most four places before the thing, elsewhere for another game."""
    walkthrough = [
        "go to shelf 5",
        "take mug 1 from shelf 5",
        "go to desk 1",
        "move mug 1 to desk 1",
    ]
    admissible, first = [f"go to shelf {n}" for n in range(1, 10)] + ["go to desk 1"], {}
    for folder in ("/data", "/elsewhere/data"):
        for trial in range(40):
            demonstrator = Demonstrator(
                f"{folder}/train/pick_and_place_simple-Mug-None-Desk-1/trial_{trial}/game.tw-pddl",
                walkthrough,
            )
            demonstrator.reset(Page([a[6:] for a in admissible], "put a mug in desk."))
            switch, subgoal, action = demonstrator.advise("", admissible)
            assert (
                switch
                and subgoal == "find and take mug"
                and first.setdefault(trial, action) == action
            )
    assert set(first.values()) == {f"go to shelf {n}" for n in range(1, 6)}


def test_the_expert_goes_where_he_has_seen_the_thing_or_the_lamp():
    """On whichever way he saw it: there is no searching any more."""
    walkthrough = ["go to shelf 5", "take mug 1 from shelf 5", "go to desk 1", "use desklamp 1"]
    places = [f"shelf {n}" for n in range(1, 10)] + ["bed 1", "desk 1"]
    admissible, page = (
        [f"go to {place}" for place in places],
        Page(places, "examine the mug with the desklamp."),
    )
    demonstrator = Demonstrator("a/b/game.tw-pddl", walkthrough)
    demonstrator.reset(page)
    assert demonstrator.advise("", admissible)[2] in admissible[:5]
    page.follow(
        "go",
        "",
        "shelf 9",
        "You arrive at shelf 9. On the shelf 9, you see a desklamp 1, and a mug 2.",
    )
    page.follow("go", "", "shelf 8", "You arrive at shelf 8. On the shelf 8, you see nothing.")
    assert demonstrator.advise("find and take mug", admissible) == (
        False,
        "find and take mug",
        "go to shelf 9",
    )
    page.follow("take", "mug 2", "shelf 9", "You pick up the mug 2 from the shelf 9.")
    assert demonstrator.advise("use desklamp", admissible) == (
        False,
        "use desklamp",
        "go to shelf 9",
    )


def test_a_disguise_renames_in_each_episode_alike_and_keeps_what_is_no_name():
    """Things among things, places among places, whatever is deduced from them; the appliances stay, and so does every other word."""
    prompt = (
        "Task: put a clean mug in desk.\nYou see a mug 1, a pen 2, a watch 1. Admissible actions: 'go to desk 1', 'go to shelf 12', 'go to bed 1', "
        "'go to fridge 1', 'take mug 1 from shelf 12', 'take pen 2 from shelf 12', 'take watch 1 from shelf 12'\nSubgoal: clean mug."
    )
    said = (
        "<switch>KEEP</switch><subgoal>clean mug</subgoal><action>take mug 1 from shelf 12</action>"
    )
    episodes = [[(prompt, said, 3), (said, prompt, None)]] * 50
    shown, maps = disguise(episodes, random.Random(0)), set()
    for (first, told, left), (second, again, none) in shown:
        thing, place = re.search(r"take (\w+) 1 from (\w+) 12</action>", told).groups()
        assert (first, told, left, none) == (again, second, 3, None)  # one way an episode
        assert (
            f"put a clean {thing} in " in first
            and first.endswith(f"clean {thing}.")
            and f"<subgoal>clean {thing}<" in told
        )
        assert (
            thing in ("mug", "pen", "watch")
            and place in ("desk", "shelf", "bed")
            and "'go to fridge 1'" in first
        )
        others = re.compile(r"\b(mug|pen|watch|desk|shelf|bed)\b")
        assert others.sub("_", first) == others.sub("_", prompt) and sorted(
            set(others.findall(first))
        ) == sorted(set(others.findall(prompt)))
        maps.add((thing, place))
    assert len(maps) == 9


def test_subgoals_carry_no_numbers():
    said = {
        "take mug 1 from desk 2": "find and take mug",
        "move mug 1 to shelf 12": "put mug in shelf",
        "clean mug 1 with sinkbasin 1": "clean mug",
        "heat egg 3 with microwave 1": "heat egg",
        "cool egg 3 with fridge 1": "cool egg",
        "use desklamp 1": "use desklamp",
        "look": "look",
    }
    assert {deed: subgoal_of(deed) for deed in said} == said


def test_names_count_each_kind_from_the_last_identifier():
    assert names(
        [
            "sink_bar__minus_1_bar_sinkbasin",
            "mug_bar__plus_2",
            "mug_bar__plus_1",
            "sink_bar_7",
            "agent1",
        ]
    ) == {
        "mug_bar__plus_2": "mug 1",
        "mug_bar__plus_1": "mug 2",
        "agent1": "agent1",
        "sink_bar_7": "sink 1",
        "sink_bar__minus_1_bar_sinkbasin": "sinkbasin 1",
    }


# --- errors, most of them on made-up games ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return tmp_path


def write(
    folder, name="pick_and_place_simple-Mug-None-Desk-1", split="train", trial="trial_1", **changes
):
    """A game file that the adapter accepts and no engine could play."""
    file = folder / "json_2.1.1" / split / name / trial / "game.tw-pddl"
    file.parent.mkdir(parents=True)
    file.write_text(
        json.dumps({"solvable": True, "grammar": 'template :: "move {o} to {r}";', **changes})
    )
    return file


def test_games_are_sorted_solvable_and_of_the_six_types(folder):
    good = [write(folder, trial="trial_2"), write(folder, trial="trial_1")]
    write(folder, trial="trial_3", solvable=False)
    write(folder, "pick_and_place_with_movable_recep-Mug-Bowl-Desk-1")
    write(folder, "pick_heat_then_place_in_recep-PotatoSliced-None-Fridge-1")
    assert games("train") == tuple(map(str, reversed(good))) and size("train") == 2
    assert make("train", 1).gamefile == str(good[0])


def test_missing_data_says_how_to_get_it(folder, monkeypatch):
    with pytest.raises(RuntimeError, match="no folder .*train.*alfworld-download"):
        size("train")
    (folder / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="^0 playable games"):
        size("train")
    monkeypatch.delenv("ALFWORLD_DATA")
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(RuntimeError, match="ALFWORLD_DATA is not set"):
        size("train")


def test_bad_split_and_bad_index(folder):
    write(folder)
    with pytest.raises(ValueError, match="train, valid_seen, valid_unseen"):
        make("test")
    for index in (-1, 1):
        with pytest.raises(IndexError, match="has 1 games"):
            make("train", index)


def test_unsolvable_and_older_games_are_refused(folder):
    with pytest.raises(RuntimeError, match="not marked solvable"):
        AlfworldEnv(write(folder, solvable=False))
    with pytest.raises(RuntimeError, match="alfworld-download -f"):
        AlfworldEnv(write(folder, trial="old", grammar='template :: "put {o} in/on {r}";'))


@plays
def test_a_real_game_turned_old_is_refused(tmp_path):
    game = json.loads(Path(games("valid_seen")[0]).read_text())
    old = write(
        tmp_path,
        **{**game, "grammar": game["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")},
    )
    with pytest.raises(RuntimeError, match="older data release"):
        AlfworldEnv(old)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="another error comes first")
def test_missing_package_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "textworld", None)
    monkeypatch.setattr(alfworld_env, "_idle", [])
    with pytest.raises(RuntimeError, match="pip install -r requirements-alfworld.txt"):
        AlfworldEnv(write(folder)).reset()


def test_a_failed_build_says_how_to_install_it(folder, monkeypatch):
    for error in (
        OSError("libdownward.so: cannot open"),
        RuntimeError("Can't find: libdownward.so"),
        ImportError("fast_downward"),
    ):
        monkeypatch.setattr(alfworld_env, "_engine_class", lambda: (_ for _ in ()).throw(error))
        monkeypatch.setattr(alfworld_env, "_idle", [])
        monkeypatch.setitem(sys.modules, "textworld", types.SimpleNamespace(EnvInfos=dict))
        monkeypatch.setattr(sys, "version_info", (3, 12, 0))
        with pytest.raises(
            RuntimeError,
            match=f"PDDL engine .{re.escape(str(error))}.: pip install -r requirements-alfworld.txt$",
        ):
            AlfworldEnv(write(folder, trial=type(error).__name__)).reset()


def test_python_too_new_is_said(folder, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(alfworld_env, "_idle", [])
    with pytest.raises(RuntimeError, match="3.10 to 3.12"):
        AlfworldEnv(write(folder)).reset()


def test_step_before_reset(folder):
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step"):
        AlfworldEnv(write(folder)).step("look")
