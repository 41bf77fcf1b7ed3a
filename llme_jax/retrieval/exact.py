"""Exact search: the best keys of every query by inner product or distance, on the devices."""

from functools import cache, partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import BATCH_AXES, batch_sharding, make_mesh, replicated, to_mesh

# Keys on a device at a time at most: 2**16 x 1024 floats are 256 MiB, and so are the scores of 1000
# queries against them.
BLOCK = 1 << 16
UNIT = 1 << 12  # keys in one product
GROUP = 16  # neighbours among which the best is looked at first


class Rows(Protocol):
    """Embeddings [C, D] that can be read in slices: an array, or one kept on disk."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


def search(
    queries: np.ndarray,
    corpus: Rows,
    hits: int,
    metric: Literal["cos", "ip", "l2"],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    block: int = BLOCK,
    unit: int = UNIT,
    progress: bool = True,
    largest: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `hits` best keys of every query, in fp32.

    The corpus is read once, block by block: each device gets its own keys, finds the best of them
    for all queries, and what the devices found is merged at the end. Two blocks are on a device
    at most, however large the corpus is.

    Args:
        queries: float32[Q, D].
        corpus: float32[C, D].
        metric: cos and ip score by inner product (embeddings come normalised where that is
            wanted), l2 by the negative squared distance: a higher score is always better.
        batch_size: queries searched at a time.
        mesh: keys are spread over its devices; the first device alone when None. With several
            processes, all call this with the same queries and corpus, and each reads the keys of
            its own devices.
        block: keys on a device at a time at most.
        unit: keys in one product, a multiple of GROUP.
        progress: is there to be a bar?
        largest: queries and keys of the largest search that is to share this one's programs; None
            where there is no other.

    Returns:
        scores float32[Q, hits], best first, and ids int32[Q, hits]; equal scores are ordered by
        id. Where the corpus has fewer keys than `hits`, -inf and -1 fill up the row.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    extent = largest or (len(queries), len(corpus))
    found, rows, unit, block = _sizes(mesh, *extent, hits, batch_size, block, unit)
    batches = [
        to_mesh(_pad(queries[i : i + rows], rows), replicated(mesh))
        for i in range(0, len(queries), rows)
    ]
    shape = mesh.size, rows, found
    empty = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    best = [to_mesh(empty, (batch_sharding(mesh),) * 2) for _ in batches]
    merge, join = _compiled(mesh, metric, unit)

    starts = range(0, len(corpus), block * mesh.size)
    quiet = not progress or jax.process_index() != 0
    for start in tqdm(starts, desc="Searching", unit=" blocks", leave=False, disable=quiet):
        keys = _block_to_mesh(mesh, corpus, start, block)
        bounds = to_mesh(np.array([start, len(corpus)], np.int32), replicated(mesh))
        jax.block_until_ready(best)  # of the block before, while this one was read
        best = [merge(*b, q, keys, bounds) for b, q in zip(best, batches, strict=True)]

    results = [join(*b) for b in best]
    scores, ids = (np.concatenate(parts)[: len(queries)] for parts in zip(*results, strict=True))
    fill = ((0, 0), (0, hits - found))
    return np.pad(scores, fill, constant_values=-np.inf), np.pad(ids, fill, constant_values=-1)


def _sizes(
    mesh: Mesh, queries: int, keys: int, hits: int, batch_size: int, block: int, unit: int
) -> tuple[int, int, int, int]:
    """Hits and queries of a batch, keys of a product and of a device at a time."""
    # Products of one shape on any number of devices: their bits, and so the ids, are the same.
    unit = min(unit, -(-keys // GROUP) * GROUP)
    units = -(-keys // unit)
    rounds = -(-units // (mesh.size * max(block // unit, 1)))
    block = unit * -(-units // (mesh.size * rounds))
    return min(hits, keys), min(batch_size, queries), unit, block


def analyse(
    mesh: Mesh, queries: int, keys: int, dim: int, hits: int, metric: str, batch_size: int
) -> Needs:
    """Compiles the search of a block of keys, as `search` does it."""
    found, rows, unit, block = _sizes(mesh, queries, keys, hits, batch_size, BLOCK, UNIT)
    spread, everywhere = batch_sharding(mesh), replicated(mesh)
    merge, _ = _compiled(mesh, metric, unit)

    def of(shape: tuple[int, ...], kind: type, sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    lowered = merge.lower(
        *(of((mesh.size, rows, found), kind, spread) for kind in (np.float32, np.int32)),
        of((rows, dim), np.float32, everywhere),
        of((mesh.size * block, dim), np.float32, spread),
        of((2,), np.int32, everywhere),
    )
    return needs(lowered)


def _block_to_mesh(mesh: Mesh, corpus: Rows, start: int, block: int) -> jax.Array:
    """Keys `start` to `start + block * devices`, a block on each device; the last one repeats."""
    shape = block * mesh.size, corpus.shape[1]

    def read(index):
        first, last, _ = index[0].indices(shape[0])
        first = min(start + first, len(corpus) - 1)
        return _pad(corpus[first : start + last], block)

    return jax.make_array_from_callback(shape, batch_sharding(mesh), read)


@cache
def _compiled(mesh: Mesh, metric: str, unit: int):
    """`merge(scores, ids, queries, keys, bounds)`, each device's best so far with those of its
    block merged in, and `join(scores, ids)`, the best of all devices, on every device."""
    # Mapped by hand: the compiler would gather the scores of all keys before a top_k.
    merge = jax.shard_map(
        partial(_merge, metric=metric, unit=unit),
        mesh=mesh,
        in_specs=(P(BATCH_AXES), P(BATCH_AXES), P(), P(BATCH_AXES), P()),
        out_specs=(P(BATCH_AXES), P(BATCH_AXES)),
    )
    return jax.jit(merge), jax.jit(_join, out_shardings=replicated(mesh))


def _merge(scores, ids, queries, keys, bounds, *, metric: str, unit: int):
    """The best of a device: scores and ids [1, Q, hits], queries [Q, D], its keys [block, D]."""
    start, total = bounds
    first = start + jax.lax.axis_index(BATCH_AXES) * len(keys)
    units = keys.reshape(-1, unit, keys.shape[1])
    product = jax.lax.map(partial(_scores, queries, metric=metric), units)
    new_scores, new_ids = _candidates(product, scores.shape[2], total - first)
    # top_k prefers the lower position where scores are equal: earlier blocks, then lower ids.
    joined = jnp.concatenate([scores[0], new_scores], axis=1)
    scores, position = jax.lax.top_k(joined, scores.shape[2])
    ids = jnp.concatenate([ids[0], new_ids + first], axis=1)
    return scores[None], jnp.take_along_axis(ids, position, axis=1)[None]


def _scores(queries, keys, *, metric: str):
    """[Q, D] and [unit, D] -> [Q, unit]."""
    product = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    if metric == "l2":
        return 2 * product - (queries**2).sum(1, keepdims=True) - (keys**2).sum(1)
    return product


def _candidates(scores, hits: int, total):
    """Those of [units, Q, unit] scores that can be among the `hits` best of a query, by place.

    They are the groups of neighbours with the `hits` best maxima: in a group left out nothing is
    above these maxima, and ties are broken by id, so a skipped group cannot win one. Two small
    top_k take less time than a large one, on GPUs above all, which sort everything.

    Args:
        total: keys that are real; those past the last repeat it, so that the maximum of its group
            is right.

    Returns:
        Scores and places, float32[Q, n] and int32[Q, n].
    """
    units, rows, unit = scores.shape
    groups = scores.reshape(units, rows, unit // GROUP, GROUP)
    maxima = groups.max(3).swapaxes(0, 1).reshape(rows, -1)
    maxima = jnp.where(jnp.arange(maxima.shape[1]) * GROUP < total, maxima, -jnp.inf)
    best = jnp.sort(jax.lax.top_k(maxima, min(hits, maxima.shape[1]))[1])
    in_unit, group = jnp.divmod(best, unit // GROUP)
    scores = groups[in_unit, jnp.arange(rows)[:, None], group]
    places = best[..., None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)
    scores = jnp.where(places < total, scores, -jnp.inf)
    return scores.reshape(rows, -1), places.reshape(rows, -1)


def _join(scores, ids):
    """[devices, Q, hits] -> [Q, hits], by score, then by id."""
    devices, rows, hits = scores.shape
    scores, ids = (x.swapaxes(0, 1).reshape(rows, devices * hits) for x in (scores, ids))
    scores, ids = jax.lax.sort((-scores, ids), num_keys=2)
    return -scores[:, :hits], ids[:, :hits]


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if len(rows) == count:  # np.pad would copy them
        return rows
    return np.pad(rows, ((0, count - len(rows)), (0, 0)), mode="edge")
