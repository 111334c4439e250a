"""`--env openenv:URL`: a server of OpenEnv's; `--env openenv:module:Class`: its Environment, here.

    python train.py --env openenv:http://127.0.0.1:8000 --model ...

It speaks through OpenEnv's own client (pip install openenv-core). Each episode is a session of the
server, many at once, so the server must allow twice as many as --num_envs (its
max_concurrent_envs), for training and evaluation. Nothing is fetched from a hub and no container
is started: the server runs already.
Options (--env_options, as JSON):

    field      the action's field that takes the text; default "message"
    actions    names of the actions; the field then takes their number, and another action costs
               a step and changes nothing
    rules      "module:function": see adapter_rules.py, which also says how task, success and
               score are found
    timeout_s  seconds for one answer, default 60
    wait_s     seconds that a reset waits for a server that was there before, default 60

Splits: the reset of task `n` of train has seed n, 0 to 9,999; of unseen 1,000,000 + n, 0 to 299;
the server must keep to it. `truncated` in an observation or its metadata says that a limit ended
the episode. A server that does not answer in time, or is gone, costs the episode as a lost
environment process does: see envs.EnvPool.
"""

import contextlib
import time
import typing

from worlds import adapter_rules

try:
    from openenv.core import GenericEnvClient
    from websockets.exceptions import WebSocketException
except ImportError:  # optional: World says so
    GenericEnvClient = None

MORE = "let it take more sessions, or lower --num_envs"
URLS = ("http://", "https://", "ws://", "wss://")


class World:
    """What envs.py expects of a module."""

    SPLITS = adapter_rules.SPLITS
    THREADS = 32  # episodes that are asked at once: they wait for a server

    def __init__(self, address):
        self.__name__ = f"openenv:{address}"
        if GenericEnvClient is None:
            raise ValueError(f"{self.__name__} needs OpenEnv's client: pip install openenv-core")
        self.address = address
        self.reached = False  # whether the server has answered
        self.local = None
        if not address.startswith(URLS):
            if ":" not in address:
                raise ValueError(
                    f"{self.__name__} is no address: give openenv:http://HOST:PORT of a running "
                    "server or openenv:module:Class (nothing is fetched from a hub)"
                )
            self.local = adapter_rules.load(address, "the environment")

    def size(self, split):
        return adapter_rules.size(split, self.__name__)

    def make(
        self,
        split="train",
        index=0,
        field="message",
        actions=(),
        rules="",
        timeout_s=60.0,
        wait_s=60.0,
    ):
        seed = adapter_rules.seed_of(split, index, self.__name__)
        function = adapter_rules.load(rules, "rules") if rules else None
        return OpenEnv(self, seed, field, list(actions), function, timeout_s, wait_s)

    def client(self, timeout_s):
        if self.local:
            return LocalClient(self.local)
        return GenericEnvClient(
            self.address,
            connect_timeout_s=timeout_s,
            message_timeout_s=timeout_s,
            mode="simulation",
        ).sync()


class OpenEnv:
    """One task. ConnectionError where the server is gone or does not answer."""

    def __init__(self, world, seed, field, actions, rules, timeout_s, wait_s):
        self.world, self.seed, self.rules = world, seed, rules
        self.field, self.actions = field, actions
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self.client = None
        self.running = False

    def reset(self, seed=None):
        """Begin the task anew -> (observation, info). `seed` is ignored: the task has its own."""
        self.task = f"play {self.world.address}"
        result = self.begin()
        self.running = True
        text, info, _ = self.translate(result, ended=False)
        self.task = info["task"]
        return text, info

    def step(self, action):
        if not self.running:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        value = action
        if self.actions:
            if action not in self.actions:
                return f"Nothing happens. {self.text}", 0.0, False, False, dict(self.info)
            value = self.actions.index(action)
        result = self.ask(self.client.step, {self.field: value})
        self.running = not result.done
        text, info, truncated = self.translate(result, ended=bool(result.done))
        won = info["won"]
        return text, float(won), bool(result.done) and not truncated, truncated, info

    def close(self):
        self.running = False
        if self.client is not None:
            with contextlib.suppress(Exception):  # it may be gone
                self.client.close()
            self.client = None

    def begin(self):
        """The first result of a session; where the server was there before, it is waited for."""
        until = time.monotonic() + (self.wait_s if self.world.reached else 0)
        while True:
            try:
                if self.client is None:
                    self.client = self.world.client(self.timeout_s)
                result = self.ask(self.client.reset, seed=self.seed)
                self.world.reached = True
                return result
            except ConnectionError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.5)

    def ask(self, method, *arguments, **keywords):
        """The server's answer. Where there is none, ConnectionError says why, in one sentence."""
        try:
            return method(*arguments, **keywords)
        except TimeoutError:
            reason = f"no answer within {self.timeout_s:g} s"
        except WebSocketException as error:  # a full server closes, and may say why too late
            reason = f"{error}: if the server is full, {MORE}"
        except OSError as error:
            reason = str(error)
        except RuntimeError as error:
            if "CAPACITY_REACHED" not in str(error):
                raise
            reason = f"{error}: {MORE}"
        self.close()
        raise ConnectionError(reason)

    def translate(self, result, ended):
        """-> (text, info, whether a limit ended the episode)."""
        observation = result.observation
        facts = {**(observation.get("metadata") or {}), **observation}
        truncated = ended and bool(facts.get("truncated"))
        self.text, self.info = adapter_rules.translate(
            observation,
            {},
            result.reward,
            ended and not truncated,
            truncated,
            task=self.task,
            task_type=self.world.address,
            admissible=self.actions,
            rules=self.rules,
        )
        if not isinstance(self.text, str):
            raise ValueError(
                f"{self.world.__name__} shows no text but {sorted(observation)}: name `rules` that "
                'return one, --env_options \'{"rules": "module:function"}\''
            )
        return self.text, dict(self.info), truncated and not self.info["won"]


class LocalClient:
    """An OpenEnv Environment in this process, with the client's methods."""

    def __init__(self, environment):
        self.env = environment()
        self.action = typing.get_type_hints(environment.step)["action"]

    def reset(self, seed):
        return Result(self.env.reset(seed=seed))

    def step(self, fields):
        return Result(self.env.step(self.action(**fields)))

    def close(self):
        self.env.close()


class Result:
    """An Observation as the client's results are."""

    def __init__(self, observation):
        self.observation = observation.model_dump(exclude={"reward", "done"})
        self.reward, self.done = observation.reward, observation.done
