"""Datasets of the package `datasets` -> rows: of the Hub, of a folder, of `save_to_disk`.

    hf:NAME[:SPLIT], hf:NAME:CONFIG:SPLIT       NAME is a folder if there is one, else the Hub's

Columns are named as sentence-transformers' users name them, or as our rows do. Those that hold ids
instead of texts become `query_id`, `pos_id` and `neg_id`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest, digest_file, digest_folder
from llme_jax.sources.formats import line_of

TOGETHER = 1000  # rows converted at a time
SHORT = {"nanobeir": "sentence-transformers/NanoBEIR-en"}  # names of our own
JUDGED = ("qrels", "default")  # configurations with the judgements; else NAME-qrels has them
# What a column may be called. Either of the first two is meant where it is there; of the others
# one alone can be.
QUERY = ("query", "anchor", "question", "sentence1")
POSITIVE = ("pos", "positive", "answer", "passage", "sentence2")
NEGATIVE = re.compile(r"negatives?_?(\d*)")
# The same with ids; the columns above hold ids where they hold whole numbers.
QUERY_ID = ("query_id", "qid")
POSITIVE_ID = ("pos_id", "positive_id", "positive_ids")
NEGATIVE_ID = re.compile(r"negatives?_ids?_?(\d*)")
SCORES = ("teacher_scores", "scores", "score", "labels", "label")
ENOUGH = {"pos", "neg", "history", "pos_index", "pos_id", "answers"}  # one of them, with a query


def is_dataset(name: str) -> bool:
    return name.startswith("hf:") and not name.startswith("hf://")  # which fsspec reads


def dataset_file(name: str, sources: Path) -> str:
    """The rows of a split as a JSON-lines file below `sources`, made when the data is new.

    Raises:
        InputError: there is no such dataset or split, the package is not installed, or the columns
            are none of rows.
    """
    path, *parts = name_parts(name)
    config, split = (None, *parts)[-2:] if parts else (None, None)
    with loading(name):
        load = _load if os.path.isdir(path) else _load_once
        dataset = load(path, config, split, tables_of(path, sources))
    if not len(dataset):
        raise InputError(f"{name}: has no rows: give a split, or a part, that has some")
    folder = Path(path).absolute().name
    stem = ".".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in (folder, *parts))
    file = sources / digest(name, contents(dataset))[:12] / folder / f"{stem}.json"
    if not file.is_file():
        _write(name, dataset, file)
    return str(file)


def name_parts(name: str) -> list[str]:
    """The folder or the Hub's name, then what stands behind it: CONFIG, SPLIT or nothing.

    Raises:
        InputError: it is none of the names at the top.
    """
    # A split's part has a colon of its own: train[:1000].
    path, *parts = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))
    if not path or len(parts) > 2 or not all(parts):
        raise InputError(f"{name}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    path = os.path.expanduser(SHORT.get(path, path))
    home = Path.home().resolve()
    if Path(path).resolve() in (home, *home.parents):  # all files below would be looked at
        raise InputError(f"{name}: is the home folder, or above it: give that of the data set")
    return [path, *parts]


@contextmanager
def loading(name: str) -> Iterator[None]:
    """
    Raises:
        InputError: instead of what the package raises while it loads.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{name}: {error}: pip install 'llme_jax[datasets]'") from None
    except Exception as error:  # each of its readers has errors of its own
        said = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: cannot be loaded, {type(error).__name__}: {said}; are name, config, split "
            "and network right?"
        ) from error


def contents(dataset) -> list[str]:
    """What changes when the data does."""
    return [digest_file(file["filename"]) for file in dataset.cache_files]


def tables_of(path: str, sources: Path) -> str | None:
    """Where the package keeps the tables that it makes of a folder; None for its own place.

    That of a folder is named by content: its own knows a folder by what its README says.
    """
    if not os.path.isdir(path):
        return None
    return str(sources / "tables" / digest_folder(Path(path))[:12])


@cache
def set_parts(path: str, tables: str | None) -> dict[str, dict] | None:
    """The splits of corpus, queries and qrels of a retrieval set, by their names; None where it is
    something else.

    Args:
        tables: see `tables_of`.
    """
    import datasets

    names = [] if _is_saved(path) else datasets.get_dataset_config_names(path)
    if not {"corpus", "queries"} <= {*names}:
        return None
    judged = next(((path, name) for name in JUDGED if name in names), (f"{path}-qrels", None))
    places = {"corpus": (path, "corpus"), "queries": (path, "queries"), "qrels": judged}
    how = {"keep_in_memory": False, "cache_dir": tables}
    return {part: datasets.load_dataset(*at, **how) for part, at in places.items()}


def _load(path: str, config: str | None, split: str | None, tables: str | None):
    """A split, or the only one; its table stays on disk."""
    import datasets

    if not _is_saved(path):
        how = {"keep_in_memory": False, "cache_dir": tables}
        return datasets.load_dataset(path, config, split=split or "train", **how)
    saved = datasets.load_from_disk(path, keep_in_memory=False)
    if config:
        raise ValueError(f"what save_to_disk wrote has no config {config}")
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    split = split or (next(iter(saved)) if len(saved) == 1 else "train")
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(saved[k]) for k in saved})
    return datasets.concatenate_datasets(
        [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _is_saved(path: str) -> bool:
    """Did save_to_disk write it?"""
    return any(os.path.isfile(f"{path}/{file}.json") for file in ("state", "dataset_dict"))


_load_once = cache(_load)  # a run asks for its data several times, and the Hub answers slowly


def _write(name: str, dataset, file: Path) -> None:
    convert = _conversion(name, dataset)
    with atomic_text(file) as out:
        for row in rows_of(name, dataset):
            out.write(line_of(convert(row), name) + "\n")


def rows_of(name: str, dataset) -> Iterator[dict]:
    """The rows of a split without what is null in them, a few at a time in memory."""
    with tqdm(desc=f"Reading {name}", total=len(dataset), unit=" rows") as bar:
        for batch in dataset.with_format("arrow").iter(TOGETHER):
            for row in batch.to_pylist():
                yield {k: value for k, value in row.items() if value is not None}
            bar.update(len(batch))


def _conversion(name: str, dataset):
    """What makes a row of {query, pos, neg, teacher_scores} of one of the dataset, with `query_id`,
    `pos_id` and `neg_id` where it has ids.

    Raises:
        InputError: names the columns that there are, and those that would do.
    """
    columns, features = dataset.column_names, dataset.features
    ours = {*columns}
    query = _column(name, columns, QUERY) or _column(name, columns, QUERY_ID)
    pos = None
    if not {"pos", "history"} & ours:
        pos = _column(name, columns, POSITIVE) or _column(name, columns, POSITIVE_ID)
    if not query or not (pos or ENOUGH & ours):
        if "text" in columns:  # a corpus
            return lambda row: row
        raise InputError(
            f"{name}: has the columns {', '.join(columns)}: rename some (rename_column), rows need "
            f"{_either(QUERY)}, and {_either(POSITIVE)}, or query_id and positive_id; a corpus "
            "needs text"
        )
    named = NEGATIVE_ID if pos in POSITIVE_ID else NEGATIVE
    found = [] if {"neg", "history"} & ours else filter(named.fullmatch, columns)
    negatives = sorted(found, key=lambda column: int(named.fullmatch(column)[1] or 0))
    asked = "query_id" if query in QUERY_ID or _holds(features[query], "u?int") else "query"
    by_id = pos in POSITIVE_ID or (pos and _holds(features[pos], "u?int"))
    right, wrong = ("pos_id", "neg_id") if by_id else ("pos", "neg")
    kinds = {c: _holds(features[c], "u?int|float|bool") for c in SCORES if c in columns}
    scores = next((column for column, kind in kinds.items() if kind == "list"), None)
    if pos and not scores and (one := [c for c, kind in kinds.items() if kind == "value"]):
        raise InputError(
            f"{name}: {one[0]} is one number a row, and a pair that has a low one is no positive: "
            "keep the rows that are positives and remove the column, or make it a list, a number "
            "for the positive and one for each negative"
        )

    def convert(row: dict) -> dict:
        made = {asked: row.pop(query, None)}
        if pos:
            made[right] = listed(row.pop(pos, []))
        if negatives:
            made[wrong] = [text for n in negatives for text in listed(row.pop(n, []))]
        if scores in row:
            made["teacher_scores"] = row.pop(scores)
        return made | row

    return convert


def _column(name: str, columns: list[str], known: tuple[str, ...]) -> str | None:
    found = [column for column in known if column in columns]
    if len(found) > 1 and found[0] not in known[:2]:
        raise InputError(
            f"{name}: {' and '.join(found)} could each be the {known[0]}: rename the one that is "
            f"(rename_column) to {known[0]}"
        )
    return found[0] if found else None


def _holds(feature, types: str) -> str | None:
    """Whether a column has a value of one of the types a row, or a list of them."""
    each = getattr(feature, "feature", feature)
    if not re.match(types, str(getattr(each, "dtype", None))):
        return None
    return "value" if each is feature else "list"


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
