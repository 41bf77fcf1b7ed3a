"""tfds:NAME[/CONFIG][:SPLIT]: an ArrayRecord split of TFDS -> JSON lines, once.

What is made lies in `{sources}/{digest}/{folder}/{name}.json`; the digest names the version of the
dataset, so that a changed one is read anew.
"""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write, digest, digest_file
from llme_jax.files.storage import one_sentence, writing
from llme_jax.sources.buckets import download, file_system, version

BUILDER = "llm_embedder"  # datasets of llme_jax.build_tfds
TFDS = "tensorflow_datasets."  # how the names of its classes begin
EXTRA = "extra"  # in those: a JSON object with the fields that no column holds
TOGETHER = 256  # examples read at a time; one by one takes five times as long
VERSION = re.compile(r"\d+\.\d+\.\d+")


class _Dataset(NamedTuple):
    """A dataset that was built: where its files are."""

    fs: object  # of fsspec
    folder: str  # the version's, `{data dir}/NAME[/CONFIG]/1.0.0`
    files: dict[str, dict]  # what fsspec knows of each file in it, by name

    @property
    def is_local(self) -> bool:
        return "file" in self.fs.protocol

    def versions(self) -> list:
        """What changes when a file does: of local ones their content."""
        if self.is_local:
            return sorted((n, digest_file(Path(i["name"]))) for n, i in self.files.items())
        return sorted(version(info) for info in self.files.values())


def split_file(name: str, data_root: str, sources: Path) -> Path:
    """The split as a JSON-lines file; TFDS is imported only to make it.

    Raises:
        InputError: there is no such dataset or split, or it cannot be read; says what there is.
    """
    path, _, split = name.removeprefix("tfds:").partition(":")
    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*){0,2}", path):
        raise InputError(f"{name}: write tfds:NAME/CONFIG:SPLIT, as in tfds:{BUILDER}/nq:train")
    split = split or "train"
    with one_sentence(name):
        dataset = _find(name, path, data_root)
    key = digest(split, dataset.folder, dataset.versions())[:12]
    parts = [part for part in path.split("/") if not VERSION.fullmatch(part)]
    readable = split.translate({ord("["): "_", ord(":"): "-", ord("]"): None, ord(" "): None})
    stem = ".".join([*parts, re.sub(r"[^\w.+-]", "_", readable)])
    file = sources / key / parts[-1] / f"{stem}.json"
    if not file.is_file():
        _materialise(name, dataset, split, file)
    return file


def _find(name: str, path: str, data_root: str) -> _Dataset:
    """The newest version of a dataset in --data_root, else in TFDS's own folder.

    Raises:
        InputError: it is in none of them; says what is, and how it is built.
    """
    dataset, _, config = path.partition("/")
    roots = [data_root, os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"]
    there = {}
    for root in roots:
        fs, place = file_system(root)
        folder, entries = f"{place}/{path}", _entries(fs, f"{place}/{path}")
        versions = [v for v in entries if VERSION.fullmatch(v)]
        if versions:
            folder += "/" + max(versions, key=lambda v: [int(n) for n in v.split(".")])
            entries = _entries(fs, folder)
        if "dataset_info.json" in entries:
            return _Dataset(fs, folder, {k: i for k, i in entries.items() if i["type"] == "file"})
        there = there or _entries(fs, f"{place}/{dataset}")
    command = _command(dataset, config, root)
    if there:
        raise InputError(
            f"{name}: dataset {dataset} has {f'no config {config}' if config else 'configs'}, give "
            f"one of {', '.join(sorted(there))}, or build it with {command}"
        )
    raise InputError(
        f"{name}: there is no dataset {dataset} in {root} (which has "
        f"{', '.join(sorted(_entries(fs, place))) or 'none'}): set TFDS_DATA_DIR, or build it with "
        f"{command}"
    )


def _command(dataset: str, config: str, root: str) -> str:
    if dataset == BUILDER:
        return (
            f"python -m llme_jax.build_tfds --name {config.removesuffix('_corpus') or 'NAME'} "
            f"--train_data FILE --data_dir {root}"
        )
    part = f"{dataset}/{config}".rstrip("/")
    return f"tfds build {part} --file_format array_record --data_dir {root}"


def _entries(fs, folder: str) -> dict[str, dict]:
    """What lies in a folder, by name; nothing where there is none."""
    if not fs.isdir(folder):
        return {}
    infos = {info["name"].rstrip("/").split("/")[-1]: info for info in fs.ls(folder, detail=True)}
    return {k: info for k, info in infos.items() if not k.startswith(".") and k != "downloads"}


def _materialise(name: str, dataset: _Dataset, split: str, file: Path) -> None:
    """Writes the examples of a split, in order, as JSON lines.

    Raises:
        InputError: there is no such split, it is empty, or it cannot be read without TensorFlow.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(f"{name}: needs TFDS: pip install 'llme_jax[tfds]'") from None

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = TemporaryDirectory(dir=file.parent)
    with beside as temporary:
        folder = dataset.folder
        if not dataset.is_local:  # ArrayRecord reads local files only
            folder = temporary
            _fetch(name, dataset, [n for n in dataset.files if n.endswith(".json")], folder)
        _check_features(name, Path(folder, "features.json"))
        builder = tfds.builder_from_directory(folder)
        shards = _shards(name, dataset.folder, builder, split)
        if not dataset.is_local:
            _fetch(name, dataset, shards, folder)
        _write(name, builder, split, file)


def _check_features(name: str, path: Path) -> None:
    """TFDS imports the classes that features.json names: only its own are let through.

    Raises:
        InputError: the file names another, or cannot be read.
    """
    if not path.is_file():
        return
    classes = []
    try:  # the hook sees every object in it
        json.loads(
            path.read_text(encoding="utf-8"),
            object_hook=lambda part: classes.append(str(part.get("pythonClassName", TFDS))),
        )
    except ValueError as error:
        raise InputError(f"{name}: {path} is not readable JSON ({error})") from None
    for class_name in classes:
        if not class_name.startswith(TFDS):
            raise InputError(
                f"{name}: {path} names the class {class_name}, which is not one of TFDS and "
                "would be imported: build the dataset with classes of TFDS"
            )


def _shards(name: str, folder: str, builder, split: str) -> list[str]:
    """The names of a split's files, when it has rows and can be read without TensorFlow."""
    formats = [f.value for f in builder.info.available_file_formats()]
    if "array_record" not in formats:
        raise InputError(
            f"{name}: {folder} holds {', '.join(formats)}, which needs TensorFlow: build it with "
            "--file_format array_record"
        )
    try:
        of_split = builder.info.splits[split]
    except (KeyError, ValueError):
        splits = list(builder.info.splits)
        raise InputError(
            f"{name}: {folder} has no split {split}, give {' or '.join(splits)}, or a part as in "
            f"{splits[0]}[:1000]"
        ) from None
    if not of_split.num_examples:
        raise InputError(f"{name}: there are no rows in {split}: give a part that has some")
    return list(of_split.filenames)


def _write(name: str, builder, split: str, file: Path) -> None:
    source = builder.as_data_source(split, file_format="array_record")
    starts = range(0, len(source), TOGETHER)
    examples = (
        x for i in starts for x in source.__getitems__(range(len(source))[i : i + TOGETHER])
    )
    with (
        atomic_write(file) as beside,
        # Half a surrogate pair, which a field that nobody asks for may hold, is passed on.
        beside.open("w", encoding="utf-8", errors="surrogatepass") as out,
    ):
        for example in tqdm(examples, desc=f"Reading {name}", total=len(source), unit=" rows"):
            try:
                row = _plain(example)
            except UnicodeDecodeError as error:
                raise InputError(f"{name}: holds bytes that are no text: {error}") from None
            if builder.name == BUILDER:
                row |= json.loads(row.pop(EXTRA, "{}"))
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _fetch(name: str, dataset: _Dataset, files: list[str], folder: str) -> None:
    with one_sentence(name):
        for file in sorted(files):
            download(dataset.fs, dataset.files[file], Path(folder, file))


def _plain(value):
    """Arrays and bytes of TFDS as what JSON knows.

    TFDS has no list that may be absent, only empty ones: these are left out with the fields that
    are None.
    """
    if isinstance(value, dict):
        plain = {name: _plain(part) for name, part in value.items()}
        return {name: part for name, part in plain.items() if part is not None and part != []}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list) else value
