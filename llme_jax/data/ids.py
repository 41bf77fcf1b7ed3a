"""Passages that are named by an id of their own: which line of the corpus each is."""

import json
import logging
import os
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llme_jax.data.rows import BadRows, parse_line, read_lines, shown
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest

logger = logging.getLogger(__name__)

FIELDS = ("_id", "id", "docid", "doc_id", "pid")  # of a passage; the first that it has


def id_of(passage: dict) -> str | None:
    """The id of a line of a corpus; None where it has none."""
    value = next((passage[name] for name in FIELDS if passage.get(name) is not None), None)
    return None if value is None else str(value)


class IdTable:
    """The passages of a corpus by their ids; 16 bytes a passage.

    Raises:
        InputError: a passage has no id, or that of another.
    """

    def __init__(self, path: str):
        def convert(passage: dict) -> int:
            name = id_of(passage)
            if name is None:
                raise InputError(
                    f"has no {', '.join(FIELDS[:-1])} or {FIELDS[-1]}, by which rows name passages"
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
    if not names_passages(path):
        return path
    if corpus is None:
        raise InputError(f"{path}: names passages by id: give the --corpus that has them")
    stamps = [(os.path.realpath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns)
              for f in (path, corpus)]  # fmt: skip
    place = Path(path)
    out = sources / digest("ids", stamps)[:12] / place.absolute().parent.name / place.name
    if out.is_file():
        return str(out)
    table, missing = IdTable(corpus), 0

    def convert(record: dict) -> dict:
        nonlocal missing
        for kind in ("pos", "neg"):
            ids = _ids(record, kind)
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


def names_passages(path: str) -> bool:
    """Whether the first row names passages by id; what is no row is said by those who read it."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            record = parse_line(next((line for line in file if line.strip()), b""))
        return any(_ids(record, kind) is not None for kind in ("pos", "neg"))
    except (OSError, InputError):
        return False


def _ids(record: dict, kind: str) -> list[str | int] | None:
    """The ids in a row; None where it has none, or numbers already."""
    numbers, ids = record.get(f"{kind}_index"), record.get(f"{kind}_id")
    if isinstance(numbers, list) and any(isinstance(n, str) for n in numbers):
        ids, name = numbers, f"{kind}_index"
    elif numbers is None and ids is not None:
        name = f"{kind}_id"
    else:
        return None
    if not isinstance(ids, list) or not all(type(i) in (str, int) for i in ids):
        raise InputError(f"{name} is {shown(ids)}: give a list of ids")
    return ids
