"""Worlds: one small interface, the worlds that come with the project, and a runner that steps many of them at once.

A world is a Python module. It has

    SPLITS                                            tuple of names, the training split first
    size(split) -> int                                how many tasks; ValueError for an unknown split
    make(split="train", index=0, **options) -> env    task `index`, the same one every time; IndexError where there is none
    IN_PROCESS = True                                 False where the engine is not thread-safe or leaks: worker processes then

and its envs have Gymnasium's signatures (Gymnasium itself is not needed):

    reset(seed=None) -> (observation, info)
    step(action) -> (observation, reward, terminated, truncated, info)
    close()
    expert(subgoal) -> (switch, subgoal, action) or None      optional: what a demonstrator holding `subgoal` would do now

observation is text. reward is 1.0 on the step that wins, else 0.0; the trainer scales it. terminated means the task itself
ended, truncated that the step limit cut it off. info holds task (str), task_type (str), admissible (list of str), won
(bool), score (float) and, where there is one, gamefile; also subgoals (list of str), where the world can list what a planner
might set out to do now. After the end, step raises RuntimeError until reset is called.

`--env NAME` takes a name of `WORLDS` or of any importable module that has these, so a world of one's own is one file.
"""
import contextlib
import importlib
import os
import pickle
import subprocess
import sys

WORLDS = {"household": "household", "alfworld": "alfworld_env", "webshop": "webshop_env"}       # name -> module


def world(name):
    """The module of world `name`; ValueError, saying what there is, for a name that is neither known nor importable."""
    path, module = WORLDS.get(name, name), None
    try:
        if all(path.split(".")):                                        # not "./world.py", which importlib takes amiss
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise                                                       # the world is there, something it needs is not
    if not all(hasattr(module, needed) for needed in ("make", "size", "SPLITS")):
        raise ValueError(f"no world {name!r}: choose {', '.join(WORLDS)}, or name a module with SPLITS, size and make")
    return module


def make(name, split="train", index=0, **options):
    """Task `index` of `split` in world `name`. ValueError, IndexError or RuntimeError say what is wrong in one sentence."""
    return world(name).make(split, index, **options)


def size(name, split):
    """Number of tasks in `split` of world `name`."""
    return world(name).size(split)


class Runner:
    """Steps many envs of one split together. A slot holds one env at a time; `reset` puts a task into a slot.

    slots: ints, as many as you like. Worlds with IN_PROCESS live here, others in `workers` processes of their own
    (slot s in process s % workers), which answer side by side.
    """

    def __init__(self, name, split="train", workers=0, **options):
        self.name, self.split, self.options, self.envs = name, split, options, {}
        in_process = getattr(world(name), "IN_PROCESS", True)
        self.workers = [] if in_process else [_Worker(name, split, options) for _ in range(workers or os.cpu_count() or 1)]

    def reset(self, tasks):
        """tasks: {slot: task index} -> {slot: (observation, info)}"""
        return self._each("_reset", tasks)

    def step(self, actions):
        """actions: {slot: action} -> {slot: (observation, reward, terminated, truncated, info)}"""
        return self._each("_step", actions)

    def expert(self, subgoals):
        """subgoals: {slot: carried subgoal} -> {slot: (switch, subgoal, action) or None}"""
        return self._each("_expert", subgoals)

    def close(self):
        for env in self.envs.values():
            env.close()
        for worker in self.workers:
            worker.close()
        self.envs, self.workers = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _each(self, method, arguments):
        if not self.workers:
            return {slot: getattr(self, method)(slot, argument) for slot, argument in arguments.items()}
        share = [{s: a for s, a in arguments.items() if s % len(self.workers) == w} for w in range(len(self.workers))]
        busy = [(worker, part) for worker, part in zip(self.workers, share) if part]
        for worker, part in busy:                                       # all start before the first is waited for
            worker.send((method, part))
        parts = [worker.receive() for worker, _ in busy]                # all are read before one is raised: none stays behind
        for part in parts:
            if isinstance(part, Exception):
                raise part
        answers = {slot: answer for part in parts for slot, answer in part.items()}
        return {slot: answers[slot] for slot in arguments}              # the order of the rows must not depend on `workers`

    def _reset(self, slot, index):
        if slot in self.envs:
            self.envs.pop(slot).close()
        self.envs[slot] = make(self.name, self.split, index, **self.options)
        return self.envs[slot].reset()

    def _step(self, slot, action):
        return self.envs[slot].step(action)

    def _expert(self, slot, subgoal):
        return self.envs[slot].expert(subgoal)


class _Worker:
    """A fresh Python that serves one in-process Runner over pipes: nothing of torch or CUDA is forked into it."""

    def __init__(self, *runner):
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        command = [sys.executable, "-c", "import envs; envs._serve()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, "PYTHONPATH": path})
        self.send(runner)

    def send(self, message):
        with contextlib.suppress(OSError):                              # it died: `receive` will say so
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def receive(self):
        """The answer, or the exception in its stead."""
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError(f"an environment process died (exit {self.process.wait()}): its message is above")

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()                                  # `_serve` ends at that
        self.process.stdout.close()
        self.process.wait()


def _serve():
    """A worker's life: read (method, arguments), answer, until the pipe closes. Whatever the engine prints goes to stderr."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    name, split, options = pickle.load(requests)
    runner = Runner.__new__(Runner)
    runner.name, runner.split, runner.options, runner.envs, runner.workers = name, split, options, {}, []
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return runner.close()
        try:
            answer = pickle.dumps(runner._each(method, arguments))
        except Exception as error:                                      # goes back to the caller, in his process
            answer = _pickled(error)
        answers.write(answer)
        answers.flush()


def _pickled(error):
    """The exception as bytes; its words alone where the caller could not rebuild it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pickle.dumps(error)
