"""One training file on disk: token ids of its texts and, row by row, what refers to them.

Everything that selection does not change is made once, in constant memory, and memory-mapped from
then on; what selection changes works on these arrays when they are loaded.
"""

import json
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llme_jax.config import DataConfig
from llme_jax.config.identity import identity, name_of
from llme_jax.data.arrays import ArrayWriter
from llme_jax.data.instructions import (
    Instruction,
    instruction_of,
)
from llme_jax.data.pairs import PairLayout
from llme_jax.data.rows import BadRows, Row, parse_row, read_lines
from llme_jax.data.select import Candidates, RowSummary
from llme_jax.data.tokens import TokenStore, TokenWriter
from llme_jax.files.atomic import digest_file
from llme_jax.files.checksums import kept

FORMAT = 3  # goes up when the files below change their meaning
REMEMBERED_TEXTS = 2_000_000  # keys among which a repeated text is found, about 250 MB

# Candidates of row i are entries offsets[i]:offsets[i + 1] of `candidates` and `scores`, the
# positives first; query i is text i of the query tokens.
COLUMNS = {
    "offsets": np.int64,  # n + 1
    "candidates": np.int64,  # index of the key's text
    "scores": np.float64,  # teacher score, NaN where the row has none; float64 for the filters
    "lines": np.int64,  # the row's line in the file, from 1
    "n_pos": np.int32,
    "highest": np.float64,  # of the row's teacher scores, NaN where it has none
    "lowest": np.float64,
    "best": np.int32,  # the first candidate with the highest score
    "key_hash": np.uint64,  # hash of each key text without its instruction
}


class TrainStore:
    """A training file of n rows, tokenised; opened by `open_store`.

    Attributes:
        name: of everything that it depends on.
        queries, keys: the tokens of n queries and of all distinct keys; None where there are pairs.
        pairs: of every candidate, joined with its query in a chat template; else None.
        offsets, candidates, scores, lines, key_hash: see COLUMNS.
        rows: what the row filters look at.
        tasks: how many rows each task has ("" where a row names none).
        unread: fields that no command knows.
        content: hash of the file.
        layout: how queries and keys are joined to pairs; None where they are read apart.
        teacher: vectors for batches to bring; None: they bring none.
    """

    def __init__(self, folder: Path, content: str, layout: PairLayout | None = None):
        self.name, self.content, self.layout = folder.name, content, layout
        self.teacher: TeacherVectors | None = None
        names = ("pairs",) if layout and layout.in_template else ("queries", "keys")
        stores = {name: TokenStore(folder / name) for name in names}
        self.queries, self.keys, self.pairs = map(stores.get, ("queries", "keys", "pairs"))
        columns = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in COLUMNS
        }
        self.offsets, self.candidates = columns["offsets"], columns["candidates"]
        self.scores, self.lines = columns["scores"], columns["lines"]
        self.key_hash = columns["key_hash"]
        self.rows = RowSummary(
            columns["n_pos"],
            np.diff(self.offsets),
            *(columns[name] for name in ("highest", "lowest", "best")),
        )
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tasks: dict[str, int] = meta["tasks"]
        self.bad_rows: list[tuple[int, str]] = meta["bad_rows"]
        self.unread: list[str] = meta["unread"]

    def __len__(self) -> int:
        return len(self.lines)

    def longest(self, field: str) -> int:
        """Tokens of the longest query, key or pair; of pairs at most those of any two together."""
        if field != "pair":
            return _longest(self.queries if field == "query" else self.keys)
        if self.pairs is not None:
            return _longest(self.pairs)
        return _longest(self.queries) + _longest(self.keys) + self.layout.special

    def padded(self, rows: np.ndarray) -> Candidates:
        """The candidates of some rows; what stands in the padding is of other rows."""
        n_keys = self.rows.n_keys[rows]
        column = np.arange(n_keys.max())
        at = np.minimum(self.offsets[rows][:, None] + column, len(self.scores) - 1)
        has_scores = ~np.isnan(self.rows.highest[rows])
        return Candidates(self.rows.n_pos[rows], n_keys, self.scores[at], has_scores)

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Where candidates [B, N] of rows [B] stand in `candidates` and `scores`; int64[B, N]."""
        return self.offsets[rows][:, None] + columns


def _longest(store: TokenStore) -> int:
    return int(store.lengths.max(initial=1))


class TeacherVectors(NamedTuple):
    """Another model's vectors of the texts of a training file.

    Attributes:
        store: the file as that model reads it: all rows of the student's, its own numbers of texts.
        queries, keys: float32[n, E] of that store's texts.
    """

    store: TrainStore
    queries: np.ndarray
    keys: np.ndarray

    @classmethod
    def zeros(cls, store: TrainStore, width: int) -> "TeacherVectors":
        """A stand-in that takes no memory."""
        shapes = (len(store.queries), width), (len(store.keys), width)
        return cls(store, *(np.broadcast_to(np.float32(0), shape) for shape in shapes))

    def of(self, lines: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of the query and the candidates [B, N] of the rows in these lines; float32[B, 1+N, E]."""
        rows = np.searchsorted(self.store.lines, lines)
        keys = self.store.candidates[self.store.entries(rows, columns)]
        return np.concatenate([self.queries[rows][:, None], self.keys[keys]], axis=1)


def open_store(
    path: str,
    data: DataConfig,
    tokenizer,
    tokenizer_name: str,
    cache: Path,
    bad_rows: BadRows,
    layout: PairLayout | None = None,
) -> TrainStore:
    """The store of a file under `{cache}/train`, made when its content or a setting is new.

    Args:
        tokenizer_name: `fingerprint(tokenizer)`.
        bad_rows: gets the file's invalid lines, also when the store was there before.
        layout: how queries and keys are joined; None: they are read apart.

    Raises:
        InputError: the file has more invalid lines than `bad_rows` allows.
    """
    content = digest_file(path)
    facts = {"content": content, "tokenizer": tokenizer_name, "layout": repr(layout)}
    of = identity(data, "queries", "keys", "texts", format=FORMAT, **facts)
    folder = cache / "train" / name_of(of)
    built = []

    def build(beside: Path) -> None:
        _build(beside, path, data, tokenizer, bad_rows, layout)
        built.append(beside)

    store = TrainStore(kept(folder, build), content, layout)
    if not built:
        for line, reason in store.bad_rows:
            bad_rows.add(path, line, reason)
    return store


def _lengths(data: DataConfig, layout: PairLayout | None) -> tuple[int, int]:
    """Tokens that a query and a key keep."""
    if layout:
        return layout.limit, layout.limit
    return data.query_max_length, data.key_max_length


class _InstructedRow(NamedTuple):
    row: Row
    instruction: Instruction


def _build(
    folder: Path,
    path: str,
    data: DataConfig,
    tokenizer,
    bad_rows: BadRows,
    layout: PairLayout | None,
) -> None:
    """Streams a file into `folder`."""

    def convert(record: dict) -> _InstructedRow:
        row = parse_row(record)
        return _InstructedRow(row, instruction_of(data, row.task, row.prompt))

    known_bad = len(bad_rows.found)
    with ExitStack() as stack:
        builder = _Builder(folder, data, tokenizer, stack, layout)
        for line, (row, instruction) in read_lines(path, convert, bad_rows):
            builder.append(line, row, instruction)
    bad = [(line, reason) for _, line, reason in bad_rows.found[known_bad:]]
    meta = {"source": path, "tasks": builder.tasks, "bad_rows": bad}
    meta["unread"] = sorted(builder.unread)
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


class _Builder:
    """Appends rows to the files of a store; keys with the same text are stored once."""

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        tokenizer,
        stack: ExitStack,
        layout: PairLayout | None,
    ):
        in_template = bool(layout and layout.in_template)
        how = {"truncation_side": data.truncation_side, "bare": bool(layout) and not in_template}
        limits = dict(zip(("queries", "keys"), _lengths(data, layout), strict=True))
        if in_template:
            limits, how["pairs"] = {"pairs": layout.limit}, True
        writers = {
            name: stack.enter_context(
                TokenWriter(folder / name, tokenizer, max_length=limit, **how)
            )
            for name, limit in limits.items()
        }
        self._queries, self._keys, self._pairs = map(writers.get, ("queries", "keys", "pairs"))
        self._columns = {n: ArrayWriter(folder / f"{n}.npy", t) for n, t in COLUMNS.items()}
        for column in self._columns.values():
            stack.callback(column.close)
        self._columns["offsets"].append(0)
        self._seen: dict[int, int] = {}  # hash of instruction and text -> index of the text
        self.tasks: dict[str, int] = {}
        self.unread: set[str] = set()

    def append(self, line: int, row: Row, instruction: Instruction) -> None:
        columns = self._columns
        if self._pairs:
            for key in row.keys:
                self._pairs.append(row.query, instruction.query, instruction.key + key)
        else:
            self._queries.append(row.query, instruction.query)
        salt = _hash(instruction.key)
        columns["candidates"].extend(self._key_index(k, instruction.key, salt) for k in row.keys)
        columns["offsets"].append(len(columns["candidates"]))
        columns["scores"].extend(row.teacher_scores or [np.nan] * len(row.keys))
        columns["lines"].append(line)
        columns["n_pos"].append(row.positives)
        for name, value in zip(("highest", "lowest", "best"), row.score_range(), strict=True):
            columns[name].append(value)
        self.unread |= row.unread
        self.tasks[row.task or ""] = self.tasks.get(row.task or "", 0) + 1

    def _key_index(self, text: str, instruction: str, salt: int) -> int:
        """The index of a key's text, which is written when it was not seen lately."""
        text_hash = _hash(text)
        identity = text_hash ^ salt  # one text under two instructions is two texts
        index = self._seen.get(identity)
        if index is None:
            index = len(self._columns["key_hash"])
            self._columns["key_hash"].append(text_hash)
            if self._keys:
                self._keys.append(text, instruction)
            if len(self._seen) >= REMEMBERED_TEXTS:
                self._seen.clear()
            self._seen[identity] = index
        return index


def _hash(text: str) -> int:
    """64 bits that identify a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
