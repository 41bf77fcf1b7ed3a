"""What retrieval is evaluated on: the passages of --corpus and the queries of --eval_data.

A corpus may hold tens of millions of passages, so only the byte offset of every line is kept in
memory; a passage's text is read from the file when it is asked for.
"""

import hashlib
import os
from array import array
from collections.abc import Collection, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from string import Formatter

import numpy as np
from tqdm import tqdm

from llme_jax.data.rows import (
    BadRows,
    other_format,
    parse_line,
    prompt_of,
    query_id_of,
    read_lines,
    shown,
    strings_of,
    task_of,
    whole_numbers,
)
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file

_shown = partial(shown, none="null")
FIELDS = ("_id", "id", "docid", "doc_id", "pid")  # of a passage; the first that it has


def id_of(passage: dict, fields: tuple[str, ...] = FIELDS) -> str | None:
    """The id of a line of a corpus; None where it has none."""
    value = next((passage[name] for name in fields if passage.get(name) is not None), None)
    return None if value is None else str(value)


class Corpus:
    """Passages by index, the text of each made from its fields by a template.

    Args:
        path: JSON lines.
        key_template: a format string over the fields of a line, as in "{title} {text}".

    Attributes:
        offsets: int64[C + 1]; passage i is the bytes offsets[i]:offsets[i + 1] of the file.
        digest: hash of the file's content.

    Raises:
        InputError: a line is no JSON object or lacks a string the template asks for.
    """

    def __init__(self, path: str | Path, key_template: str):
        self.path = Path(path)
        self.key_template = key_template
        self._fields = _template_fields(key_template)
        self.offsets, self.digest = self._scan()
        self._file = open(self.path, "rb")  # noqa: SIM115, read as long as this is there

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, i: int) -> str:
        """Passage i without any instruction."""
        return self._format(self._line(i))

    def name(self, i: int) -> str:
        """The id of passage i; its number where it has none."""
        return id_of(self._line(i)) or str(i)

    def field(self, i: int, name: str):
        """What passage i has under that name; None where it has nothing."""
        return self._line(i).get(name)

    def _line(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        start, stop = self.offsets[i : i + 2].tolist()
        line = os.pread(self._file.fileno(), stop - start, start)
        try:
            return parse_line(line)
        except InputError:
            raise InputError(f"{self.path}: was changed while it was read; start again") from None

    def __iter__(self) -> Iterator[str]:
        return map(self.text, range(len(self)))

    def _format(self, row: dict) -> str:
        return self.key_template.format_map({name: row[name] for name in self._fields})

    def _scan(self) -> tuple[np.ndarray, str]:
        """One pass over the file: validates every line, notes where it ends, hashes it all."""
        position, offsets, digest = 0, array("q", [0]), hashlib.sha256()
        size = _file_size(self.path, "--corpus")
        with (
            open(self.path, "rb") as file,
            tqdm(total=size, desc=f"Reading {self.path.name}", unit="B", unit_scale=True) as bar,
        ):
            for number, line in enumerate(file, 1):
                digest.update(line)
                bar.update(len(line))
                position += len(line)
                if line.strip():
                    if len(offsets) == 1 and (kind := other_format(line)):
                        raise InputError(
                            f"{self.path}: is {kind} instead of JSON lines: write one object a line"
                        )
                    self._check(line, f"{self.path}:{number}")
                    offsets.append(position)
        if len(offsets) == 1:
            raise InputError(f"{self.path}: has no passages, give --corpus a file that does")
        return np.asarray(offsets, np.int64), digest.hexdigest()

    def _check(self, line: bytes, where: str) -> None:
        try:
            row = parse_line(line)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        for name in self._fields:
            if name not in row:
                raise InputError(
                    f"{where}: has no field '{name}', only {', '.join(row) or 'none at all'}: "
                    f"give a --key_template of its fields instead of '{self.key_template}'"
                )
            if not isinstance(row[name], str):
                raise InputError(f"{where}: {name} is {_shown(row[name])}: give a string")


class QuerySet:
    """Which queries those of a file are, as the digest of all of them.

    Attributes:
        own_ids: do all rows bring a query_id?
    """

    def __init__(self):
        self._hash, self._count, self.own_ids = blake2b(digest_size=16), 0, True

    def add(self, row: dict) -> None:
        query_id = query_id_of(row, self._count)
        self.own_ids &= row.get("query_id") is not None
        self._hash.update(repr((query_id, row["query"])).encode())
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


# Metrics that need pos_index in every row. Mining uses it where it is there.
NEED_POSITIVES = {"mrr", "recall", "ndcg"}


class EvalData:
    """Queries with what is known of their answers; row i of every list is query i.

    Args:
        path: JSON lines with `query` and, each where a metric needs it, `pos_index`, `answers`;
            optionally `query_id` (the row's number, from 0, where absent) and `task`.
        metrics: those to be computed; decides which fields every row has to have.
        corpus_size: passages that `pos_index` may point to.

    Attributes:
        query_ids: int or str, no two alike.
        task: the task of all rows, or None.
        prompts: a row's own text before its query, or None.
        positives: passages that answer the query, each once; None when no metric needs them.
        answers: accepted answers; None when no metric needs them.
        digest: hash of the file's content.
        queries: which these are.

    Raises:
        InputError: names the line, the field and the remedy.
    """

    def __init__(self, path: str | Path, *, metrics: Collection[str], corpus_size: int):
        self.path = Path(path)
        self.texts: list[str] = []
        self.query_ids: list[int | str] = []
        self.task: str | None = None
        self.prompts: list[str | None] = []
        self.queries = QuerySet()
        self.positives: list[list[int]] | None = [] if NEED_POSITIVES & set(metrics) else None
        self.answers: list[list[str]] | None = [] if "nq" in metrics else None
        rows = read_queries(self.path, metrics=metrics, corpus_size=corpus_size, bad_rows=BadRows())
        for query_id, row in rows:
            self.task = row.get("task")
            self.query_ids.append(query_id)
            self.texts.append(row["query"])
            self.prompts.append(row.get("prompt"))
            self.queries.add(row)
            if self.positives is not None:
                self.positives.append(list(dict.fromkeys(row["pos_index"])))
            if self.answers is not None:
                self.answers.append(row["answers"])
        if not self.texts:
            raise InputError(f"{self.path}: has no queries, give --eval_data a file that does")
        self.digest = digest_file(self.path)

    def __len__(self) -> int:
        return len(self.texts)


def read_queries(
    path: Path, *, metrics: Collection[str], corpus_size: int | None, bad_rows: BadRows
) -> Iterator[tuple[int | str, dict]]:
    """The rows of --eval_data that can be used, each behind its query_id.

    Of the rows before, only the query_ids are remembered.

    Args:
        metrics: those to be computed; decides which fields every row has to have.
        corpus_size: passages that `pos_index` may point to; None where that is not known.
        bad_rows: decides whether a row that cannot be used is left out or an error.

    Raises:
        InputError: there is no such file, or it is empty.
    """
    _file_size(path, "--eval_data")
    check = partial(_checked_query, metrics=set(metrics), corpus_size=corpus_size)
    lines: dict[int | str, int] = {}  # where a query_id was seen
    task = None
    for number, row in read_lines(str(path), check, bad_rows):
        query_id = query_id_of(row, len(lines))
        if query_id in lines:
            reason = (
                f"query_id {_shown(query_id)} is that of line {lines[query_id]} too: give every "
                "row its own, or none to any row"
            )
            bad_rows.add(str(path), number, reason)
        elif lines and row.get("task") != task:
            reason = (
                f"task is {_shown(row.get('task'))}, in the rows before it {_shown(task)}: "
                "evaluate one task at a time"
            )
            bad_rows.add(str(path), number, reason)
        else:
            lines[query_id], task = number, row.get("task")
            yield query_id, row


def _checked_query(row: dict, metrics: set[str], corpus_size: int | None) -> dict:
    """The row, when it can be used; an InputError, to which file and line are added."""
    query = row.get("query")
    if not isinstance(query, str):
        raise InputError(f'query is {_shown(query)}: every row needs "query", a string')
    query_id_of(row, 0)
    task_of(row)
    prompt_of(row)
    if "pos_index" in row:
        row["pos_index"] = whole_numbers(row["pos_index"])
    if NEED_POSITIVES & metrics or ("collate_neg" in metrics and row.get("pos_index")):
        _check_pos_index(row.get("pos_index"), corpus_size)
    if "nq" in metrics:
        check_answers(row.get("answers"))
    if "collate_neg" in metrics:  # mining leaves out what these hold
        for name in ("pos", "answers"):
            strings_of(row, name)
    return row


def _check_pos_index(positives, corpus_size: int | None) -> None:
    if not positives:
        raise InputError(
            "has no pos_index, which mrr, recall and ndcg need: add it, or ask for --metrics nq, "
            "which needs only answers"
        )
    if not isinstance(positives, list):
        raise InputError(f"pos_index is {_shown(positives)}: give a list of integers")
    for index in positives:
        if type(index) is not int or index < 0 or (corpus_size and index >= corpus_size):
            numbers = f"0 to {corpus_size - 1}" if corpus_size else "from 0"
            raise InputError(
                f"pos_index has {_shown(index)}, passages are numbered {numbers}: "
                "give the --corpus that pos_index was made for"
            )


def check_answers(answers) -> None:
    if not answers:
        raise InputError(
            "has no answers, which nq needs: add them, or ask for --metrics mrr recall ndcg, which "
            "need only pos_index"
        )
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"answers is {_shown(answers)}: give a list of strings")


def _template_fields(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"--key_template '{template}': {error}; write {{field}}") from None
    if not names or not all(name.isidentifier() for name in names):
        raise InputError(
            f"--key_template '{template}': name the fields of a corpus line in braces, as in "
            "'{title} {text}'"
        )
    return list(dict.fromkeys(names))


def _file_size(path: Path, flag: str) -> int:
    if not path.is_file():
        raise InputError(f"{flag} {path}: there is no such file, check the path and --data_root")
    if not (size := path.stat().st_size):
        raise InputError(f"{flag} {path}: the file is empty, give one with JSON lines")
    return size
