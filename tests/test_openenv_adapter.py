"""--env openenv:URL, against a server of OpenEnv's own making on 127.0.0.1.

Skipped where OpenEnv's client or its server cannot be imported.
"""

import contextlib
import importlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import envs
from config import ConfigError
from conftest import tiny_config
from support import world_check
from support.loading import check_world_and_model
from worlds import openenv_adapter

try:
    from openenv.core.env_server import create_fastapi_app  # noqa: F401
except ImportError as error:
    pytest.skip(f"pip install openenv-core ({error})", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:an environment of")
HERE = Path(__file__).parent
LOCAL = "openenv:openenv_server:Count"


class Server:
    def __init__(self, sessions=200):
        self.sessions = sessions
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.world = f"openenv:http://127.0.0.1:{self.port}"
        self.start()

    def start(self, wait=True):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "openenv_server.py", str(self.port), str(self.sessions)]
        )
        while wait:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self.process.poll() is None
            time.sleep(0.1)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    importlib.invalidate_caches()


def goal(info):
    return int(info["task"].removeprefix("reach "))


@pytest.mark.parametrize("where", ["server", "here"])
def test_it_keeps_the_interface(server, where):
    name = server.world if where == "server" else LOCAL
    faults, summary = world_check.check_world(name, tasks=2)
    assert faults == []
    assert "10000 tasks in train, 300 tasks in unseen" in summary and "after 100 steps" in summary


def test_many_episodes_at_once(server):
    with envs.EnvPool(server.world, "train") as pool:
        begun = pool.reset({slot: slot for slot in range(16)})
        goals = {slot: goal(info) for slot, (_, info) in begun.items()}
        assert set(goals.values()) == {2, 3, 4, 5}
        assert begun[0][0] == "at 0" and begun[0][1]["admissible"] == ["up", "down"]
        running = dict.fromkeys(goals, "up")
        for turn in range(1, 6):
            for slot, (text, reward, terminated, _, info) in pool.step(running).items():
                assert text == f"at {turn}"
                assert (turn == goals[slot]) == terminated == info["won"] == bool(reward)
                if terminated:
                    del running[slot]
        assert not running


def test_a_server_that_is_full_is_waited_for():
    server = Server(sessions=2)
    try:
        kept = [envs.make(server.world) for _ in range(2)]
        for env in kept:
            env.reset()
        with envs.EnvPool(server.world, "train") as pool, pytest.raises(envs.WorldError) as caught:
            pool.reset({0: 0})
        assert "let it take more sessions, or lower --num_envs" in str(caught.value)
        third = envs.world(server.world).make(wait_s=100)
        third.world.reached = True
        closing = threading.Timer(1, kept[0].close)
        closing.start()
        assert third.reset()[0] == "at 0"
        closing.join()
    finally:
        server.stop()


def test_here_and_there_are_the_same(server):
    for index in range(3):
        there, here = envs.make(server.world, "unseen", index), envs.make(LOCAL, "unseen", index)
        first, second = there.reset(), here.reset()
        assert (first[0], first[1]["task"]) == (second[0], second[1]["task"])
        for action in ("down", "up"):
            assert there.step(action)[:4] == here.step(action)[:4]
        there.close()


def test_a_limit_of_the_server_truncates():
    env = envs.make(LOCAL)
    env.reset()
    assert [env.step("down")[2:4] for _ in range(9)] == [(False, False)] * 8 + [(False, True)]


def test_a_win_at_the_limit_of_the_server_is_terminated(tmp_path, monkeypatch):
    text = "def judge(observation, info, reward, ended):\n    return {'won': ended}\n"
    (tmp_path / "testing_rules.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    env = envs.make(LOCAL, rules="testing_rules:judge")
    env.reset()
    outcomes = [env.step("down") for _ in range(9)]
    assert [outcome[1:4] for outcome in outcomes] == [(0.0, False, False)] * 8 + [
        (1.0, True, False)
    ]


def test_an_answer_that_does_not_come_costs_the_episode(server):
    with envs.EnvPool(server.world, "train", timeout_s=2) as pool:
        pool.reset({0: 0, 1: 1})
        pool.step({0: "down", 1: "down"})
        with pytest.warns(UserWarning, match="no answer within 2 s.; 1 of 2 episodes begin anew"):
            outcomes = pool.step({0: "sleep", 1: "down"})
        assert outcomes[0] is None and outcomes[1][0] == "at -2"
        assert pool.reset({0: 0})[0][0] == "at 0"
        with pytest.warns(UserWarning), pytest.raises(envs.WorldError, match="task 0 .* twice"):
            pool.step({0: "sleep", 1: "down"})


def test_a_lost_server_costs_the_episodes_and_is_waited_for():
    server = Server()
    try:
        with envs.EnvPool(server.world, "train", wait_s=100) as pool:
            pool.reset(dict.fromkeys(range(4), 7))  # one task in all slots, as in a group
            pool.step(dict.fromkeys(range(4), "down"))
            with pytest.warns(UserWarning, match="lost its server"):
                outcomes = pool.step(dict.fromkeys(range(4), "crash"))
            assert outcomes == dict.fromkeys(range(4))
            server.process.wait()
            server.start(wait=False)  # pool.reset waits
            begun = pool.reset(dict.fromkeys(range(4), 7))
            assert [begun[slot][0] for slot in range(4)] == ["at 0"] * 4
            wins = [pool.step(dict.fromkeys(range(4), "up")) for _ in range(goal(begun[0][1]))]
            assert wins[-1][3][4]["won"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("openenv:http://127.0.0.1:9", "lost its server .Failed to connect to ws://127.0.0.1:9"),
        ("openenv:somebody/their-env", "nothing is fetched from a hub"),
        ("openenv:openenv_server:NoSuch", "'openenv_server:NoSuch' is no module:name"),
    ],
)
def test_what_is_not_there_is_one_sentence(name, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_world_and_model(tiny_config(env=name, bc_episodes=0, model="x"))
    assert "\n" not in str(caught.value)


def test_named_actions_are_sent_as_numbers(monkeypatch):
    from worlds import openenv_adapter

    sent = []
    monkeypatch.setattr(
        openenv_adapter.LocalClient, "step", lambda self, fields: sent.append(fields) or self.last
    )
    env = envs.make(LOCAL, field="action_id", actions=["up", "down"])
    _, info = env.reset()
    env.client.last = env.client.reset(seed=1)
    assert env.step("fly")[0] == "Nothing happens. at 0" and not sent
    env.step("down")
    assert sent == [{"action_id": 1}] and info["admissible"] == ["up", "down"]


def test_without_openenv_the_command_that_brings_it(monkeypatch):
    from worlds import openenv_adapter

    monkeypatch.setattr(openenv_adapter, "GenericEnvClient", None)
    with pytest.raises(ValueError, match="pip install openenv-core"):
        envs.world("openenv:http://127.0.0.1:9")


def test_a_reward_at_a_limit_is_no_win():
    world = SimpleNamespace(address="here", __name__="openenv:here")
    env = openenv_adapter.OpenEnv(world, 0, "message", [], None, 60, 60)
    env.task = "play"
    for limit in (False, True):
        observation = {"message": "the end", "truncated": limit}
        result = SimpleNamespace(observation=observation, reward=0.5, done=True)
        _, info, truncated = env.translate(result, ended=True)
        assert (truncated, info["won"]) == (limit, not limit)


def test_a_limit_counts_at_the_end_and_the_task_is_that_of_the_reset(monkeypatch):
    env = envs.make("openenv:openenv_server:Count")
    begun = SimpleNamespace(observation={"message": "a", "task": "reach 3"}, reward=0, done=False)
    later = SimpleNamespace(observation={"message": "b", "truncated": True}, reward=0, done=False)
    monkeypatch.setattr(env, "begin", lambda: begun)
    env.reset()
    _, info, truncated = env.translate(later, ended=False)
    assert (info["task"], truncated) == ("reach 3", False)
