"""Files and folders that appear under their names only when they are whole; digests."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

from llme_jax.files.storage import in_bucket, temporary_folder, writing


@contextmanager
def atomic_dir(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write in that takes the name `folder` on success and vanishes on an error.

    What a killed process leaves behind has another name and is never read. When two processes
    build the same folder, the first one to finish wins.

    Args:
        replace: a folder that is there gives way to the new one.
    """
    beside, old = (
        folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("tmp", "old")
    )
    with writing(folder):
        beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.rglob("*"):
            _to_disk(path)
        if replace and folder.exists():
            folder.rename(old)
        try:
            beside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            if replace or not folder.is_dir():
                raise
        _to_disk(folder.parent)
    finally:
        for leftover in (beside, old):
            remove(leftover)


def _to_disk(path: Path) -> None:
    """A name must not outlive a crash of the machine that its content does not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a disk that cannot
            raise
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Deletes a folder that may be there; of a link the link alone, not what it points to."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The same for a file: a path beside it to write to, which replaces what was there before.

    Several processes, also on several hosts, may write the same file; the last one wins. A file of
    a bucket is written in a local folder, then put there.
    """
    if in_bucket(path):
        with temporary_folder() as folder:
            beside = Path(folder) / path.name
            yield beside
            path.write_bytes(beside.read_bytes())
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
    try:
        yield beside
        _to_disk(beside)
        os.replace(beside, path)
        _to_disk(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """`atomic_write` as an open text file."""
    with atomic_write(path) as beside, beside.open("w", encoding="utf-8") as file:
        yield file


def digest(*parts) -> str:
    """A short name for a combination of settings and contents, for use in cache paths."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def digest_file(path: str | os.PathLike) -> str:
    """Names a file's content.

    A file is read once in a process while it stays as it is: a copy can keep size and time of
    change, but not inode and time of status.
    """
    stat = os.stat(path)
    state = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return _digest_of(os.path.realpath(path), state)


@lru_cache(1 << 16)
def _digest_of(path: str, state: tuple[int, ...]) -> str:
    content = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()


def digest_folder(folder: Path) -> str:
    """Names the content of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([(str(path.relative_to(folder)), digest_file(path)) for path in files])
