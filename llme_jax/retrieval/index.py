"""Exact search: the best keys of every query by inner product or distance, on the devices."""

from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from llme_jax.sharding import BATCH_AXES, batch_sharding, make_mesh, replicated, to_mesh

# Keys on a device at a time: 2**16 x 1024 floats are 256 MiB, and so are the scores of 1000
# queries against them.
BLOCK = 1 << 16


def search(
    queries: np.ndarray,
    corpus: np.ndarray,
    hits: int,
    metric: Literal["cos", "ip", "l2"],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The `hits` best keys of every query, in fp32.

    Args:
        queries: float32[Q, D].
        corpus: float32[C, D].
        metric: cos and ip score by inner product (embeddings come normalised where that is
            wanted), l2 by the negative squared distance: a higher score is always better.
        batch_size: queries searched at a time, over all devices.
        mesh: queries are spread over its devices, each of which sees all keys; the first device
            alone when None.
        block: keys on a device at a time.

    Returns:
        scores float32[Q, hits], best first, and ids int32[Q, hits]; equal scores are ordered by
        id. Where the corpus has fewer keys than `hits`, -inf and -1 fill up the row.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    found = min(hits, len(corpus))
    rows = -(-min(batch_size, len(queries)) // mesh.size) * mesh.size
    batches = [
        to_mesh(_pad(queries[i : i + rows], rows), batch_sharding(mesh))
        for i in range(0, len(queries), rows)
    ]
    empty = np.full((rows, found), -np.inf, np.float32), np.full((rows, found), -1, np.int32)
    best = [to_mesh(empty, (batch_sharding(mesh),) * 2) for _ in batches]
    merge, gather = _compiled(mesh, metric)

    block = min(block, len(corpus))
    starts = range(0, len(corpus), block)
    quiet = jax.process_index() != 0
    for start in tqdm(starts, desc="Searching", unit=" blocks", leave=False, disable=quiet):
        keys = corpus[start : start + block]
        bounds = np.array([start, len(keys)], np.int32)
        keys = to_mesh(_pad(keys, block), replicated(mesh))
        bounds = to_mesh(bounds, replicated(mesh))
        best = [merge(*b, q, keys, bounds) for b, q in zip(best, batches, strict=True)]

    results = [gather(*b) for b in best]
    scores, ids = (np.concatenate(parts)[: len(queries)] for parts in zip(*results, strict=True))
    fill = ((0, 0), (0, hits - found))
    return np.pad(scores, fill, constant_values=-np.inf), np.pad(ids, fill, constant_values=-1)


@cache
def _compiled(mesh: Mesh, metric: str):
    """`merge(scores, ids, queries, keys, bounds)`, the best so far with those of a block merged
    in, and `gather(scores, ids)`, the same on every device."""
    # Mapped by hand: the compiler would gather the scores of all queries before a top_k.
    merge = jax.shard_map(
        partial(_merge, metric=metric),
        mesh=mesh,
        in_specs=(P(BATCH_AXES), P(BATCH_AXES), P(BATCH_AXES), P(), P()),
        out_specs=(P(BATCH_AXES), P(BATCH_AXES)),
    )
    gather = jax.jit(lambda *best: best, out_shardings=replicated(mesh))
    return jax.jit(merge, donate_argnums=(0, 1)), gather


def _merge(scores, ids, queries, keys, bounds, *, metric: str):
    start, count = bounds
    product = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    if metric == "l2":
        norms = (queries**2).sum(1, keepdims=True), (keys**2).sum(1)
        product = 2 * product - norms[0] - norms[1]
    product = jnp.where(jnp.arange(len(keys)) < count, product, -jnp.inf)
    new_scores, new_ids = jax.lax.top_k(product, min(scores.shape[1], len(keys)))
    # top_k prefers the lower position where scores are equal: earlier blocks, then lower ids.
    scores, position = jax.lax.top_k(jnp.concatenate([scores, new_scores], axis=1), scores.shape[1])
    ids = jnp.concatenate([ids, new_ids + start], axis=1)
    return scores, jnp.take_along_axis(ids, position, axis=1)


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(np.asarray(rows, np.float32), ((0, count - len(rows)), (0, 0)))
