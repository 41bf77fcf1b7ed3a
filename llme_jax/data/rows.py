"""Training rows: JSON lines, validated one at a time as they are read.

Whatever is wrong is said with file, line, value and remedy; `--max_bad_rows` lines may be skipped.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from llme_jax.config.setting import LARGEST_FLOAT
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write

logger = logging.getLogger(__name__)

SCORES_OF = "teacher_scores_of"  # the field that names others than these
# Fields of training rows: what training reads, and what the other commands read and write.
KNOWN_FIELDS = {
    *("query", "pos", "neg", "history", "task", "prompt"),
    *("teacher_scores", SCORES_OF, "pos_scores", "neg_scores"),
    *("query_id", "pos_index", "neg_index", "pos_id", "neg_id", "answers", "key", "key_index"),
    *("neg_source", "neg_rank", "neg_score", "neg_reranker_score"),
    *("score_inputs", "context_inputs", "query_inputs", "answer_inputs"),
}
T = TypeVar("T")


class Row(NamedTuple):
    """One training row: a query and its candidates, the positives first."""

    query: str
    keys: list[str]
    positives: int  # how many of the keys are positives
    teacher_scores: list[float] | None  # one a key
    task: str | None
    prompt: str | None = None  # what is put before this query, where queries get an instruction
    unread: frozenset[str] = frozenset()  # fields that no command knows

    def score_range(self) -> tuple[float, float, int]:
        """Highest and lowest teacher score, and the first key with the highest; NaN and 0 where
        the row has none."""
        scores = self.teacher_scores
        if not scores:
            return math.nan, math.nan, 0
        highest = max(scores)
        return highest, min(scores), scores.index(highest)


class ScoringRow(NamedTuple):
    """A row whose candidates a language model scores."""

    task: str
    query: str
    keys: list[str]  # pos + neg, or history
    positives: int  # how many of the keys are positives
    answers: list[str]
    # Of task lrlm, where the row has token lists: the tokens of each key, and those that follow.
    tokens: tuple[list[list[int]], list[int], list[int], list[int]] | None = None


@dataclass
class BadRows:
    """Invalid lines: up to `allowed` of them are noted and skipped, the next one is an error."""

    allowed: int = 0
    found: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, reason

    def add(self, path: str, line: int, reason: str) -> None:
        """
        Raises:
            InputError: there are more than `allowed`.
        """
        if len(self.found) >= self.allowed:
            skipped = f" (after {self.allowed} skipped lines)" if self.allowed else ""
            raise InputError(f"{path}:{line}: {reason}{skipped}")
        self.found.append((path, line, reason))

    def report(self, path: Path | None) -> None:
        """Says how many lines were skipped, and lists them in `path`; nothing when none were."""
        if not self.found:
            return
        where = f", see {path}" if path else ""
        logger.warning("skipped %d invalid lines%s", len(self.found), where)
        if path:
            with atomic_write(path) as beside, beside.open("w", encoding="utf-8") as file:
                for name, line, reason in self.found:
                    record = {"file": name, "line": line, "reason": reason}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(
    path: str, convert: Callable[[dict], T], bad_rows: BadRows
) -> Iterator[tuple[int, T]]:
    """Line numbers (from 1) and converted objects of a JSON-lines file; blank lines are skipped.

    Args:
        convert: makes a value of a parsed object; its InputErrors get file and line in front.
        bad_rows: decides whether an invalid line is skipped or an error.
    """
    first = True
    for number, line in _filled_lines(path):
        if first and (kind := other_format(line)):
            raise InputError(f"{path}: is {kind} instead of JSON lines: write one object a line")
        first = False
        try:
            value = convert(parse_line(line))
        except InputError as error:
            bad_rows.add(path, number, str(error))
        else:
            yield number, value


def read_texts(path: str) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines of a text file, without their ends; blank ones are skipped.

    Raises:
        InputError: a line is no UTF-8.
    """
    for number, line in _filled_lines(path):
        try:
            yield number, _decoded(line).rstrip("\r\n")
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None


def _filled_lines(path: str) -> Iterator[tuple[int, bytes]]:
    with (
        open(path, "rb") as lines,
        tqdm(
            total=os.path.getsize(path),
            desc=f"Reading {os.path.basename(path)}",
            unit="B",
            unit_scale=True,
        ) as bar,
    ):
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            if line.strip():
                yield number, line


def parse_row(record: dict) -> Row:
    """Validates one training row; fields that training does not use may hold anything.

    Raises:
        InputError: says what is wrong with which field, without file and line.
    """
    query, task = query_of(record), task_of(record)
    pos, neg, names = _candidates(record)
    scores = record.get("teacher_scores")
    if scores is not None:
        if record.get(SCORES_OF) not in (None, names):
            raise InputError(
                f"teacher_scores are those of {record[SCORES_OF]}, as llme_jax.rank says there, "
                f"and {names} is trained on: rank the row without {record[SCORES_OF]}"
            )
        _check_scores("teacher_scores", scores, len(pos) + len(neg), names)
    elif names == "pos + neg":
        scores = _scores_apart(record, pos, neg)
    unread = frozenset(record.keys() - KNOWN_FIELDS)
    return Row(query, pos + neg, len(pos), scores, task, prompt_of(record), unread)


def parse_scoring_row(record: dict, tasks: Collection[str]) -> ScoringRow:
    """Validates one row to be scored.

    Args:
        tasks: those that there is a prompt for.

    Raises:
        InputError: says what is wrong with which field, without file and line.
    """
    task = task_of(record)
    if task not in tasks:
        raise InputError(f"task is {shown(task)}: give one of {', '.join(tasks)}")
    pos, neg, names = _candidates(record)
    keys = pos + neg
    if task == "lrlm" and record.get("score_inputs") is not None:
        key_tokens = record["score_inputs"]
        if not isinstance(key_tokens, list) or len(key_tokens) != len(keys):
            raise InputError(f"score_inputs is no list with one entry for each of {names}")
        lists = [_tokens(tokens, f"score_inputs[{i}]") for i, tokens in enumerate(key_tokens)]
        rest = (_tokens(record.get(f"{n}_inputs"), f"{n}_inputs") for n in ("context", "query"))
        answer = _tokens(record.get("answer_inputs"), "answer_inputs")
        if not answer:
            raise InputError("answer_inputs is empty: there is nothing to score")
        return ScoringRow(task, "", keys, len(pos), [""], (lists, *rest, answer))
    answers = strings_of(record, "answers")
    if not answers:
        raise InputError("answers is missing or empty: give the desired outputs, a list of strings")
    for i, answer in enumerate(answers):
        if not answer.strip():
            raise InputError(f"answers[{i}] is {shown(answer)}: there is nothing to score")
    return ScoringRow(task, query_of(record), keys, len(pos), answers)


def query_of(record: dict) -> str:
    query = record.get("query")
    if not isinstance(query, str):
        raise InputError(f'query is {shown(query)}: every row needs "query", a string')
    return query


def scored_source(record: dict) -> str:
    """The fields whose texts a row's teacher_scores are read for."""
    return "history" if record.get("history") is not None else "pos + neg"


def whole_numbers(values):
    """Of a list, whole numbers that other tools have written as 17.0 as 17; all else as it is."""
    if not isinstance(values, list):
        return values
    return [int(v) if type(v) is float and v.is_integer() else v for v in values]


def query_id_of(record: dict, number: int) -> int | str:
    """The row's `query_id`, its number where it has none."""
    query_id = record.get("query_id")
    if query_id is not None and type(query_id) not in (int, str):
        raise InputError(f"query_id is {shown(query_id)}: give an integer or a string")
    return number if query_id is None else query_id


def task_of(record: dict) -> str | None:
    task = record.get("task")
    if not isinstance(task, str | None):
        raise InputError(f"task is {shown(task)}: give a string, as in qa or tool")
    return task


def prompt_of(record: dict) -> str | None:
    prompt = record.get("prompt")
    if not isinstance(prompt, str | None):
        raise InputError(f"prompt is {shown(prompt)}: give a string, the text before the query")
    return prompt


def not_read(fields: list[str]) -> str:
    """Of fields that no command knows: a misspelt name costs its data without a word."""
    more = f" and {len(fields) - 8} more" if len(fields) > 8 else ""
    return f"training does not read these fields: {', '.join(fields[:8])}{more}"


def _candidates(record: dict) -> tuple[list[str], list[str], str]:
    """Positives, the other candidates, and which fields they came from."""
    if scored_source(record) == "history":
        return [], strings_of(record, "history"), "history"
    if record.get("pos") is None and record.get("neg") is None:
        raise InputError("no candidates: every row needs pos and neg, or history")
    return strings_of(record, "pos"), strings_of(record, "neg"), "pos + neg"


def _tokens(value, name: str) -> list[int]:
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise InputError(f"{name} is {shown(value)}: give a list of token ids")
    return value


def other_format(line: bytes) -> str | None:
    """What a text file is that is no JSON lines, seen from its first line; None where it may be."""
    text = line.decode("utf-8-sig", errors="replace").strip()
    if text == "{":
        return "one JSON object over many lines"
    if text.startswith("[{") or (text.startswith("[") and not text.endswith("]")):
        return "one JSON array"
    if text.replace("\t", " ").isprintable() and text[:1].isalpha():
        table = {"\t": "a table with tabs", ",": "CSV"}
        return next((kind for mark, kind in table.items() if mark in text), None)
    return None


def parse_line(line: bytes) -> dict:
    """The JSON object in a line of a file.

    Raises:
        InputError: says what is wrong, without file and line.
    """
    text = _decoded(line).rstrip()  # a column behind a line break is another line's
    try:
        record = json.loads(text)
        if "\\u" in text:  # an escape can write half a surrogate pair, which is no character
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON, {error.msg} at column {error.colno}: write one object a line"
        ) from None
    except UnicodeEncodeError:
        raise InputError("has half a surrogate pair: remove its \\u escape") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not readable JSON, {error}: write one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{shown(record)} is no JSON object: write one object a line")
    return record


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"not valid UTF-8, {error.reason}: save the file as UTF-8") from None


def strings_of(record: dict, name: str) -> list[str]:
    values = record.get(name)
    if values is None:
        return []
    if not isinstance(values, list):
        raise InputError(f"{name} is {shown(values)}: give a list of strings")
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(f"{name}[{i}] is {shown(value)}: give a list of strings")
    return values


def _scores_apart(record: dict, pos: list[str], neg: list[str]) -> list[float] | None:
    """Teacher scores as FlagEmbedding's later tools write them; None where there are none."""
    names = {"pos_scores": pos, "neg_scores": neg}
    found = {name: record[name] for name in names if record.get(name) is not None}
    if not found:
        return None
    for name, keys in names.items():
        if keys or name in found:
            _check_scores(name, found.get(name), len(keys), name.removesuffix("_scores"))
    return found.get("pos_scores", []) + found.get("neg_scores", [])


def _check_scores(field: str, scores, expected: int, names: str) -> None:
    if not isinstance(scores, list):
        raise InputError(f"{field} is {shown(scores)}: give a list of numbers")
    if len(scores) != expected:
        raise InputError(f"{field} has {len(scores)} values, {names} has {expected}")
    for i, score in enumerate(scores):
        if type(score) not in (int, float):
            raise InputError(f"{field}[{i}] is {shown(score)}: give a list of numbers")
        if not abs(score) <= LARGEST_FLOAT:  # nan is not, and an integer may be larger
            raise InputError(f"{field}[{i}] is {score}: score the row again or leave {field} out")


def shown(value, none: str = "missing") -> str:
    """A value of a file as an error shows it, cut short where it is long."""
    if value is None:
        return none
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
