"""The batch: what one training step reads, numpy on the host and jax arrays on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt32
from numpy import ndarray

from llme_jax.data.widths import STEP, usual_width

# A block has so many texts of a device at least, as products of few rows use hardware badly, and
# there are so few of them, as each adds an attention to every layer of the program.
BLOCK_ROWS = 16
MOST_BLOCKS = 4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "lengths", "numbers", "place", "second"],
    meta_fields=["widths"],
)
@dataclass(frozen=True)
class Texts:
    """R texts a device that one model reads together, without padding between them.

    Arrays hold those of all devices, an equal part of each. A device's texts are sorted, the
    longest first, and cut into blocks of similar length, in which they attend.

    Attributes:
        ids: tokens of the texts, one text after another; T a device, padding at the end.
        lengths: tokens of each text, an array a block.
        numbers: which of the batch each text is, whatever the devices, an array a block.
        place: by field, the row of each of the field's texts among the R of its device.
        second: of pairs, where the second text begins, an array a block.
        widths: columns of each block.
    """

    ids: Int32[ndarray, "devices*T"]
    lengths: tuple[Int32[ndarray, "_"], ...]
    numbers: tuple[Int32[ndarray, "_"], ...]
    place: dict[str, Int32[ndarray, "_"]]
    second: tuple[Int32[ndarray, "_"], ...]
    widths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(int(lengths.sum()) for lengths in self.lengths)


class Batch(NamedTuple):
    """B queries with N keys each (M = B * N).

    The keys of query b are b*N .. b*N+N-1; key 0 is the positive. Hashes are the two halves of a
    64-bit hash of the raw text, without its instruction.
    """

    texts: dict[str, Texts]  # those that are read together, by what they are called together
    teacher_scores: Float32[ndarray, "B N"]  # 0 where the row has none
    has_scores: Bool[ndarray, "B"]
    key_hash: UInt32[ndarray, "M 2"]  # identity of the key's text
    positive_hash: UInt32[ndarray, "B P 2"]  # all known positives, padded by repeating key 0
    # A teacher's of each query and its keys, where they are to be learnt.
    teacher_vectors: Float32[ndarray, "B 1+N E"] | None = None


def describe_shapes(batch: Batch) -> str:
    """As in "2,304 tokens of texts in 40x64 + 40x32", of all devices."""
    return " and ".join(
        f"{len(texts.ids):,} tokens of {name} in "
        + " + ".join(f"{len(n)}x{w}" for n, w in zip(texts.lengths, texts.widths, strict=True))
        for name, texts in batch.texts.items()
    )


def work(batch: Batch, *, padding: bool = False) -> dict[str, tuple[float, float]]:
    """Tokens, and pairs of tokens that attend to each other, by what the texts are called.

    Args:
        padding: whether that counts too.
    """
    found = {}
    for name, texts in batch.texts.items():
        blocks = zip(texts.lengths, texts.widths, strict=True)
        if padding:
            found[name] = len(texts.ids), sum(len(n) * float(w) ** 2 for n, w in blocks)
        else:
            found[name] = work_of(np.concatenate(texts.lengths))
    return found


def work_of(lengths: Int[ndarray, "n"]) -> tuple[float, float]:
    """Tokens of texts, and pairs of tokens that attend to each other."""
    return float(lengths.sum()), float((lengths.astype(float) ** 2).sum())


class Shape(NamedTuple):
    """What decides the program for the texts of a batch."""

    rows: tuple[int, ...]  # of a device, of every block
    widths: tuple[int, ...]
    tokens: int  # T


class Order:
    """How the texts of a global batch are ordered on their devices, the longest first.

    Args:
        lengths: int[devices, R], tokens of every text.
    """

    def __init__(self, lengths: Int[ndarray, "devices R"]):
        self.rows = np.argsort(-lengths, axis=1, kind="stable")
        self.tokens = int(lengths.sum(1).max())  # of a device
        count = max(1, min(MOST_BLOCKS, lengths.shape[1] // BLOCK_ROWS))
        self._bounds = [lengths.shape[1] * i // count for i in range(count + 1)]
        firsts = np.take_along_axis(lengths, self.rows[:, self._bounds[:-1]], axis=1)
        self.longest: list[int] = firsts.max(axis=0).tolist()  # tokens, of every block

    def shape(self, widths: Sequence[int], tokens: int) -> Shape:
        """Blocks of these widths, as many as there are in `longest`; equal neighbours are one."""
        ends = [i for i in range(1, len(widths)) if widths[i] != widths[i - 1]]
        cuts = [0, *ends, len(widths)]
        rows = tuple(self._bounds[b] - self._bounds[a] for a, b in pairwise(cuts))
        return Shape(rows, tuple(widths[a] for a in cuts[:-1]), tokens)

    def fits(self, widths: Sequence[int], tokens: int) -> bool:
        within = all(n <= width for n, width in zip(self.longest, widths, strict=True))
        return within and self.tokens <= tokens


def pack_texts(
    fields: dict[str, Sequence[ndarray]],
    rows: Int[ndarray, "devices R"],
    shape: Shape,
    *,
    first: int = 0,
    devices: int | None = None,
) -> Texts:
    """Right-padded texts of some devices, packed.

    Args:
        fields: of each, int32[devices, n, L] ids and int32[devices, n] lengths, at least 1; of
            pairs also where the second text begins.
        rows: see `Order`, of these devices.
        first: number of the first of these devices.
        devices: how many there are in all, these by default.
    """
    columns = zip(*fields.values(), strict=True)
    ids, lengths, *second = (np.concatenate(parts, axis=1) for parts in columns)
    lengths = np.take_along_axis(lengths, rows, 1)
    ids = np.take_along_axis(ids, rows[:, :, None], 1)
    tokens = np.zeros((len(ids), shape.tokens), np.int32)
    inside = np.arange(ids.shape[2]) < lengths[:, :, None]
    for of_device, device, real in zip(tokens, ids, inside, strict=True):
        of_device[: real.sum()] = device[real]
    cuts = np.cumsum(shape.rows)[:-1]

    def cut(x: ndarray) -> tuple[ndarray, ...]:
        return tuple(part.astype(np.int32).ravel() for part in np.split(x, cuts, axis=1))

    counts = [part[1].shape[1] for part in fields.values()]
    numbers = _numbers(counts, first, len(ids), devices or len(ids))
    places = np.split(np.argsort(rows, axis=1), np.cumsum(counts)[:-1], axis=1)
    return Texts(
        ids=tokens.ravel(),
        lengths=cut(lengths),
        numbers=cut(np.take_along_axis(numbers, rows, 1)),
        place={
            name: part.astype(np.int32).ravel() for name, part in zip(fields, places, strict=True)
        },
        second=cut(np.take_along_axis(second[0], rows, 1)) if second else (),
        widths=shape.widths,
    )


def pack_padded(texts: dict[str, Sequence[ndarray]], devices: int, *, blocks: bool = True) -> Texts:
    """Right-padded texts of a whole batch, packed without room for more tokens.

    Args:
        texts: of each field, int32[n, L] ids and int32[n] lengths; of pairs also where the second
            text begins.
        blocks: cuts them into blocks of similar length, else all attend in one.
    """
    width = max(columns[0].shape[1] for columns in texts.values())
    fields = {}
    for name, (ids, *columns) in texts.items():
        ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
        fields[name] = [x.reshape(devices, -1, *x.shape[1:]) for x in (ids, *columns)]
    order = Order(np.concatenate([columns[1] for columns in fields.values()], axis=1))
    widths = [usual_width(n, width) if blocks else width for n in order.longest]
    return pack_texts(fields, order.rows, order.shape(widths, -(-order.tokens // STEP) * STEP))


def _numbers(
    counts: Sequence[int], first: int, count: int, devices: int
) -> Int[ndarray, "count R"]:
    """Numbers of the texts of `count` devices, which have so many of each field.

    Those of the first field go through all devices, then come those of the second.
    """
    parts, start = [], 0
    for each in counts:
        parts.append(start + (first + np.arange(count))[:, None] * each + np.arange(each))
        start += devices * each
    return np.concatenate(parts, axis=1)
