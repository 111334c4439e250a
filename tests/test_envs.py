"""envs.py: finding worlds, and stepping many environments, here or in worker processes.

`python -m envs WORLD` checks the contract of any world, also of one's own.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import envs
import hiper
import rollout
from config import ConfigError
from conftest import tiny_config
from support import distributed, env_workers, world_check, world_guard
from support.loading import check_world_and_model
from worlds import household

ROOT = Path(__file__).parent.parent

# The worlds of these tests have names of their own: a user's corridor.py must not be found instead.
CORRIDOR = '''\
"""A world in one file: walk to the end of a corridor."""

SPLITS = ("train", "test")


def size(split):
    if split not in SPLITS:
        raise ValueError(f"corridor has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return 5


def make(split="train", index=0, max_steps=20):
    if not 0 <= index < size(split):
        raise IndexError(f"corridor's split {split!r} has tasks 0 to 4, not {index}")
    return Corridor(index + SPLITS.index(split) + 1, max_steps)


class Corridor:
    def __init__(self, length, max_steps):
        self.length = length
        self.max_steps = max_steps
        self.done = True

    def reset(self, seed=None):
        self.at = 0
        self.steps = 0
        self.done = False
        return self.page(), self.info()

    def step(self, action):
        if self.done:
            raise RuntimeError("call reset before step")
        self.steps += 1
        self.at = max(0, self.at + {"east": 1, "west": -1}.get(action, 0))
        won = self.at == self.length
        truncated = not won and self.steps >= self.max_steps
        self.done = won or truncated
        return self.page(), float(won), won, truncated, self.info()

    def close(self):
        pass

    def page(self):
        return f"You are at {self.at} of {self.length}."

    def info(self):
        won = self.at == self.length
        return {
            "task": "walk to the end",
            "task_type": "walk",
            "admissible": ["east", "west"],
            "won": won,
            "score": float(won),
        }
'''

FAR = '''\
"""The corridor with an engine of the worst manners, for worker processes."""

import os
import time

import testing_corridor
from testing_corridor import SPLITS, size

IN_PROCESS = False
print("an engine says hello")


class Odd(Exception):  # unlike most, cannot be rebuilt from its message
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class Far(testing_corridor.Corridor):
    def step(self, action):
        print("a chatty", "engine", flush=True)
        os.write(1, b"\\x80\\x04 speaks C")
        os.system("echo and starts shells")
        if action == "die":
            os._exit(3)
        if action == "hang":
            time.sleep(600)
        if action == "odd":
            raise Odd(1, 2)
        if action == "unpicklable":
            return lambda: None
        return super().step(action)

    def expert(self, subgoal):
        return (True, "get there", "east") if subgoal != "get there" else None

    def close(self):
        if "CLOSED" in os.environ:
            with open(os.environ["CLOSED"], "a") as file:
                file.write(f"{self.length} ")


def make(split="train", index=0, max_steps=20):
    env = testing_corridor.make(split, index, max_steps)
    lives = os.environ.get(f"LIVES_{index}")  # a file, one letter for each process that dies here
    if lives and open(lives).read():
        with open(lives, "r+") as file:
            file.truncate(len(file.read()) - 1)
        os._exit(5)
    return Far(env.length, env.max_steps)
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text): puts a module where `import` finds it, for the one test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def corridor(write):
    return write("testing_corridor", CORRIDOR)


@pytest.fixture
def far(corridor, write):
    return write("testing_far", FAR)


# ---- the contract, for any world -----------------------------------------------------------------


def check_world(name, tasks=4, **options):
    faults, summary = world_check.check_world(name, tasks, **options)
    assert faults == []
    return summary


def test_household_keeps_the_contract():
    check_world("household", tasks=12)


def test_a_world_of_ones_own_keeps_the_contract(corridor):
    check_world(corridor)


def test_the_step_limit_is_an_option_of_a_world_that_has_none(corridor, write):
    code = CORRIDOR.replace("index=0, max_steps=20", "index=0")
    code = code.replace("+ 1, max_steps)", "+ 1, 10**6)")
    name = write("testing_unlimited", code)
    assert "episodes are truncated after 7 steps" in check_world(name, max_steps=7)
    with pytest.raises(AssertionError, match="max_steps must be a whole number above 0, not 0"):
        check_world(name, max_steps=0)


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ('SPLITS = ("train", "test")', 'SPLITS = ["train", "test"]', "SPLITS must be a tuple"),
        ("return 5", "return 5.0", "size('train') must return a whole number"),
        ("raise IndexError", "raise KeyError", "must raise IndexError, not KeyError"),
        ("not 0 <= index <", "not index <", "make('train', -1), where tasks are 0 to 4, must"),
        ("raise ValueError", "raise KeyError", "size of an unknown split must raise ValueError"),
        ("if self.done:", "if not hasattr(self, 'at'):", "step after the end must raise"),
        ("float(won), won, truncated", "won, won, truncated", "the reward must be a float"),
        ("float(won), won, truncated", "-1.0 + 2 * won, won, truncated", "reward must be 1.0"),
        ("float(won), won, truncated", "float(won), won, won", "both terminated and truncated"),
        ("float(won), won, truncated", "float(won), int(won), truncated", "True or False"),
        ("self.at = 0\n", "self.at = getattr(self, 'at', 0)\n", "reset must begin the task anew"),
        ('"score": float(won)', '"score": won', "info['score'] must be a float"),
        ('["east", "west"]', '("east", "west")', "info['admissible'] must be a list"),
        ('["east", "west"]', '["east", 7]', "info['admissible'] must be a list of strings"),
        ("index=0, max_steps=20", "index=0", "NameError: name 'max_steps' is not defined ("),
        ('{"east": 1, "west": -1}.get(action, 0)', '{"east": 1, "west": -1}[action]', "KeyError"),
        ("reset(self, seed=None)", "reset(self)", "TypeError"),
        ("return self.page(), float", "return self.page().encode(), float", "must be text"),
        ("return self.page(), self.info()", "return self.page()", "reset must return"),
        ("self.length = length", "self.length = length + next(DRAWS)", "the same task every time"),
        ("index=0, max_steps", "index=1, max_steps", "make() must be task 0"),
        ("truncated = not won and", "truncated = False and", "no end in 500 steps"),
        (
            "def close",
            "def expert(self, _):\n        return 'east'\n\n    def close",
            "expert must",
        ),
        (
            "def close",
            "def expert(self, goal):\n        return not goal, 'x', 'west'\n\n    def close",
            "the expert does not win",
        ),
        ("class Corridor:", "class Corridor", "SyntaxError"),
    ],
)
def test_the_check_says_what_is_wrong(write, capsys, right, wrong, said):
    """`python -m envs` on worlds with one fault each: exit 2, a sentence each, no traceback."""
    assert CORRIDOR.count(right) == 1
    text = CORRIDOR.replace(right, wrong)
    if said == "no end in 500 steps":
        text = text.replace("self.at == self.length", "False")
    if "DRAWS" in wrong:
        text = "import itertools\nDRAWS = itertools.count()\n" + text
    write("testing_corridor", text)
    assert world_check.main(["testing_corridor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert said in "\n".join(lines)


@pytest.mark.parametrize(
    "options, said",
    [
        ('{"step": 1}', "make does not take the options"),
        ('{"split": "test"}', "make does not take the options"),
        ('{"max_steps": 0}', "max_steps must be a whole number above 0"),
        ('{"max_steps": "x"}', "max_steps must be a whole number above 0"),
    ],
)
def test_the_check_says_once_what_is_wrong_with_the_options(corridor, capsys, options, said):
    assert world_check.main([corridor, "--env_options", options]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"error: {said}")


def test_the_check_as_a_command(tmp_path):
    """`python -m envs WORLD`, the world being in the current folder."""
    (tmp_path / "mine.py").write_text(CORRIDOR)

    def command(*words):
        done = subprocess.run(
            [sys.executable, ROOT / "envs.py", *words], cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    code, said, complaint = command("mine")
    assert (code, complaint) == (0, "")
    assert said.startswith("ok: mine has 5 tasks in train, 5 tasks in test; random play ends after")
    assert "no expert" in said
    assert command("mine", "--env_options", '{"max_steps": 1}')[0] == 0
    for words in (["yours"], *(["mine", "--env_options", x] for x in ('{"step": 1}', "[1]", "{"))):
        code, said, complaint = command(*words)
        assert (code, complaint) == (2, "")
        assert said.startswith("error: ")
    for words in ([], ["--env_options"], ["mine", "{}"]):
        code, said, complaint = command(*words)
        assert (code, said) == (2, "")
        assert complaint.startswith("usage: python -m envs")


@pytest.mark.parametrize(
    "right, wrong, options, said",
    [
        ("", "", {"step": 3}, r"TypeError: make\(\) got an unexpected"),
        ("", "", {"max_steps": "x"}, "max_steps must be a whole number"),
        ("", "", {"max_steps": 0}, "max_steps must be a whole number"),
        ("", "", {"workers": 2}, "TypeError"),
        ("", "", {}, "has no expert to clone: give --model"),
        ('"score": float(won)', '"score": won', {}, r"info\['score'\] must be a float"),
        ("self.steps += 1", "self.stepz += 1", {}, r"AttributeError: .*corridor.py, line \d+\)"),
        ("class Corridor:", "class Corridor", {}, "SyntaxError: .*corridor.py, line"),
        ('"""A world in one file', 'import absent\n"""', {}, "No module named 'absent'"),
    ],
)
def test_a_run_does_not_begin_in_a_world_that_does_not_work(write, right, wrong, options, said):
    """One sentence, before anything is written."""
    write("testing_corridor", CORRIDOR.replace(right, wrong))
    config = tiny_config(env="testing_corridor", env_options=options)
    if "AttributeError" in said:
        config.bc_episodes = 0
    with pytest.raises(ConfigError, match=said):
        check_world_and_model(config)


def test_a_world_without_a_step_limit_gets_one(write):
    """Where `make` has no max_steps: the world's MAX_STEPS, else 100; the option sets it."""
    endless = CORRIDOR.replace(", max_steps=20", "").replace("index + SPL", "index + 900 + SPL")
    endless = endless.replace("+ 1, max_steps)", "+ 1, 10**9)")
    write("testing_endless", endless)
    write("testing_short", endless + "\nMAX_STEPS = 3\n")
    for name, options, limit in (
        ("testing_endless", {}, 100),
        ("testing_short", {}, 3),
        ("testing_short", {"max_steps": 5}, 5),
    ):
        with envs.EnvPool(name, **options) as pool:
            for _ in range(2):  # the second episode counts anew
                pool.reset({4: 0})
                ends = [pool.step({4: "east"})[4][2:4] for _ in range(limit)]
                assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    assert "truncated after 3 steps" in check_world("testing_short")


# ---- finding a world -----------------------------------------------------------------------------


def test_household_by_name():
    assert envs.world("household") is household and envs.size("household", "seen") == 300
    env, same = envs.make("household", "seen", 3, max_steps=2), household.make("seen", 3)
    assert env.reset() == same.reset() and env.max_steps == 2


def test_known_worlds_have_their_module():
    assert all((ROOT / "worlds" / f"{name}.py").exists() for name in envs.WORLDS)


@pytest.mark.parametrize(
    "name",
    [
        "houshold",
        "no.such.world",
        "envs.no_such_world",
        "json",
        "json.no_such_world",
        "./testing_corridor",
        "testing_corridor.py",
        ".testing_corridor",
        "",
        "make",
        "size",
        "SPLITS",
    ],
)
def test_no_such_world_says_what_there_is(name, corridor, write):
    for lacking in ("make", "size", "SPLITS"):
        write(lacking, CORRIDOR + f"del {lacking}\n")
    choices = "choose household, alfworld, webshop, babyai, gym:ID or openenv:URL, or name a module"
    with pytest.raises(ValueError, match=f"no world {re.escape(repr(name))}: {choices}"):
        envs.world(name)


def test_a_world_in_a_package(write):
    write("testing_worlds/__init__", "")
    write("testing_worlds/corridor", CORRIDOR)
    assert envs.size("testing_worlds.corridor", "test") == 5
    with pytest.raises(ValueError, match="no world 'testing_worlds.corner'"):
        envs.size("testing_worlds.corner", "test")


def test_what_a_world_lacks_is_not_hidden(write):
    write("needy", "import a_package_that_is_not_here\n" + CORRIDOR)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        envs.make("needy")
    write("broken", "from json import no_such_thing\n" + CORRIDOR)
    with pytest.raises(ImportError, match="no_such_thing"):
        envs.make("broken")


# ---- EnvPool -------------------------------------------------------------------------------------


def alone(name, split, index, actions, **options):
    env = envs.make(name, split, index, **options)
    return [env.reset(), *map(env.step, actions)]


def together(pool, tasks, actions):
    """{slot: transcript} of tasks {slot: index}, all slots at once."""
    transcripts = {slot: [outcome] for slot, outcome in pool.reset(tasks).items()}
    for turn in zip(*(actions[slot] for slot in tasks), strict=True):
        for slot, outcome in pool.step(dict(zip(tasks, turn, strict=True))).items():
            transcripts[slot].append(outcome)
    return transcripts


def test_a_pool_steps_as_one_env_would_alone():
    tasks = {7: 3, 0: 0, 4: 299, 2: 3}  # one task twice
    walks = {slot: [] for slot in tasks}
    for slot, index in tasks.items():
        env, rng = envs.make("household", "unseen", index, max_steps=12), random.Random(slot)
        _, info = env.reset()
        for _ in range(12):
            walks[slot].append(rng.choice([*info["admissible"], "sing"]))
            info = env.step(walks[slot][-1])[-1]
    expected = {
        slot: alone("household", "unseen", index, walks[slot], max_steps=12)
        for slot, index in tasks.items()
    }
    with envs.EnvPool("household", "unseen", max_steps=12) as pool:
        assert together(pool, tasks, walks) == expected


def test_slots_are_independent(corridor):
    with envs.EnvPool(corridor, "test") as pool:
        pool.reset({0: 4, 1: 4})
        pool.step({0: "east"})
        pool.step({0: "east"})
        pages = [outcome[0] for outcome in pool.step({1: "east", 0: "east"}).values()]
        assert pages == ["You are at 1 of 6.", "You are at 3 of 6."]
        assert pool.reset({0: 2})[0][0] == "You are at 0 of 4."  # another task in slot 0
        assert pool.step({1: "east"})[1][0] == "You are at 2 of 6."
        assert pool.reset({}) == pool.step({}) == {}


def test_a_pool_asks_the_expert(far):
    with envs.EnvPool("household") as pool:
        pool.reset({0: 0, 5: 1})
        expected = {slot: household_expert(index) for slot, index in ((0, 0), (5, 1))}
        assert pool.expert({0: "", 5: ""}) == expected
    with envs.EnvPool(far, workers=2) as pool:
        pool.reset({0: 0, 1: 1})
        assert pool.expert({1: "get there", 0: ""}) == {1: None, 0: (True, "get there", "east")}


def test_a_world_without_an_expert_says_so(corridor):
    """support/cloning.py relies on this error."""
    with envs.EnvPool(corridor) as pool:
        pool.reset({0: 0})
        with pytest.raises(AttributeError, match="expert"):
            pool.expert({0: ""})


def household_expert(index):
    env = envs.make("household", "train", index)
    env.reset()
    return env.expert("")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_play_as_in_process(far, workers, capfd):
    tasks = {5: 0, 0: 4, 3: 2, 1: 2, 2: 1}
    rng = random.Random(0)
    walks = {slot: [rng.choice(["east", "west", "sing"]) for _ in range(6)] for slot in tasks}
    expected = {
        slot: alone("testing_corridor", "test", index, walks[slot], max_steps=6)
        for slot, index in tasks.items()
    }
    with envs.EnvPool(far, "test", workers=workers, max_steps=6) as pool:
        assert len(pool.envs.workers) == workers
        got = together(pool, tasks, walks)
    assert got == expected
    out, err = capfd.readouterr()  # the engine's prints: not in the pipe, and not lost
    assert (
        "chatty" not in out
        and "an engine says hello" in err
        and "a chatty engine" in err
        and "starts shells" in err
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_answers_come_in_the_order_of_the_question(far, workers):
    """Whatever the number of workers: the trainer batches its rows in this order."""
    with envs.EnvPool(far, workers=workers) as pool:
        assert list(pool.reset({slot: 4 for slot in (4, 1, 0, 3, 2)})) == [4, 1, 0, 3, 2]
        assert list(pool.step({slot: "east" for slot in (3, 4, 0)})) == [3, 4, 0]


def test_one_worker_per_core_where_none_are_asked_for(far, monkeypatch):
    """Of the cores that this process may use; several processes on a machine share them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(3)), raising=False)
    with envs.EnvPool(far) as pool:
        assert len(pool.envs.workers) == 3
    for processes, cores in (("2", 1), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert env_workers.usable_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert env_workers.usable_cores() == 2


def test_errors_in_a_worker_come_back(far):
    """The episode is lost, with a warning that says why; at the second time in a row the task is
    named. What comes before the first step is raised as it is."""
    with envs.EnvPool(far, workers=2) as pool:
        with pytest.raises(IndexError, match="corridor's split 'train' has tasks 0 to 4, not 99"):
            pool.reset({0: 99})
        pool.reset({0: 0, 1: 1})
        pool.step({1: "west"})
        # an exception that does not survive pickling
        with pytest.warns(UserWarning, match="task 0 .* begins anew: at turn 1: Odd: 1 and 2 "):
            assert pool.step({0: "odd", 1: "west"}) == {0: None, 1: pool_page(2)}
        pool.reset({0: 0})
        with pytest.raises(envs.WorldError, match="task 0 .* failed twice: at turn 1: .*pickle"):
            pool.step({0: "unpicklable"})
        pool.reset({0: 0})
        assert pool.step({0: "east"})[0][1] == 1.0  # and it lives on
        with pytest.warns(UserWarning, match="call reset"):
            assert pool.step({0: "east"}) == {0: None}
    with (
        envs.EnvPool(far, "no such split", workers=1) as pool,
        pytest.raises(ValueError, match="no split 'no such split'"),
    ):
        pool.reset({0: 0})


def pool_page(length):
    """What a step to the west answers at the corridor's begin."""
    info = {
        "task": "walk to the end",
        "task_type": "walk",
        "admissible": ["east", "west"],
        "won": False,
        "score": 0.0,
    }
    return f"You are at 0 of {length}.", 0.0, False, False, info


def test_a_failed_reset_leaves_the_slot_empty(write, corridor):
    """Above all, no env is closed twice."""
    write(
        "frail", CORRIDOR.replace("pass", "assert not hasattr(self, 'closed'); self.closed = True")
    )
    with envs.EnvPool("frail") as pool:
        pool.reset({0: 0})
        pool.step({0: "west"})
        with pytest.warns(UserWarning), pytest.raises(envs.WorldError, match="tasks 0 to 4"):
            pool.reset({0: 99})


BREACHES = {
    "return 5": r"step must return \(observation, reward, terminated, truncated, info\), not 5",
    "return page, 0.0, False, info": "step must return",
    "return None, 0.0, False, False, info": "the observation must be text, not None",
    "return page, None, False, False, info": "the reward must be a number .* not None",
    "return page, '1', False, False, info": "the reward must be a number .* not '1'",
    "return page, float('nan'), False, False, info": "the reward must be a number .* not nan",
    "return page, 1e9, False, False, info": "the reward must be a number .* not 1000000000.0",
    "return page, 0.0, None, False, info": "terminated must be True or False, not None",
    "return page, 0.0, False, False, None": "info must be a dict, not None",
    "info['score'] = float('inf')": r"info\['score'\] must be a number .* not inf",
    "info['score'] = None": r"info\['score'\] must be a number .* not None",
    "info['task'] = 3": r"info\['task'\] must be text, not 3",
    "info['admissible'] = [1]": "must be a list of texts",
    "info['won'] = 'yes'": r"info\['won'\] must be True or False, not 'yes'",
    "raise KeyError('lamp')": r"KeyError: 'lamp' \(.*breach.py, line \d+\)",
    "raise SystemExit(3)": "SystemExit: 3",
}


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("breach", BREACHES)
def test_a_world_that_breaks_the_interface_costs_its_episode_then_is_named(
    write, corridor, breach, in_process
):
    """Its neighbours play on. The sentence has world, task, turn and reason."""
    if not in_process and "info" in breach:
        return  # the same code; starting processes takes long
    lines = "\n            ".join(["page, info = self.page(), self.info()", breach])
    source = CORRIDOR.replace(
        "        self.steps += 1\n",
        f"        self.steps += 1\n        if action == 'break':\n            {lines}\n"
        "            return page, 0.0, False, False, info\n",
    )
    write("breach", source + f"IN_PROCESS = {in_process}\n")
    with envs.EnvPool("breach", workers=1) as pool:
        pool.reset({0: 3, 1: 4})
        pool.step({0: "east", 1: "east"})
        reason = f"at turn 2: .*{BREACHES[breach]}"
        with pytest.warns(UserWarning, match=f"task 3 of breach's split 'train' .*{reason}"):
            outcomes = pool.step({0: "break", 1: "east"})
        assert outcomes[0] is None
        assert outcomes[1][0] == "You are at 2 of 5."
        pool.reset({0: 3})
        pool.step({0: "east"})
        twice = f"^task 3 of breach's split 'train' failed twice: {reason}"
        with pytest.raises(envs.WorldError, match=twice):
            pool.step({0: "break"})


def test_what_a_world_raises_does_not_command_the_terminal(write, corridor, capsys):
    """Escapes in an exception that quotes the world's text are shown as text."""
    source = CORRIDOR.replace("        self.steps += 1\n", "        raise KeyError('a\x1b[2J')\n")
    write(
        "hostile",
        source.replace(
            "if self.done:",
            "if action == 'east':\n            return (\n"
            "                self.page(), 0.0, False, False, self.info())\n        if self.done:",
        ),
    )
    with envs.EnvPool("hostile") as pool, pytest.warns(UserWarning) as warned:
        pool.reset({0: 0})
        pool.step({0: "east"})
        pool.step({0: "west"})
    assert "a\\x1b[2J" in str(warned[0].message) and "\x1b" not in str(warned[0].message)
    distributed.fail("a\x1b[2J")
    assert capsys.readouterr().err == "error: a\\x1b[2J\n"


def test_two_episodes_of_one_task_that_fail_once_each_have_not_failed_twice(write, corridor):
    """As in a group: in the same step, and while the other's second try runs."""
    source = CORRIDOR.replace(
        "        self.steps += 1\n",
        "        self.steps += 1\n        assert action != 'break'\n",
    )
    write("grouped", source)
    with envs.EnvPool("grouped") as pool, pytest.warns(UserWarning, match="begins anew"):
        pool.reset({slot: 4 for slot in range(4)})
        pool.step({0: "east"})
        assert pool.step({0: "break", 1: "break"}) == {0: None, 1: None}
        pool.reset({0: 4, 1: 4})
        assert pool.step({0: "east", 2: "break"})[2] is None
        pool.reset({2: 4})
        pool.reset({3: 4})  # a first try after all the second ones
        assert pool.step({3: "break"}) == {3: None}
        with pytest.raises(envs.WorldError, match="task 4 .* failed twice: at turn 2"):
            pool.step({0: "break"})


def test_numbers_of_numpy_are_numbers(write, corridor):
    write("numeric", CORRIDOR.replace("float(won), won", "np.float32(won), np.bool_(won)"))
    source = "import numpy as np\n" + CORRIDOR.replace(
        "float(won), won, truncated", "np.float32(won), np.bool_(won), truncated"
    )
    write("numeric", source)
    with envs.EnvPool("numeric") as pool:
        pool.reset({0: 0})
        assert pool.step({0: "east"})[0][1:3] == (1.0, True)
    state = rollout.AgentState(tiny_config(), 0, "", {})
    decision = hiper.Decision(True, "", "east", True, "")
    with envs.EnvPool("numeric") as pool:
        pool.reset({0: 0})
        state.record_turn([], [], decision, pool.step({0: "east"})[0])
    episode = state.to_episode([])
    assert json.loads(json.dumps([episode.success, episode.task_score])) == [True, 1.0]


def test_lone_surrogates_of_a_world_are_replaced(write, corridor):
    source = CORRIDOR.replace('"walk to the end"', '"walk \\ud800"').replace("You are", "\\udfff")
    write("surrogate", source)
    with envs.EnvPool("surrogate") as pool:
        observation, info = pool.reset({0: 0})[0]
    assert observation == "? at 0 of 1."
    assert info["task"] == "walk ?"


@pytest.fixture
def processes(monkeypatch):
    """All worker processes that the test starts; at its end none may run."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1],
    )
    yield started
    assert all(process.poll() is not None for process in started), "a process is left behind"


@pytest.mark.parametrize(
    "action, why", [("die", "died (exit 3)"), ("hang", "did not answer within 1 s")]
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_episodes_are_lost(
    far, processes, monkeypatch, action, why
):
    lost = f"of testing_far {re.escape(why)}; its episodes are lost"
    with envs.EnvPool(far, workers=2) as pool:
        pool.reset({slot: 4 for slot in range(5)})
        pool.step({2: "east"})
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match=lost):
            patch.setattr(env_workers, "LIMIT", 1.0)
            outcomes = pool.step({1: "east", 0: "east", 2: action, 4: "east"})
        assert list(outcomes) == [1, 0, 2, 4]
        # Slot 0 answered before, slot 1 lives in the other process.
        assert [outcomes[slot][0] for slot in (0, 1)] == ["You are at 1 of 5."] * 2
        assert outcomes[2] is None
        assert outcomes[4] is None
        for _ in range(2):  # lost until they are reset, and so are those not asked then
            again = pool.step({slot: "east" for slot in (4, 3, 0)})
            assert [again[slot] is None for slot in (4, 3, 0)] == [True, False, True]
            assert pool.expert({0: "", 1: ""}) == {0: None, 1: (True, "get there", "east")}
        pool.reset({2: 0, 0: 4})
        assert pool.step({2: "east", 0: "east", 1: "east"})[2][1] == 1.0
        assert pool.step({0: "east", 1: "east", 4: "east"})[0][0] == "You are at 2 of 5."
        exit_code = 3 if action == "die" else -9
        assert [process.poll() for process in processes] == [exit_code, None, None]
    assert [process.poll() for process in processes[1:]] == [0, 0]


def test_a_task_that_loses_two_processes_in_a_row_raises(far, processes):
    with envs.EnvPool(far, workers=1) as pool, pytest.warns(UserWarning):
        pool.reset({0: 2, 1: 4})
        assert pool.step({0: "die", 1: "east"}) == {0: None, 1: None}
        pool.reset({0: 2, 1: 4})
        message = "^task 2 of testing_far's split 'train' failed twice: .* died .exit 3.$"
        with pytest.raises(RuntimeError, match=message):
            pool.step({0: "die", 1: "east"})


def test_a_task_that_ends_between_two_losses_may_lose_another(far, processes):
    with envs.EnvPool(far, workers=1) as pool, pytest.warns(UserWarning):
        for _ in range(2):
            pool.reset({0: 0})
            assert pool.step({0: "die"}) == {0: None}
            pool.reset({0: 0})
            assert pool.step({0: "east"})[0][1] == 1.0


def test_a_reset_that_ends_its_process_is_tried_once_more(far, processes, tmp_path, monkeypatch):
    for index, lives in enumerate(["x", "x", "xx"]):
        (tmp_path / str(index)).write_text(lives)
        monkeypatch.setenv(f"LIVES_{index}", str(tmp_path / str(index)))
    with envs.EnvPool(far, workers=1) as pool, pytest.warns(UserWarning, match="died .exit 5."):
        pages = [
            page for page, _ in pool.reset({3: 4, 0: 0, 1: 1, 2: 3}).values()
        ]  # two tasks, each with one process
        assert (
            pages == [f"You are at 0 of {length}." for length in (5, 1, 2, 4)]
            and len(processes) == 3
        )
        assert pool.step({2: "east"})[2][0] == "You are at 1 of 4."
        with pytest.raises(
            RuntimeError,
            match="^task 2 of testing_far's split 'train' failed twice: its environment process "
            "died .exit 5.$",
        ):
            pool.reset({0: 2})
        assert pool.reset({0: 2})[0][0] == "You are at 0 of 3."  # it has no lives left to take


def test_signals_that_stop_a_run_leave_its_environments(far, processes):
    """Ctrl-C reaches all processes of a terminal, but the iteration that ends first needs them."""
    with envs.EnvPool(far, workers=1) as pool:
        pool.reset({0: 1})
        for number in (signal.SIGINT, signal.SIGTERM):
            processes[0].send_signal(number)
            assert pool.step({0: "west"}) == {0: pool_page(2)}


def test_a_worker_that_dies_between_two_questions(far, processes):
    with envs.EnvPool(far, workers=1) as pool, pytest.warns(UserWarning, match="died .exit -9."):
        pool.reset({0: 0})
        processes[0].kill()
        processes[0].wait()
        assert pool.expert({0: ""}) == {0: None}
        assert pool.step({0: "east"}) == {0: None}
        pool.reset({0: 0})
        assert pool.step({0: "east"})[0][1] == 1.0


def test_an_error_costs_its_episode_also_where_another_process_is_lost(far, processes):
    with envs.EnvPool(far, workers=2) as pool, pytest.warns(UserWarning):
        pool.reset({0: 0, 1: 4})
        pool.step({1: "west"})
        assert pool.step({0: "die", 1: "odd"}) == {0: None, 1: None}
        assert pool.step({0: "east", 1: "east"})[0] is None


def test_closing_does_not_wait_for_ever(write, corridor, processes, monkeypatch):
    write(
        "stubborn",
        CORRIDOR.replace("pass", "import time; time.sleep(600)") + "IN_PROCESS = False\n",
    )
    with envs.EnvPool("stubborn", workers=1) as pool:
        pool.reset({0: 0})
        monkeypatch.setattr(env_workers, "LIMIT", 0.3)


def test_close_closes_envs_and_leaves_no_process(far, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    pool = envs.EnvPool(far, workers=2)
    pool.reset({0: 0, 1: 1, 2: 2})
    pool.reset({2: 3})  # closes the third
    assert (tmp_path / "closed").read_text().split() == ["3"]
    processes = [worker.process for worker in pool.envs.workers]
    assert [process.poll() for process in processes] == [None, None]
    pool.close()
    assert [process.poll() for process in processes] == [0, 0]
    assert sorted((tmp_path / "closed").read_text().split()) == ["1", "2", "3", "4"]
    pool.close()  # once more does no harm


def test_the_context_manager_closes_after_an_error(far):
    with pytest.raises(KeyError, match="ours"):
        with envs.EnvPool(far, workers=1) as pool:
            process = pool.envs.workers[0].process
            pool.reset({0: 0})
            raise KeyError("ours")
    assert process.poll() == 0


def test_a_pool_in_this_process_closes_envs(far, write, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    write("near", FAR.replace("IN_PROCESS = False", ""))
    with envs.EnvPool("near", workers=2) as pool:
        assert isinstance(pool.envs, env_workers.LocalEnvs)
        pool.reset({0: 0, 1: 1})
        pool.reset({0: 2})
    assert sorted((tmp_path / "closed").read_text().split()) == ["1", "2", "3"]


def test_workers_find_what_the_caller_finds(far, tmp_path):
    """The project is on sys.path, the world in the current folder: sys.path's empty entry."""
    code = f"""if True:
        import sys
        sys.path[:] = ["", {str(ROOT)!r}] + [p for p in sys.path if p]
        import envs
        with envs.EnvPool("testing_far", workers=1) as pool:
            print(pool.reset({{0: 1}})[0][0])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("\nYou are at 0 of 2.\n"), done.stderr


def test_the_user_s_options_go_before_the_tiny_agent_s():
    config = tiny_config(env="babyai", env_options={"one_word": False, "max_steps": 9})
    assert envs.world_options(config) == {"one_word": False, "max_steps": 9}


def test_a_win_on_the_pool_s_last_step_is_no_truncation():
    with envs.EnvPool("household", "train") as pool:
        pool.reset({0: 0})
        subgoal, outcomes = "", []
        while not outcomes or not outcomes[-1][2]:
            _, subgoal, action = pool.expert({0: subgoal})[0]
            outcomes.append(pool.step({0: action})[0])
        pool.limit = len(outcomes)
        pool.reset({0: 0})
        subgoal = ""
        for _ in outcomes:
            _, subgoal, action = pool.expert({0: subgoal})[0]
            last = pool.step({0: action})[0]
    assert last[1:4] == (1.0, True, False)


@pytest.mark.parametrize("value", [-2e6, 2e6, float("nan")])
@pytest.mark.parametrize("name", ["reward", "score", "progress"])
def test_numbers_are_bounded_on_both_sides(name, value):
    numbers = {"reward": 0.0, "score": 0.0, "progress": 0.5}
    info = {"task": "", "task_type": "", "admissible": [], "won": False}

    def fault(reward, score, progress):
        info.update(score=score, progress=progress)
        return world_guard.find_fault("step", ("page", reward, False, False, info))

    assert fault(**numbers) is None
    assert name in fault(**{**numbers, name: value})


def test_lone_surrogates_are_replaced_wherever_they_stand():
    broken = ("a\ud800", {"admissible": ["go\udfff", "b"], "deep": [{"c": "\ud800"}], "n": 1})
    whole = ("a?", {"admissible": ["go?", "b"], "deep": [{"c": "?"}], "n": 1})
    assert world_guard.replace_surrogates(broken) == whole


def test_of_the_episodes_that_lose_a_server_only_the_first_is_to_blame(monkeypatch):
    local = env_workers.LocalEnvs("household", "train", {})
    monkeypatch.setattr(local, "attempt", lambda *_: ConnectionError("it is\ngone"))
    with pytest.warns(UserWarning, match="2 of 2 episodes begin anew"):
        answers, lost = local.call("step", {3: "look", 1: "look"})
    assert (answers, lost) == ({}, {3: "lost its server (it is gone)"})
