"""The folder of a run, on a disk or in a bucket.

In a bucket (`gs://`) nothing can be renamed, linked or appended to, and an object is there as a
whole or not at all. What the two have in common is `pathlib`'s interface, which `etils.epath` gives
to both.
"""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

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


def upload(folder: Path, target: Path) -> None:
    """Copies a local folder into one of a bucket, and marks that as complete."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    (target / MARKER).write_text("")


def temporary_folder() -> TemporaryDirectory:
    """For what is written here before it goes to a bucket."""
    return TemporaryDirectory(prefix="llme_jax-")
