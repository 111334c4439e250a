"""ALFWorld: the world on real games, and its errors on made-up ones.

Tests that play a game need ALFWORLD_DATA and textworld and are skipped without them. The others
always run."""

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

from worlds import alfworld, alfworld_engine
from worlds.alfworld import SPLITS, TASK_TYPES, AlfworldEnv, games, make, size, task_type
from worlds.alfworld_engine import names
from worlds.alfworld_expert import Expert, disguise, parse_action, subgoal_of
from worlds.alfworld_page import Page


def missing():
    """Why no game can be played here; "" if one can."""
    if not os.environ.get("ALFWORLD_DATA"):
        return "ALFWORLD_DATA is not set"
    if not importlib.util.find_spec("textworld"):
        return "textworld is not installed"
    if sys.version_info >= (3, 13):
        return "textworld fails on Python 3.13 and newer"
    return ""


plays = pytest.mark.skipif(bool(missing()), reason=missing())
KEYS = {"task", "task_type", "admissible", "won", "score", "gamefile", "subgoals"}


def walkthrough(env):
    return json.loads(Path(env.gamefile).read_text())["walkthrough"]


def first_of(split, kind, **options):
    """An env of the first game of that task type."""
    kinds = [task_type(file) for file in games(split)]
    return make(split, kinds.index(kind), **options)


def play(env, actions):
    """Everything an episode returns: the reset's pair, then one 5-tuple per action."""
    return [env.reset(), *map(env.step, actions)]


def find_names(text):
    return set(re.findall(r"[a-z]+ \d+", text))


@pytest.fixture
def env():
    world = make("valid_seen", 0)
    yield world
    world.close()


@pytest.fixture
def no_idle_engines(monkeypatch):
    monkeypatch.setattr(alfworld_engine, "idle_engines", [])


# ---- playing ----


@plays
@pytest.mark.parametrize("split", SPLITS)
def test_walkthroughs_win_and_reward_once(split):
    first = 2 * SPLITS.index(split)  # two task types per split, all six over the three
    for kind in TASK_TYPES[first : first + 2]:
        env = first_of(split, kind)
        _, *steps = play(env, walkthrough(env))
        _, rewards, terminated, truncated, infos = zip(*steps, strict=True)
        assert rewards == (0.0,) * (len(steps) - 1) + (1.0,)
        assert terminated == (False,) * (len(steps) - 1) + (True,)
        assert not any(truncated)
        assert infos[-1]["won"]
        assert infos[-1]["score"] == 1.0
        assert infos[-1]["task_type"] == kind
        with pytest.raises(RuntimeError, match="reset"):
            env.step("look")
        env.close()


@plays
def test_first_observation_and_info(env):
    observation, info = env.reset(seed=7)
    assert observation.startswith("You are in the middle of a room.")
    assert "\n" not in observation
    assert "Your task" not in observation
    assert "Welcome" not in observation
    assert set(info) == KEYS
    assert not info["won"]
    assert info["score"] == 0.0
    assert info["gamefile"] == games("valid_seen")[0]
    assert info["task_type"] in TASK_TYPES
    assert re.fullmatch(r"[a-z ]+\.", info["task"])
    assert "look" in info["admissible"]
    assert "help" not in info["admissible"]
    *_, again = env.step("look")
    assert set(again) == KEYS
    assert again["gamefile"] == info["gamefile"]
    assert again["task"] == info["task"]


@plays
def test_an_inadmissible_action_costs_a_step_and_changes_nothing(env):
    env.max_steps = 2
    _, before = env.reset()
    observation, reward, terminated, truncated, info = env.step("dance with mug 1")
    assert (observation, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
    assert info == before
    assert env.step("dance with mug 1")[3]


@plays
def test_an_inadmissible_action_is_noted_on_the_page(env):
    env.page = True
    before, _ = env.reset()
    observation, *_ = env.step("dance with mug 1")
    assert observation == "Nothing happens. " + before


@plays
def test_the_page_is_an_observation_and_changes_nothing_else(env):
    actions = [*walkthrough(env)[:-1], "dance", walkthrough(env)[-1]]
    with_page = make("valid_seen", 0, page=True)
    page = None
    for (observation, *others), (text, *page_others) in zip(
        play(env, actions), play(with_page, actions), strict=True
    ):
        assert others == page_others
        assert text != page, "an action leaves its trace on the page"
        assert text != observation
        assert "Hold " in text
        page = text
    with_page.close()


@plays
def test_the_step_limit_truncates_and_a_win_on_the_last_step_does_not(env):
    plan = walkthrough(env)
    env.max_steps = len(plan) - 1
    *_, terminated, truncated, info = play(env, plan[:-1])[-1]
    assert truncated
    assert not terminated
    assert not info["won"]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(plan[-1])
    env.max_steps = len(plan)
    *_, terminated, truncated, info = play(env, plan)[-1]
    assert terminated
    assert not truncated
    assert info["won"]


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


# ---- the engine's caches ----


def walk_two_games_at_random():
    rng = random.Random(3)
    envs = [make("valid_unseen", 0), make("valid_unseen", 100)]
    seen = [env.reset() for env in envs]
    for _ in range(20):
        for env in envs:
            info = seen[-2][-1]
            action = rng.choice([*info["admissible"], "dance"])
            seen.append((action, *env.step(action)))
    return seen


@plays
def test_caches_change_nothing(monkeypatch, no_idle_engines):
    """Every observation and list of actions is what textworld's own engine says."""
    from textworld.envs.pddl import PddlEnv

    ours = walk_two_games_at_random()
    monkeypatch.setattr(alfworld_engine, "idle_engines", [])
    monkeypatch.setattr(alfworld_engine, "engine_class", lambda: PddlEnv)
    assert walk_two_games_at_random() == ours
    verbs = {action.split()[0] for action, *_ in ours[2:]}
    assert len(verbs) > 3


@plays
def test_a_game_is_translated_once_and_textworld_is_restored(monkeypatch, no_idle_engines):
    import fast_downward
    from textworld.envs.pddl import textgen

    calls = []
    translate = fast_downward.pddl2sas

    def counting_translate(*args, **options):
        calls.append(args)
        return translate(*args, **options)

    monkeypatch.setattr(fast_downward, "pddl2sas", counting_translate)
    fresh_class = functools.cache(alfworld_engine.engine_class.__wrapped__)
    monkeypatch.setattr(alfworld_engine, "engine_class", fresh_class)
    owners = (fast_downward, textgen, textgen.Rule)
    before = [dict(vars(owner)) for owner in owners]
    one = make("valid_seen", 3)
    other = make("valid_seen", 3)
    first_pages = [one.reset(), one.reset(), other.reset()]
    assert first_pages == [first_pages[0]] * 3
    assert one.step("look") == other.step("look")
    assert len(calls) == 1
    assert [dict(vars(owner)) for owner in owners] == before


def test_names_count_each_kind_from_the_last_identifier():
    identifiers = [
        "sink_bar__minus_1_bar_sinkbasin",
        "mug_bar__plus_2",
        "mug_bar__plus_1",
        "sink_bar_7",
        "agent1",
    ]
    assert names(identifiers) == {
        "mug_bar__plus_2": "mug 1",
        "mug_bar__plus_1": "mug 2",
        "agent1": "agent1",
        "sink_bar_7": "sink 1",
        "sink_bar__minus_1_bar_sinkbasin": "sinkbasin 1",
    }


# ---- the expert ----


@plays
@pytest.mark.parametrize("kind", ["pick_two_obj_and_place", "look_at_obj_in_light"])
def test_the_expert_wins_and_switches_once_per_deed(kind):
    env = first_of("valid_unseen", kind)
    env.reset()
    subgoal = ""
    switches = 0
    won = False
    while not won:
        switch, next_subgoal, action = env.expert(subgoal)
        assert switch or next_subgoal == subgoal
        subgoal = next_subgoal
        switches += switch
        *_, info = env.step(action)
        won = info["won"]
    deeds = ("take", "move", "clean", "heat", "cool", "use")
    assert switches == sum(action.split()[0] in deeds for action in walkthrough(env))
    assert env.expert(subgoal) is None
    env.close()


@plays
def test_the_expert_recovers_from_random_actions():
    """Every third action is random: objects put down elsewhere, doors closed."""
    env = first_of("valid_unseen", "pick_two_obj_and_place", max_steps=200)
    rng = random.Random(0)
    _, info = env.reset()
    subgoal = ""
    while not info["won"]:
        _, subgoal, action = env.expert(subgoal)
        if rng.random() < 0.3:
            action = rng.choice([*info["admissible"], "dance with mug 1"])
        *_, info = env.step(action)
    env.close()


@plays
def test_the_expert_pursues_a_given_subgoal_whether_or_not_it_helps():
    """It puts down too early what it should clean, and then does what is needed."""
    env = first_of("valid_unseen", "pick_clean_then_place_in_recep", max_steps=200)
    _, info = env.reset()
    (find,) = info["subgoals"]
    assert find.startswith("find and take ")
    assert env.expert("")[:2] == (True, find)
    while info["subgoals"] == [find]:
        switch, subgoal, action = env.expert(find)
        assert (switch, subgoal) == (False, find)
        *_, info = env.step(action)
    treat, *_, put = info["subgoals"]
    assert treat == find.replace("find and take", "clean")
    assert put.startswith(find.replace("find and take", "put") + " in ")
    assert env.expert(find)[:2] == (True, treat)
    while put in info["subgoals"]:  # too early
        switch, subgoal, action = env.expert(put)
        assert (switch, subgoal) == (False, put)
        *_, info = env.step(action)
    assert not info["won"]
    assert env.expert(put)[:2] == (True, find)
    subgoal = put
    chosen = []
    while not info["won"]:
        switch, subgoal, action = env.expert(subgoal)
        if switch:
            chosen.append(subgoal)
        *_, info = env.step(action)
    assert chosen == [find, treat, put]
    env.close()


def test_the_expert_puts_down_where_that_is_possible():
    places = ["bed 1", "coffeemachine 1", "desk 1"]
    page = Page(places, "put a mug in desk.")
    plan = ["go to bed 1", "take mug 1 from bed 1", "move mug 1 to desk 1"]
    expert = Expert("a/b/game.tw-pddl", plan)
    expert.reset(page)
    here = "coffeemachine 1"
    page.update("go", "", here, f"You arrive at {here}. On the {here}, you see nothing.")
    page.update("take", "pen 1", here, "")
    for admissible, action in (
        (["go to bed 1", "go to desk 1"], "go to desk 1"),
        (["go to bed 1", "open coffeemachine 1"], "open coffeemachine 1"),
        (["go to desk 1", "move pen 1 to coffeemachine 1"], "move pen 1 to coffeemachine 1"),
    ):
        advice = expert.advise("put down pen", admissible)
        assert advice == (False, "put down pen", action)


def test_a_search_does_not_depend_on_where_the_data_lies():
    """It starts at most four places before the thing, at another place for another game."""
    plan = ["go to shelf 5", "take mug 1 from shelf 5", "go to desk 1", "move mug 1 to desk 1"]
    places = [f"shelf {n}" for n in range(1, 10)] + ["desk 1"]
    admissible = [f"go to {place}" for place in places]
    first_actions = {}
    for folder in ("/data", "/elsewhere/data"):
        for trial in range(40):
            game = f"pick_and_place_simple-Mug-None-Desk-1/trial_{trial}/game.tw-pddl"
            expert = Expert(f"{folder}/train/{game}", plan)
            expert.reset(Page(places, "put a mug in desk."))
            switch, subgoal, action = expert.advise("", admissible)
            assert switch
            assert subgoal == "find and take mug"
            assert first_actions.setdefault(trial, action) == action
    assert set(first_actions.values()) == {f"go to shelf {n}" for n in range(1, 6)}


def test_the_expert_goes_where_it_has_seen_the_thing_or_the_lamp():
    """Then it no longer searches."""
    plan = ["go to shelf 5", "take mug 1 from shelf 5", "go to desk 1", "use desklamp 1"]
    places = [f"shelf {n}" for n in range(1, 10)] + ["bed 1", "desk 1"]
    admissible = [f"go to {place}" for place in places]
    page = Page(places, "examine the mug with the desklamp.")
    expert = Expert("a/b/game.tw-pddl", plan)
    expert.reset(page)
    _, _, action = expert.advise("", admissible)
    assert action in admissible[:5]
    observation = "You arrive at shelf 9. On the shelf 9, you see a desklamp 1, and a mug 2."
    page.update("go", "", "shelf 9", observation)
    page.update("go", "", "shelf 8", "You arrive at shelf 8. On the shelf 8, you see nothing.")
    find = "find and take mug"
    assert expert.advise(find, admissible) == (False, find, "go to shelf 9")
    page.update("take", "mug 2", "shelf 9", "You pick up the mug 2 from the shelf 9.")
    use = "use desklamp"
    assert expert.advise(use, admissible) == (False, use, "go to shelf 9")


def test_subgoals_have_no_numbers():
    subgoals = {
        "take mug 1 from desk 2": "find and take mug",
        "move mug 1 to shelf 12": "put mug in shelf",
        "clean mug 1 with sinkbasin 1": "clean mug",
        "heat egg 3 with microwave 1": "heat egg",
        "cool egg 3 with fridge 1": "cool egg",
        "use desklamp 1": "use desklamp",
        "look": "look",
    }
    assert {action: subgoal_of(action) for action in subgoals} == subgoals


# ---- the page ----

EPISODE = [  # action, the engine's answer, the page after it
    (
        "go to shelf 1",
        "You arrive at shelf 1. On the shelf 1, you see a mug 2, and a pen 1.",
        "At shelf 1: mug 2. Hold nothing. Named shelf 1 with mug 2. "
        "Unseen bed 1, desk 1, drawer 1.",
    ),
    (
        "take mug 2 from shelf 1",
        "You pick up the mug 2 from the shelf 1.",
        "At shelf 1: nothing. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1, drawer 1.",
    ),
    (
        "dance",
        "Nothing happens.",
        "Nothing happens. At shelf 1: nothing. Hold mug 2. Named shelf 1. "
        "Unseen bed 1, desk 1, drawer 1.",
    ),
    (
        "go to drawer 1",
        "You arrive at drawer 1. The drawer 1 is closed.",
        "At drawer 1 closed. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "open drawer 1",
        "You open the drawer 1. The drawer 1 is open. In it, you see a egg 1, and a mug 1.",
        "At drawer 1: mug 1. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "close drawer 1",
        "You close the drawer 1.",
        "At drawer 1 closed. Hold mug 2. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "heat mug 2 with microwave 1",
        "You heat the mug 2 using the microwave 1.",
        "At drawer 1 closed. Hold mug 2 heat. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "clean mug 2 with sinkbasin 1",
        "You clean the mug 2 using the sinkbasin 1.",
        "At drawer 1 closed. Hold mug 2 heat clean. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "cool mug 2 with fridge 1",
        "You cool the mug 2 using the fridge 1.",
        "At drawer 1 closed. Hold mug 2 clean cool. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "look",
        "You are facing the drawer 1.",
        "At drawer 1 closed. Hold mug 2 clean cool. Named shelf 1. Unseen bed 1, desk 1.",
    ),
    (
        "go to desk 1",
        "You arrive at desk 1. On the desk 1, you see nothing.",
        "At desk 1: nothing. Hold mug 2 clean cool. Seen mug 1 at drawer 1. Named shelf 1. "
        "Unseen bed 1.",
    ),
    (
        "move mug 2 to desk 1",
        "You move the mug 2 to the desk 1.",
        "At desk 1: mug 2. Hold nothing. Seen mug 1 at drawer 1. Named shelf 1. Unseen bed 1.",
    ),
    (
        "go to shelf 1",
        "You arrive at shelf 1. On the shelf 1, you see a pen 1.",
        "At shelf 1: nothing. Hold nothing. Seen mug 1 at drawer 1, mug 2 at desk 1. "
        "Named shelf 1. Unseen bed 1.",
    ),
]


def test_the_page_has_what_was_seen():
    page = Page(["bed 1", "desk 1", "drawer 1", "shelf 1"], "put a clean mug in shelf.")
    assert str(page) == (
        "In the middle. Hold nothing. Named shelf 1. Unseen bed 1, desk 1, drawer 1, shelf 1."
    )
    for action, observation, text in EPISODE:
        page.update(*parse_action(action), observation)
        assert str(page) == text


def test_unseen_places_are_listed_from_the_current_one():
    page = Page(["bed 1", "desk 1", "desk 2", "drawer 1", "shelf 1"], "put a mug in shelf.")
    page.update("go", "", "desk 1", "You arrive at desk 1. On the desk 1, you see nothing.")
    assert str(page).endswith("Unseen desk 2, drawer 1, shelf 1, bed 1.")


def test_things_in_named_places_are_listed_there_and_the_lamp_apart():
    page = Page(["bed 1", "desk 1", "desk 2"], "put two mug in desk.")
    observation = "You arrive at bed 1. On the bed 1, you see a mug 1, a desklamp 1, and a mug 2."
    page.update("go", "", "bed 1", observation)
    page.update("take", "mug 1", "bed 1", "You pick up the mug 1 from the bed 1.")
    page.update("move", "mug 1", "desk 2", "You move the mug 1 to the desk 2.")
    assert str(page) == (
        "At bed 1: mug 2. Hold nothing. Named desk 1, desk 2 with mug 1. Unseen desk 1, desk 2."
    )
    page.task_words.add("desklamp")
    page.update("go", "", "desk 1", "You arrive at desk 1. On the desk 1, you see a floorlamp 1.")
    assert str(page) == (
        "At desk 1: nothing. Hold nothing. Seen mug 2 at bed 1. Named desk 1, desk 2 with mug 1. "
        "Lamp desklamp 1 at bed 1. Unseen desk 2."
    )


@plays
def test_the_page_has_no_more_than_the_engine_told():
    """Every name on it was in the engine's text, or in its list of actions, before."""
    env = make("valid_unseen", 3, max_steps=60)
    page = make("valid_unseen", 3, max_steps=60, page=True)
    rng = random.Random(0)
    observation, info = env.reset()
    text, _ = page.reset()
    told = observation + " ".join(info["admissible"])
    ended = False
    while not ended:
        assert find_names(text) <= find_names(told)
        action = rng.choice(info["admissible"])
        text, *_ = page.step(action)
        observation, _, terminated, truncated, info = env.step(action)
        told += " " + observation
        ended = terminated or truncated
        for action in info["admissible"]:
            if action.startswith("move "):
                _, thing, _ = parse_action(action)
                assert f"Hold {thing}" in text
    env.close()
    page.close()


# ---- disguise ----

PROMPT = (
    "Task: put a clean mug in desk.\nYou see a mug 1, a pen 2, a watch 1. Admissible actions: "
    "'go to desk 1', 'go to shelf 12', 'go to bed 1', 'go to fridge 1', "
    "'take mug 1 from shelf 12', 'take pen 2 from shelf 12', 'take watch 1 from shelf 12'\n"
    "Subgoal: clean mug."
)
RESPONSE = (
    "<switch>KEEP</switch><subgoal>clean mug</subgoal><action>take mug 1 from shelf 12</action>"
)


def test_a_disguise_renames_alike_in_an_episode_and_keeps_other_words():
    """Things become things and places become places; appliances and other words stay."""
    renamed_words = re.compile(r"\b(mug|pen|watch|desk|shelf|bed)\b")
    episodes = [[(PROMPT, RESPONSE, 3), (RESPONSE, PROMPT, None)]] * 50
    pairs = set()
    for first_turn, second_turn in disguise(episodes, random.Random(0)):
        prompt, response, rest = first_turn
        assert rest == 3
        assert second_turn == (response, prompt, None)  # the same names in the whole episode
        thing, place = re.search(r"take (\w+) 1 from (\w+) 12</action>", response).groups()
        assert f"put a clean {thing} in " in prompt
        assert prompt.endswith(f"clean {thing}.")
        assert f"<subgoal>clean {thing}<" in response
        assert thing in ("mug", "pen", "watch")
        assert place in ("desk", "shelf", "bed")
        assert "'go to fridge 1'" in prompt
        assert renamed_words.sub("_", prompt) == renamed_words.sub("_", PROMPT)
        assert set(renamed_words.findall(prompt)) == set(renamed_words.findall(PROMPT))
        pairs.add((thing, place))
    assert len(pairs) == 9


# ---- errors, most of them on made-up games ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return tmp_path


def write_game(folder, name="pick_and_place_simple-Mug-None-Desk-1", *, trial="trial_1", **changes):
    """A game file of the train split that the world accepts and no engine could play."""
    file = folder / "json_2.1.1" / "train" / name / trial / "game.tw-pddl"
    file.parent.mkdir(parents=True)
    game = {"solvable": True, "grammar": 'template :: "move {o} to {r}";', **changes}
    file.write_text(json.dumps(game))
    return file


def test_games_are_sorted_solvable_and_of_the_six_types(folder):
    second = write_game(folder, trial="trial_2")
    first = write_game(folder, trial="trial_1")
    write_game(folder, trial="trial_3", solvable=False)
    write_game(folder, "pick_and_place_with_movable_recep-Mug-Bowl-Desk-1")
    write_game(folder, "pick_heat_then_place_in_recep-PotatoSliced-None-Fridge-1")
    assert games("train") == (str(first), str(second))
    assert size("train") == 2
    assert make("train", 1).gamefile == str(second)


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
    write_game(folder)
    with pytest.raises(ValueError, match="train, valid_seen, valid_unseen"):
        make("test")
    for index in (-1, 1):
        with pytest.raises(IndexError, match="has 1 games"):
            make("train", index)


def test_unsolvable_and_older_games_are_refused(folder):
    with pytest.raises(RuntimeError, match="not marked solvable"):
        AlfworldEnv(write_game(folder, solvable=False))
    with pytest.raises(RuntimeError, match="alfworld-download -f"):
        AlfworldEnv(write_game(folder, trial="old", grammar='template :: "put {o} in/on {r}";'))


@plays
def test_a_real_game_with_the_older_grammar_is_refused(tmp_path):
    game = json.loads(Path(games("valid_seen")[0]).read_text())
    game["grammar"] = game["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")
    with pytest.raises(RuntimeError, match="older data release"):
        AlfworldEnv(write_game(tmp_path, **game))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="another error comes first")
def test_missing_package_says_how_to_install_it(folder, monkeypatch, no_idle_engines):
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(RuntimeError, match="pip install -r requirements-alfworld.txt"):
        AlfworldEnv(write_game(folder)).reset()


@pytest.mark.parametrize(
    "error",
    [
        OSError("libdownward.so: cannot open"),
        RuntimeError("Can't find: libdownward.so"),
        ImportError("fast_downward"),
    ],
)
def test_a_failed_build_says_how_to_install_it(folder, monkeypatch, no_idle_engines, error):
    def failing_engine_class():
        raise error

    monkeypatch.setattr(alfworld_engine, "engine_class", failing_engine_class)
    monkeypatch.setitem(sys.modules, "textworld", types.SimpleNamespace(EnvInfos=dict))
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    reason = re.escape(str(error))
    message = f"PDDL engine .{reason}.: pip install -r requirements-alfworld.txt$"
    with pytest.raises(RuntimeError, match=message):
        AlfworldEnv(write_game(folder)).reset()


def test_python_too_new_is_said(folder, monkeypatch, no_idle_engines):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(RuntimeError, match="3.11 or 3.12"):
        AlfworldEnv(write_game(folder)).reset()


def test_step_before_reset(folder):
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step"):
        AlfworldEnv(write_game(folder)).step("look")


def test_the_world_names_its_options():
    """TINY_AGENT holds options of `make`, and a disguise exists where DEMONSTRATOR asks for it."""
    assert alfworld.TINY_AGENT == {"page": True}
    assert alfworld.DEMONSTRATOR["disguises"] == 1
    assert alfworld.disguise is disguise


@plays
def test_an_action_that_failed_delivers_nothing():
    env = first_of("valid_seen", "pick_and_place_simple")
    env.reset()
    subgoal = ""
    while not env._page.held:
        _, subgoal, action = env.expert(subgoal)
        env.step(action)
    move = f"move {env._page.held} to {env._expert._destination}"
    assert env.step(move)[0] == "Nothing happens."
    assert env._expert._delivered == set()
    env.close()
