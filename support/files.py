"""Files that survive a crash: complete and on the disk before they take their predecessor's place;
and what is said where a disk is full or read-only."""

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import tempfile

from safetensors import SafetensorError

from config import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
PROBE = 2**20  # bytes that are written to find out whether a disk is full


def write_whole(path, text):
    """Replace a text file as a whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def swap_in(new, place):
    """Put the folder `new`, synced, in place of the folder `place`.

    What cannot be removed (on NFS, while a file in it is open) stays beside it as NAME.stale-N,
    until a later `remove_stale` can.
    """
    sync_tree(new)
    free = make_way(place)
    new.rename(place)
    sync(place.parent)
    if free:
        shutil.rmtree(free, ignore_errors=True)


def make_way(place):
    """Move the folder `place`, if there is one, to a free name beside it -> the name or None."""
    if not place.exists():
        return None
    names = (place.with_name(f"{place.name}.stale-{n}") for n in itertools.count())
    free = next(name for name in names if not name.exists())
    place.rename(free)
    return free


def remove_stale(folder):
    """Remove what earlier calls of `swap_in` had to leave in the folder, as far as that works."""
    for stale in folder.glob("*.stale-*"):
        shutil.rmtree(stale, ignore_errors=True)


def sync_tree(folder):
    """Wait until a folder and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path):
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path):
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


# ---- full disks --------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(folder):
    """ConfigError, one sentence, where the block fails because a disk is full or read-only."""
    try:
        yield
    except Exception as error:
        problem = disk_problem(error, folder)
        if problem is None:
            raise
        raise ConfigError(
            f"{problem}, then give the same command again; it goes on from the last checkpoint"
        ) from None


def disk_problem(error, folder):
    """What is wrong with the disk, if that is why `error` came; else None.

    torch, safetensors and tokenizers have errors of their own where a disk is full. torch's does
    not say so: it counts where the disk of `folder` has no room left.
    """
    where = getattr(error, "filename", None) or folder
    number = getattr(error, "errno", None)
    full = number in FULL or "No space left on device" in str(error)
    if not full and isinstance(error, RuntimeError | SafetensorError):
        full = not has_room(folder)
    if full:
        return f"cannot write to {where}, the disk is full: make room"
    inside = str(where).startswith(str(folder))  # a file elsewhere may be one that is read
    if number == errno.EROFS or number in CLOSED and inside:
        return f"cannot write to {where} ({error.strerror}): make it writable"
    return None


def has_room(folder):
    """Whether a small file can still be written to the folder's disk."""
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else ".") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in FULL
    return True
