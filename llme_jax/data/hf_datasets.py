"""Datasets of the package `datasets` -> rows: of the Hub, of a folder, of `save_to_disk`.

    hf:NAME[:SPLIT], hf:NAME:CONFIG:SPLIT       NAME is a folder if there is one, else the Hub's

Columns are named as sentence-transformers' users name them, or as our rows do.
"""

import json
import os
import re
from functools import cache
from pathlib import Path

from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest

TOGETHER = 1000  # rows converted at a time
# What a column may be called. Either of the first two is meant where it is there; of the others
# one alone can be.
QUERY = ("query", "anchor", "question", "sentence1")
POSITIVE = ("pos", "positive", "answer", "passage", "sentence2")
NEGATIVE = re.compile(r"negatives?_?(\d*)")
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
    # A split's part has a colon of its own: train[:1000].
    path, *parts = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))
    if not path or len(parts) > 2 or not all(parts):
        raise InputError(f"{name}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    path = os.path.expanduser(path)
    config, split = (None, *parts)[-2:] if parts else (None, None)
    try:
        dataset = (_load if os.path.isdir(path) else _load_once)(path, config, split)
    except ImportError as error:
        raise InputError(f"{name}: {error}: pip install 'llme_jax[datasets]'") from None
    except Exception as error:  # each of its readers has errors of its own
        said = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: cannot be loaded, {type(error).__name__}: {said}; are name, config, split "
            "and network right?"
        ) from error
    if not len(dataset):
        raise InputError(f"{name}: has no rows: give a split, or a part, that has some")
    files = [file["filename"] for file in dataset.cache_files]
    stamps = [(os.path.realpath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    folder = Path(path).absolute().name
    stem = ".".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in (folder, *parts))
    file = sources / digest(name, stamps)[:12] / folder / f"{stem}.json"
    if not file.is_file():
        _write(name, dataset, file)
    return str(file)


def _load(path: str, config: str | None, split: str | None):
    """A split, or the only one; its table stays on disk."""
    import datasets

    if not any(os.path.isfile(f"{path}/{file}.json") for file in ("state", "dataset_dict")):
        return datasets.load_dataset(path, config, split=split or "train", keep_in_memory=False)
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


_load_once = cache(_load)  # a run asks for its data several times, and the Hub answers slowly


def _write(name: str, dataset, file: Path) -> None:
    convert = _conversion(name, dataset)
    batches = dataset.with_format("arrow").iter(TOGETHER)
    with (
        atomic_text(file) as out,
        tqdm(desc=f"Reading {name}", total=len(dataset), unit=" rows") as bar,
    ):
        for batch in batches:
            for row in batch.to_pylist():
                row = convert({k: value for k, value in row.items() if value is not None})
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            bar.update(len(batch))


def _conversion(name: str, dataset):
    """What makes a row of {query, pos, neg, teacher_scores} of one of the dataset.

    Raises:
        InputError: names the columns that there are, and those that would do.
    """
    columns = dataset.column_names
    query = _column(name, columns, QUERY)
    pos = None if {"pos", "history"} & {*columns} else _column(name, columns, POSITIVE)
    if not query or not (pos or ENOUGH & {*columns}):
        if "text" in columns:  # a corpus
            return lambda row: row
        raise InputError(
            f"{name}: has the columns {', '.join(columns)}: rename some (rename_column), rows need "
            f"{_either(QUERY)}, and {_either(POSITIVE)}; a corpus needs text"
        )
    found = [] if {"neg", "history"} & {*columns} else filter(NEGATIVE.fullmatch, columns)
    negatives = sorted(found, key=lambda column: int(NEGATIVE.fullmatch(column)[1] or 0))
    kinds = {c: _numbers(dataset.features[c]) for c in SCORES if c in columns}
    scores = next((column for column, kind in kinds.items() if kind == "list"), None)
    if pos and not scores and (one := [c for c, kind in kinds.items() if kind == "number"]):
        raise InputError(
            f"{name}: {one[0]} is one number a row, and a pair that has a low one is no positive: "
            "keep the rows that are positives and remove the column, or make it a list, a number "
            "for the positive and one for each negative"
        )

    def convert(row: dict) -> dict:
        made = {"query": row.pop(query, None)}
        if pos:
            made["pos"] = _listed(row.pop(pos, []))
        if negatives:
            made["neg"] = [text for n in negatives for text in _listed(row.pop(n, []))]
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


def _numbers(feature) -> str | None:
    """Whether a column has a number a row, or a list of them."""
    each = getattr(feature, "feature", feature)
    if not re.match("u?int|float|bool", str(getattr(each, "dtype", None))):
        return None
    return "number" if each is feature else "list"


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
