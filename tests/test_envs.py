"""envs.py: finding worlds, stepping many at once, here or in worker processes; and `check_world` for worlds of one's own:

python -c "from tests.test_envs import check_world; check_world('my_world')"
"""

import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import envs
from worlds import household

ROOT = Path(__file__).parent.parent

CORRIDOR = '''"""A world in one file: walk to the end of a corridor."""
SPLITS = ("train", "test")

def size(split):
    if split not in SPLITS:
        raise ValueError(f"corridor has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return 5

def make(split="train", index=0, max_steps=20):
    if not 0 <= index < size(split):
        raise IndexError(f"corridor's split {split!r} has tasks 0 to {size(split) - 1}, not {index}")
    return Corridor(index + SPLITS.index(split) + 1, max_steps)

class Corridor:
    def __init__(self, length, max_steps):
        self.length, self.max_steps, self.done = length, max_steps, True

    def reset(self, seed=None):
        self.at, self.steps, self.done = 0, 0, False
        return self.page(), self.info()

    def step(self, action):
        if self.done:
            raise RuntimeError("call reset before step")
        self.steps, self.at = self.steps + 1, max(0, self.at + {"east": 1, "west": -1}.get(action, 0))
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
        return {"task": "walk to the end", "task_type": "walk", "admissible": ["east", "west"], "won": won, "score": float(won)}
'''

FAR = '''"""The corridor with an engine of the worst manners, for worker processes."""
import os
import time
import corridor
from corridor import SPLITS, size

IN_PROCESS = False
print("an engine says hello")

class Odd(Exception):                           # unlike most, cannot be rebuilt from its message
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

class Far(corridor.Corridor):
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
    env = corridor.make(split, index, max_steps)
    lives = os.environ.get(f"LIVES_{index}")    # a file with a letter for each process that dies over this task
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
    return write("corridor", CORRIDOR)


@pytest.fixture
def far(corridor, write):
    return write("far", FAR)


# ---- the contract, for any world ---------------------------------------------------------------------------------------


def check_world(name, tasks=4, **options):
    """Assert that world `name` keeps what the docstring of envs.py promises, on `tasks` tasks of each split."""
    module = envs.world(name)
    assert (
        isinstance(module.SPLITS, tuple)
        and module.SPLITS
        and all(isinstance(split, str) for split in module.SPLITS)
    )
    assert isinstance(getattr(module, "IN_PROCESS", True), bool)
    for call in (envs.size, envs.make):
        with pytest.raises(ValueError):
            call(name, "no such split")
    for split in module.SPLITS:
        number = envs.size(name, split)
        assert isinstance(number, int) and number > 0
        for index in (number, -1):
            with pytest.raises(IndexError):
                envs.make(name, split, index)
        for index in random.Random(0).sample(range(number), min(tasks, number)):
            env, twin = (envs.make(name, split, index, **options) for _ in range(2))
            with pytest.raises(RuntimeError):
                env.step("before reset")
            first = _random_episode(env, index)
            assert _random_episode(twin, index) == first, (
                "the same task, the same actions, another transcript"
            )
            with pytest.raises(RuntimeError):
                env.step("after the end")
            assert _random_episode(env, index) == first, "reset does not start over"
            assert env.reset(seed=1) == first[0]
            _check_expert(env)
            env.close()
            twin.close()
    env = module.make()
    twin = envs.make(name, module.SPLITS[0], 0)
    assert env.reset() == twin.reset(), "make's defaults are not the first task of the first split"
    for action in ("", "no such action\n\u00e9"):  # a model says anything
        _check_step(env.step(action))
    env.close()
    twin.close()


def _check_info(info):
    assert {"task": str, "task_type": str, "won": bool, "score": float}.items() <= {
        k: type(v) for k, v in info.items()
    }.items()
    assert (
        info["task"]
        and isinstance(info["admissible"], list)
        and all(isinstance(a, str) for a in info["admissible"])
    )
    assert isinstance(info.get("gamefile", ""), str) and pickle.loads(pickle.dumps(info)) == info


def _check_step(outcome):
    observation, reward, terminated, truncated, info = outcome
    assert [type(x) for x in outcome[:4]] == [str, float, bool, bool] and observation
    assert reward == float(info["won"] and terminated) and not (terminated and truncated)
    _check_info(info)
    return terminated or truncated


def _random_episode(env, seed, limit=500):
    """reset's pair and every step's five, until the end."""
    rng, transcript = random.Random(seed), [env.reset()]
    assert isinstance(transcript[0][0], str) and not transcript[0][1]["won"]
    _check_info(transcript[0][1])
    while len(transcript) <= limit:
        transcript.append(env.step(rng.choice(transcript[-1][-1]["admissible"])))
        assert transcript[-1][-1]["task"] == transcript[0][-1]["task"]
        if _check_step(transcript[-1]):
            return transcript
    raise AssertionError(f"no end in {limit} steps")


def _check_expert(env, limit=500):
    """From the env's fresh start the expert, where there is one, wins or gives up."""
    subgoal, ended = "", False
    for turn in range(limit if hasattr(env, "expert") else 0):
        advice = env.expert(subgoal)
        if advice is None or ended:
            break
        switch, carried, action = advice
        assert (
            isinstance(switch, bool)
            and isinstance(carried, str)
            and carried
            and isinstance(action, str)
        )
        assert switch or carried == subgoal, "KEEP, and another subgoal"
        assert switch or turn, "the first turn has no subgoal to keep"
        subgoal, outcome = carried, env.step(action)
        ended = _check_step(outcome)
        assert not ended or outcome[-1]["won"], "the expert does not win"


def test_household_keeps_the_contract():
    check_world("household", tasks=12)


def test_a_world_of_ones_own_keeps_the_contract(corridor):
    check_world(corridor)


@pytest.mark.parametrize(
    "breach",
    [
        ('SPLITS = ("train", "test")', 'SPLITS = ["train", "test"]'),
        ("raise IndexError", "raise KeyError"),
        ("not 0 <= index <", "not index <"),
        ("raise ValueError", "raise KeyError"),
        ("if self.done:", "if not hasattr(self, 'at'):"),
        ("float(won), won, truncated", "won, won, truncated"),
        ("float(won), won, truncated", "-1.0 + 2 * won, won, truncated"),
        ("float(won), won, truncated", "float(won), won, won"),
        (
            "self.at, self.steps, self.done = 0, 0, False",
            "self.steps, self.done = 0, False; self.at = getattr(self, 'at', 0)",
        ),
        ('"score": float(won)', '"score": won'),
        ('{"east": 1, "west": -1}.get(action, 0)', '{"east": 1, "west": -1}[action]'),
        ("reset(self, seed=None)", "reset(self)"),
        ("return self.page(), float", "return self.page().encode(), float"),
        (
            "self.max_steps, self.done = length, max_steps, True",
            "self.max_steps, self.done = id(self), max_steps, True",
        ),
        ("index=0, max_steps", "index=1, max_steps"),
    ],
)
def test_the_contract_check_finds_breaches(write, breach):
    """check_world itself: worlds with one fault each."""
    assert CORRIDOR.count(breach[0]) == 1
    write("corridor", CORRIDOR.replace(*breach))
    with pytest.raises((AssertionError, KeyError, TypeError, pytest.fail.Exception)):
        check_world("corridor")


# ---- finding a world ----------------------------------------------------------------------------------------------------


def test_household_by_name():
    assert envs.world("household") is household and envs.size("household", "seen") == 300
    env, same = envs.make("household", "seen", 3, max_steps=2), household.make("seen", 3)
    assert env.reset() == same.reset() and env.max_steps == 2


def test_known_worlds_have_their_module():
    assert all((ROOT / f"{module}.py").exists() for module in envs.WORLDS.values())


@pytest.mark.parametrize(
    "name",
    [
        "houshold",
        "no.such.world",
        "envs.no_such_world",
        "json",
        "json.no_such_world",
        "./corridor",
        "corridor.py",
        ".corridor",
        "",
        "make",
        "size",
        "SPLITS",
    ],
)
def test_no_such_world_says_what_there_is(name, corridor, write):
    for lacking in ("make", "size", "SPLITS"):
        write(lacking, CORRIDOR + f"del {lacking}\n")
    with pytest.raises(
        ValueError,
        match=f"no world {re.escape(repr(name))}: choose household, alfworld, webshop, or name a module",
    ):
        envs.world(name)


def test_a_world_in_a_package(write):
    write("worlds/__init__", "")
    write("worlds/corridor", CORRIDOR)
    assert envs.size("worlds.corridor", "test") == 5
    with pytest.raises(ValueError, match="no world 'worlds.corner'"):
        envs.size("worlds.corner", "test")


def test_what_a_world_lacks_is_not_hidden(write):
    write("needy", "import a_package_that_is_not_here\n" + CORRIDOR)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        envs.make("needy")
    write("broken", "from json import no_such_thing\n" + CORRIDOR)
    with pytest.raises(ImportError, match="no_such_thing"):
        envs.make("broken")


# ---- Runner -------------------------------------------------------------------------------------------------------------


def alone(name, split, index, actions, **options):
    env = envs.make(name, split, index, **options)
    return [env.reset(), *map(env.step, actions)]


def together(runner, tasks, actions):
    """{slot: transcript} of tasks {slot: index}, all slots at once."""
    transcripts = {slot: [outcome] for slot, outcome in runner.reset(tasks).items()}
    for turn in zip(*(actions[slot] for slot in tasks)):
        for slot, outcome in runner.step(dict(zip(tasks, turn))).items():
            transcripts[slot].append(outcome)
    return transcripts


def test_runner_steps_as_one_would_alone():
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
    with envs.Runner("household", "unseen", max_steps=12) as runner:
        assert together(runner, tasks, walks) == expected


def test_slots_are_independent(corridor):
    with envs.Runner(corridor, "test") as runner:
        runner.reset({0: 4, 1: 4})
        runner.step({0: "east"})
        runner.step({0: "east"})
        pages = [outcome[0] for outcome in runner.step({1: "east", 0: "east"}).values()]
        assert pages == ["You are at 1 of 6.", "You are at 3 of 6."]
        assert runner.reset({0: 2})[0][0] == "You are at 0 of 4."  # another task in slot 0
        assert runner.step({1: "east"})[1][0] == "You are at 2 of 6."
        assert runner.reset({}) == runner.step({}) == {}


def test_runner_asks_the_expert(corridor, far):
    with envs.Runner("household") as runner, envs.Runner(far, workers=2) as remote:
        runner.reset({0: 0, 5: 1})
        advice = runner.expert({0: "", 5: ""})
        assert advice == {slot: household_expert(index) for slot, index in ((0, 0), (5, 1))}
        remote.reset({0: 0, 1: 1})
        assert remote.expert({1: "get there", 0: ""}) == {1: None, 0: (True, "get there", "east")}
    with envs.Runner(
        corridor
    ) as runner:  # has none: scratch.py's demonstrations rely on this error
        runner.reset({0: 0})
        with pytest.raises(AttributeError, match="expert"):
            runner.expert({0: ""})


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
        slot: alone("corridor", "test", index, walks[slot], max_steps=6)
        for slot, index in tasks.items()
    }
    with envs.Runner(far, "test", workers=workers, max_steps=6) as runner:
        assert len(runner.workers) == workers and not runner.envs
        got = together(runner, tasks, walks)
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
    with envs.Runner(far, workers=workers) as runner:
        assert list(runner.reset({slot: 4 for slot in (4, 1, 0, 3, 2)})) == [4, 1, 0, 3, 2]
        assert list(runner.step({slot: "east" for slot in (3, 4, 0)})) == [3, 4, 0]


def test_one_worker_per_core_where_none_are_asked_for(far, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with envs.Runner(far) as runner:
        assert len(runner.workers) == 3


def test_errors_in_a_worker_come_back(far):
    with envs.Runner(far, workers=2) as runner:
        with pytest.raises(IndexError, match="corridor's split 'train' has tasks 0 to 4, not 99"):
            runner.reset({0: 99})
        runner.reset({0: 0, 1: 1})
        with pytest.raises(
            RuntimeError, match="1 and 2"
        ):  # an exception that does not survive pickling
            runner.step({0: "odd"})
        with pytest.raises(Exception, match="pickle"):
            runner.step({0: "unpicklable"})
        assert runner.step({0: "east"})[0][1] == 1.0  # and it lives on
        with pytest.raises(RuntimeError, match="call reset"):
            runner.step({0: "east"})
    with (
        envs.Runner(far, "no such split", workers=1) as runner,
        pytest.raises(ValueError, match="no split 'no such split'"),
    ):
        runner.reset({0: 0})


def test_an_error_in_one_worker_leaves_the_others_in_step(far):
    """The other workers' answers to the same question are not taken for answers to the next."""
    with envs.Runner(far, workers=2) as runner:
        runner.reset({0: 0, 1: 4})
        with pytest.raises(RuntimeError, match="1 and 2"):
            runner.step({0: "odd", 1: "east"})
        assert runner.step({1: "east"})[1][0] == "You are at 2 of 5."


def test_a_failed_reset_leaves_the_slot_empty(write, corridor):
    """Above all, no env is closed twice."""
    write(
        "frail", CORRIDOR.replace("pass", "assert not hasattr(self, 'closed'); self.closed = True")
    )
    with envs.Runner("frail") as runner:
        runner.reset({0: 0})
        with pytest.raises(IndexError):
            runner.reset({0: 99})


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
    lost = {
        "task": "",
        "task_type": "",
        "admissible": [],
        "won": False,
        "score": 0.0,
        "progress": 0.0,
        "page": "",
        "lost": why,
    }
    with envs.Runner(far, workers=2) as runner:
        runner.reset({slot: 4 for slot in range(5)})
        runner.step({2: "east"})
        with (
            monkeypatch.context() as patch,
            pytest.warns(UserWarning, match=f"of far {re.escape(why)}; its episodes are lost"),
        ):
            patch.setattr(envs, "LIMIT", 1.0)
            outcomes = runner.step({1: "east", 0: "east", 2: action, 4: "east"})
        assert list(outcomes) == [1, 0, 2, 4]
        assert [outcomes[slot][0] for slot in (0, 1)] == [
            "You are at 1 of 5."
        ] * 2  # answered before, and elsewhere
        assert outcomes[2] == ("", 0.0, False, True, {**lost, "culprit": True})
        assert outcomes[4] == ("", 0.0, False, True, {**lost, "culprit": False})
        for _ in range(2):  # lost until they are reset, and so are those not asked then
            again = runner.step({slot: "east" for slot in (4, 3, 0)})
            assert [again[slot][-1].get("lost") for slot in again] == [
                why,
                None,
                why,
            ] and not again[0][-1]["culprit"]
            assert runner.expert({0: "", 1: ""}) == {0: None, 1: (True, "get there", "east")}
        runner.reset({2: 0, 0: 4})
        assert runner.step({2: "east", 0: "east", 1: "east"})[2][1] == 1.0
        assert runner.step({0: "east", 1: "east", 4: "east"})[0][0] == "You are at 2 of 5."
        assert [process.poll() for process in processes] == [
            3 if action == "die" else -9,
            None,
            None,
        ]
    assert [process.poll() for process in processes[1:]] == [0, 0]


def test_a_reset_that_ends_its_process_is_tried_once_more(far, processes, tmp_path, monkeypatch):
    for index, lives in enumerate(["x", "x", "xx"]):
        (tmp_path / str(index)).write_text(lives)
        monkeypatch.setenv(f"LIVES_{index}", str(tmp_path / str(index)))
    with envs.Runner(far, workers=1) as runner, pytest.warns(UserWarning, match="died .exit 5."):
        pages = [
            page for page, _ in runner.reset({3: 4, 0: 0, 1: 1, 2: 3}).values()
        ]  # two tasks, each with one process
        assert (
            pages == [f"You are at 0 of {length}." for length in (5, 1, 2, 4)]
            and len(processes) == 3
        )
        assert runner.step({2: "east"})[2][0] == "You are at 1 of 4."
        with pytest.raises(
            RuntimeError,
            match="^task 2 of far's split 'train' failed twice: its environment process died .exit 5.$",
        ):
            runner.reset({0: 2})
        assert runner.reset({0: 2})[0][0] == "You are at 0 of 3."  # it has no lives left to take


def test_a_worker_that_dies_between_two_questions(far, processes):
    with envs.Runner(far, workers=1) as runner, pytest.warns(UserWarning, match="died .exit -9."):
        runner.reset({0: 0})
        processes[0].kill()
        processes[0].wait()
        assert runner.expert({0: ""}) == {0: None} and runner.step({0: "east"})[0][-1]["lost"]
        runner.reset({0: 0})
        assert runner.step({0: "east"})[0][1] == 1.0


def test_an_error_is_raised_also_where_another_process_is_lost(far, processes):
    with envs.Runner(far, workers=2) as runner, pytest.warns(UserWarning):
        runner.reset({0: 0, 1: 4})
        with pytest.raises(RuntimeError, match="1 and 2"):
            runner.step({0: "die", 1: "odd"})
        assert runner.step({0: "east", 1: "east"})[0][-1]["lost"]


def test_closing_does_not_wait_for_ever(write, corridor, processes, monkeypatch):
    write(
        "stubborn",
        CORRIDOR.replace("pass", "import time; time.sleep(600)") + "IN_PROCESS = False\n",
    )
    with envs.Runner("stubborn", workers=1) as runner:
        runner.reset({0: 0})
        monkeypatch.setattr(envs, "LIMIT", 0.3)


def test_close_closes_envs_and_leaves_no_process(far, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    runner = envs.Runner(far, workers=2)
    runner.reset({0: 0, 1: 1, 2: 2})
    runner.reset({2: 3})  # closes the third
    assert (tmp_path / "closed").read_text().split() == ["3"]
    processes = [worker.process for worker in runner.workers]
    assert [process.poll() for process in processes] == [None, None]
    runner.close()
    assert [process.poll() for process in processes] == [0, 0]
    assert sorted((tmp_path / "closed").read_text().split()) == ["1", "2", "3", "4"]
    runner.close()  # once more does no harm


def test_the_context_manager_closes_after_an_error(far):
    with pytest.raises(KeyError, match="ours"):
        with envs.Runner(far, workers=1) as runner:
            process = runner.workers[0].process
            runner.reset({0: 0})
            raise KeyError("ours")
    assert process.poll() == 0


def test_runner_in_process_closes_envs(far, write, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    write("near", FAR.replace("IN_PROCESS = False", ""))
    with envs.Runner("near", workers=2) as runner:
        assert not runner.workers
        runner.reset({0: 0, 1: 1})
        runner.reset({0: 2})
    assert sorted((tmp_path / "closed").read_text().split()) == ["1", "2", "3"]


def test_workers_find_what_the_caller_finds(far, tmp_path):
    """Run from elsewhere: the project is on sys.path, the world in the current folder, sys.path's empty entry."""
    code = f"""if True:
        import sys
        sys.path[:] = ["", {str(ROOT)!r}] + [p for p in sys.path if p]
        import envs
        with envs.Runner("far", workers=1) as runner:
            print(runner.reset({{0: 1}})[0][0])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("\nYou are at 0 of 2.\n"), done.stderr
