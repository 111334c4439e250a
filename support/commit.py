"""The commit of this code, as runs and benchmarks record it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = "git --no-optional-locks describe --always --dirty --abbrev=40 --exclude=*"


def checked_out_commit():
    """Its 40 digits, with `-dirty` where tracked files differ; None outside a git repository."""
    if not (ROOT / ".git").exists():
        return None
    try:
        return subprocess.run(
            COMMAND.split(), cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def short(commit):
    """The commit in ten digits, with its `-dirty`."""
    return commit[:10] + commit[40:]
