"""Arrays on disk: those that grow, those that an earlier run left."""

from pathlib import Path

import numpy as np

from llme_jax.files.atomic import atomic_write
from llme_jax.files.checksums import is_sealed, seal_file

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


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array that `left_before` reads; it is there as a whole or not at all."""
    with atomic_write(path) as beside:
        with beside.open("wb") as file:
            np.save(file, array)
        seal_file(beside)


def left_before(path: Path, rows: int, dims: int, **how) -> np.ndarray | None:
    """What an earlier run left: float32 of so many rows and dimensions; None where it is damaged.

    Args:
        how: to open it, as in `numpy.load`.
    """
    try:
        if not is_sealed(path):
            return None
        array = np.load(path, allow_pickle=False, **how)
    except (OSError, ValueError, EOFError):
        return None
    fits = array.ndim == dims and len(array) == rows and array.dtype == np.float32
    return array if fits else None
