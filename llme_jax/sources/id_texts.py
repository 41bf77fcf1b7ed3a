"""Training rows that name their texts by id: the texts are looked up, once."""

import json
import logging
from pathlib import Path

from llme_jax.data.corpus import FIELDS, Corpus
from llme_jax.data.rows import BadRows, read_lines, shown
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text
from llme_jax.sources.ids import IdTable, checked_ids, derived, first_row

logger = logging.getLogger(__name__)

QUERY_FIELDS = ("query_id", "qid", *FIELDS)  # ids of queries; the first that a line has


def ids_in(path: str) -> list[str]:
    """What the first row names by id: queries, passages, both or nothing."""
    row = first_row(path)
    named = {"queries": _names_query(row), "passages": _names_passages(row)}
    return [kind for kind, by_id in named.items() if by_id]


def with_texts(
    path: str, files: dict[str, str], key_template: str, sources: Path, *, max_bad_rows: int
) -> str:
    """The path of the same rows with texts: `query` of `query_id`, `pos` of `pos_id`, `neg` of
    `neg_id`.

    A row takes no memory, a line of `files` 24 bytes, and 8 more while they are sorted.

    Args:
        files: JSON lines with the queries, the passages or both; see `ids_in`.
        key_template: makes the texts of passages.
        sources: where files are made.
        max_bad_rows: as many are left out, with a warning.

    Raises:
        InputError: a line lacks id or text, or none has an id of a row.
    """
    out = derived(path, [*files.values()], sources, key_template, max_bad_rows)
    if out.is_file():
        return str(out)
    queries = passages = None
    if "queries" in files:
        field = "query" if "query" in first_row(files["queries"]) else "text"
        queries = _Texts(files["queries"], f"{{{field}}}", QUERY_FIELDS, "train_queries")
    if "passages" in files:
        passages = _Texts(files["passages"], key_template, FIELDS, "train_corpus")

    def convert(row: dict) -> dict:
        found = {}
        if queries and _names_query(row):
            found["query"] = queries.text("query_id", row["query_id"])
        if passages and _names_passages(row):
            for kind in ("pos", "neg"):
                field = f"{kind}_id"
                ids = checked_ids(row, field) or []
                found[kind] = [passages.text(field, name) for name in ids]
        return found | row | found  # in this order

    bad_rows = BadRows(max_bad_rows)
    with atomic_text(out) as file:
        for _, row in read_lines(path, convert, bad_rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for _, line, reason in bad_rows.found:
        logger.warning("%s:%d: %s; left out", path, line, reason)
    return str(out)


class _Texts:
    """The texts of a file by id."""

    def __init__(self, path: str, template: str, fields: tuple[str, ...], flag: str):
        self._path, self._flag = path, flag
        self._table, self._lines = IdTable(path, fields), Corpus(path, template)

    def text(self, field: str, name: str | int) -> str:
        """
        Args:
            field: of the row that has the id.
        """
        if (number := self._table.find(name)) is None:
            raise InputError(
                f"{field} has {shown(name)}, which no line of {self._path} has: give the "
                f"--{self._flag} that has it"
            )
        return self._lines.text(number)


def _names_query(row: dict) -> bool:
    return row.get("query") is None and row.get("query_id") is not None


def _names_passages(row: dict) -> bool:
    has = {name for name, value in row.items() if value is not None}
    return not has & {"pos", "neg", "history"} and bool(has & {"pos_id", "neg_id"})
