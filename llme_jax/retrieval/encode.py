"""Texts to vectors: batches of static shape over all devices, the longest texts first."""

import time
from collections import deque
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from llme_jax.data.tokens import TokenStore, bucket
from llme_jax.data.widths import batches_by_length
from llme_jax.devices.sharding import batch_sharding, make_mesh, replicated, to_mesh, whole
from llme_jax.models.dual_encoder import DualEncoder

# Tokens a device encodes at a time at most: enough to keep it busy, little enough for its memory.
# Small on CPU, where that saves padding and stays in the cache: with 16384, MiniLM took twice as
# long for queries of very different lengths.
TOKENS = {"cpu": 1 << 11, "gpu": 1 << 16, "tpu": 1 << 16}


def encode(
    encoder: DualEncoder,
    params,
    store: TokenStore,
    *,
    field: Literal["query", "key"],
    batch_size: int,
    pad_id: int,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Embeddings of all texts of a store, float32[n, D] in the store's order.

    Texts are sorted by length and cut into batches, so that a batch has little padding and few
    shapes are compiled. Batch t is on the devices while the host fetches batch t - 1.

    Args:
        params: arrays on the mesh, or on the host.
        batch_size: texts encoded at a time, over all devices; fewer where they are long.
        mesh: with axes (data, fsdp), both for the batch; the first device alone when None. With
            several processes, all call this with the same store and all receive the result.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    if not len(store):
        raise ValueError("nothing to encode: the store is empty")
    params = place(params, mesh)
    desc = "Encoding queries" if field == "query" else "Encoding keys"
    if encoder.tied:
        field = "key"  # the same for both, so one program serves queries and keys
    forward = partial(_forward, params, encoder=encoder, field=field, result=replicated(mesh))

    lengths = store.lengths
    longest = int(lengths.max())
    longest += longest % 2  # fused attention on GPU takes even widths
    batches = batches_by_length(
        lengths,
        width=lambda length: bucket(length, longest),
        rows=lambda width: _rows(batch_size, width, len(store), mesh),
    )
    embeddings, pending = None, deque()
    bar = _Progress(desc, int(lengths.sum()))

    def fetch():
        nonlocal embeddings
        texts, result = pending.popleft()
        result = np.asarray(result)
        if embeddings is None:
            embeddings = np.empty((len(store), result.shape[1]), np.float32)
        embeddings[texts] = result[: len(texts)]
        bar.add(len(texts), int(lengths[texts].sum()))

    for texts, filled, width in batches:
        batch = to_mesh(store.padded(filled, width, pad_id), (batch_sharding(mesh),) * 2)
        pending.append((texts, forward(*batch)))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    bar.close()
    return embeddings


class _Progress:
    """Tokens, not texts, say how much time is left: the longest texts come first."""

    def __init__(self, desc: str, tokens: int):
        quiet = jax.process_index() != 0
        self._bar = tqdm(
            total=tokens, desc=desc, unit=" tokens", unit_scale=True, leave=False, disable=quiet
        )
        self._started, self._texts = time.perf_counter(), 0

    def add(self, texts: int, tokens: int) -> None:
        self._texts += texts
        rate = self._texts / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} texts/s", refresh=False)
        self._bar.update(tokens)

    def close(self) -> None:
        self._bar.close()


def place(params, mesh: Mesh | None):
    """Parameters, from the host or spread over the mesh, whole on every device."""
    sharding = replicated(mesh or make_mesh(devices=jax.local_devices()[:1]))
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else to_mesh(x, sharding), params)
    return whole(params, sharding)


@partial(jax.jit, static_argnames=("encoder", "field", "result"))
def _forward(params, ids, lengths, *, encoder: DualEncoder, field: str, result: NamedSharding):
    embeddings = encoder.encode(params, ids, lengths, field=field)
    # On every device, so that every process can read all of them.
    return jax.lax.with_sharding_constraint(embeddings, result)


def _rows(batch_size: int, width: int, texts: int, mesh: Mesh) -> int:
    """Texts of a batch: `batch_size`, less where they are long, a multiple of the devices."""
    tokens = TOKENS[mesh.devices.flat[0].platform]
    per_device = min(-(-min(batch_size, texts) // mesh.size), max(tokens // width, 1))
    return per_device * mesh.size
