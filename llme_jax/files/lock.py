"""One process at a time in a folder, and no child that outlives the one that started it."""

import ctypes
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llme_jax.errors import InputError
from llme_jax.files.storage import writing

WAIT = 60  # seconds that a child of a killed process has to save and leave
PR_SET_PDEATHSIG = 1  # of Linux' prctl


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[int]:
    """Holds the folder's lock; its file descriptor, which children inherit, holds it as well.

    Args:
        shared: to read what is there, beside others that do.

    Raises:
        InputError: another process holds it; names the process.
    """
    file, end, said = _opened(folder), time.monotonic() + WAIT, False
    try:
        while not _taken(file, shared) or not _is_there(file, folder):
            file.seek(0)
            owner = file.read().strip()
            if not _is_there(file, folder):  # who held it has deleted the folder
                file.close()
                file = _opened(folder)
                continue
            if _alive(owner) or time.monotonic() > end:
                raise InputError(
                    f"{folder}: another run is at work there (process {owner or 'unknown'}): wait "
                    "for it, or give another --output_dir"
                )
            if not said:
                print("waiting for what a stopped run has left running", file=sys.stderr)
                said = True
            time.sleep(0.2)
        if not shared:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield file.fileno()
    finally:
        file.close()


def _opened(folder: Path) -> TextIO:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("a+")


def _taken(file, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network disks have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def _is_there(file: TextIO, folder: Path) -> bool:
    """Whether an open lock is still the folder's."""
    try:
        return os.fstat(file.fileno()).st_ino == os.stat(folder / ".lock").st_ino
    except FileNotFoundError:
        return False


def _alive(owner: str) -> bool:
    try:
        os.kill(int(owner), 0)
    except PermissionError:
        return True
    except (ValueError, ProcessLookupError):
        return False
    return True


def end_with_parent(parent: int) -> None:
    """In a child, before it becomes its program: SIGTERM comes when its parent is gone.

    Where there is no prctl (macOS) a killed parent leaves the child running; the lock that it
    holds keeps others out until it is done.

    Args:
        parent: its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before
            os._exit(128 + signal.SIGTERM)
