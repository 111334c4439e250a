"""The commit of this code, as runs and benchmarks record it."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def checked_out_commit():
    """Its 40 digits; with `-dirty-` and a digest of the differences where tracked files differ.

    None outside a git repository.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        differences = _git("diff", "--no-ext-diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    digest = hashlib.sha256(differences).hexdigest()[:8]
    return f"{commit}-dirty-{digest}" if differences else commit


def _git(*words):
    command = ["git", "--no-optional-locks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=20).stdout


def short(commit):
    """The commit in ten digits, with its `-dirty`."""
    return commit[:10] + commit[40:]
