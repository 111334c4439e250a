"""A run with tiny settings, watched from outside (Linux): its memory, open files, processes.

    python tests/soak.py MINUTES FOLDER [--flag value ...]      flags of train.py

The run saves in each iteration. At the end it is asked to stop (SIGTERM). What is printed: the
slope of its memory after its first third, open files, and what it leaves behind.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "iterations": 100_000,
    "episodes": 4,
    "num_envs": 4,
    "bc_episodes": 30,
    "eval_episodes": 4,
    "max_new_tokens": 24,
    "save_every": 1,
}
NAMES = ("memory", "files", "threads", "processes")  # of a measurement
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20  # MB


def soak(minutes, out, words):
    """-> (measurements, five a second from the first iteration on, exit code, processes left)"""
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    log = open(out.with_suffix(".txt"), "w")
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *flags, *words]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    rows = []
    end = None
    while process.poll() is None:
        time.sleep(0.2)
        if iterations := count_lines(out / "metrics.jsonl"):
            end = end or time.monotonic() + 60 * minutes
            with contextlib.suppress(OSError):  # it has just ended
                rows.append({"iteration": iterations, **measure(process.pid)})
        if end and time.monotonic() > end:
            process.send_signal(signal.SIGTERM)
            process.wait()
    time.sleep(2)
    return rows, process.returncode, session(process.pid)


def count_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def measure(pid):
    """Resident memory in MB, open files and threads of a process; processes of its session."""
    folder = Path("/proc") / str(pid)
    return {
        "memory": int((folder / "statm").read_text().split()[1]) * PAGE,
        "files": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
        "processes": len(session(pid)),
    }


def session(leader):
    """The processes that the leader of a session has started, and itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader:
            found.append(int(path.parent.name))
    return found


def summarize(rows, code, left):
    """What goes up and down within an iteration (a save opens files): its lowest value counts.

    The first third of the run opens what the run needs, and after its last iteration it closes
    that: the second third is held against the last one.
    """
    iterations = rows[-1]["iteration"]
    rows = [row for row in rows if row["iteration"] < iterations]
    thirds = [rows[n * len(rows) // 3 : (n + 1) * len(rows) // 3] for n in range(3)]
    low = {name: [min(row[name] for row in third) for third in thirds] for name in NAMES}
    memory = low["memory"]
    return {
        "iterations": iterations,
        "lowest_memory_mb": [round(value, 1) for value in memory],
        "mb_per_100_iterations": round(300 * (memory[2] - memory[1]) / iterations, 2),
        **{name: low[name][1:] for name in NAMES[1:]},
        "exit_code": code,
        "processes_left": len(left),
    }


if __name__ == "__main__":
    measured = soak(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    Path(sys.argv[2]).with_suffix(".json").write_text(json.dumps(measured[0]))
    print(json.dumps(summarize(*measured)))
