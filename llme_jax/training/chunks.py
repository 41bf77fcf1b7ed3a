"""A device's texts through a model: all at once, or a few at a time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llme_jax.config import TrainConfig
from llme_jax.data.batch import Texts
from llme_jax.models.packing import pack, padded

# (ids [T], packing, dropout_key=) -> [R, ...]
Compute = Callable[..., Float[Array, "R ..."]]


class Chunk(NamedTuple):
    """How much goes through a model at a time.

    Attributes:
        most: texts, or tokens.
        tokens: whether these are counted, those that pad a text to the width of its block too.
    """

    most: int
    tokens: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> "Chunk | None":
        """What the settings ask for."""
        if config.sub_batch_tokens:
            return cls(config.sub_batch_tokens, tokens=True)
        return cls(config.sub_batch_size) if config.sub_batch_size else None

    def holds(self, texts: Texts) -> bool:
        """Whether all texts of a device go through at once."""
        if not self.tokens:
            return sum(map(len, texts.lengths)) <= self.most
        blocks = zip(texts.lengths, texts.widths, strict=True)
        return max(len(texts.ids), sum(len(n) * width for n, width in blocks)) <= self.most

    def rows(self, width: int) -> int:
        """Texts at a time of a block of that width."""
        return self.most // width if self.tokens else self.most


def over_texts(
    compute: Compute, texts: Texts, dropout_key: Array | None, *, chunk: Chunk | None
) -> dict[str, Float[Array, "n ..."]]:
    """What a function gives for the texts of a device, by field.

    Args:
        dropout_key: what each text's dropout is drawn from, with its number.
        chunk: of how much activations are held at a time, None for all.
    """
    packing = pack(
        *(texts.lengths, texts.widths, len(texts.ids), texts.numbers),
        jnp.concatenate(texts.second) if texts.second else None,
    )
    if chunk is None or chunk.holds(texts):
        out = compute(texts.ids, packing, dropout_key=dropout_key)
    else:
        blocks = zip(
            packing.in_blocks(texts.ids),
            texts.lengths,
            texts.numbers,
            *([texts.second] if texts.second else []),
            strict=True,
        )
        out = jnp.concatenate([_in_chunks(compute, block, dropout_key, chunk) for block in blocks])
    return {field: out.at[place].get(unique_indices=True) for field, place in texts.place.items()}


def _in_chunks(
    compute: Compute, block: tuple[Array, ...], dropout_key: Array | None, chunk: Chunk
) -> Float[Array, "n ..."]:
    """What a function gives for the n texts of a padded block, some at a time.

    A scan whose body is rematerialised keeps only token ids and results for the backward pass and
    computes each chunk again there: GradCache (arXiv:2101.06983), the gradient unchanged.
    """
    rows, width = block[0].shape
    # Two turns at least: XLA takes a scan of one for no loop, and keeps its activations.
    chunks = max(-(-rows // min(chunk.rows(width), rows)), min(2, rows))
    each = -(-rows // chunks)

    def split(x):
        padding = [(0, chunks * each - rows)] + [(0, 0)] * (x.ndim - 1)
        # Padded rows repeat real ones: a text of length 0 has no defined mean.
        return jnp.pad(x, padding, mode="wrap").reshape(chunks, each, *x.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)  # the scan already keeps the passes apart
    def body(_, part):
        ids, lengths, numbers, *second = part
        packing = padded(lengths, width, *second, numbers=numbers)
        return None, compute(ids.reshape(-1), packing, dropout_key=dropout_key)

    _, out = jax.lax.scan(body, None, tuple(map(split, block)))
    return out.reshape(-1, *out.shape[2:])[:rows]
