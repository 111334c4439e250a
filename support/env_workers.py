"""Where an EnvPool's environments live: in this process, or in processes of their own.

The latter is for engines that are not thread-safe, leak or hang. Each process is a fresh Python
that answers over pipes; nothing of torch or CUDA is forked into it. A process that dies, or needs
longer than LIMIT for an answer, is replaced.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

from support.metrics import printable
from support.world_guard import describe
from support.world_lookup import world

LIMIT = 120.0  # seconds for one answer, after which the process is killed


class LocalEnvs:
    """Environments in this process: slot -> env. `call` has the signature of `WorkerEnvs.call`.

    A world that waits for servers says THREADS: so many of its environments are asked at once. Its
    envs raise ConnectionError where a server is gone.
    """

    def __init__(self, module, split, options):
        self.world = world(module)
        self.split, self.options = split, options
        self.envs = {}
        count = getattr(self.world, "THREADS", 0)
        self.threads = ThreadPoolExecutor(count) if count else None

    def call(self, method, arguments):
        """method: reset, step or expert; {slot: argument} -> ({slot: answer}, {slot: reason}).

        In the place of an answer is the exception that the world raised. Without an answer are the
        slots that lost their server; the first of them is named with the reason.
        """

        def attempt(slot):
            return slot, self.attempt(method, slot, arguments[slot])

        answers = dict((self.threads.map if self.threads else map)(attempt, arguments))
        lost = [slot for slot, answer in answers.items() if isinstance(answer, ConnectionError)]
        losses = {}
        if lost:
            said = " ".join(str(answers[lost[0]]).split())
            reason = f"lost its server ({printable(said)})"
            losses[lost[0]] = reason
            warnings.warn(
                f"an environment of {self.world.__name__} {reason}; {len(lost)} of "
                f"{len(arguments)} episodes begin anew",
                stacklevel=2,
            )
        return {slot: answer for slot, answer in answers.items() if slot not in lost}, losses

    def attempt(self, method, slot, argument):
        try:
            return self.answer(method, slot, argument)
        except (Exception, SystemExit) as error:
            error.described = describe(error)  # the place in the source is not pickled
            return error

    def answer(self, method, slot, argument):
        if method == "reset":
            if slot in self.envs:
                with contextlib.suppress(Exception):
                    self.envs.pop(slot).close()
            self.envs[slot] = self.world.make(self.split, argument, **self.options)
            return self.envs[slot].reset()
        return getattr(self.envs[slot], method)(argument)

    def close(self):
        for env in self.envs.values():
            with contextlib.suppress(Exception):
                env.close()
        self.envs = {}
        if self.threads:
            self.threads.shutdown()


class WorkerEnvs:
    """slot -> an environment in process `slot % workers`; the processes answer side by side."""

    def __init__(self, module, split, options, workers=0):
        self.arguments = (module, split, options)
        self.workers = [Worker(*self.arguments) for _ in range(workers or usable_cores())]
        self.homes = {}  # slot -> the worker, alive or not, that holds its environment

    def call(self, method, arguments):
        """method: reset, step or expert; {slot: argument} -> ({slot: answer}, {slot: reason}).

        In the place of an answer may be the exception that the world raised. Without an answer are
        the slots of lost processes. The second value names the slots at
        which a process was lost, and what became of it. The order of the answers does not depend
        on the number of processes.
        """
        shares = self._shares(method, arguments)
        for worker, share in shares.items():  # all start before the first is waited for
            worker.send(method, share)
        answers = {}
        for worker, share in shares.items():
            answers.update(worker.receive(share))
        losses = self._replace_lost()
        return {slot: answers[slot] for slot in arguments if slot in answers}, losses

    def close(self):
        for worker in self.workers:
            worker.close()
        self.workers = []

    def _shares(self, method, arguments):
        """{worker: {slot: argument}}; a slot whose worker was lost waits for its reset."""
        shares = {worker: {} for worker in self.workers}
        for slot, argument in arguments.items():
            worker = self.workers[slot % len(self.workers)]
            if method == "reset":
                self.homes[slot] = worker
            if self.homes.setdefault(slot, worker) is worker:
                shares[worker][slot] = argument
        return shares

    def _replace_lost(self):
        """A new process for each lost one -> {slot at which it was lost: reason}."""
        losses = {}
        for place, worker in enumerate(self.workers):
            if worker.reason:
                losses[worker.lost_at] = worker.reason
                warnings.warn(
                    f"an environment process of {self.arguments[0]} {worker.reason}; its "
                    "episodes are lost, another process takes over",
                    stacklevel=2,
                )
                self.workers[place] = Worker(*self.arguments)
        return losses


def usable_cores():
    """Of this machine's cores, the share of each of the run's processes on it; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Worker:
    """One process with a LocalEnvs in it."""

    def __init__(self, *arguments):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from support.env_workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.reason = None  # once it is lost: what happened, and at which slot
        self.lost_at = None
        self._write(arguments)

    def send(self, method, share):
        """Ask for each slot of `share`, {slot: argument}; nothing where it is empty."""
        if share:
            self._write((method, share))

    def receive(self, share):
        """{slot: answer, or the exception in its place}; incomplete where the process is lost."""
        answers = {}
        for slot in share:
            start = time.monotonic()
            try:
                with self._time_limit():
                    answers[slot] = pickle.load(self.process.stdout)
            except (EOFError, pickle.UnpicklingError):
                late = time.monotonic() - start >= LIMIT
                self.close()
                self.lost_at = slot
                self.reason = f"died (exit {self.process.returncode})"
                if late:
                    self.reason = f"did not answer within {LIMIT:g} s"
                break
        return answers

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # `serve` ends at that
        self.process.stdout.close()
        with self._time_limit():
            self.process.wait()

    def _write(self, message):
        with contextlib.suppress(OSError), self._time_limit():  # it died: `receive` will notice
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    @contextlib.contextmanager
    def _time_limit(self):
        """Kills the process after LIMIT seconds. The block then ends, since its pipes close."""
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def serve():
    """A worker's loop: read (method, {slot: argument}), answer slot by slot, until the pipe ends.

    What the engine prints goes to stderr. The signals that ask a run to stop (support/stopping.py)
    are the trainer's: an iteration that is to end needs its environments.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    local = LocalEnvs(*pickle.load(requests))
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return local.close()
        for slot, argument in arguments.items():
            answers.write(_pickled(local.attempt(method, slot, argument)))
            answers.flush()


def _pickled(answer):
    """The answer as bytes; a RuntimeError where it cannot be rebuilt from them."""
    try:
        raw = pickle.dumps(answer)
        if isinstance(answer, BaseException):
            pickle.loads(raw)  # the errors of some packages fail here
        return raw
    except Exception as error:
        failed = answer if isinstance(answer, BaseException) else error
        lost = RuntimeError(f"{type(failed).__name__}: {failed}")
        lost.described = getattr(failed, "described", str(lost))
        return pickle.dumps(lost)
