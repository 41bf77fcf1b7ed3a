"""Arrays on disk: columns that grow, files and folders that appear only when complete."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llme_jax.files.storage import in_bucket, temporary_folder, writing

BUFFERED = 1 << 16  # values kept as Python numbers until they are written together


class ArrayWriter:
    """A one-dimensional `.npy` file that grows; memory stays constant.

    numpy pads the header so that it can be rewritten in place with the final length.
    """

    def __init__(self, path: Path, dtype):
        self._dtype = np.dtype(dtype)
        self._pending: list = []
        self._written = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._write_header()

    def __len__(self) -> int:
        return self._written + len(self._pending)

    def append(self, value) -> None:
        self.extend((value,))

    def extend(self, values) -> None:
        self._pending.extend(values)
        if len(self._pending) >= BUFFERED:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _flush(self) -> None:
        self._file.write(np.array(self._pending, self._dtype).tobytes())
        self._written += len(self._pending)
        self._pending = []

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._written,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes the name `folder` on success and vanishes on an error.

    What a killed process leaves behind has another name and is never read. When two processes
    build the same folder, the first one to finish wins.
    """
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(folder):
        beside.mkdir(parents=True)
    try:
        yield beside
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def published_file(path: Path) -> Iterator[Path]:
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
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(*parts) -> str:
    """A short name for a combination of settings and contents, for use in cache paths."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
