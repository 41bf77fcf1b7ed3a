"""What names of data stand for, as commands find it: of settings, or of names alone."""

from collections.abc import Sequence

from llme_jax.config import DataConfig, TextConfig
from llme_jax.sources.resolve import Files


def files_of(data: TextConfig | Files) -> Files:
    return data if isinstance(data, Files) else Files(vars(data))


def corpus_file(data: TextConfig | Files) -> str:
    return str(files_of(data).corpus)


def queries_file(data: TextConfig | Files) -> str:
    return str(files_of(data).queries)


def training_files(data: DataConfig) -> list[str]:
    return files_of(data).training


def evaluation_sets(data: DataConfig) -> dict[str, Files]:
    return files_of(data).sets


def local_file(name: str, data_root: str = "/nowhere") -> str:
    return str(Files({"data_root": data_root}).local(name))


def expand_paths(names: Sequence[str], data_root: str = "/nowhere") -> list[str]:
    return Files({"data_root": data_root}).expanded(names)


def is_made(name: str, data_root: str = "/nowhere") -> bool:
    return Files({"data_root": data_root, "eval_data": name}).beside is None
