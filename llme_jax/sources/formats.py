"""Data files in other formats than JSON lines become that, once, in the cache."""

import errno
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write, digest_file

BLOCK = 1 << 22  # bytes unpacked, or downloaded, at a time
# How their files begin.
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
TABLES = {b"PAR1": "parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
UNREAD = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x89HDF": "HDF5"}


def format_of(path: str | Path) -> str | None:
    """Of a file that is no text, what it is; None where there is no such file."""
    if not os.path.isfile(path):  # a pipe would wait for ever
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:  # said by those who need the file
        return None
    known = PACKED | TABLES | UNREAD
    return next((kind for magic, kind in known.items() if start.startswith(magic)), None)


def as_lines(path: str, sources: Path) -> str:
    """The path of the same rows as JSON lines: the path itself, else a file below `sources`.

    Raises:
        InputError: the file is of a format that is not read, is damaged, or takes a package that
            is not installed.
    """
    kind = format_of(path)
    if kind is None:
        return path
    if kind in UNREAD.values():
        raise InputError(f"{path}: is a {kind} file; unpack it, and give JSON lines")
    key = digest_file(path)[:12]
    name, suffix = os.path.splitext(os.path.basename(path))
    if kind in TABLES.values() or suffix not in (".gz", ".zst"):
        name = f"{name}.json"
    file = sources / key / Path(path).absolute().parent.name / name
    if not file.is_file():
        try:
            if kind in TABLES.values():
                _write_rows(path, kind, file)
            else:
                _unpack(path, file, _gzip if kind == "gzip" else _zstd)
        except InputError:  # a package is missing
            raise
        except (EOFError, ValueError, OSError, zlib.error) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # it is not the file that cannot be read
            raise InputError(f"{path}: this {kind} file cannot be read ({error}); fetch it "
                             "again") from error  # fmt: skip
    return str(file)


def _unpack(path: str, file: Path, blocks: Callable[[BinaryIO], Iterator[bytes]]) -> None:
    with (
        open(path, "rb") as packed,
        tqdm(
            total=os.path.getsize(path),
            desc=f"Unpacking {os.path.basename(path)}",
            unit="B",
            unit_scale=True,
        ) as bar,
        atomic_write(file) as beside,
        beside.open("wb") as out,
    ):
        for block in blocks(packed):
            out.write(block)
            bar.update(packed.tell() - bar.n)


def _gzip(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.open(packed) as source:
        while block := source.read(BLOCK):
            yield block


def _zstd(packed: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{packed.name}: reading zstd takes zstandard: pip install 'llme_jax[formats]'"
        ) from None
    frame = None
    while part := packed.read(BLOCK):
        while part:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(part)
            except zstandard.ZstdError as error:
                raise ValueError(error) from None
            part = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends too early")


def _write_rows(path: str, kind: str, file: Path) -> None:
    rows = tqdm(_rows(path, kind), desc=f"Reading {os.path.basename(path)}", unit=" rows")
    with atomic_write(file) as beside, beside.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(line_of(row, path) + "\n")


def line_of(row: dict, name: str) -> str:
    """A row of a table as JSON: bytes are text, times as in ISO 8601.

    Args:
        name: of the table, for messages.

    Raises:
        InputError: the row has bytes that are no text, or what JSON knows no form of.
    """

    def plain(value):
        if isinstance(value, bytes):
            return value.decode()
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise ValueError(type(value).__name__)

    try:
        return json.dumps(row, ensure_ascii=False, default=plain)
    except ValueError as error:
        raise InputError(
            f"{name}: has a value that is no text, number or list of such ({error}); remove its "
            "column"
        ) from None


def _rows(path: str, kind: str) -> Iterator[dict]:
    """The rows of a table, see TABLES; fields that are null are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: reading {kind} takes pyarrow: pip install 'llme_jax[formats]'"
        ) from None
    if kind == "parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    elif kind == "Arrow":
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(path))
    for batch in batches:
        for row in batch.to_pylist():
            yield {name: value for name, value in row.items() if value is not None}
