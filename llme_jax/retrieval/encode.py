"""Texts to vectors: batches of static shape over all devices, the longest texts first."""

import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import usual_width
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import (
    abstract,
    make_mesh,
    on_each_device,
    replicate,
    replicated,
    to_mesh,
)
from llme_jax.errors import RunError
from llme_jax.inference.over_store import batch_shapes, over_store, rows_a_batch
from llme_jax.models.dual_encoder import DualEncoder


def encode(
    encoder: DualEncoder,
    params,
    store: TokenStore,
    *,
    field: Literal["query", "key"],
    batch_size: int,
    pad_id: int,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Embeddings of all texts of a store, float32[n, D] in the store's order.

    Texts are sorted by length and cut into batches, so that a batch has little padding and few
    shapes are compiled.

    Args:
        params: arrays on the mesh, or on the host.
        batch_size: texts encoded at a time, over all devices; fewer where they are long.
        mesh: with axes (data, fsdp), both for the batch; the first device alone when None. With
            several processes, all call this with the same store and all receive the result.
        max_length: of texts that other calls may bring, which then share this one's programs; None
            where these texts are all, and padding counts more.
        progress: is there to be a bar?
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    if not len(store):
        raise ValueError("nothing to encode: the store is empty")
    params = on_every_device(params, mesh)
    desc = "Encoding queries" if field == "query" else "Encoding keys"
    if encoder.tied:
        field = "key"  # the same for both, so one program serves queries and keys
    forward = partial(_forward, params, encoder=encoder, field=field, result=replicated(mesh))

    longest = max_length or int(store.lengths.max())
    with _Progress(desc, int(store.lengths.sum()), progress) as bar:
        vectors = over_store(
            store,
            lambda *texts: forward(*texts[:-1]),
            mesh=mesh,
            pad_id=pad_id,
            **batches(mesh, longest, batch_size),
            done=bar.add,
        )
    if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise RunError(
            f"the encoder gives numbers that are not finite for {len(wrong)} texts, the first is "
            f"text {wrong[0]}: give other weights, or --dtype fp32, in which numbers can be larger"
        )
    return vectors


def batches(mesh: Mesh, longest: int, batch_size: int) -> dict[str, Callable[[int], int]]:
    """`width` and `rows`, as `over_store` takes them, for texts of up to so many tokens."""
    longest += longest % 2  # fused attention on GPU takes even widths
    return {
        "width": lambda length: usual_width(length, longest),
        "rows": lambda width: rows_a_batch(mesh, width, batch_size),
    }


def analyse(
    encoder: DualEncoder,
    params,
    mesh: Mesh,
    field: str,
    rows: int,
    width: int,
    split: bool = False,
) -> Needs:
    """Compiles the encoding of a batch; shapes of parameters are enough.

    Args:
        split: whether texts have two parts, of which the second is pooled.
    """
    everywhere = replicated(mesh)
    texts = batch_shapes(mesh, rows // mesh.size, (width,), (), *([()] if split else []))
    how = {"encoder": encoder, "field": field, "result": everywhere}
    return needs(_forward.lower(abstract(params, everywhere), *texts, **how))


class _Progress:
    """Tokens, not texts, say how much time is left: the longest texts come first."""

    def __init__(self, desc: str, tokens: int, shown: bool):
        quiet = not shown or jax.process_index() != 0
        self._bar = tqdm(
            total=tokens, desc=desc, unit=" tokens", unit_scale=True, leave=False, disable=quiet
        )
        self._started, self._texts = time.perf_counter(), 0

    def add(self, texts: int, tokens: int) -> None:
        self._texts += texts
        rate = self._texts / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} texts/s", refresh=False)
        self._bar.update(tokens)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()


def on_every_device(params, mesh: Mesh | None):
    """Parameters, from the host or spread over the mesh, whole on every device."""
    sharding = replicated(mesh or make_mesh(devices=jax.local_devices()[:1]))
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else to_mesh(x, sharding), params)
    return replicate(params, sharding)


@partial(jax.jit, static_argnames=("encoder", "field", "result"))
def _forward(params, *texts, encoder: DualEncoder, field: str, result: NamedSharding):
    def encode(params, texts, _):
        return encoder.encode(params, *texts, field=field)

    embeddings = on_each_device(encode, params, texts, None, result)
    # On every device, so that every process can read all of them.
    return jax.lax.with_sharding_constraint(embeddings, result)
