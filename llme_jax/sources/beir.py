"""BEIR's folders and MS MARCO's tables become JSON lines, once, in the cache.

    scifact/                        corpus.jsonl, queries.jsonl, qrels/{split}.tsv
    msmarco/                        collection.tsv, queries.{split}.tsv, qrels.{split}.tsv

A folder stands for its passages, for the queries of its test split, or for the pairs of its train
split; the qrels file of another split stands for that one. Qrels are BEIR's (three columns) or
TREC's (four); what is judged above 0 is a positive. Retrieval sets of the Hub become such folders.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import BadRows, read_lines, read_texts
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest, digest_file
from llme_jax.sources.ids import IdTable

logger = logging.getLogger(__name__)

Role = Literal["corpus", "queries", "pairs"]
# Those that a folder stands for; for queries also the only one that it has.
SPLITS = {"queries": ("test", "dev"), "pairs": ("train",)}
_QRELS = re.compile(r"qrels\.(.+)\.(tsv|txt)")


def as_rows(path: str, role: Role, key_template: str, sources: Path) -> str | None:
    """The JSON lines that a folder, a qrels file or a table stands for; None for other files.

    Args:
        role: what is wanted of it.
        key_template: makes the texts of pairs out of passages.
        sources: where files are made.

    Raises:
        InputError: a part is missing, or a line cannot be read; names it.
    """
    place = Path(path)
    if place.is_dir() and (passages := passages_of(place)):
        if role == "corpus":
            return as_rows(str(passages), role, key_template, sources) or str(passages)
        return _of_split(_qrels(place, role), role, key_template, sources)
    if role != "corpus" and place.is_file() and split_of(place):
        return _of_split(place, role, key_template, sources)
    if place.suffix != ".tsv" or not place.is_file():
        return None
    if role == "pairs":
        raise InputError(
            f"{path}: is a table of texts; give the qrels file beside it, which says what belongs "
            "together"
        )
    name = "_id" if role == "corpus" else "query_id"
    text = "text" if role == "corpus" else "query"
    more = {"title": ""} if role == "corpus" else {}
    rows = ({name: key, **more, text: value} for key, value in _table(place))
    return _made(place, [place], rows, sources, place.stem)


def passages_of(base: Path) -> Path | None:
    files = (base / name for name in ("corpus.jsonl", "collection.tsv"))
    return next((path for path in files if path.is_file()), None)


def split_of(qrels: Path) -> str | None:
    """The split that a qrels file is of; None for other files."""
    if qrels.parent.name == "qrels" and qrels.suffix == ".tsv":
        return qrels.stem
    found = _QRELS.fullmatch(qrels.name)
    return found[1] if found else None


def folder_of(qrels: Path) -> Path:
    """The BEIR folder that a qrels file belongs to."""
    return qrels.parent.parent if qrels.parent.name == "qrels" else qrels.parent


def parts_of(place: Path) -> list[Path]:
    """The files that a folder, or a qrels file, stands for; none for anything else."""
    split = split_of(place)
    base = folder_of(place) if split else place
    if not (passages := passages_of(base)):
        return []
    judged = [place] if split else sorted([*base.glob("qrels/*.tsv"), *base.glob("qrels.*.tsv")])
    queries = {_queries_of(base, split_of(path)) for path in judged}
    return [passages, *judged, *sorted(queries - {None})]


def _queries_of(base: Path, split: str) -> Path | None:
    names = ("queries.jsonl", f"queries.{split}.tsv", "queries.tsv")
    return next((base / name for name in names if (base / name).is_file()), None)


def _qrels(base: Path, role: Role) -> Path:
    """The qrels file that a folder stands for."""
    there = sorted([*(base / "qrels").glob("*.tsv"), *base.glob("qrels.*.tsv")])
    for split in SPLITS[role]:
        for path in there:
            if split_of(path) == split:
                return path
    if role == "queries" and len(there) == 1:
        return there[0]
    named = ", ".join(map(str, there)) or "none"
    raise InputError(
        f"{base}: has no qrels of the split {' or '.join(SPLITS[role])}; name the qrels file of "
        f"another one (there is {named})"
    )


def _of_split(qrels: Path, role: Role, key_template: str, sources: Path) -> str:
    """Rows of queries with the ids of their positives; of pairs, with their texts."""
    base = folder_of(qrels)
    split, passages = split_of(qrels), passages_of(base)
    queries = _queries_of(base, split)
    if queries is None or passages is None:
        missing = "queries.jsonl" if queries is None else "corpus.jsonl"
        raise InputError(f"{qrels}: {base} has no {missing}, which belongs to it; add the file")

    def rows() -> Iterator[dict]:
        judged, found = _judged(qrels), 0
        if role == "pairs":
            corpus_path = as_rows(str(passages), "corpus", key_template, sources) or str(passages)
            corpus, table = Corpus(corpus_path, key_template), IdTable(corpus_path)
        for query_id, text in _queries(queries):
            if not (ids := judged.get(query_id)):
                continue
            found += 1
            row = {"query_id": query_id, "query": text}
            if role == "pairs":
                numbers = [n for n in map(table.find, ids) if n is not None]
                row |= {"pos": [corpus.text(n) for n in numbers], "neg": []}
                if not numbers:
                    continue
            yield row | {"pos_id": ids}
        if found < len(judged):
            logger.warning(
                "%s: %d of its %d queries are not in %s and are left out",
                *(qrels, len(judged) - found, len(judged), queries),
            )

    template = key_template if role == "pairs" else ""
    name = f"{base.absolute().name}.{split}"
    return _made(base, [qrels, queries, passages], rows(), sources, name, role, template)


def _judged(path: Path) -> dict[str, list[str]]:
    """The ids of the passages that are judged relevant, by query."""
    positives: dict[str, list[str]] = {}
    for number, line in read_texts(path):
        columns = line.split("\t") if "\t" in line else line.split()
        try:
            query_id, passage_id, grade = columns[0], columns[-2], int(columns[-1])
            if len(columns) not in (3, 4):
                raise ValueError
        except (ValueError, IndexError):
            if number == 1:
                continue  # names of the columns
            raise InputError(
                f"{path}:{number}: not a judgement, which has a query, a passage and a whole "
                "number; correct the line"
            ) from None
        if grade > 0:
            positives.setdefault(query_id, []).append(passage_id)
    if not positives:
        raise InputError(f"{path}: judges no passage relevant; give the qrels of these queries")
    return positives


def _queries(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".tsv":
        yield from _table(path)
        return

    def convert(record: dict) -> tuple[str, str]:
        if not isinstance(record.get("text"), str) or record.get("_id") is None:
            raise InputError("has no _id and text, as queries of BEIR do")
        return str(record["_id"]), record["text"]

    for _, query in read_lines(str(path), convert, BadRows()):
        yield query


def _table(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in read_texts(path):
        key, tab, text = line.partition("\t")
        if not tab or not key.strip():
            raise InputError(f"{path}:{number}: not an id, a tab and a text; correct the line")
        yield key, text


def _made(
    base: Path, files: list[Path], rows: Iterator[dict], sources: Path, name: str, *depends: str
) -> str:
    """The rows as JSON lines in a file that is made when the content of one of `files` is new."""
    key = digest(list(map(digest_file, files)), depends)[:12]
    out = sources / key / base.absolute().name / f"{name}.json"
    if not out.is_file():
        with atomic_text(out) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(out)
