"""Passages that are named by an id of their own: which line of the corpus each is."""

import json
import logging
import os
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llme_jax.data.corpus import FIELDS, id_of
from llme_jax.data.rows import BadRows, parse_line, read_lines, shown
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest, digest_file

logger = logging.getLogger(__name__)


class IdTable:
    """The passages of a corpus by their ids; 16 bytes a passage.

    Args:
        fields: where ids are; the first that a passage has.

    Raises:
        InputError: a passage has no id, or that of another.
    """

    def __init__(self, path: str, fields: tuple[str, ...] = FIELDS):
        def convert(passage: dict) -> int:
            name = id_of(passage, fields)
            if name is None:
                raise InputError(
                    f"has no {', '.join(fields[:-1])} or {fields[-1]}, by which rows name it"
                )
            return _hash(name)

        self._path = path
        found = read_lines(path, convert, BadRows())
        hashes = np.fromiter((value for _, value in found), np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        if len(twice := np.flatnonzero(self._hashes[1:] == self._hashes[:-1])):
            first, second = sorted(self._order[twice[0] : twice[0] + 2].tolist())
            raise InputError(
                f"{path}: passages {first + 1} and {second + 1} have the same id; keep one"
            )

    def find(self, name: str | int) -> int | None:
        """The number of a passage, from 0; None where there is none of this id."""
        value = np.uint64(_hash(str(name)))
        at = int(np.searchsorted(self._hashes, value))
        known = at < len(self._hashes) and self._hashes[at] == value
        return int(self._order[at]) if known else None


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def with_numbers(path: str, corpus: str | None, sources: Path, *, lenient: bool) -> str:
    """The path of the same rows, whose `pos_id` and `neg_id` (or ids in `pos_index` and
    `neg_index`) have become numbers of passages; the path itself where the first row has none.

    Args:
        sources: where files are made.
        lenient: positives that are no passages are left out, as BEIR's sets have some.

    Raises:
        InputError: there is no corpus, or it has no passage of an id.
    """
    has_ids = corpus is not None and id_of(first_row(corpus)) is not None
    if not names_passages(path, has_ids):
        return path
    if corpus is None:
        raise InputError(f"{path}: names passages by id: give the --corpus that has them")
    out = derived(path, [corpus], sources)
    if out.is_file():
        return str(out)
    table, missing = IdTable(corpus), 0

    def convert(record: dict) -> dict:
        nonlocal missing
        for kind in ("pos", "neg"):
            ids = _ids(record, kind, has_ids)
            if ids is None:
                continue
            found = [table.find(name) for name in ids]
            if None in found and not lenient:
                name = ids[found.index(None)]
                raise InputError(
                    f"{kind}_id has {shown(name)}, which is no passage of {corpus}: give the "
                    "--corpus that has it"
                )
            missing += found.count(None)
            record[f"{kind}_index"] = [n for n in found if n is not None]
        return record

    with atomic_text(out) as file:
        for _, row in read_lines(path, convert, BadRows()):
            if row.get("pos_index") != []:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if missing:
        logger.warning("%s: %d positives are no passages of %s and are left out",
                       path, missing, corpus)  # fmt: skip
    return str(out)


def derived(path: str, files: list[str], sources: Path, *settings) -> Path:
    """Where rows stand that are made from those of `path` with the help of `files`; another place
    when one of them changes."""
    place = Path(path)
    key = digest("ids", [digest_file(file) for file in (path, *files)], *settings)[:12]
    return sources / key / place.absolute().parent.name / place.name


def names_passages(path: str, has_ids: bool) -> bool:
    """Whether the first row names passages by id; what is no row is said by those who read it."""
    try:
        return any(_ids(first_row(path), kind, has_ids) is not None for kind in ("pos", "neg"))
    except InputError:
        return False


def first_row(path: str) -> dict:
    """The first row of a file; an empty one where it has none, or one that cannot be read."""
    if not os.path.isfile(path):  # a pipe would wait for ever
        return {}
    try:
        with open(path, "rb") as file:
            return parse_line(next((line for line in file if line.strip()), b"{}"))
    except (OSError, InputError):
        return {}


def _ids(record: dict, kind: str, has_ids: bool) -> list[str | int] | None:
    """The ids in a row; None where it has none.

    Args:
        has_ids: the passages have ids: those of a row count, whatever numbers it has beside them.
    """
    numbers = record.get(f"{kind}_index")
    if isinstance(numbers, list) and any(isinstance(n, str) for n in numbers):
        return checked_ids(record, f"{kind}_index")
    return checked_ids(record, f"{kind}_id") if numbers is None or has_ids else None


def checked_ids(record: dict, name: str) -> list[str | int] | None:
    """
    Raises:
        InputError: the field is no list of ids.
    """
    ids = record.get(name)
    if ids is not None and not (isinstance(ids, list) and all(type(i) in (str, int) for i in ids)):
        raise InputError(f"{name} is {shown(ids)}: give a list of ids")
    return ids
