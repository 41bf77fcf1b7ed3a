"""The batch: what one training step reads, numpy on the host and jax arrays on the device."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt32
from numpy import ndarray

from llme_jax.data.widths import usual_width

# A block has so many texts of a device at least, as products of few rows use hardware badly, and
# there are so few of them, as each adds an encoder to the program that is compiled.
BLOCK_ROWS = 16
MOST_BLOCKS = 4


class Texts(NamedTuple):
    """n texts as right-padded token ids, in blocks of similar length so that little is padding.

    Every device holds as many texts of every block. Text i is row `place[i]` of the blocks put
    one below the other.
    """

    ids: tuple[Int32[ndarray, "_ _"], ...]  # the longest texts first
    lengths: tuple[Int32[ndarray, "_"], ...]
    place: Int32[ndarray, "n"]
    second: tuple[Int32[ndarray, "_"], ...] = ()  # of pairs: where the second text begins


class Batch(NamedTuple):
    """B queries with N keys each (M = B * N).

    The keys of query b are b*N .. b*N+N-1; key 0 is the positive. Hashes are the two halves of a
    64-bit hash of the raw text, without its instruction.
    """

    texts: dict[str, Texts]  # by name: B of `query` and M of `key`, or M of `pair`
    teacher_scores: Float32[ndarray, "B N"]  # 0 where the row has none
    has_scores: Bool[ndarray, "B"]
    key_hash: UInt32[ndarray, "M 2"]  # identity of the key's text
    positive_hash: UInt32[ndarray, "B P 2"]  # all known positives, padded by repeating key 0


PLURALS = {
    "query": "queries",
    "key": "keys",
    "pair": "pairs",
}  # in the order in which they are reported


def shapes(batch: Batch) -> dict[str, list[tuple[int, int]]]:
    """Rows and columns of every block, by the names of the texts, however jax has put them."""
    names = sorted(batch.texts, key=lambda name: [*PLURALS, name].index(name))
    return {name: [x.shape for x in batch.texts[name].ids] for name in names}


def describe_shapes(batch: Batch) -> str:
    """As in "queries 16x32 and keys 64x128 + 64x64"."""
    return " and ".join(
        f"{PLURALS.get(name, name)} " + " + ".join("x".join(map(str, shape)) for shape in blocks)
        for name, blocks in shapes(batch).items()
    )


def real_lengths(batch: Batch) -> dict[str, ndarray]:
    """Tokens of every text, by the names of the texts."""
    return {name: np.concatenate(texts.lengths) for name, texts in batch.texts.items()}


def padded_lengths(batch: Batch) -> dict[str, ndarray]:
    """The same with padding."""
    return {
        name: np.concatenate([np.full(len(ids), ids.shape[1]) for ids in texts.ids])
        for name, texts in batch.texts.items()
    }


class Blocks:
    """How the texts of a global batch are spread over blocks.

    Args:
        lengths: int[n], tokens of every text; devices hold equal runs of neighbouring texts.
        devices: how many there are, over all hosts.
    """

    def __init__(self, lengths: ndarray, devices: int):
        lengths = np.asarray(lengths).reshape(devices, -1)
        self._order = np.argsort(-lengths, axis=1, kind="stable")  # each device's, longest first
        rows = lengths.shape[1]
        count = max(1, min(MOST_BLOCKS, rows // BLOCK_ROWS))
        self._bounds = [rows * i // count for i in range(count + 1)]
        firsts = np.take_along_axis(lengths, self._order[:, self._bounds[:-1]], axis=1)
        self.longest: list[int] = firsts.max(axis=0).tolist()  # tokens, of every block

    def cut(self, widths: Sequence[int]) -> list[tuple[Int[ndarray, "devices _"], int]]:
        """The texts on each device, and the width, of every block; equal neighbours are joined.

        Args:
            widths: as many as there are in `longest`.
        """
        ends = [i for i in range(1, len(widths)) if widths[i] != widths[i - 1]]
        offset = np.arange(len(self._order))[:, None] * self._order.shape[1]
        return [
            (offset + self._order[:, self._bounds[start] : self._bounds[stop]], widths[start])
            for start, stop in pairwise([0, *ends, len(widths)])
        ]


def places(blocks: Sequence[ndarray]) -> Int32[ndarray, "n"]:
    """Where every text stands when the blocks are put one below the other."""
    order = np.concatenate([block.ravel() for block in blocks])
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return place


def plain_texts(ids: Int32[ndarray, "n L"], lengths: Int32[ndarray, "n"]) -> Texts:
    """Texts in a single block, in their own order."""
    return Texts((ids,), (lengths,), np.arange(len(ids), dtype=np.int32))


def cut_texts(ids: Int32[ndarray, "n L"], lengths: Int32[ndarray, "n"], devices: int) -> Texts:
    """Texts of one padded matrix in blocks, each as wide as usual for its longest text."""
    blocks = Blocks(lengths, devices)
    cut = blocks.cut([usual_width(n, ids.shape[1]) for n in blocks.longest])
    parts = [(ids[block.ravel(), :width], lengths[block.ravel()]) for block, width in cut]
    return Texts(*map(tuple, zip(*parts, strict=True)), places([block for block, _ in cut]))


def fits(longest: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether blocks with these longest texts can be padded to these widths."""
    return all(length <= width for length, width in zip(longest, widths, strict=True))
