"""Pairs of texts, joined from the tokens of each: `[CLS] query [SEP] key [SEP]`.

A text is tokenised once, whatever it is paired with; the ids are those of the tokenizer's own call
on the pair.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from llme_jax.data.tokens import TokenStore
from llme_jax.errors import InputError
from llme_jax.hugging_face.reading import reading_of
from llme_jax.hugging_face.tokenizer import plain_backend


class PairLayout(NamedTuple):
    """How a tokenizer joins two texts, and how much of them.

    Attributes:
        before, between, after: its special tokens around the two.
        limit: tokens of the longest pair, special tokens included.
        side: "right" or "left", which end of a text is cut off.
        in_template: they are not joined from their tokens, but said in the chat template.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    limit: int
    side: str
    in_template: bool = False

    @property
    def special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def pair_layout(tokenizer, limit: int, side: str) -> PairLayout:
    """The layout of a fast tokenizer of transformers.

    Raises:
        InputError: `limit` leaves no room for two texts.
    """
    if reading_of(tokenizer).messages:
        return PairLayout((), (), (), limit, side, in_template=True)
    encoding = plain_backend(tokenizer).encode("a", "a")
    of, ids = np.array([-1 if s is None else s for s in encoding.sequence_ids]), encoding.ids
    first, second = np.flatnonzero(of == 0), np.flatnonzero(of == 1)
    layout = PairLayout(
        tuple(ids[: first[0]]),
        tuple(ids[first[-1] + 1 : second[0]]),
        tuple(ids[second[-1] + 1 :]),
        limit,
        side,
    )
    if limit < layout.special + 2:
        raise InputError(
            f"--query_max_length and --key_max_length are {limit} tokens together, which leaves no "
            f"room for two texts beside the tokenizer's {layout.special} special tokens: give "
            f"{layout.special + 2} or more"
        )
    return layout


class Pairs:
    """n pairs of texts of two stores, with the methods of a TokenStore.

    Args:
        queries, keys: stores of bare texts, see `TokenWriter`, cut to `layout.limit`.
        first, second: int[n], the query and the key of each pair.
    """

    def __init__(
        self,
        queries: TokenStore,
        keys: TokenStore,
        layout: PairLayout,
        first: ndarray,
        second: ndarray,
    ):
        self._queries, self._keys, self._layout = queries, keys, layout
        self._first, self._second = first, second
        room = layout.limit - layout.special
        self._kept = longest_first(queries.whole[first], keys.whole[second], room)

    def __len__(self) -> int:
        return len(self._first)

    @property
    def lengths(self) -> ndarray:
        """Tokens of every pair, special tokens included; int32[n]."""
        return (self._kept[0] + self._kept[1] + self._layout.special).astype(np.int32)

    def lengths_of(self, ids: ndarray) -> ndarray:
        return self.lengths[ids]

    def padded(self, ids: ndarray, width: int, pad_id: int) -> tuple[ndarray, ndarray, ndarray]:
        """The pairs `ids` as one right-padded matrix, wide enough for them.

        Returns:
            int32[len(ids), width] token ids, int32[len(ids)] lengths, int32[len(ids)] where the
            key begins.
        """
        layout, (first, second) = self._layout, (kept[ids] for kept in self._kept)
        out = np.full((len(ids), width), pad_id, np.int32)
        after_query = len(layout.before) + first
        key = after_query + len(layout.between)
        _put_tokens(out, np.zeros_like(first), layout.before)
        self._put_texts(out, len(layout.before), self._queries, self._first[ids], first)
        _put_tokens(out, after_query, layout.between)
        self._put_texts(out, key, self._keys, self._second[ids], second)
        _put_tokens(out, key + second, layout.after)
        lengths = key + second + len(layout.after)
        return out, lengths.astype(np.int32), key.astype(np.int32)

    def _put_texts(
        self, out: ndarray, start: int | ndarray, store: TokenStore, ids: ndarray, kept: ndarray
    ) -> None:
        """Writes `kept` tokens of each text, from column `start` on."""
        begin = store.offsets[ids]
        if self._layout.side == "left":
            begin = store.offsets[ids + 1] - kept
        column = np.arange(out.shape[1]) - np.broadcast_to(start, kept.shape)[:, None]
        inside = (column >= 0) & (column < kept[:, None])
        out[inside] = store.values[(begin[:, None] + column)[inside]]


def longest_first(first: ndarray, second: ndarray, room: int) -> tuple[ndarray, ndarray]:
    """How many tokens each text of a pair keeps when both share `room`, int64[n] each.

    Tokens are taken one at a time from the longer text; of two that are too long the one that was
    longer, or the second, has the odd token. Source: `truncate_encodings` of the tokenizers
    library, which transformers calls longest_first.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    short = np.minimum(first, second)
    cut = np.maximum(short, room - short)
    both = short + cut > room
    short, cut = np.where(both, room // 2, short), np.where(both, room // 2 + room % 2, cut)
    fits, swapped = first + second <= room, first > second
    return (
        np.where(fits, first, np.where(swapped, cut, short)),
        np.where(fits, second, np.where(swapped, short, cut)),
    )


def _put_tokens(out: ndarray, start: ndarray, tokens: tuple[int, ...]) -> None:
    rows = np.arange(len(out))
    for i, token in enumerate(tokens):
        out[rows, start + i] = token
