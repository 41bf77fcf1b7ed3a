"""Training data: files -> stores -> rows that survive the filters -> batches of token ids."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from llme_jax.config import DataConfig, LossConfig
from llme_jax.data.batch import Batch
from llme_jax.data.dataset import Dataset, make_dataset
from llme_jax.data.instructions import RECIPES
from llme_jax.data.plan import PlannedBatch
from llme_jax.data.rows import BadRows, expand_paths
from llme_jax.data.select import select_keys
from llme_jax.data.tokens import bucket, cache_dir, fingerprint
from llme_jax.data.train_store import TrainStore, open_store
from llme_jax.errors import InputError


class _Chosen(NamedTuple):
    """The b rows of a batch that come from one dataset, and the keys taken for them."""

    store: TrainStore
    at: ndarray  # int64[b], positions in the batch
    rows: ndarray  # int64[b], indices into the store
    keys: ndarray  # int64[b, N], indices into the row's candidates

    def of(self, positions: ndarray) -> "_Chosen":
        kept = np.isin(self.at, positions)
        return _Chosen(self.store, self.at[kept], self.rows[kept], self.keys[kept])

    def texts(self) -> ndarray:
        return self.store.candidates[self.store.entries(self.rows, self.keys)]

    def num_positives(self) -> ndarray:
        """Known positives of every row: the listed ones, and key 0 when it is none of them."""
        listed = self.store.rows.n_pos[self.rows]
        return listed + (self.keys[:, 0] >= listed)


class TrainData:
    """The rows to train on: an entry a listed file, rows numbered through all files.

    Attributes:
        names, paths, tasks, sizes, recipes: one entry a listed file, after filters and sampling;
            a task is the one that most rows name.
    """

    def __init__(self, datasets: list[Dataset], data: DataConfig, pad_id: int, seed: int):
        self._datasets, self._data = datasets, data
        self._pad_id, self._seed = pad_id, seed
        self.names = [d.name for d in datasets]
        self.paths = [d.path for d in datasets]
        self.tasks = [max(d.store.tasks, key=d.store.tasks.get) for d in datasets]
        self.sizes = [len(d.rows) for d in datasets]
        self.recipes = [d.recipe for d in datasets]
        self._ends = np.cumsum(self.sizes)
        # Files without scores may be mixed in: the losses leave their rows out of distillation.
        self._mixed = next(
            (d.recipe for d in datasets if d.recipe == d.configured), self.recipes[0]
        )
        most = max(int(d.store.rows.n_pos[d.rows].max()) for d in datasets)
        self._usual_positives = min(8, _power_of_two(max(1, most)))

    def recipe(self, dataset: int | None) -> LossConfig:
        """The losses of a batch from one dataset, or of a mixed one (None)."""
        return self._mixed if dataset is None else self.recipes[dataset]

    def describe(self, planned: PlannedBatch) -> list[str]:
        """Where each row of a batch comes from, as in "train.json:17"."""
        out = [""] * len(planned.rows)
        for dataset, at, rows in self._by_dataset(planned):
            for i, line in zip(at, dataset.store.lines[rows], strict=True):
                out[i] = f"{dataset.path}:{line}"
        return out

    def assemble(self, planned: PlannedBatch, positions: slice = slice(None)) -> Batch:
        """The batch of the planned rows, or only of its `positions` (in ascending order).

        Widths come from the whole batch, so that all hosts agree on them.
        """
        chosen = [
            _Chosen(d.store, at, rows, self._select(d, rows, planned.rows[at], planned.epoch))
            for d, at, rows in self._by_dataset(planned)
        ]
        longest_query = max(c.store.queries.lengths_of(c.rows).max() for c in chosen)
        longest_key = max(c.store.keys.lengths_of(c.texts()).max() for c in chosen)
        positives = max(int(c.num_positives().max()) for c in chosen)
        widths = (
            bucket(longest_query, self._data.query_max_length),
            bucket(longest_key, self._data.key_max_length),
            max(self._usual_positives, _power_of_two(positives)),
        )
        local = [c.of(np.arange(len(planned.rows))[positions]) for c in chosen]
        parts = [_gather(c, *widths, self._pad_id) for c in local]
        order = np.argsort(np.concatenate([c.at for c in local]))
        batch = Batch(*(np.concatenate(field)[order] for field in zip(*parts, strict=True)))
        return batch._replace(
            key_ids=batch.key_ids.reshape(-1, widths[1]),
            key_lengths=batch.key_lengths.reshape(-1),
            key_hash=batch.key_hash.reshape(-1, 2),
        )

    def _by_dataset(self, planned: PlannedBatch) -> Iterator[tuple[Dataset, ndarray, ndarray]]:
        """Dataset, positions in the batch and rows of the store, for all datasets of a batch."""
        of_row = np.searchsorted(self._ends, planned.rows, side="right")
        for i in np.unique(of_row):
            dataset, at = self._datasets[i], np.flatnonzero(of_row == i)
            start = self._ends[i] - self.sizes[i]
            yield dataset, at, dataset.rows[planned.rows[at] - start]

    def _select(self, dataset: Dataset, rows: ndarray, numbers: ndarray, epoch: int) -> ndarray:
        candidates, how = dataset.store.padded(rows), dataset.selection
        return select_keys(candidates, numbers, how, seed=self._seed, epoch=epoch)


def prepare(
    data: DataConfig, loss: LossConfig, tokenizer, *, seed: int, bad_rows_path: Path | None
) -> TrainData:
    """Reads, validates and tokenises --train_data, or opens what an earlier run left in the cache.

    Args:
        seed: of the sample that max_sample_num takes and of all choices of keys.
        bad_rows_path: where skipped lines are listed, if there are any.

    Raises:
        InputError: a file, a row or a setting that cannot be trained on.
    """
    if not data.train_data:
        raise InputError("--train_data is missing: give the JSON-lines files to train on")
    if data.use_train_config and data.version not in RECIPES:
        raise InputError(
            f"--use_train_config: --version {data.version} has no training recipes, "
            f"give --version {' or '.join(RECIPES)}"
        )
    paths = expand_paths(data.train_data, data.data_root)
    cache, tokenizer_name = cache_dir(data.dataset_cache_dir), fingerprint(tokenizer)
    bad_rows = BadRows(data.max_bad_rows)
    stores = {
        path: open_store(path, data, tokenizer, tokenizer_name, cache, bad_rows)
        for path in dict.fromkeys(paths)
    }
    bad_rows.report(bad_rows_path)
    datasets, repeats = [], Counter()
    for path in paths:
        folder = Path(path).absolute().parent.name
        name = f"{folder}_{repeats[folder]}" if repeats[folder] else folder
        repeats[folder] += 1
        sample_seed = (seed % 2**63, len(datasets))
        datasets.append(make_dataset(name, path, stores[path], data, loss, sample_seed))
    if data.inbatch_same_dataset is None:
        _check_one_recipe(datasets)
    return TrainData(datasets, data, tokenizer.pad_token_id or 0, seed)


def _check_one_recipe(datasets: list[Dataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        if other.configured != first.configured:
            raise InputError(
                f"--use_train_config gives {first.path} and {other.path} different losses, which "
                "no mixed batch can have: give --inbatch_same_dataset epoch"
            )


def _gather(
    chosen: _Chosen, query_width: int, key_width: int, num_positives: int, pad_id: int
) -> Batch:
    """The rows of one dataset as a batch, its key fields still [b, N, ...]."""
    store, rows, keys = chosen.store, chosen.rows, chosen.keys
    texts = chosen.texts()
    query_ids, query_lengths = store.queries.padded(rows, query_width, pad_id)
    key_ids, key_lengths = store.keys.padded(texts.ravel(), key_width, pad_id)
    scores = store.scores[store.entries(rows, keys)]
    has_scores = ~np.isnan(store.rows.highest[rows])
    column = np.arange(num_positives)
    listed = column < store.rows.n_pos[rows][:, None]
    positives = store.entries(rows, np.where(listed, column, keys[:, :1]))
    return Batch(
        query_ids=query_ids,
        query_lengths=query_lengths,
        key_ids=key_ids.reshape(*keys.shape, key_width),
        key_lengths=key_lengths.reshape(keys.shape),
        teacher_scores=np.where(has_scores[:, None], scores, 0).astype(np.float32),
        has_scores=has_scores,
        key_hash=_halves(store.key_hash[texts]),
        positive_hash=_halves(store.key_hash[store.candidates[positives]]),
    )


def _halves(hashes: ndarray) -> ndarray:
    """uint64[...] -> uint32[..., 2]; jax has no 64-bit integers by default."""
    return np.ascontiguousarray(hashes).view(np.uint32).reshape(*hashes.shape, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
