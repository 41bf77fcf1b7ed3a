"""BEIR's folders and MS MARCO's tables become JSON lines, once, in the cache.

    scifact/                        corpus.jsonl, queries.jsonl, qrels/{split}.tsv
    msmarco/                        collection.tsv, queries.{split}.tsv, qrels.{split}.tsv

A folder stands for its passages, for the queries of its test split, or for the pairs of its train
split; the qrels file of another split stands for that one. Qrels are BEIR's (three columns) or
TREC's (four); what is judged above 0 is a positive. Retrieval sets of the Hub become such folders.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Literal

from llme_jax.config import DataConfig, TextConfig
from llme_jax.config.setting import as_list
from llme_jax.data.corpus import Corpus
from llme_jax.data.hf_datasets import is_dataset
from llme_jax.data.hub_sets import set_place, sets_of
from llme_jax.data.id_texts import ids_in, with_texts
from llme_jax.data.ids import IdTable, names_passages, with_numbers
from llme_jax.data.rows import BadRows, expand_paths, read_lines, read_texts
from llme_jax.data.sources import is_made, is_remote, local_file, resolve_path
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest, stamp
from llme_jax.files.cache import cache_dir, check_cache

logger = logging.getLogger(__name__)

Role = Literal["corpus", "queries", "pairs"]
# Those that a folder stands for; for queries also the only one that it has.
SPLITS = {"queries": ("test", "dev"), "pairs": ("train",)}
_QRELS = re.compile(r"qrels\.(.+)\.(tsv|txt)")
_ENDINGS = re.compile(r"(\.(jsonl?|gz|zst|parquet|arrow|tsv))+$")


def check_files(data: TextConfig) -> None:
    """Finds out before a model is fetched whether the files are there.

    Raises:
        InputError: one is not; names its flag.
    """
    if isinstance(data, DataConfig) and data.train_data:
        training_files(data)
    flags = ("eval_data", "corpus", "train_corpus", "train_queries")
    named = [(f, name) for f in flags for name in as_list(getattr(data, f, None))]
    for flag, name in named:
        if is_remote(name, data.data_root) or _is_table(name, data):
            continue
        path = os.path.expanduser(resolve_path(name, data.data_root))
        if not any(map(os.path.isfile, [path, *glob.glob(path)])):
            raise InputError(
                f"--{flag} {path}: there is no such file, check the path and --data_root"
            )


def evaluation_sets(data: DataConfig) -> dict[str, DataConfig]:
    """The sets of --eval_data by name, each as the settings of it alone.

    A set is called as its folder or file, behind the folder above where two have the same name,
    numbered where they still do.

    Raises:
        InputError: there are no passages to search for one.
    """
    named, corpora = as_list(data.eval_data), as_list(data.corpus)
    if len(corpora) < 2:
        corpora = (corpora or [None]) * len(named)
    sets = [
        replace(data, eval_data=name, corpus=corpus)
        for several, corpus in zip(named, corpora, strict=True)
        for name in sets_of(several)
    ]
    for one in sets:
        if corpus_of(one) is None:
            raise InputError(
                f"--eval_data {one.eval_data} needs --corpus, the passages that are searched; only "
                "a BEIR folder or a retrieval set of the Hub brings its own"
            )
    places = [_place(one.eval_data, data).absolute() for one in sets]
    return dict(zip(_set_names(places), sets, strict=True))


def _set_names(places: list[Path]) -> list[str]:
    named, stems = [], []
    for place in places:
        stem = place.name if place.is_dir() else _ENDINGS.sub("", place.name)
        split = _split(place)
        stems.append(f"{_folder_of(place).name}.{split}" if split else stem)
    for place, stem in zip(places, stems, strict=True):
        above = (_folder_of(place) if _split(place) else place).parent.name
        name = f"{above}-{stem}" if stems.count(stem) > 1 else stem
        name = re.sub(r"[^\w.-]+", "-", name)  # @ and / mean something in names of metrics
        numbered = (f"{name}-{i}" for i in count(2))
        named.append(next(n for n in chain([name], numbered) if n not in named))
    return named


def corpus_of(data: TextConfig) -> str | None:
    """--corpus; where it is not given, the BEIR folder that --eval_data is or belongs to."""
    if data.corpus or not data.eval_data:
        return data.corpus
    place = _place(data.eval_data, data)
    base = _folder_of(place) if _split(place) else place
    return str(base) if _passages(base) else None


def corpus_file(data: TextConfig) -> str:
    """The JSON lines of `corpus_of`.

    Raises:
        InputError: it cannot be fetched, or not be made.
    """
    return _file(data, corpus_of(data), "corpus")


def queries_file(data: TextConfig) -> str:
    """The JSON lines of --eval_data, whose passages are numbers of --corpus.

    Raises:
        InputError: it cannot be fetched or made, or names passages that are not there.
    """
    path = _file(data, data.eval_data, "queries")
    corpus = corpus_of(data) and corpus_file(data)
    lenient = _is_table(data.eval_data, data)
    return with_numbers(path, corpus, _sources(data), lenient=lenient)


def training_files(data: DataConfig) -> list[str]:
    """The JSON lines of --train_data, see `expand_paths`; ids have become texts."""
    paths = []
    for pattern in data.train_data:
        if _is_table(pattern, data):
            paths.append(_file(data, pattern, "pairs"))
        else:
            paths += expand_paths([pattern], data.data_root, data.dataset_cache_dir)
    return [_with_texts(path, data) for path in paths]


def _with_texts(path: str, data: DataConfig) -> str:
    corpora, files = as_list(data.corpus), {}
    corpus = data.train_corpus or (corpora[0] if len(corpora) == 1 else None)
    given = {"queries": ("queries", data.train_queries), "passages": ("corpus", corpus)}
    for kind in ids_in(path):
        role, name = given[kind]
        if name is None:
            raise InputError(
                f"{path}: names its {kind} by id: give the --train_{role} that has them"
            )
        files[kind] = _file(data, name, role)
    if not files:
        return path
    sources, bad = _sources(data), data.max_bad_rows
    return with_texts(path, files, data.key_template, sources, max_bad_rows=bad)


def is_converted(data: TextConfig) -> bool:
    """Is what is read of --eval_data made in the cache, so that results do not belong beside it?"""
    path = os.path.expanduser(resolve_path(data.eval_data, data.data_root))
    made = is_made(data.eval_data, data.data_root) or _is_table(data.eval_data, data)
    return made or names_passages(path)


def _file(data: TextConfig, name: str, role: Role) -> str:
    if _is_table(name, data):
        path = str(_place(name, data))
        return as_rows(path, role, data.key_template, _sources(data)) or path
    return local_file(name, data.data_root, data.dataset_cache_dir)


def _is_table(name: str, data: TextConfig) -> bool:
    """Is it of those that `as_rows` reads?"""
    place = _place(name, data)
    if place.is_dir():
        return _passages(place) is not None
    return place.is_file() and (place.suffix == ".tsv" or _split(place) is not None)


def _place(name: str, data: TextConfig) -> Path:
    if is_dataset(name):
        check_cache(data.dataset_cache_dir)
        if place := set_place(name, _sources(data)):
            return place
    return Path(os.path.expanduser(resolve_path(name, data.data_root)))


def _sources(data: TextConfig) -> Path:
    return cache_dir(data.dataset_cache_dir) / "sources"


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
    if place.is_dir() and (passages := _passages(place)):
        if role == "corpus":
            return as_rows(str(passages), role, key_template, sources) or str(passages)
        return _of_split(_qrels(place, role), role, key_template, sources)
    if role != "corpus" and place.is_file() and _split(place):
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


def _passages(base: Path) -> Path | None:
    files = (base / name for name in ("corpus.jsonl", "collection.tsv"))
    return next((path for path in files if path.is_file()), None)


def _split(qrels: Path) -> str | None:
    """The split that a qrels file is of; None for other files."""
    if qrels.parent.name == "qrels" and qrels.suffix == ".tsv":
        return qrels.stem
    found = _QRELS.fullmatch(qrels.name)
    return found[1] if found else None


def _folder_of(qrels: Path) -> Path:
    """The BEIR folder that a qrels file belongs to."""
    return qrels.parent.parent if qrels.parent.name == "qrels" else qrels.parent


def _qrels(base: Path, role: Role) -> Path:
    """The qrels file that a folder stands for."""
    there = sorted([*(base / "qrels").glob("*.tsv"), *base.glob("qrels.*.tsv")])
    for split in SPLITS[role]:
        for path in there:
            if _split(path) == split:
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
    base = _folder_of(qrels)
    split, passages = _split(qrels), _passages(base)
    queries = [base / "queries.jsonl", base / f"queries.{split}.tsv", base / "queries.tsv"]
    queries = next((path for path in queries if path.is_file()), None)
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
    """The rows as JSON lines in a file that is made when one of `files` is new."""
    key = digest([stamp(file) for file in files], depends)[:12]
    out = sources / key / base.absolute().name / f"{name}.json"
    if not out.is_file():
        with atomic_text(out) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(out)
