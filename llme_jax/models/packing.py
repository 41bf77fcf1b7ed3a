"""Where the tokens of texts lie: one after another without padding, in blocks while they attend.

Linear layers, norms and activations work on tokens alone, [T, D]; only attention needs to know
which of them are of one text, and sees them as right-padded blocks [n, L, ...].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from llme_jax.models.dropout import Rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "lengths",
        "numbers",
        "in_second",
        "tokens",
        "texts",
        "starts",
        "slot",
        "source",
        "inside",
    ],
    meta_fields=["widths"],
)
@dataclass(frozen=True)
class Packing:
    """R texts of T tokens, padding at the end included; made by `pack` or `padded`.

    Attributes:
        lengths: tokens of each text, an array a block.
        widths: L of each block.
        numbers: what dropout knows each text by, an array a block.
        in_second: bool[T], the tokens of the second text of a pair; None: there is none.
        tokens: text and place of every token.
        texts: int32[T], which text it is of; padding is of the one before it.
        starts: int32[R], the first token of every text.
        slot: where each token stands in the blocks put one below the other.
        source: the reverse, the token in each of their slots, an array a block; None: texts are
            padded as they are, [R, L] in one block.
        inside: bool[T] and, an array a block, which tokens and which slots are no padding.
    """

    lengths: tuple[Int[Array, "_"], ...]
    widths: tuple[int, ...]
    numbers: tuple[Int[Array, "_"], ...]
    in_second: Bool[Array, "T"] | None
    tokens: Rows
    texts: Int[Array, "T"]
    starts: Int[Array, "R"]
    slot: Int[Array, "T"] | None = None
    source: tuple[Int[Array, "_"], ...] | None = None
    inside: tuple[Bool[Array, "T"], tuple[Bool[Array, "_"], ...]] | None = None

    @property
    def firsts(self) -> Rows:
        """Text and place of the texts' first tokens."""
        numbers = jnp.concatenate(self.numbers)
        return Rows(numbers, jnp.zeros_like(numbers))

    @property
    def spans(self) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
        """Where each token's text begins and ends; padding is by itself."""
        begin = self.starts[self.texts]
        end = begin + jnp.concatenate(self.lengths)[self.texts]
        at = jnp.arange(len(begin))
        return jnp.where(at < end, begin, at), jnp.where(at < end, end, at + 1)

    def in_blocks(self, x: Shaped[Array, "T *d"]) -> list[Shaped[Array, "_ _ *d"]]:
        """The tokens of each block; what stands in its padding is of another token."""
        shapes = [(len(n), width) for n, width in zip(self.lengths, self.widths, strict=True)]
        if self.source is None:
            return [x.reshape(*shapes[0], *x.shape[1:])]
        inside, _ = self.inside
        parts = _scattered(x, self.source, self.slot, inside)
        return [
            part.reshape(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)
        ]

    def from_blocks(self, blocks: Sequence[Float[Array, "_ _ *d"]]) -> Float[Array, "T *d"]:
        """The reverse of `in_blocks`."""
        blocks = tuple(x.reshape(-1, *x.shape[2:]) for x in blocks)
        if self.source is None:
            return blocks[0]
        _, inside = self.inside
        return _collected(blocks, self.slot, self.source, inside)

    def first(self, x: Float[Array, "T *d"]) -> Float[Array, "R *d"]:
        """Of every text the first token."""
        if self.source is None:
            return self.in_blocks(x)[0][:, 0]
        return x.at[self.starts].get(unique_indices=True, indices_are_sorted=True)

    def split(self, x: Float[Array, "R *d"]) -> list[Float[Array, "_ *d"]]:
        """What there is one of for every text, a block at a time."""
        return jnp.split(x, np.cumsum([len(n) for n in self.lengths])[:-1])


def pack(
    lengths: Sequence[Int[Array, "_"]],
    widths: Sequence[int],
    size: int,
    numbers: Sequence[Int[Array, "_"]],
    second: Int[Array, "R"] | None = None,
) -> Packing:
    """Texts one after another, those of the first block first.

    Args:
        lengths: tokens of each text, at least 1, an array a block.
        widths: L of each block.
        size: T, at least the sum of the lengths.
        numbers: what dropout knows each text by.
        second: where the second text of each pair begins.
    """
    rows = [len(n) for n in lengths]
    all_lengths = jnp.concatenate(lengths)
    ends = jnp.cumsum(all_lengths)
    starts = ends - all_lengths
    # Padding goes on the last text.
    text = jnp.repeat(jnp.arange(len(starts)), all_lengths, total_repeat_length=size)
    place = jnp.arange(size) - starts[text]
    # Slots before each text, in the blocks one below the other.
    slots = np.repeat(widths, rows)
    before = np.cumsum(slots) - slots
    within = [jnp.arange(width) < n[:, None] for n, width in zip(lengths, widths, strict=True)]
    first = jnp.split(starts, np.cumsum(rows)[:-1])
    source = tuple(
        jnp.where(real, start[:, None] + jnp.arange(width), 0).reshape(-1)
        for real, start, width in zip(within, first, widths, strict=True)
    )
    real = jnp.arange(size) < ends[-1]
    slot = jnp.where(real, jnp.asarray(before)[text] + place, 0)
    return Packing(
        tuple(lengths),
        tuple(widths),
        tuple(numbers),
        None if second is None else place >= second[text],
        Rows(jnp.concatenate(numbers)[text], jnp.where(real, place, 0)),
        text,
        starts,
        slot,
        source,
        (real, tuple(x.reshape(-1) for x in within)),
    )


def padded(
    lengths: Int[Array, "B"],
    width: int,
    second: Int[Array, "B"] | None = None,
    numbers: Int[Array, "B"] | None = None,
) -> Packing:
    """Texts that are padded to one width, [B, L], as B * L tokens."""
    numbers = jnp.zeros_like(lengths) if numbers is None else numbers
    texts = jnp.repeat(jnp.arange(len(lengths)), width)
    starts = jnp.arange(len(lengths)) * width
    place = jnp.arange(len(texts)) - starts[texts]
    rows = Rows(numbers[texts], place)
    in_second = None if second is None else place >= second[texts]
    return Packing((lengths,), (width,), (numbers,), in_second, rows, texts, starts)


# A token has one slot and a slot one token, so what moves them back is a gather as well; the
# derived backward pass would scatter, which takes many times as long.


@jax.custom_vjp
def _scattered(x, source, slot, inside):
    return [x[of_block] for of_block in source]


def _scattered_backward(saved, parts):
    slot, inside = saved
    return _masked(jnp.concatenate(parts)[slot], inside), None, None, None


_scattered.defvjp(
    lambda x, source, slot, inside: (_scattered(x, source, slot, inside), (slot, inside)),
    _scattered_backward,
)


@jax.custom_vjp
def _collected(blocks, slot, source, inside):
    return jnp.concatenate(blocks)[slot]


def _collected_backward(saved, x):
    source, inside = saved
    parts = [_masked(x[of], real) for of, real in zip(source, inside, strict=True)]
    return tuple(parts), None, None, None


_collected.defvjp(
    lambda blocks, slot, source, inside: (
        _collected(blocks, slot, source, inside),
        (source, inside),
    ),
    _collected_backward,
)


def _masked(x, inside):
    return jnp.where(inside.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
