"""Checksums of what later runs read again: disks lose bits, people replace files.

A folder has them in a file of its own, a single file behind its content, where those that read it
do not look.
"""

import json
import logging
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llme_jax.files.atomic import atomic_dir, atomic_write, remove

logger = logging.getLogger(__name__)

ABANDONED = 3600  # seconds
_HALF = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")
NAME = "checksums.json"
_SEAL = b"crc32:%08x"  # at the end of a single file
_BLOCK = 1 << 22


def kept(folder: Path, build: Callable[[Path], None]) -> Path:
    """A folder of the cache, which is built when it is not there or not as it was written.

    Args:
        build: makes its content in the folder it is given.
    """
    _sweep(folder.parent)
    if folder.is_dir():
        if (found := damage(folder)) is None:
            return folder
        logger.warning("%s is made again: %s", folder, found)
        away = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        with suppress(FileNotFoundError):  # another process has found it too
            folder.rename(away)
        remove(away)
    with atomic_dir(folder) as beside:
        build(beside)
        seal(beside)
    return folder


def _sweep(folder: Path) -> None:
    """Deletes what killed runs have left half-built: nothing in it has changed for an hour."""
    for path in folder.glob(".*"):
        if not _HALF.fullmatch(path.name):
            continue
        with suppress(OSError):  # another process is faster
            newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > ABANDONED:
                remove(path)


def seal(folder: Path, *patterns: str) -> None:
    """Writes down size and checksum of every file in a folder, or of those of some patterns."""
    below = {path for pattern in patterns or ["**/*"] for path in folder.glob(pattern)}
    files = sorted(path for path in below if path.is_file() and path.name != NAME)
    sums = {str(p.relative_to(folder)): [p.stat().st_size, _crc(p)] for p in files}
    with atomic_write(folder / NAME) as beside:
        beside.write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def damage(folder: Path, below: str = "") -> str | None:
    """What is not as it was sealed, in the folder or in one below it; None when all is."""
    try:
        sums = json.loads((folder / NAME).read_text(encoding="utf-8"))
        for name, (size, crc) in sums.items():
            if not name.startswith(below):
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _crc(path) != crc:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"it has no {NAME}"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"its {NAME} cannot be read"
    return None


def seal_file(path: Path) -> None:
    """Appends its checksum to a file of a format that is read from the front."""
    seal = _SEAL % _crc(path)
    with path.open("ab") as file:
        file.write(seal)


def is_sealed(path: Path) -> bool:
    """Whether a file is as it was when `seal_file` had it."""
    length = len(_SEAL % 0)
    size = path.stat().st_size - length
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        end = file.read()
    return end == _SEAL % _crc(path, size)


def _crc(path: Path, size: int | None = None) -> int:
    """Of the first `size` bytes of a file, or of all."""
    left, crc = os.path.getsize(path) if size is None else size, 0
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return crc
