"""The token store: every text tokenised once, kept as ragged ids in memory-mapped files."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llme_jax.data.arrays import ArrayWriter
from llme_jax.errors import InputError
from llme_jax.files.checksums import kept

# One call of the tokenizer sees so many texts and characters at most, which bounds its memory.
CHUNK_TEXTS = 4096
CHUNK_CHARACTERS = 1 << 21


class TokenStore:
    """Token ids of n texts, memory-mapped: text i is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        whole: of bare texts, int32[n], how many tokens each had before it was cut; else None.
    """

    def __init__(self, folder: Path):
        self.values = np.asarray(np.load(folder / "values.npy", mmap_mode="r"))
        self.offsets = np.asarray(np.load(folder / "offsets.npy", mmap_mode="r"))
        bare = (folder / "whole.npy").is_file()
        self.whole = np.asarray(np.load(folder / "whole.npy", mmap_mode="r")) if bare else None

    @classmethod
    def of(cls, texts: Sequence[np.ndarray], whole: np.ndarray | None = None) -> "TokenStore":
        """A store in memory, of the ids of each text."""
        store = cls.__new__(cls)
        store.values = np.concatenate([np.zeros(0, np.uint32), *texts])
        store.offsets, store.whole = np.cumsum([0, *map(len, texts)]), whole
        return store

    def part(self, start: int, stop: int) -> "TokenStore":
        """The texts from `start` to before `stop`, as a store of their own; nothing is copied."""
        part = copy.copy(self)
        part.offsets = self.offsets[start : stop + 1]
        part.whole = None if self.whole is None else self.whole[start:stop]
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

    def padded(self, ids, width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The texts `ids` as one right-padded matrix; what exceeds `width` is left out.

        Returns:
            int32[len(ids), width] token ids, int32[len(ids)] lengths.
        """
        ids = np.asarray(ids, np.int64)
        lengths = np.minimum(self.lengths_of(ids), width)
        columns = np.arange(width)
        real = columns < lengths[:, None]
        out = np.full((len(ids), width), pad_id, np.int32)
        out[real] = self.values[(self.offsets[ids][:, None] + columns)[real]]
        return out, lengths


class TokenWriter:
    """Appends texts to a token store on disk, tokenised in big parallel chunks.

    Ids are what `tokenizer(text, truncation=True, max_length=max_length)` gives, special tokens
    included, without padding.

    Args:
        folder: is created, and complete when the `with` block ends.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens a text keeps at most, special tokens included.
        truncation_side: "right" or "left", the side that is cut off.
        bare: without special tokens, to be joined with another text; how long the texts were
            before they were cut is kept too, as it decides which of two is cut.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer,
        *,
        max_length: int,
        truncation_side: str,
        bare: bool = False,
    ):
        self._tokenizer = cutting_backend(tokenizer, max_length, truncation_side)
        self._bare = (max_length, truncation_side) if bare else None
        self._empty = tokenizer.pad_token_id or 0
        folder.mkdir(exist_ok=True)
        if bare:
            self._tokenizer.no_truncation()
            self._whole = ArrayWriter(folder / "whole.npy", np.int32)
        largest = max(self._tokenizer.get_vocab().values())
        self._values = ArrayWriter(
            folder / "values.npy", np.uint16 if largest < 2**16 else np.uint32
        )
        self._offsets = ArrayWriter(folder / "offsets.npy", np.int64)
        self._offsets.append(0)
        self._texts: list[str] = []
        self._characters = 0

    def append(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if len(self._texts) >= CHUNK_TEXTS or self._characters >= CHUNK_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if self._bare:
            for ids, whole in _bare_ids(self._tokenizer, self._texts, *self._bare):
                self._add(ids)
                self._whole.append(whole)
        else:
            for encoding in self._tokenizer.encode_batch_fast(self._texts):
                # Language models' tokenizers may make nothing of an empty text.
                self._add(encoding.ids or [self._empty])
        self._texts, self._characters = [], 0

    def _add(self, ids: list[int]) -> None:
        self._values.extend(ids)
        self._offsets.append(len(self._values))

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self._flush()
        self._values.close()
        self._offsets.close()
        if self._bare:
            self._whole.close()


def tokenize(
    texts: Iterable[str],
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
            for text in tqdm(texts, desc=desc, total=total, unit=" texts"):
                writer.append(text)

    return TokenStore(kept(folder, build))


def whole_tokens(texts: Sequence[str], backend, empty: int) -> TokenStore:
    """A store in memory of texts with the ids that `TokenWriter` gives them.

    Args:
        backend: as `cutting_backend` makes it.
        empty: the token of a text without any.
    """
    chunks = (texts[i : i + CHUNK_TEXTS] for i in range(0, len(texts), CHUNK_TEXTS))
    encodings = (encoding for chunk in chunks for encoding in backend.encode_batch_fast(chunk))
    return TokenStore.of([np.array(e.ids or [empty], np.uint32) for e in encodings])


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


def fingerprint(tokenizer) -> str:
    """A name for what a tokenizer does to texts, the same on every machine."""
    return blake2b(plain_backend(tokenizer).to_str().encode(), digest_size=16).hexdigest()


def cutting_backend(tokenizer, max_length: int, side: str):
    """A copy of the Rust tokenizer inside that cuts texts, special tokens included, at `side`.

    Raises:
        InputError: `max_length` leaves no room for text.
    """
    backend = plain_backend(tokenizer)
    special = backend.num_special_tokens_to_add(False)
    if max_length <= special:
        raise InputError(
            f"a maximum length of {max_length} tokens leaves no room for text beside the "
            f"tokenizer's {special} special tokens: give {special + 1} or more"
        )
    backend.enable_truncation(max_length, direction=side)
    return backend


def plain_backend(tokenizer):
    """A copy of the Rust tokenizer inside, with padding and truncation switched off."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} has no fast tokenizer: save a tokenizer.json beside it"
        )
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend
