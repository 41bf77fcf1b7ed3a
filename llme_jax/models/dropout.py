"""Dropout whose mask depends on the key, the text and the place in it, and on nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Places are numbered as if every axis behind the first had this size, so that a text's mask is
# the same at every padded width.
AXIS = 4096


class Rows(NamedTuple):
    """What the rows are that something is dropped from, however they are ordered or cut."""

    texts: jax.Array  # int32[n]: each row's text, numbered through the batch
    places: jax.Array | None = None  # int32[n]: its place in the text; None: it is all of it


def fold_in(key: jax.Array | None, site: int) -> jax.Array | None:
    """The key of another place in the model."""
    return None if key is None else jax.random.fold_in(key, site)


def dropout(x: jax.Array, key: jax.Array | None, rate: float, rows: Rows | None) -> jax.Array:
    """Zero a share `rate` of the entries and divide the others by `1 - rate`.

    Nothing is dropped when `key` is None; else there are `rows`. A mask needs no more than
    well-mixed bits, so they come from an integer hash of text and place instead of Threefry, whose
    bits cost more than the attention they are dropped from. An entry's fate does not depend on the
    number of devices, the padding or the cutting of a batch, and the backward pass recomputes the
    mask instead of storing it.
    """
    if key is None or rate == 0.0:
        return x
    of_rows, second = seeds(key, rows.texts)
    if rows.places is not None:
        of_rows = mix(of_rows + rows.places.astype(jnp.uint32))
    place = jnp.zeros((1, *x.shape[1:]), jnp.uint32)
    for axis in range(1, x.ndim):
        stride = AXIS ** (x.ndim - 1 - axis) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, place.shape, axis) * jnp.uint32(stride)
    kept = is_kept(mix(place ^ second), of_rows.reshape(-1, *(1,) * (x.ndim - 1)), rate)
    return jnp.where(kept, x / (1.0 - rate), 0)


def seeds(key: jax.Array, texts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the key makes of the texts, uint32 of their shape, and what it adds to a place in one,
    uint32[]."""
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    return mix(texts.astype(jnp.uint32) ^ first), second


def is_kept(of_place: jax.Array, of_row: jax.Array, rate: float) -> jax.Array:
    """The fate of an entry, from the hashes of its row and of the place in it."""
    keep = 1.0 - rate
    threshold = jnp.uint32(round(keep * 2**32) if keep < 1 - 2**-33 else 2**32 - 1)
    return mix(of_place + of_row) < threshold


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that flips half of the bits (lowbias32, Wellons' hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
