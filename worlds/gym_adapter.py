"""`--env gym:ID`: an env of Gymnasium whose observations and actions are text, or are made so.

ID is Gymnasium's, `module:Name-v0` included. Options (--env_options, as JSON):

    wrapper    "module:name": called with the env, returns the env in text
    actions    names of discrete actions, in their order
    rules      "module:function": see adapter_rules.py, which also says how task, success and
               score are found
    kwargs     arguments of gymnasium.make

Observations: text, or a dict with texts in it. Actions: text, which is passed on as it is, or
discrete actions, which have names. The names are the option's; else those of the env's attribute
ACTION_NAMES, or of its enumeration `actions`, in lower case; else 0, 1, 2 ... They are listed as
admissible. Another action costs a step and changes nothing.

Splits: task `n` of train is seed n, 0 to 9,999; of unseen, seed 1,000,000 + n, 0 to 299.
The step limit is the env's own (max_episode_steps), else 100. An env with a method
`expert(subgoal)` (see envs.py) can be cloned.
"""

import importlib

from worlds import adapter_rules

try:
    import gymnasium
except ImportError:  # optional: World says so
    gymnasium = None


class World:
    """What envs.py expects of a module."""

    SPLITS = adapter_rules.SPLITS

    def __init__(self, name):
        if gymnasium is None:
            raise ValueError(f"gym:{name} needs Gymnasium: pip install gymnasium")
        self.name = name
        self.__name__ = f"gym:{name}"
        package, _, own_name = name.rpartition(":")
        try:
            if package:
                importlib.import_module(package)
            self.MAX_STEPS = gymnasium.spec(own_name).max_episode_steps or 100
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"no world {self.__name__!r}: {error}") from None

    def size(self, split):
        return adapter_rules.size(split, self.__name__)

    def make(self, split="train", index=0, wrapper="", actions=(), rules="", kwargs=None):
        seed = adapter_rules.seed_of(split, index, self.__name__)
        function = adapter_rules.load(rules, "rules") if rules else None
        try:
            env = gymnasium.make(self.name, disable_env_checker=True, **(kwargs or {}))
        except (gymnasium.error.Error, TypeError) as error:
            raise ValueError(f"{self.__name__} cannot be made: {error}") from None
        if wrapper:
            env = adapter_rules.load(wrapper, "wrapper")(env)
        return GymEnv(env, self.__name__, seed, list(actions), function)


class GymEnv:
    """One task of a Gymnasium env. ValueError where its actions are neither text nor discrete."""

    def __init__(self, env, name, seed, actions, rules):
        self.env, self.name, self.seed, self.rules = env, name, seed, rules
        self.running = False
        self.actions = None  # text is passed on
        space = env.action_space
        if isinstance(space, gymnasium.spaces.Discrete):
            self.actions = actions or action_names(env)
            if len(self.actions) != space.n or len(set(self.actions)) != space.n:
                raise ValueError(
                    f"{name} has {space.n} actions, and `actions` must name each: {self.actions}"
                )
        elif not isinstance(space, gymnasium.spaces.Text):
            raise ValueError(f"{name} takes {space}, not text: name a wrapper (--env_options)")
        if hasattr(env.unwrapped, "expert"):
            self.expert = env.unwrapped.expert

    def reset(self, seed=None):
        """Begin the task anew -> (observation, info). `seed` is ignored: the task has its own."""
        self.running = True
        self.task = f"play {self.name.removeprefix('gym:')}"
        text, info = self.translate(*self.env.reset(seed=self.seed), 0.0, False, False)
        self.task = info["task"]
        return text, info

    def step(self, action):
        if not self.running:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        if self.actions is None:
            chosen = action
        elif action in self.actions:
            chosen = self.env.action_space.start + self.actions.index(action)
        else:
            return f"Nothing happens. {self.text}", 0.0, False, False, dict(self.info)
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        text, info = self.translate(observation, info, reward, bool(terminated), bool(truncated))
        won = info["won"]
        self.running = not (terminated or truncated)
        terminated = bool(terminated) or won
        return text, float(won), terminated, bool(truncated) and not terminated, info

    def close(self):
        self.running = False
        self.env.close()

    def translate(self, observation, info, reward, terminated, truncated):
        self.text, self.info = adapter_rules.translate(
            observation,
            info,
            reward,
            terminated,
            truncated,
            task=self.task,
            task_type=self.name.removeprefix("gym:"),
            admissible=self.actions or [],
            rules=self.rules,
        )
        if not isinstance(self.text, str):
            raise ValueError(
                f"{self.name} shows {self.env.observation_space}, not text: name a wrapper, "
                '--env_options \'{"wrapper": "module:name"}\''
            )
        return self.text, dict(self.info)


def action_names(env):
    """The names of a discrete env's actions."""
    own = env.unwrapped
    names = getattr(own, "ACTION_NAMES", None) or getattr(own, "actions", None)
    if isinstance(names, type):  # an enumeration
        names = [member.name for member in names]
    if not names:
        names = [str(n) for n in range(env.action_space.n)]
    return [str(name).lower() for name in names]
