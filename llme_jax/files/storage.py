"""Where results go: the folder of a run, on a disk or in a bucket; what can be written to.

In a bucket (`gs://`) nothing can be renamed, linked or appended to, and an object is there as a
whole or not at all. What the two have in common is `pathlib`'s interface, which `etils.epath` gives
to both.
"""

import importlib.util
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from llme_jax.errors import InputError

MARKER = "complete"  # object that is written last


def in_bucket(path) -> bool:
    return "://" in str(path)


def open_folder(path: str) -> Path:
    """A folder as something with the interface of `pathlib.Path`.

    Raises:
        InputError: the package that reads the bucket is not installed, or none is known.
    """
    if not in_bucket(path):
        return Path(path).expanduser()
    if not path.startswith("gs://"):
        raise InputError(f"--output_dir {path}: give a folder, or gs://bucket/folder")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"--output_dir {path}: pip install 'llme_jax[gcs]', which reads gs://")
    from etils import epath

    return epath.Path(path)


def result_path(folder: Path, eval_data: Path, kind: str, save_name: str | None) -> Path:
    """`{folder}/{eval_data's stem}.{kind}[.{save_name}].json`"""
    parts = [eval_data.stem, kind, save_name, "json"]
    return folder.expanduser() / ".".join(part for part in parts if part)


@contextmanager
def one_sentence(name: str | Path) -> Iterator[None]:
    """Whatever a file system raises becomes an InputError; each has errors of its own."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file") from None
    except Exception as error:
        raise InputError(
            f"{name}: cannot be reached, {type(error).__name__}: {error}; are name, network and "
            "credentials right?"
        ) from error


def check_writable(
    flag: str, path: str | Path, *, is_file: bool = False, remedy: str = "give another path"
) -> None:
    """Finds out before any long work whether something can be written; leaves nothing behind.

    A local folder need not be there: the nearest one above it is tried, in which it would be made.

    Args:
        flag: what named the path.
        path: a folder, on a disk or in a bucket; or a local file that is replaced as a whole.

    Raises:
        InputError: it cannot.
    """
    if in_bucket(path):
        _check_bucket(flag, path)
        return
    target = folder = Path(path).expanduser().absolute()
    if is_file:
        if os.path.isdir(folder):
            raise InputError(f"{flag} {path}: is a folder, give a file")
        if os.path.exists(folder) and not os.path.isfile(folder):  # it would be replaced
            raise InputError(f"{flag} {path}: is a device or a pipe, give a file")
        folder = folder.parent
    there = next(f for f in (folder, *folder.parents) if os.path.lexists(f))
    if not os.path.isdir(there):
        raise InputError(f"{flag} {path}: {there} is no folder, {remedy}")
    try:  # permissions alone say little: of root, of read-only disks, of /proc
        with TemporaryFile(dir=there), suppress(FileNotFoundError):
            os.lstat(target)  # refuses names that are too long
    except OSError as error:
        raise InputError(
            f"{flag} {path}: nothing can be written in {there} ({error.strerror}): {remedy}"
        ) from None


def _check_bucket(flag: str, folder: Path) -> None:
    probe = folder / f".writable-{uuid.uuid4().hex[:8]}"
    with one_sentence(f"{flag} {folder}"):
        try:
            probe.write_text("")
        except FileNotFoundError:
            raise InputError(f"{flag} {folder}: there is no such bucket") from None
        probe.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a disk refuses while something is made there becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}): change its folder, or give another one"
        ) from error


def upload(folder: Path, target: Path) -> None:
    """Copies a local folder into one of a bucket, and marks that as complete."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    (target / MARKER).write_text("")


def temporary_folder() -> TemporaryDirectory:
    """For what is written here before it goes to a bucket."""
    return TemporaryDirectory(prefix="llme_jax-")
