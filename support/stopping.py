"""A run that is asked to stop: SIGTERM, or Ctrl-C.

During an iteration the first signal lets it end; then the run saves and ends. At another time (in
cloning, in an evaluation) it ends the run at once, with the last checkpoint as it is. The second
signal always does. The exit code is the shell's: 143 for SIGTERM, 130 for Ctrl-C.
"""

import os
import signal
import sys
import threading

from accelerate.utils import gather_object

from support.distributed import leave

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run ends here because it was asked to; the text says how it goes on.

    No Exception, so that nothing takes it for an error of its own.
    """

    def __init__(self, number, text):
        super().__init__(text)
        self.code = 128 + number


class Stopping:
    """Receives the signals inside its `with` block, on every process.

    out: the run's folder; accelerator: its processes.
    """

    def __init__(self, out, accelerator):
        self.out = out
        self.accelerator = accelerator
        self.number = 0  # of the signal that came
        self.waits = False  # whether an iteration is to end first
        self.before = {}  # signal -> the handler that was there

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def whole(self, iterations):
        """The iterations; during each of them the first signal waits for its end."""
        self.waits = True
        try:
            yield from iterations
        finally:
            self.waits = False

    def asked(self):
        """A Stopped to raise once the run is saved, or None. All processes agree."""
        number = max(gather_object([self.number]))
        if not number:
            return None
        return Stopped(number, "stopped: the same command goes on from here")

    def _receive(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        if not self.waits:
            raise Stopped(number, self._what_is_left())
        if self.accelerator.is_main_process:
            text = "\nstopping after this iteration; the next signal stops at once\n"
            os.write(2, text.encode())  # print may be what was interrupted

    def _what_is_left(self):
        if (self.out / "checkpoint").exists():
            return "stopped: the same command goes on from the last checkpoint"
        if (self.out / "start").exists():
            return "stopped: the same command begins again, with the same clone"
        return "stopped before anything was saved: the same command begins again, cloning included"


def end_stopped(stopped, accelerator):
    """Say how the run goes on, and end the process with the signal's exit code."""
    if accelerator.is_main_process:
        print(stopped, file=sys.stderr)
    for tracker in accelerator.trackers:
        tracker.finish()
    if accelerator.num_processes == 1:
        sys.exit(stopped.code)
    leave(stopped.code)  # the others may be anywhere
