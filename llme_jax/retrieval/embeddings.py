"""Embeddings on disk: shards that are finished one by one, so that a killed run continues."""

import json
import logging
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llme_jax.data.arrays import left_before, save_array
from llme_jax.data.tokens import TokenStore
from llme_jax.devices.agree import each_has, from_process
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write, digest, remove
from llme_jax.files.lock import locked

logger = logging.getLogger(__name__)

SHARD = 1 << 17  # texts; 400 MB at 768 numbers each


class Embeddings:
    """float32[n, D] in shards, memory-mapped; what `index.search` reads."""

    def __init__(self, shards: list[np.ndarray]):
        self._shards = shards
        self._ends = list(accumulate(len(shard) for shard in shards))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._shards[0].shape[1]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Of neighbouring rows, or of those with these numbers, in any order."""
        if not isinstance(rows, slice):
            return self._taken(rows)
        start, stop, _ = rows.indices(len(self))
        parts = [self._shards[0][:0]]
        i = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[i - 1] if i else 0
            parts.append(self._shards[i][start - first : stop - first])
            start, i = self._ends[i], i + 1
        return parts[-1] if len(parts) <= 2 else np.concatenate(parts)  # one shard: no copy

    def _taken(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((*rows.shape, self.shape[1]), np.float32)
        of_row = np.searchsorted(self._ends, rows, side="right")
        for i in np.unique(of_row):
            here = of_row == i
            out[here] = self._shards[i][rows[here] - (self._ends[i - 1] if i else 0)]
        return out


def in_use(
    folder: Path, store: TokenStore, describe: dict, *, must_exist: bool = False
) -> AbstractContextManager:
    """Keeps others from the embeddings of a store, see `encode_to_disk`: from what is not whole
    yet, or is to be deleted; whole ones are read by all who like.

    Raises:
        InputError: another process makes them.
    """
    place, paths, _ = _shards(folder, store, describe, None)
    whole = all(path.exists() for path in paths)
    if jax.process_index() != 0 or (must_exist and not whole):
        return nullcontext()
    return locked(place, shared=whole)


def _shards(
    folder: Path, store: TokenStore, describe: dict, shard: int | None
) -> tuple[Path, list[Path], list[int]]:
    """Where the embeddings of a store are, in which files, and how many are in each."""
    shard = shard or SHARD
    place = folder / digest(sorted(describe.items()), len(store), shard)
    starts = range(0, len(store), shard)
    sizes = [min(shard, len(store) - start) for start in starts]
    return place, [place / f"{start:012d}.npy" for start in starts], sizes


def encode_to_disk(
    folder: Path,
    store: TokenStore,
    describe: dict,
    encode: Callable[[TokenStore], np.ndarray],
    *,
    must_exist: bool = False,
    shard: int | None = None,
) -> tuple[Embeddings, Path | None]:
    """Embeddings of all texts of a store, in `{folder}/{key}`; shards that are there are kept.

    With several processes each has all of them on its own disk. A shard that some lack is handed on
    by one that has it; one that none has is encoded by all of them.

    Args:
        describe: everything the embeddings depend on; named in manifest.json, and the key.
        encode: texts -> float32[n, D].
        must_exist: refuse to encode anything.

    Returns:
        The embeddings, and their folder, or None when all of them were there before.

    Raises:
        InputError: must_exist, and something is missing.
    """
    place, paths, sizes = _shards(folder, store, describe, shard)
    starts = accumulate(sizes[:-1], initial=0)
    who = each_has(list(map(_is_whole, paths, sizes)))
    have, somewhere = who.all(axis=0), who.any(axis=0)
    if must_exist and not somewhere.all():
        raise InputError(
            f"--load_encode: {folder} has no embeddings of this corpus by this encoder with these "
            "settings; make them with --save_encode"
        )
    if not have.all():  # they may be in a folder that is read-only
        manifest = {**describe, "texts": len(store), "shard": shard or SHARD}
        with atomic_write(place / "manifest.json") as beside:
            beside.write_text(json.dumps(manifest, indent=2) + "\n")
    if have.any() and not have.all():
        logger.info("%d of %d shards are encoded already", have.sum(), len(have))
    for i, (start, path, size) in enumerate(zip(starts, paths, sizes, strict=True)):
        if somewhere[i] and not have[i]:  # a host has lost its disk
            _hand_on(path, int(who[:, i].argmax()), size, who[jax.process_index(), i])
        elif not have[i]:
            save_array(path, encode(store.part(start, start + size)))
    embeddings = Embeddings([np.load(path, mmap_mode="r") for path in paths])
    return embeddings, None if have.all() else place


def _hand_on(path: Path, source: int, texts: int, have: bool) -> None:
    """Writes a shard where it is missing, as process `source` has it."""
    width = from_process(source, np.int32(np.load(path, mmap_mode="r").shape[1] if have else 0))
    rows = np.load(path) if have else np.zeros((texts, int(width)), np.float32)
    rows = from_process(source, rows)
    if not have:
        save_array(path, rows)


def _is_whole(path: Path, texts: int) -> bool:
    """Whether a shard is there, with as many vectors."""
    if not path.exists():
        return False
    if left_before(path, texts, 2, mmap_mode="r") is not None:
        return True
    logger.warning("%s is damaged: its texts are encoded again", path)
    return False


def forget(place: Path) -> None:
    """Deletes the embeddings in `place`, once no process reads them any more."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(place))
    remove(place)
    with suppress(OSError):  # other embeddings are in it
        place.parent.rmdir()
