"""A jitted function over all texts of a token store: few shapes, no gap between two batches."""

from collections import deque
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from llme_jax.data.pairs import Pairs
from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import batches_by_length
from llme_jax.devices.sharding import batch_sharding, to_mesh

# Tokens on a device at a time at most: enough to keep it busy, little enough for its memory.
# Small on CPU, where that saves padding and stays in the cache: with 16384, MiniLM took twice as
# long for queries of very different lengths.
TOKENS = {"cpu": 1 << 11, "gpu": 1 << 16, "tpu": 1 << 16}


def tokens_a_device(mesh: Mesh) -> int:
    return TOKENS[mesh.devices.flat[0].platform]


def rows_a_batch(mesh: Mesh, width: int, most: int) -> int:
    """Texts of a batch of this width: `most`, less where they are long; a multiple of devices."""
    a_device = min(-(-most // mesh.size), max(tokens_a_device(mesh) // width, 1))
    return a_device * mesh.size


def sharing(mesh: Mesh) -> int:
    """Devices that share the rows of a batch."""
    return mesh.size // mesh.shape["tensor"]


def enough_rows(mesh: Mesh, texts: int) -> int:
    """Rows of a batch that has room for all of so few texts: a power of two a device."""
    devices = sharing(mesh)
    return devices << (-(-texts // devices) - 1).bit_length()


def batch_shapes(mesh: Mesh, rows: int, *of_a_row: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Integers of a batch with so many rows a device, enough to compile with."""
    shapes = [(rows * sharing(mesh), *shape) for shape in of_a_row]
    how = {"dtype": np.int32, "sharding": batch_sharding(mesh)}
    return [jax.ShapeDtypeStruct(shape, **how) for shape in shapes]


def over_store(
    store: TokenStore | Pairs,
    launch: Callable[..., jax.Array],
    *,
    mesh: Mesh,
    pad_id: int,
    width: Callable[[int], int],
    rows: Callable[[int], int],
    done: Callable[[int, int], None],
) -> np.ndarray:
    """What a function gives for every text, float32[n, ...] in the store's order.

    Batch t is on the devices while the host fetches batch t - 1. Fewer texts than a batch has
    get the next power of two of rows: calls of all sizes share few programs, small ones are fast.

    Args:
        launch: (ids [B, L], lengths [B], of pairs where the second text begins [B], which texts
            these are [B]) -> [B, ...], not waited for. The arrays are on the mesh, their rows
            spread over the axes of batches; which texts is numpy.
        width, rows: see `batches_by_length`.
        done: is told texts and tokens of each batch as it is finished.
    """
    lengths = store.lengths
    enough = enough_rows(mesh, len(store))
    results, pending = None, deque()

    def fetch():
        nonlocal results
        texts, result = pending.popleft()
        result = np.asarray(result)
        if results is None:
            results = np.empty((len(store), *result.shape[1:]), np.float32)
        results[texts] = result[: len(texts)]
        done(len(texts), int(lengths[texts].sum()))

    for texts, filled, columns in batches_by_length(lengths, width, lambda w: min(rows(w), enough)):
        batch = store.padded(filled, columns, pad_id)
        on_mesh = to_mesh(batch, (batch_sharding(mesh),) * len(batch))
        pending.append((texts, launch(*on_mesh, filled)))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    return np.empty(0, np.float32) if results is None else results
