"""What the names of data in a command's settings stand for: local JSON lines.

    path/train.json, llm-embedder:qa/nq/train.json     files, the latter under --data_root
    train.json.gz, train.json.zst, train.parquet       unpacked once
    gs://bucket/train.json, s3://..., hf://...         downloaded once
    tfds:NAME[/CONFIG][:SPLIT]                         ArrayRecord splits of TFDS, converted once
    hf:NAME[:CONFIG][:SPLIT]                           see hf_datasets, converted once
    scifact/, scifact/qrels/dev.tsv                    see beir, converted once

What is made lies in `{cache}/sources/{digest}/{folder}/{name}.json`, named by the content of what
it was made from. The rest of the package reads files whose rows have their texts and numbers, and
knows of none of these names.
"""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from llme_jax.config.setting import Groups, as_list
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest, digest_file, digest_folder
from llme_jax.files.cache import cache_dir, check_cache
from llme_jax.sources.beir import Role, as_rows, folder_of, parts_of, passages_of, split_of
from llme_jax.sources.buckets import downloaded
from llme_jax.sources.formats import as_lines, format_of
from llme_jax.sources.hf_datasets import dataset_file, is_dataset, name_parts
from llme_jax.sources.hub_sets import set_place, sets_of
from llme_jax.sources.id_texts import ids_in, with_texts
from llme_jax.sources.ids import with_numbers
from llme_jax.sources.tfds import split_file

PREFIX = "llm-embedder:"  # of paths under --data_root
READ_BY_ALL = ("eval_data", "corpus", "train_corpus", "train_queries")
_ENDINGS = re.compile(r"(\.(jsonl?|gz|zst|parquet|arrow|tsv))+$")


def resolve(config: Groups, *, leave_out: str | None = None) -> "Files":
    """The files of a command's settings; nothing is fetched or made yet, but all are there.

    Args:
        leave_out: a setting that this run does not read.

    Raises:
        InputError: one is not there; names its flag.
    """
    settings = config.flat()
    files = Files({name: value for name, value in settings.items() if name != leave_out})
    files.check()
    return files


class Files:
    """What settings name, as local files. Each is fetched and made when it is first asked for.

    All that gives a file raises an InputError where it cannot be fetched or made, or names what is
    not there; it names the flag and the remedy.

    Args:
        settings: of a command, by name; what is not among them is not given.

    Attributes:
        given: the settings that are.
        cache: where what is made of files is kept.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.given = {n: value for n, value in settings.items() if value is not None}
        self._root = settings.get("data_root", "")
        self.cache = cache_dir(settings.get("dataset_cache_dir"))
        self._sources = self.cache / "sources"

    def check(self) -> None:
        """
        Raises:
            InputError: a file is not there.
        """
        given = self.given.get("train_data")
        if isinstance(given, list):
            for name in given:
                if not self._is_table(name):
                    self._expanded(name, fetch=False)
        for flag in READ_BY_ALL:
            for name in as_list(self.given.get(flag)):
                path = self._path(name)
                if self._is_remote(name) or self._is_table(name) or path.is_file():
                    continue
                if not any(map(os.path.isfile, glob.glob(str(path)))):
                    raise InputError(
                        f"--{flag} {path}: there is no such file, check the path and --data_root"
                    )

    @cached_property
    def corpus(self) -> Path | None:
        """The passages: those of --corpus, else of the BEIR folder of --eval_data; None where
        there are none."""
        name = self._corpus_name
        return None if name is None else self._file(name, "corpus")

    @cached_property
    def queries(self) -> Path:
        """The rows of --eval_data, whose passages are numbers of the corpus."""
        name = self.given["eval_data"]
        path = self._file(name, "queries")
        lenient = self._is_table(name)  # positives of BEIR's sets are not all passages
        corpus = self.corpus and str(self.corpus)
        return Path(with_numbers(str(path), corpus, self._sources, lenient=lenient))

    @cached_property
    def rows(self) -> Path:
        """The rows of --eval_data as they are."""
        return self.local(self.given["eval_data"])

    @cached_property
    def demonstrations(self) -> Path:
        """The rows of a --train_data that is one file."""
        path = self.local(self.given["train_data"])
        if not path.is_file():
            raise InputError(
                f"--train_data {path}: there is no such file, check the path and --data_root, or "
                "give --few_shot 0"
            )
        return path

    @cached_property
    def training(self) -> list[str]:
        """The rows of --train_data, globs in sorted order; they have texts, no ids."""
        paths = []
        for name in self.given["train_data"]:
            if self._is_table(name):
                paths.append(str(self._file(name, "pairs")))
            else:
                paths += self.expanded([name])
        return list(map(self._with_texts, paths))

    @cached_property
    def sets(self) -> dict[str, "Files"]:
        """The sets of --eval_data by name, each as the files of it alone.

        A set is called as its folder or file, behind the folder above where two have the same
        name, numbered where they still do.
        """
        named, corpora = (as_list(self.given.get(n)) for n in ("eval_data", "corpus"))
        if len(corpora) < 2:
            corpora = (corpora or [None]) * len(named)
        sets = [
            Files(self.given | {"eval_data": name, "corpus": corpus})
            for several, corpus in zip(named, corpora, strict=True)
            for name in sets_of(several, self._sources)
        ]
        for one in sets:
            if one._corpus_name is None:
                raise InputError(
                    f"--eval_data {one.given['eval_data']} needs --corpus, the passages that "
                    "are searched; only a BEIR folder or a retrieval set of the Hub brings its own"
                )
        places = [self._place(one.given["eval_data"]).absolute() for one in sets]
        return dict(zip(_set_names(places), sets, strict=True))

    @cached_property
    def beside(self) -> Path | None:
        """The folder of --eval_data; None where it is fetched, unpacked or a part of a set, beside
        which nothing is written."""
        name = self.given["eval_data"]
        path = self._path(name)
        made = self._is_remote(name) or format_of(path) or self._is_table(name)
        return None if made else path.parent

    def result(self, flag: str) -> list[Path]:
        """The result files that a setting names."""
        return list(map(self._path, as_list(self.given.get(flag))))

    def local(self, name: str) -> Path:
        """The one file that a name stands for; a local path is not looked at."""
        files = self._local(name)
        if len(files) > 1:
            raise InputError(f"{name}: matches {len(files)} files, give the name of one")
        return Path(files[0])

    def expanded(self, names: Sequence[str]) -> list[str]:
        """The files that names of training data stand for, globs in sorted order."""
        return [path for name in names for path in self._expanded(name)]

    def _expanded(self, name: str, *, fetch: bool = True) -> list[str]:
        if not fetch and self._is_remote(name):
            return []
        paths = []
        for path in self._local(name) if fetch else [str(self._path(name))]:
            if os.path.isdir(path):
                raise InputError(f"--train_data {name}: {path} is a folder, give {path}/*.json")
            if os.path.isfile(path):
                paths.append(path)
            elif glob.has_magic(path):
                found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
                if not found:
                    raise InputError(f"--train_data {name}: no file matches {path}")
                paths += found
            else:
                remedy = ", is --data_root right?" if path != name else ""
                raise InputError(f"--train_data {name}: there is no file {path}{remedy}")
        return paths

    def _local(self, name: str) -> list[str]:
        """The local files that a name stands for; globs of this machine are left as they are."""
        if not self._is_remote(name):
            path = str(self._path(name))
            files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            files = [file for file in files if os.path.isfile(file)]
            if not any(map(format_of, files)):
                return [path]
            self._check_cache()
            return [as_lines(file, self._sources) for file in files]
        self._check_cache()
        if name.startswith("tfds:"):
            return [str(split_file(name, self._root, self._sources))]
        if is_dataset(name):
            return [dataset_file(name, self._sources)]
        found = downloaded(resolve_path(name, self._root), self._sources)
        return [as_lines(file, self._sources) for file in found]

    def _with_texts(self, path: str) -> str:
        corpora, files = as_list(self.given.get("corpus")), {}
        corpus = self.given.get("train_corpus", corpora[0] if len(corpora) == 1 else None)
        queries = self.given.get("train_queries")
        for kind in ids_in(path):
            role, name = {"queries": ("queries", queries), "passages": ("corpus", corpus)}[kind]
            if name is None:
                raise InputError(
                    f"{path}: names its {kind} by id: give the --train_{role} that has them"
                )
            files[kind] = str(self._file(name, role))
        if not files:
            return path
        template, bad = (self.given[name] for name in ("key_template", "max_bad_rows"))
        return with_texts(path, files, template, self._sources, max_bad_rows=bad)

    @property
    def _corpus_name(self) -> str | None:
        """--corpus; where it is not given, the BEIR folder that --eval_data is or belongs to."""
        corpus, name = (self.given.get(n) for n in ("corpus", "eval_data"))
        if corpus or not name:
            return corpus
        place = self._place(name)
        base = folder_of(place) if split_of(place) else place
        return str(base) if passages_of(base) else None

    def _file(self, name: str, role: Role) -> Path:
        if self._is_table(name):
            path = str(self._place(name))
            return Path(as_rows(path, role, self.given["key_template"], self._sources) or path)
        return self.local(name)

    def _is_table(self, name: str) -> bool:
        """Is it of those that `as_rows` reads?"""
        place = self._place(name)
        if place.is_dir():
            return passages_of(place) is not None
        return place.is_file() and (place.suffix == ".tsv" or split_of(place) is not None)

    def _place(self, name: str) -> Path:
        if is_dataset(name):
            self._check_cache()
            if place := set_place(name, self._sources):
                return place
        return self._path(name)

    def _path(self, name: str) -> Path:
        return Path(os.path.expanduser(resolve_path(name, self._root)))

    def _is_remote(self, name: str) -> bool:
        return is_remote(resolve_path(name, self._root))

    def _check_cache(self) -> None:
        check_cache(self.given.get("dataset_cache_dir"))


def resolve_path(path: str, data_root: str) -> str:
    """`llm-embedder:qa/nq/train.json` -> `{data_root}/qa/nq/train.json`; others unchanged."""
    return os.path.join(data_root, path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path


def is_remote(name: str) -> bool:
    """Is it no file of this machine?"""
    return name.startswith("tfds:") or is_dataset(name) or "://" in name


def content_of(name: str) -> str | None:
    """What changes when the data behind a name does; None where there is nothing.

    Of what lies elsewhere it is the name itself.
    """
    if is_dataset(name) and os.path.isdir(name_parts(name)[0]):
        return digest(name_parts(name)[1:], digest_folder(Path(name_parts(name)[0])))
    if is_remote(name):
        return name
    path = os.path.expanduser(name)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        return None
    parts = [part for place in map(Path, found) for part in parts_of(place) or [place]]
    return digest([digest_folder(p) if p.is_dir() else digest_file(p) for p in parts])


def _set_names(places: list[Path]) -> list[str]:
    named, stems = [], []
    for place in places:
        stem = place.name if place.is_dir() else _ENDINGS.sub("", place.name)
        split = split_of(place)
        stems.append(f"{folder_of(place).name}.{split}" if split else stem)
    for place, stem in zip(places, stems, strict=True):
        above = (folder_of(place) if split_of(place) else place).parent.name
        name = f"{above}-{stem}" if stems.count(stem) > 1 else stem
        name = re.sub(r"[^\w.-]+", "-", name)  # @ and / mean something in names of metrics
        numbered = (f"{name}-{i}" for i in count(2))
        named.append(next(n for n in chain([name], numbered) if n not in named))
    return named
