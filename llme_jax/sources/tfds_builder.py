"""The TFDS dataset `llm_embedder`: JSON lines -> ArrayRecord splits that read back as they were.

Only llme_jax.build_tfds imports this module: TFDS is heavy, and reading does not need it.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from string import Formatter
from tempfile import TemporaryDirectory

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.rows import BadRows, parse_line, parse_row, read_lines
from llme_jax.errors import InputError
from llme_jax.sources.tfds import BUILDER, EXTRA

SHARD_BYTES = 1 << 26  # JSON in one shard; TFDS keeps a shard's rows in memory
COLUMNS = {  # of training and evaluation rows; a corpus has those that --key_template names
    **dict.fromkeys(("query", "task"), "text"),
    "query_id": "integer",
    **dict.fromkeys(("pos", "neg", "history", "answers", "key", "neg_source"), "texts"),
    **dict.fromkeys(("pos_index", "neg_index", "key_index", "neg_rank"), "integers"),
    **dict.fromkeys(("context_inputs", "query_inputs", "answer_inputs"), "integers"),
    **dict.fromkeys(("teacher_scores", "neg_score"), "numbers"),
}
# No column: score_inputs, as TFDS writes lists of lists only with TensorFlow.
FEATURES = {
    "text": lambda: tfds.features.Scalar(np.str_, optional=True),
    "integer": lambda: tfds.features.Scalar(np.int64, optional=True),
    "texts": lambda: tfds.features.Sequence(tfds.features.Text()),
    "integers": lambda: tfds.features.Tensor(shape=(None,), dtype=np.int64),
    # As bytes, because TFDS keeps other floats in 32 bits.
    "numbers": lambda: tfds.features.Tensor(shape=(None,), dtype=np.float64, encoding="bytes"),
}
Shard = tuple[str, int, int]  # path, first byte, byte after the last


class LlmEmbedder(tfds.core.ShardBasedBuilder):
    """Splits of JSON-lines files, their rows in order.

    It is no GeneratorBasedBuilder, because that sorts all rows of a split in memory, and needs
    TensorFlow for more than 1 GB of them.

    Args:
        files: the files of every split.
        columns: the kind of each column, of FEATURES.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, files: dict[str, list[str]], columns: dict[str, str], **settings):
        self._files, self._columns = files, columns
        super().__init__(file_format="array_record", **settings)

    def _info(self):
        features = {name: FEATURES[kind]() for name, kind in self._columns.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Rows of LLM-Embedder's guide; `extra` is JSON of what has no column.",
            features=tfds.features.FeaturesDict(features | {EXTRA: FEATURES["text"]()}),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator]]]:
        splits = {}
        for split, paths in self._files.items():
            shards = [shard for path in paths for shard in cut(path)]
            said = [f"Writing {split} {i}/{len(shards)}" for i in range(1, len(shards) + 1)]
            splits[split] = [partial(self._examples, *s) for s in zip(shards, said, strict=True)]
        return splits

    def _examples(self, shard: Shard, said: str) -> Iterator[tuple[int, dict]]:
        path, start, stop = shard
        with (
            open(path, "rb") as lines,
            tqdm(total=stop - start, desc=said, unit="B", unit_scale=True) as bar,
        ):
            lines.seek(start)
            while start < stop:
                line = lines.readline()
                bar.update(len(line))
                if line.strip():
                    yield start, to_example(parse_line(line), self._columns)
                start += len(line)


def cut(path: str, size: int = SHARD_BYTES) -> list[Shard]:
    """Parts of a file of about `size` bytes that end with a line."""
    ends, total = [0], os.path.getsize(path)
    with open(path, "rb") as file:
        while ends[-1] < total:
            file.seek(min(ends[-1] + size, total))
            file.readline()
            ends.append(file.tell())
    return [(path, start, stop) for start, stop in pairwise(ends)]


def to_example(row: dict, columns: dict[str, str]) -> dict:
    """A row as an example of TFDS: what has no column, or does not fit its own, is in `extra`."""
    blank = {name: [] if kind.endswith("s") else None for name, kind in columns.items()}
    row = {name: value for name, value in row.items() if value is not None}
    fits = {n: v for n, v in row.items() if n in columns and _fits(v, columns[n])}
    rest = {name: value for name, value in row.items() if name not in fits}
    return blank | fits | {EXTRA: json.dumps(rest) if rest else None}


def _fits(value, kind: str) -> bool:
    """Does a column of this kind give the value back? An empty list would be taken for none."""
    if kind.endswith("s"):
        return (
            isinstance(value, list)
            and bool(value)
            and all(_fits(part, kind.removesuffix("s")) for part in value)
        )
    if kind == "text":
        return isinstance(value, str)
    if kind == "integer":
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def build(
    name: str,
    data_dir: str,
    train_data: list[str],
    eval_data: str | None,
    corpus: str | None,
    key_template: str,
) -> list[str]:
    """Writes the splits train and test of the config `name` and corpus of `{name}_corpus`.

    Every row is checked before anything is written.

    Args:
        train_data, eval_data, corpus: local files.
        data_dir: a local folder, of which a bucket may get a copy.

    Returns:
        The names by which the splits are read, in that order.

    Raises:
        InputError: a row is invalid, or the dataset exists.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"--name {name}: give letters, digits, dots and dashes")
    files = {"train": train_data, "test": [eval_data] if eval_data else []}
    configs = {
        name: ({split: paths for split, paths in files.items() if paths}, COLUMNS),
        f"{name}_corpus": ({"corpus": [corpus]} if corpus else {}, _columns(key_template)),
    }
    configs = {config: what for config, what in configs.items() if what[0]}
    for config in configs:
        folder = Path(data_dir).expanduser() / BUILDER / config / str(LlmEmbedder.VERSION)
        if folder.exists():
            raise InputError(f"{folder} exists already: delete it, or give another --name")
    _check(train_data, eval_data, corpus, key_template)
    for config, (splits, columns) in configs.items():
        of_config = tfds.core.BuilderConfig(name=config)
        builder = LlmEmbedder(splits, columns, config=of_config, data_dir=data_dir)
        # Or TFDS leaves an empty folder beside the data, and says that it downloads.
        with TemporaryDirectory() as nothing, redirect_stdout(StringIO()):
            builder.download_and_prepare(download_dir=nothing)
    return [f"tfds:{BUILDER}/{config}:{split}" for config, what in configs.items()
            for split in what[0]]  # fmt: skip


def _columns(key_template: str) -> dict[str, str]:
    fields = (field for _, field, _, _ in Formatter().parse(key_template))
    return {field: "text" for field in fields if field and field != EXTRA}


def _check(
    train_data: list[str], eval_data: str | None, corpus: str | None, key_template: str
) -> None:
    passages = Corpus(corpus, key_template) if corpus else None
    for path in train_data:
        if not sum(1 for _ in read_lines(path, parse_row, BadRows())):
            raise InputError(f"{path}: there are no rows in this file: leave it out")
    if eval_data and passages is None:
        EvalData(eval_data, metrics=[], corpus_size=0)
    elif eval_data:  # collate_neg checks pos_index where there is one
        EvalData(eval_data, metrics=["collate_neg"], corpus_size=len(passages))
