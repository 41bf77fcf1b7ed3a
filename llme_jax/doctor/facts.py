"""What there is to know about a training file, found in one pass and little memory.

Of texts only 64-bit hashes and counts of lengths are kept, and a few numbers of every row.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from llme_jax.config import DataConfig, LossConfig
from llme_jax.data.dataset import Dataset, make_dataset
from llme_jax.data.instructions import Instruction, instruction_of
from llme_jax.data.rows import Row, parse_row, read_lines
from llme_jax.data.select import RowSummary
from llme_jax.data.tokens import CHUNK_CHARACTERS, CHUNK_TEXTS, Prompted
from llme_jax.doctor.counts import HashSet, Lengths, Lines
from llme_jax.errors import InputError
from llme_jax.hugging_face.reading import Cutter

FLAWS = ("duplicate_queries", "repeated_keys", "positive_among_negatives", "empty_texts")
_NUMBERS = {"lines": "q", "n_pos": "i", "n_keys": "i", "highest": "d", "lowest": "d", "best": "i"}


@dataclass
class _Columns:
    """Of a training file, what decides which rows are trained on; stands in for a TrainStore."""

    rows: RowSummary
    lines: ndarray
    tasks: dict[str, int]

    def __len__(self) -> int:
        return len(self.lines)


@dataclass
class FileFacts:
    """What is known of a training file.

    Attributes:
        bad: lines that are no valid row.
        unread: fields that no command knows.
        flaws: valid rows that are questionable, by what is wrong with them.
        query_lengths, key_lengths: tokens of all queries, and of all distinct keys.
        queries, keys, positives: hashes of the distinct texts; of a key, also of its instruction.
    """

    path: str
    bad: Lines = field(default_factory=Lines)
    unread: set[str] = field(default_factory=set)
    flaws: dict[str, Lines] = field(default_factory=lambda: {name: Lines() for name in FLAWS})
    tasks: Counter = field(default_factory=Counter)
    query_lengths: Lengths = field(default_factory=Lengths)
    key_lengths: Lengths = field(default_factory=Lengths)
    queries: HashSet = field(default_factory=HashSet)
    keys: HashSet = field(default_factory=HashSet)
    positives: HashSet = field(default_factory=HashSet)
    score_sum: float = 0.0
    score_count: int = 0
    _numbers: dict[str, array] = field(
        default_factory=lambda: {name: array(kind) for name, kind in _NUMBERS.items()}
    )

    def add(self, line: int, row: Row) -> None:
        """Notes all of a row but its texts."""
        pos, neg = row.keys[: row.positives], row.keys[row.positives :]
        flaws = {
            "positive_among_negatives": not set(pos).isdisjoint(neg),
            "repeated_keys": len(set(pos)) < len(pos) or len(set(neg)) < len(neg),
            "empty_texts": not all(text.strip() for text in (row.query, *row.keys)),
        }
        for name, found in flaws.items():
            if found:
                self.flaws[name].add(self.path, line)
        self.tasks[row.task or ""] += 1
        self.unread |= row.unread
        scores = row.teacher_scores or []
        self.score_sum += sum(scores)
        self.score_count += len(scores)
        values = line, row.positives, len(row.keys), *row.score_range()
        for column, value in zip(self._numbers.values(), values, strict=True):
            column.append(value)

    def numbers(self) -> tuple[ndarray, RowSummary]:
        """The lines of all rows, and what the filters look at."""
        lines, *columns = (np.array(column) for column in self._numbers.values())
        return lines, RowSummary(*columns)

    def dataset(self, data: DataConfig, loss: LossConfig) -> Dataset:
        """What training would make of the file.

        Raises:
            InputError: what it would stop with.
        """
        lines, rows = self.numbers()
        columns = _Columns(rows, lines, dict(self.tasks))
        return make_dataset("", self.path, columns, data, loss, sample_seed=(0, 0))

    def trained_on(self, data: DataConfig, loss: LossConfig) -> tuple[int, str | None]:
        """How many rows training would use, or 0 and what it would stop with."""
        try:
            return len(self.dataset(data, loss).rows), None
        except InputError as error:
            return 0, str(error)

    def summary(self, data: DataConfig, loss: LossConfig) -> dict:
        """All that is reported of the file, in plain numbers; None where nothing is known."""
        _, rows = self.numbers()
        n_neg = rows.n_keys - rows.n_pos
        kept, stops = self.trained_on(data, loss)
        bad = [{"line": line, "reason": reason} for _, line, reason in self.bad.found]
        return {
            "file": self.path,
            "rows": len(n_neg),
            "bad_rows": {"count": self.bad.count, "first": bad},
            "trained_on": kept,
            "training_stops_with": stops,
            "tasks": dict(self.tasks),
            "query_tokens": self.query_lengths.summary(data.query_max_length),
            "key_tokens": self.key_lengths.summary(data.key_max_length),
            "keys": int(rows.n_keys.sum()),
            "distinct_keys": len(self.keys),
            "positives": _spread(rows.n_pos),
            "negatives": _spread(n_neg),
            "no_positives": int((rows.n_pos == 0).sum()),
            "no_negatives": int((n_neg == 0).sum()),
            "group_negatives": data.train_group_size - 1,
            "few_negatives": int((n_neg < data.train_group_size - 1).sum()),
            "teacher_scores": self._teacher_scores(rows),
            "unread_fields": sorted(self.unread),
            **{name: lines.summary() for name, lines in self.flaws.items()},
        }

    def _teacher_scores(self, rows: RowSummary) -> dict | None:
        scored = ~np.isnan(rows.highest)
        if not scored.any():
            return None
        labelled = scored & (rows.n_pos > 0) & (rows.n_pos < rows.n_keys)  # there is a choice
        n_pos, n_keys, best = rows.n_pos[labelled], rows.n_keys[labelled], rows.best[labelled]
        return {
            "rows": int(scored.sum()),
            "mean": self.score_sum / self.score_count,
            "min": float(rows.lowest[scored].min()),
            "max": float(rows.highest[scored].max()),
            "median_spread": float(np.median((rows.highest - rows.lowest)[scored])),
            "best_is_positive": float((best < n_pos).mean()) if labelled.any() else None,
            "by_chance": float((n_pos / n_keys).mean()) if labelled.any() else None,
        }


def _spread(counts: ndarray) -> dict | None:
    if not len(counts):
        return None
    return {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())}


def read_facts(path: str, data: DataConfig, tokenizer: Cutter) -> FileFacts:
    """Reads a training file once.

    Args:
        tokenizer: cuts nothing off.
    """

    def convert(record: dict) -> tuple[Row, Instruction]:
        row = parse_row(record)
        return row, instruction_of(data, row.task, row.prompt)

    facts = FileFacts(path)
    texts = _Texts(facts, tokenizer)
    for line, (row, instruction) in read_lines(path, convert, facts.bad):
        facts.add(line, row)
        texts.add(line, row, instruction)
    texts.flush()
    return facts


class _Texts:
    """Texts on their way to the tokenizer, which gets many at a time."""

    def __init__(self, facts: FileFacts, tokenizer: Cutter):
        self._facts, self._tokenizer = facts, tokenizer
        self._clear()

    def _clear(self) -> None:
        self._lines: list[int] = []
        self._queries: list[Prompted] = []
        self._keys: list[Prompted] = []
        self._query_hashes, self._key_hashes, self._positive_hashes = ([] for _ in range(3))
        self._characters = 0

    def add(self, line: int, row: Row, instruction: Instruction) -> None:
        self._lines.append(line)
        self._queries.append((instruction.query, row.query))
        self._query_hashes.append(hash(row.query))
        keys = [(instruction.key, key) for key in row.keys]
        hashes = [hash(key) for key in row.keys]
        self._keys += keys
        self._positive_hashes += hashes[: row.positives]
        salt = hash(instruction.key)  # one text under two instructions is two texts
        self._key_hashes += [h ^ salt for h in hashes]
        self._characters += len(row.query) + sum(map(len, row.keys))
        if len(self._keys) >= CHUNK_TEXTS or self._characters >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        facts = self._facts
        queries, keys, positives = (
            np.array(hashes, np.int64)
            for hashes in (self._query_hashes, self._key_hashes, self._positive_hashes)
        )
        for i in np.flatnonzero(~facts.queries.add(queries)):
            facts.flaws["duplicate_queries"].add(facts.path, self._lines[i])
        facts.positives.add(positives)
        new = [self._keys[i] for i in np.flatnonzero(facts.keys.add(keys))]
        for lengths, texts in ((facts.query_lengths, self._queries), (facts.key_lengths, new)):
            if texts:
                prompts, texts = zip(*texts, strict=True)
                lengths.add([len(ids) for ids in self._tokenizer(texts, prompts)])
        self._clear()
