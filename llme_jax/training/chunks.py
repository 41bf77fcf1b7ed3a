"""Texts in blocks through a model: the whole batch at once, or a few texts a device at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.data.batch import Texts
from llme_jax.models.dropout import DropoutKey

# (ids [n, L], lengths [n], of pairs where the second text begins [n], dropout_key=) -> [n, ...]
Compute = Callable[..., Float[Array, "n ..."]]


def over_blocks(
    compute: Compute,
    texts: Texts,
    dropout_key: Array | None,
    *,
    devices: int,
    chunk: int | None,
) -> Float[Array, "n ..."]:
    """What a function gives for texts in blocks, in the order of the texts.

    Args:
        dropout_key: what each text's dropout is drawn from, with its number.
        devices: how many share the texts.
        chunk: texts that a device holds activations of at a time, None for all.
    """
    # A text's dropout follows its number, not the row of the block where it stands.
    numbers = jnp.zeros_like(texts.place).at[texts.place].set(jnp.arange(len(texts.place)))
    columns = texts.ids, texts.lengths, *([texts.second] if texts.second else [])
    blocks, start = [], 0
    for block in zip(*columns, strict=True):
        size = len(block[0])
        drop = None
        if dropout_key is not None:
            drop = DropoutKey(dropout_key, numbers[start : start + size])
        blocks.append(in_chunks(compute, block, drop, devices=devices, chunk=chunk))
        start += size
    return jnp.concatenate(blocks).at[texts.place].get(unique_indices=True)


def in_chunks(
    compute: Compute,
    texts: tuple[Int[Array, "n ..."], ...],
    dropout_key: DropoutKey | None,
    *,
    devices: int,
    chunk: int | None,
) -> Float[Array, "n ..."]:
    """What a function gives for n texts, `chunk` texts a device at a time.

    A scan whose body is rematerialised keeps only token ids and results for the backward pass and
    computes each chunk again there: GradCache (arXiv:2101.06983), the gradient unchanged.
    """
    rows = len(texts[0]) // devices
    if chunk is None or chunk >= rows:
        return compute(*texts, dropout_key=dropout_key)
    chunks = -(-rows // chunk)

    def split(x):
        # Every device contributes equally to every chunk, so no row changes its device.
        x = x.reshape(devices, rows, *x.shape[1:])
        padding = [(0, 0), (0, chunks * chunk - rows)] + [(0, 0)] * (x.ndim - 2)
        # Padded rows repeat real ones: a text of length 0 has no defined mean.
        x = jnp.pad(x, padding, mode="wrap")
        x = x.reshape(devices, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(chunks, devices * chunk, *x.shape[3:])

    @partial(jax.checkpoint, prevent_cse=False)  # the scan already keeps the passes apart
    def body(_, part):
        *texts, numbers = part
        key = None if dropout_key is None else dropout_key._replace(texts=numbers)
        return None, compute(*texts, dropout_key=key)

    numbers = jnp.zeros_like(texts[1]) if dropout_key is None else dropout_key.texts
    _, out = jax.lax.scan(body, None, tuple(map(split, (*texts, numbers))))
    of_text = out.shape[2:]
    out = out.reshape(chunks, devices, chunk, *of_text).swapaxes(0, 1)
    return out.reshape(devices, chunks * chunk, *of_text)[:, :rows].reshape(-1, *of_text)
