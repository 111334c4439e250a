"""Worlds: the interface that each of them has, and the pool that steps many environments at once.

A world is a Python module with

    SPLITS                              names of the splits, the training split first
    size(split) -> int                  number of tasks; ValueError for an unknown split
    make(split="train", index=0, **options) -> env
                                        task `index`, the same every time; IndexError for none
    IN_PROCESS = False                  optional: the engine needs processes of its own
    TINY_AGENT = {...}                  optional: options of `make` for the tiny agent
    MAX_STEPS = 100                     optional, where `make` has no option max_steps: the pool
                                        then truncates an episode after so many steps
    DEMONSTRATOR = {...}                optional: see `support.demonstrations.demonstrations`
    disguise(episodes, rng)             optional: demonstrations under other names

Its envs have Gymnasium's signatures (Gymnasium itself is not needed):

    reset(seed=None) -> (observation, info)
    step(action) -> (observation, reward, terminated, truncated, info)
    close()
    expert(subgoal) -> (switch, subgoal, action) or None
                                        optional: what a demonstrator with this subgoal does now

observation is text. reward is 1.0 on the step that wins, else 0.0; the trainer scales it.
terminated: the task itself ended. truncated: the step limit ended it. After the end, step raises
RuntimeError until reset is called. info holds task (str), task_type (str), admissible (list of
str), won (bool) and score (float); optional are subgoals (list of str: what a planner could
choose now), progress (float, 0 to 1, for --checklist) and gamefile (str).

`--env NAME` takes a module of worlds/ or any importable module, also one in the current folder: a
world of one's own is one file. gym:ID and openenv:URL take other libraries' envs
(worlds/gym_adapter.py, worlds/openenv_adapter.py). `python -m envs NAME` checks a world.
"""

import inspect
import sys
import warnings
from collections import Counter

from support import env_workers, world_guard
from support.world_guard import WorldError
from support.world_lookup import WORLDS, world  # noqa: F401, envs.world finds a world by name

MAX_STEPS = 100  # step limit of a world that names none


def make(name, split="train", index=0, **options):
    """Task `index` of `split` in world `name`. ValueError, IndexError, RuntimeError say why not.

    Where a world's `make` takes no max_steps only `EnvPool` truncates.
    """
    module = world(name)
    return module.make(split, index, **step_limit(module, options)[1])


def size(name, split):
    """Number of tasks in `split` of world `name`."""
    return world(name).size(split)


def world_options(config):
    """The options of `make` in a run: the tiny agent's where there is no model, then the user's."""
    tiny = {} if config.model else getattr(world(config.env), "TINY_AGENT", {})
    return {**tiny, **config.env_options}


def step_limit(module, options):
    """-> (steps after which the pool truncates, options of `make`).

    None where `make` takes max_steps itself. Elsewhere the option max_steps, else the world's
    MAX_STEPS, else ours.
    """
    if "max_steps" in inspect.signature(module.make).parameters:
        return None, options
    options = dict(options)
    return options.pop("max_steps", getattr(module, "MAX_STEPS", MAX_STEPS)), options


class EnvPool:
    """Steps many environments of one split together. A slot (any int) holds one at a time.

    Environments live in this process, or, where the world says IN_PROCESS = False, in `workers`
    processes of their own (0: one per core that this process may use). A process that dies or
    hangs is replaced. Its episodes are lost, and so is one whose world raises or breaks the
    interface: `step` and `expert` answer None for their slots until they are reset. An episode
    that fails, begins anew and fails again raises WorldError. What a world raises before its first
    step is done is raised as it is.
    """

    def __init__(self, name, split="train", workers=0, **options):
        self.name, self.split = name, split
        self.tasks = {}  # slot -> task index
        self.failed = Counter()  # task -> failed episodes that have not begun anew
        self.retries = set()  # slots whose episode has begun anew
        self.works = False  # whether a step has been taken
        self.steps = {}  # slot -> steps of its episode
        module = world(name)
        self.limit, options = step_limit(module, options)
        if getattr(module, "IN_PROCESS", True):
            self.envs = env_workers.LocalEnvs(module.__name__, split, options)
        else:
            self.envs = env_workers.WorkerEnvs(module.__name__, split, options, workers)

    def reset(self, tasks):
        """{slot: task index} -> {slot: (observation, info)}"""
        self.tasks.update(tasks)
        self.steps.update(dict.fromkeys(tasks, 0))
        answers = {}
        while len(answers) < len(tasks):
            missing = {slot: index for slot, index in tasks.items() if slot not in answers}
            for slot, index in missing.items():
                self.retries.discard(slot)
                if self.failed[index]:
                    self.failed[index] -= 1
                    self.retries.add(slot)
            answers.update(self._call("reset", missing))
        return {slot: answers[slot] for slot in tasks}

    def step(self, actions):
        """{slot: action} -> {slot: (observation, reward, terminated, truncated, info) or None}"""
        answers = self._call("step", actions)
        self.works = self.works or bool(answers)
        for slot, (observation, reward, terminated, truncated, info) in answers.items():
            self.steps[slot] += 1
            if self.limit and self.steps[slot] >= self.limit and not terminated:
                truncated = True
                answers[slot] = (observation, reward, terminated, truncated, info)
        return {slot: answers.get(slot) for slot in actions}

    def expert(self, subgoals):
        """{slot: carried subgoal} -> {slot: (switch, subgoal, action) or None}"""
        answers = self._call("expert", subgoals)
        return {slot: answers.get(slot) for slot in subgoals}

    def close(self):
        self.envs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _call(self, method, arguments):
        """{slot: argument} -> {slot: answer}, without the slots whose episode was lost."""
        answers, lost = self.envs.call(method, arguments)
        answers, faults = world_guard.sift(method, answers, self.steps, self.works)
        for slot, reason in lost.items():
            faults[slot] = f"its environment process {reason}"
        for slot, reason in faults.items():
            index = self.tasks[slot]
            where = f"task {index} of {self.name}'s split {self.split!r}"
            if slot in self.retries:
                raise WorldError(f"{where} failed twice: {reason}")
            self.failed[index] += 1
            if slot not in lost:
                warnings.warn(f"{where} failed and begins anew: {reason}", stacklevel=2)
        return answers


if __name__ == "__main__":
    from support import world_check

    sys.exit(world_check.main(sys.argv[1:]))
