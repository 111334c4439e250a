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
might set out to do now, progress (float, 0 to 1) for --checklist and page (str, what was seen so far) for --page. After the end, step
raises RuntimeError until reset is called. A module's `disguise(episodes, rng)` renames what is in demonstrations (--disguises).

`--env NAME` takes a name of `WORLDS` or of any importable module that has these, so a world of one's own is one file.
"""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings

WORLDS = {name: f"worlds.{name}" for name in ("household", "alfworld", "webshop")}  # name -> module
LIMIT = 120.0  # seconds that a worker process may take over one answer before it is killed


def world(name):
    """The module of world `name`; ValueError, saying what there is, for a name that is neither known nor importable."""
    path, module = WORLDS.get(name, name), None
    try:
        if all(path.split(".")):  # not "./world.py", which importlib takes amiss
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the world is there, something it needs is not
    if not all(hasattr(module, needed) for needed in ("make", "size", "SPLITS")):
        raise ValueError(
            f"no world {name!r}: choose {', '.join(WORLDS)}, or name a module with SPLITS, size and make"
        )
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

    A process that dies, or takes longer than LIMIT over an answer, is replaced and its episodes are lost: until their slots are
    reset, `step` says so (see `_lost`) and `expert` says None.
    """

    def __init__(self, name, split="train", workers=0, **options):
        self.name, self.split, self.options, self.envs = name, split, options, {}
        in_process = getattr(world(name), "IN_PROCESS", True)
        self.workers = (
            []
            if in_process
            else [_Worker(name, split, options) for _ in range(workers or os.cpu_count() or 1)]
        )
        self.homes = {}  # slot -> the worker, alive or not, that holds its env

    def reset(self, tasks):
        """tasks: {slot: task index} -> {slot: (observation, info)}; RuntimeError for a task at which two processes were lost"""
        answers, culprits = self._each("_reset", tasks), set()
        while left := {slot: index for slot, index in tasks.items() if slot not in answers}:
            for slot, index in left.items():
                if self.homes[slot].culprit == slot:
                    if slot in culprits:
                        raise RuntimeError(self.twice(index, self.homes[slot].why))
                    culprits.add(slot)
            answers.update(self._each("_reset", left))
        return {slot: answers[slot] for slot in tasks}

    def step(self, actions):
        """actions: {slot: action} -> {slot: (observation, reward, terminated, truncated, info)}"""
        answers = self._each("_step", actions)
        return {slot: answers[slot] if slot in answers else self._lost(slot) for slot in actions}

    def expert(self, subgoals):
        """subgoals: {slot: carried subgoal} -> {slot: (switch, subgoal, action) or None}"""
        answers = self._each("_expert", subgoals)
        return {slot: answers.get(slot) for slot in subgoals}

    def twice(self, index, why):
        """The sentence for a task that ended two processes."""
        return f"task {index} of {self.name}'s split {self.split!r} failed twice: its environment process {why}"

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
        """{slot: answer} without the lost slots, in the order of `arguments`, which must not depend on the number of workers."""
        if not self.workers:
            return {
                slot: getattr(self, method)(slot, argument) for slot, argument in arguments.items()
            }
        shares = {worker: {} for worker in self.workers}
        for slot, argument in arguments.items():
            worker = self.workers[slot % len(self.workers)]
            if method == "_reset":
                self.homes[slot] = worker
            if self.homes.setdefault(slot, worker) is worker:
                shares[worker][slot] = argument
        for worker, share in shares.items():  # all start before the first is waited for
            worker.send(method, share)
        answers = {}
        for worker, share in shares.items():  # all are read before one is raised: none stays behind
            answers.update(worker.receive(share))
        for place, worker in enumerate(self.workers):
            if worker.why:
                warnings.warn(
                    f"an environment process of {self.name} {worker.why}; its episodes are lost, another process takes over"
                )
                self.workers[place] = _Worker(self.name, self.split, self.options)
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return {slot: answers[slot] for slot in arguments if slot in answers}

    def _lost(self, slot):
        """The outcome of a step that no process answers: a truncated episode of which nothing is known. Its info has `lost`, what
        became of the process, and `culprit`: whether that happened over this slot, not over another one of the same process."""
        worker = self.homes[slot]
        info = {
            "task": "",
            "task_type": "",
            "admissible": [],
            "won": False,
            "score": 0.0,
            "progress": 0.0,
            "page": "",
        }
        return "", 0.0, False, True, {**info, "lost": worker.why, "culprit": worker.culprit == slot}

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
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.why = self.culprit = None  # once it is lost: what happened, over which slot
        self._write(runner)

    def send(self, method, share):
        """Ask for every slot of `share`, {slot: argument}; nothing if there is none."""
        if share:
            self._write((method, share))

    def receive(self, share):
        """{slot: answer, or the exception in its stead}; only the first ones where the process is lost over the next."""
        answers = {}
        for slot in share:
            start = time.monotonic()
            try:
                with self._limit():
                    answers[slot] = pickle.load(self.process.stdout)
            except (EOFError, pickle.UnpicklingError):
                late = time.monotonic() - start >= LIMIT
                self.close()
                self.culprit = slot
                self.why = (
                    f"did not answer within {LIMIT:g} s"
                    if late
                    else f"died (exit {self.process.returncode})"
                )
                break
        return answers

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # `_serve` ends at that
        self.process.stdout.close()
        with self._limit():
            self.process.wait()

    def _write(self, message):
        with contextlib.suppress(OSError), self._limit():  # it died: `receive` will notice
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    @contextlib.contextmanager
    def _limit(self):
        """Kills the process LIMIT seconds after the start of the block, which then ends too, for all its pipes are closed."""
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _serve():
    """A worker's life: read (method, {slot: argument}), answer slot by slot, until the pipe closes. What the engine prints goes to
    stderr."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    name, split, options = pickle.load(requests)
    runner = Runner.__new__(Runner)
    runner.name, runner.split, runner.options, runner.envs, runner.workers = (
        name,
        split,
        options,
        {},
        [],
    )
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return runner.close()
        for slot, argument in arguments.items():
            try:
                answer = pickle.dumps(getattr(runner, method)(slot, argument))
            except Exception as error:  # goes back to the caller, in his process
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
