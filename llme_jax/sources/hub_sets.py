"""Retrieval sets of the package `datasets` become BEIR folders, once, in the cache.

    hf:mteb/scifact                  configurations corpus, queries, and qrels or default
    hf:nanobeir:NanoSciFact          the same, with a split a set; without it, all sets

`hf:NAME:SPLIT` are the judgements of a split, in `{folder}/qrels/{split}.tsv`; where the corpus has
several splits, it is a set of its own.
"""

from collections.abc import Iterator
from pathlib import Path

from llme_jax.data.corpus import FIELDS, id_of
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir, digest
from llme_jax.sources.formats import line_of
from llme_jax.sources.hf_datasets import (
    contents,
    is_dataset,
    listed,
    loading,
    name_parts,
    rows_of,
    set_parts,
    tables_of,
)

QRELS = ("query-id", "corpus-id", "score")  # the last may be missing: all are positives


def sets_of(name: str, sources: Path) -> list[str]:
    """The sets that a name stands for: those of its splits, or itself.

    Raises:
        InputError: it cannot be loaded.
    """
    if (
        (parts := _parts(name, sources)) is None
        or len(name_parts(name)) > 1
        or not _is_several(parts)
    ):
        return [name]
    return [f"{name}:{split}" for split in _splits(name, parts)]


def set_place(name: str, sources: Path) -> Path | None:
    """The BEIR folder of a retrieval set, or the qrels file of the split that is named; None where
    the name is something else.

    Args:
        sources: where folders are made.

    Raises:
        InputError: it cannot be loaded, has no such split, or columns are missing.
    """
    if (parts := _parts(name, sources)) is None:
        return None
    path, split = (*name_parts(name), None)[:2]
    place, there = Path(path).absolute(), _splits(name, parts)
    if split not in there and (split or _is_several(parts)):
        given = f"has no split {split}" if split else f"is {len(there)} sets"
        raise InputError(
            f"{name}: {given}: give one of {', '.join(there)}, as in hf:{path}:{there[0]}"
        )
    corpus, queries, judged = parts["corpus"], parts["queries"], parts["qrels"]
    if _is_several(parts):
        corpus, queries = {split: corpus[split]}, {split: queries[split]}
        judged, place, split = {"test": judged[split]}, place / split, None
    splits = [*corpus.values(), *queries.values(), *judged.values()]
    key = digest(path, [contents(part) for part in splits])[:12]
    folder = sources / key / place.parent.name / place.name
    if not folder.is_dir():
        with atomic_dir(folder) as beside:
            _write(beside / "corpus.jsonl", _texts(name, "corpus", corpus, {"title": ""}))
            _write(beside / "queries.jsonl", _texts(name, "queries", queries, {}))
            (beside / "qrels").mkdir()
            for part, dataset in judged.items():
                _write(beside / f"qrels/{part}.tsv", _judgements(name, part, dataset))
    return folder / f"qrels/{split}.tsv" if split else folder


def _is_several(parts: dict[str, dict]) -> bool:
    return len(parts["corpus"]) > 1


def _splits(name: str, parts: dict[str, dict]) -> list[str]:
    """Those of the judgements; of several sets, those that all parts have."""
    needed = parts.values() if _is_several(parts) else [parts["qrels"]]
    found = [split for split in parts["qrels"] if all(split in part for part in needed)]
    if not found:
        raise InputError(
            f"{name}: no split of its corpus, {', '.join(parts['corpus'])}, is one of its queries "
            "and qrels; name corpus and queries by hf:NAME:CONFIG:SPLIT"
        )
    return found


def _parts(name: str, sources: Path) -> dict[str, dict] | None:
    """See `set_parts`."""
    if not is_dataset(name) or len(name_parts(name)) > 2:
        return None
    path = name_parts(name)[0]
    with loading(name):
        return set_parts(path, tables_of(path, sources))


def _write(path: Path, lines: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def _texts(name: str, what: str, splits: dict, more: dict) -> Iterator[str]:
    for dataset in splits.values():
        if "text" not in dataset.column_names or not {*FIELDS} & {*dataset.column_names}:
            raise _lacking(name, what, dataset, f"{' or '.join(FIELDS)}, and text")
        for row in rows_of(f"{name} {what}", dataset):
            made = {"_id": id_of(row), **more} | row
            yield line_of(made, name)


def _judgements(name: str, split: str, dataset) -> Iterator[str]:
    query, passage, score = QRELS
    if not {query, passage} <= {*dataset.column_names}:
        raise _lacking(name, f"qrels of {split}", dataset, f"{query} and {passage}")
    yield "\t".join(QRELS)
    for row in rows_of(f"{name} qrels", dataset):
        for one in listed(row[passage]):
            yield f"{row[query]}\t{one}\t{int(row.get(score, 1) > 0)}"


def _lacking(name: str, what: str, dataset, needed: str) -> InputError:
    return InputError(
        f"{name}: its {what} have the columns {', '.join(dataset.column_names)}: rename some "
        f"(rename_column), they need {needed}"
    )
