"""The token store: every text tokenised once, kept as ragged ids in memory-mapped files."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llme_jax.data.arrays import ArrayWriter
from llme_jax.files.checksums import kept
from llme_jax.hugging_face.reading import Cutter
from llme_jax.hugging_face.tokenizer import plain_backend

# One call of the tokenizer sees so many texts and characters at most, which bounds its memory.
CHUNK_TEXTS = 4096
CHUNK_CHARACTERS = 1 << 21


Prompted = tuple[str, str]  # what stands before a text, and the text


class TokenStore:
    """Token ids of n texts, memory-mapped: text i is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        whole: of bare texts, int32[n], how many tokens each had before it was cut; else None.
        second: of texts in two parts, int32[n], where the second begins; else None.
    """

    def __init__(self, folder: Path):
        self.values = np.asarray(np.load(folder / "values.npy", mmap_mode="r"))
        self.offsets = np.asarray(np.load(folder / "offsets.npy", mmap_mode="r"))
        self.whole, self.second = (
            np.asarray(np.load(path, mmap_mode="r")) if path.is_file() else None
            for path in (folder / "whole.npy", folder / "second.npy")
        )

    @classmethod
    def of(
        cls,
        texts: Sequence[np.ndarray],
        whole: np.ndarray | None = None,
        second: np.ndarray | None = None,
    ) -> "TokenStore":
        """A store in memory, of the ids of each text."""
        store = cls.__new__(cls)
        store.values = np.concatenate([np.zeros(0, np.uint32), *texts])
        store.offsets = np.cumsum([0, *map(len, texts)])
        store.whole, store.second = whole, second
        return store

    def part(self, start: int, stop: int) -> "TokenStore":
        """The texts from `start` to before `stop`, as a store of their own; nothing is copied."""
        part = copy.copy(self)
        part.offsets = self.offsets[start : stop + 1]
        part.whole = None if self.whole is None else self.whole[start:stop]
        part.second = None if self.second is None else self.second[start:stop]
        return part

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text, int32[n]."""
        return np.diff(self.offsets).astype(np.int32)

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of the texts `ids`, without a pass over the store; int32 in the shape of ids."""
        ids = np.asarray(ids, np.int64)
        return (self.offsets[ids + 1] - self.offsets[ids]).astype(np.int32)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def padded(self, ids, width: int, pad_id: int) -> tuple[np.ndarray, ...]:
        """The texts `ids` as one right-padded matrix; what exceeds `width` is left out.

        Returns:
            int32[len(ids), width] token ids, int32[len(ids)] lengths; of texts in two parts also
            where the second begins.
        """
        ids = np.asarray(ids, np.int64)
        lengths = np.minimum(self.lengths_of(ids), width)
        columns = np.arange(width)
        real = columns < lengths[:, None]
        out = np.full((len(ids), width), pad_id, np.int32)
        out[real] = self.values[(self.offsets[ids][:, None] + columns)[real]]
        return (out, lengths) if self.second is None else (out, lengths, self.second[ids])


class TokenWriter:
    """Appends texts to a token store on disk, tokenised in big parallel chunks.

    Ids are those that sentence-transformers gives a text with this prompt: for most models
    `tokenizer(prompt + text, truncation=True, max_length=max_length)`, without padding.

    Args:
        folder: is created, and complete when the `with` block ends.
        tokenizer: a fast tokenizer of transformers; see `reading_of`.
        max_length: tokens a text keeps at most, special tokens included.
        truncation_side: "right" or "left", the side that is cut off.
        bare: without special tokens, to be joined with another text; how long the texts were
            before they were cut is kept too, as it decides which of two is cut.
        pairs: what is appended are queries and keys, for the tokenizer's chat template.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer,
        *,
        max_length: int,
        truncation_side: str,
        bare: bool = False,
        pairs: bool = False,
    ):
        backend = plain_backend(tokenizer)
        self._bare = (backend, max_length, truncation_side) if bare else None
        self._cut = None if bare else Cutter(tokenizer, max_length, truncation_side)
        self._pairs, self._whole, self._second = pairs, None, None
        folder.mkdir(exist_ok=True)
        if bare:
            self._whole = ArrayWriter(folder / "whole.npy", np.int32)
        elif pairs or self._cut.splits:
            self._second = ArrayWriter(folder / "second.npy", np.int32)
        largest = max(backend.get_vocab().values())
        self._values = ArrayWriter(
            folder / "values.npy", np.uint16 if largest < 2**16 else np.uint32
        )
        self._offsets = ArrayWriter(folder / "offsets.npy", np.int64)
        self._offsets.append(0)
        self._texts: list[tuple[str, ...]] = []
        self._characters = 0

    def append(self, text: str, prompt: str = "", key: str = "") -> None:
        """
        Args:
            key: of a pair, whose query `text` is.
        """
        self._texts.append((text, prompt, key))
        self._characters += len(text) + len(key)
        if len(self._texts) >= CHUNK_TEXTS or self._characters >= CHUNK_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        texts, prompts, keys = zip(*self._texts, strict=True) if self._texts else ((), (), ())
        if self._bare:
            whole = [prompt + text for text, prompt, _ in self._texts]
            for ids, length in _bare_ids(self._bare[0], whole, *self._bare[1:]):
                self._add(ids)
                self._whole.append(length)
        else:
            found = (
                self._cut.pairs(texts, keys, prompts) if self._pairs else self._cut(texts, prompts)
            )
            for ids in found:
                self._add(ids)
            if self._second is not None:
                self._second.extend(map(self._cut.before, prompts))
        self._texts, self._characters = [], 0

    def _add(self, ids: list[int]) -> None:
        self._values.extend(ids)
        self._offsets.append(len(self._values))

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self._flush()
        for column in (self._values, self._offsets, self._whole, self._second):
            if column is not None:
                column.close()


def tokenize(
    texts: Iterable[Prompted],
    tokenizer,
    *,
    max_length: int,
    truncation_side: str,
    name: str,
    cache: Path,
    total: int | None,
    desc: str,
) -> TokenStore:
    """Tokenises `texts` into `{cache}/tokens/{name}`, or opens that folder when it is there.

    Args:
        texts: each with what stands before it.
        name: of everything that the ids depend on: contents and order of the texts,
            `fingerprint(tokenizer)`, `max_length` and `truncation_side`.
        total: how many texts there are, for the progress bar.
        desc: what the progress bar says.
    """
    folder = Path(cache) / "tokens" / name

    def build(beside: Path) -> None:
        with TokenWriter(
            beside, tokenizer, max_length=max_length, truncation_side=truncation_side
        ) as writer:
            for prompt, text in tqdm(texts, desc=desc, total=total, unit=" texts"):
                writer.append(text, prompt)

    return TokenStore(kept(folder, build))


def whole_tokens(texts: Sequence[Prompted], cut: Cutter) -> TokenStore:
    """A store in memory of texts with the ids that `TokenWriter` gives them."""
    found = []
    for i in range(0, len(texts), CHUNK_TEXTS):
        prompts, chunk = zip(*texts[i : i + CHUNK_TEXTS], strict=True)
        found += [np.array(ids, np.uint32) for ids in cut(chunk, prompts)]
    second = [cut.before(prompt) for prompt, _ in texts] if cut.splits else None
    return TokenStore.of(found, second=None if second is None else np.array(second, np.int32))


def pair_tokens(
    queries: Sequence[str], keys: Sequence[str], prompts: Sequence[str], cut: Cutter
) -> TokenStore:
    """A store in memory of pairs in the tokenizer's chat template; see `TokenWriter`."""
    found = []
    for i in range(0, len(queries), CHUNK_TEXTS):
        some = slice(i, i + CHUNK_TEXTS)
        ids = cut.pairs(queries[some], keys[some], prompts[some])
        found += [np.array(of_pair, np.uint32) for of_pair in ids]
    return TokenStore.of(found, second=np.zeros(len(queries), np.int32))


def bare_tokens(
    texts: Sequence[str], backend, max_length: int, side: str, desc: str | None = None
) -> TokenStore:
    """A store in memory of texts without special tokens, cut to `max_length` at `side`.

    Args:
        backend: as `plain_backend` makes it.
        desc: what a progress bar says; None for no bar.
    """
    kept, whole = [], []
    chunks = range(0, len(texts), CHUNK_TEXTS)
    for start in tqdm(chunks, desc=desc, unit=f" x {CHUNK_TEXTS} texts", disable=desc is None):
        chunk = texts[start : start + CHUNK_TEXTS]
        for ids, length in _bare_ids(backend, chunk, max_length, side):
            kept.append(np.array(ids, np.uint32))
            whole.append(length)
    return TokenStore.of(kept, np.array(whole, np.int32))


def _bare_ids(
    backend, texts: Sequence[str], max_length: int, side: str
) -> Iterator[tuple[list[int], int]]:
    """Token ids of each text, cut, and how many there were."""
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        ids = encoding.ids
        yield ids[:max_length] if side == "right" else ids[-max_length:], len(ids)
