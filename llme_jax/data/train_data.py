"""Training data: files -> stores -> rows that survive the filters -> batches of token ids."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from llme_jax.config import DataConfig, DistillConfig
from llme_jax.data.batch import Batch, Blocks, Texts, fits, places
from llme_jax.data.beir import training_files
from llme_jax.data.dataset import Dataset, check_one_recipe, make_dataset
from llme_jax.data.instructions import check_recipes
from llme_jax.data.pairs import PairLayout, Pairs
from llme_jax.data.plan import Plan, PlannedBatch
from llme_jax.data.rows import BadRows, not_read
from llme_jax.data.select import select_keys
from llme_jax.data.tokens import TokenStore, fingerprint
from llme_jax.data.train_store import TrainStore, open_store
from llme_jax.data.widths import usual_width
from llme_jax.errors import InputError
from llme_jax.files.cache import cache_dir

logger = logging.getLogger(__name__)

SAMPLED_BATCHES = 32  # how many of each file decide the widths of blocks


class _Chosen(NamedTuple):
    """The b rows of a batch that come from one dataset, and the keys taken for them."""

    store: TrainStore
    at: ndarray  # int64[b], positions in the batch
    rows: ndarray  # int64[b], indices into the store
    keys: ndarray  # int64[b, N], indices into the row's candidates

    def of(self, positions: ndarray) -> "_Chosen":
        kept = np.isin(self.at, positions)
        return _Chosen(self.store, self.at[kept], self.rows[kept], self.keys[kept])

    def texts(self, name: str) -> tuple[TokenStore | Pairs, ndarray]:
        """The store of the texts that a batch calls so, and which are the rows'; int64[b, n]."""
        if name == "pair":
            queries, keys = np.broadcast_arrays(self.rows[:, None], self.key_texts())
            store = Pairs(
                *(self.store.queries, self.store.keys, self.store.layout),
                *(queries.ravel(), keys.ravel()),
            )
            return store, np.arange(keys.size).reshape(keys.shape)
        if name == "query":
            return self.store.queries, self.rows[:, None]
        if name == "key":
            return self.store.keys, self.key_texts()
        raise ValueError(f"no texts of a row are called {name}")

    def key_texts(self) -> ndarray:
        return self.store.candidates[self.store.entries(self.rows, self.keys)]

    def num_positives(self) -> ndarray:
        """Known positives of every row: the listed ones, and key 0 when it is none of them."""
        listed = self.store.rows.n_pos[self.rows]
        return listed + (self.keys[:, 0] >= listed)


class TrainData:
    """The rows to train on: an entry a listed file, rows numbered through all files.

    Attributes:
        names, paths, contents, tasks, sizes, recipes: one entry a listed file, after filters and
            sampling; a content is the file's hash, a task the one that most rows name.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        data: DataConfig,
        pad_id: int,
        seed: int,
        layout: PairLayout | None = None,
    ):
        self._datasets, self._data = datasets, data
        self._pad_id, self._seed = pad_id, seed
        self.names = [d.name for d in datasets]
        self.paths = [d.path for d in datasets]
        self.contents = [d.store.content for d in datasets]
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
        self._limits = {"query": data.query_max_length, "key": data.key_max_length}
        if layout:
            self._limits = {"pair": layout.limit}
        self._widths: dict[str | None, dict[str, list[int]]] = {}  # by path and name of texts

    def recipe(self, dataset: int | None) -> DistillConfig:
        """The losses of a batch from one dataset, or of a mixed one (None)."""
        return self._mixed if dataset is None else self.recipes[dataset]

    def label(self, dataset: int | None) -> str | None:
        """What a dataset is reported as, its task; None where there is only one, or all mixed."""
        if dataset is None or len(set(self.tasks)) == 1:
            return None
        return self.tasks[dataset] or self.names[dataset]

    def plan(self, batch_size: int) -> Plan:
        """Which rows make which batch; warns of what does not fill one."""
        method = self._data.inbatch_same_dataset
        filling = [*zip(self.names, self.sizes, strict=True)]
        if method is None:
            filling = [("the data", sum(self.sizes))]
        for name, size in filling:
            if size < batch_size:
                logger.warning(
                    "%s has %d rows, less than a batch of %d: its rows are repeated to fill one",
                    *(name, size, batch_size),
                )
        return Plan(tuple(self.sizes), batch_size, method, self._seed)

    def describe(self, planned: PlannedBatch) -> list[str]:
        """Where each row of a batch comes from, as in "train.json:17"."""
        out = [""] * len(planned.rows)
        for dataset, at, rows in self._by_dataset(planned):
            for i, line in zip(at, dataset.store.lines[rows], strict=True):
                out[i] = f"{dataset.path}:{line}"
        return out

    def settle_widths(self, plan: Plan, devices: int) -> None:
        """Chooses the widths of the blocks that batches of a file are padded to.

        They come from some batches of each file, so that nearly all batches fit: a step is
        compiled once or twice a file, whatever the lengths of its texts.
        """
        longest: dict[str | None, dict[str, list[int]]] = {}
        for _, planned in plan.samples(SAMPLED_BATCHES):
            known = longest.setdefault(self._path(planned.dataset), {})
            for name, blocks in self._blocks(self._choose(planned), devices).items():
                known[name] = np.maximum(known.get(name, 0), blocks.longest).tolist()
        self._widths = {path: self._usual_widths(known) for path, known in longest.items()}

    def _path(self, dataset: int | None) -> str | None:
        return None if dataset is None else self.paths[dataset]

    def assemble(
        self,
        planned: PlannedBatch,
        devices: int = 1,
        positions: slice = slice(None),
        *,
        max_width: bool = False,
    ) -> Batch:
        """The batch of the planned rows, or only of its `positions`, those of some devices.

        How texts are spread over blocks, and the widths of these, come from the whole batch, so
        that all hosts agree on them.

        Args:
            devices: how many share the whole batch.
            max_width: gives it the shapes of one whose texts are longer than usual.
        """
        chosen = self._choose(planned)
        blocks = self._blocks(chosen, devices)
        widths = self._most(blocks) if max_width else self._fitting_widths(planned.dataset, blocks)
        positives = max(int(c.num_positives().max()) for c in chosen)
        num_positives = max(self._usual_positives, _power_of_two(positives))

        size = len(planned.rows)
        start, stop, _ = positions.indices(size)
        local = [c.of(np.arange(start, stop)) for c in chosen]
        parts = [_targets(c, num_positives) for c in local]
        order = np.argsort(np.concatenate([c.at for c in local]))
        scores, has_scores, key_hash, positive_hash = (
            np.concatenate(field)[order] for field in zip(*parts, strict=True)
        )
        owned = slice(start * devices // size, stop * devices // size)
        texts = {}
        for name, of_texts in blocks.items():
            whole = self._texts(chosen, name, of_texts, widths[name], owned)
            each = len(whole.place) // size  # texts a row
            texts[name] = whole._replace(place=whole.place[start * each : stop * each])
        return Batch(texts, scores, has_scores, key_hash.reshape(-1, 2), positive_hash)

    def _texts(
        self, chosen: list[_Chosen], name: str, blocks: Blocks, widths: Sequence[int], owned: slice
    ) -> Texts:
        """The part of every block that the `owned` devices hold, and all places."""
        cut = blocks.cut(widths)
        parts = [
            _padded(chosen, name, block[owned].ravel(), width, self._pad_id) for block, width in cut
        ]
        ids, lengths, *second = map(tuple, zip(*parts, strict=True))
        return Texts(ids, lengths, places([block for block, _ in cut]), *second)

    def _choose(self, planned: PlannedBatch) -> list[_Chosen]:
        return [
            _Chosen(d.store, at, rows, self._select(d, rows, planned.rows[at], planned.epoch))
            for d, at, rows in self._by_dataset(planned)
        ]

    def _blocks(self, chosen: list[_Chosen], devices: int) -> dict[str, Blocks]:
        size = sum(len(c.at) for c in chosen)
        blocks = {}
        for name in self._limits:
            lengths = None
            for c in chosen:
                store, texts = c.texts(name)
                if lengths is None:
                    lengths = np.empty((size, texts.shape[1]), np.int64)
                lengths[c.at] = store.lengths_of(texts)
            blocks[name] = Blocks(lengths, devices)
        return blocks

    def _usual_widths(self, longest: dict[str, list[int]]) -> dict[str, list[int]]:
        return {
            name: [usual_width(n, self._limits[name]) for n in lengths]
            for name, lengths in longest.items()
        }

    def _fitting_widths(
        self, dataset: int | None, blocks: dict[str, Blocks]
    ) -> dict[str, list[int]]:
        longest = {name: of_texts.longest for name, of_texts in blocks.items()}
        settled = self._widths.get(self._path(dataset)) or self._usual_widths(longest)
        if all(fits(longest[name], settled[name]) for name in blocks):
            return settled
        return self._most(blocks)  # one more program serves all batches that do not fit

    def _most(self, blocks: dict[str, Blocks]) -> dict[str, list[int]]:
        return {name: [self._limits[name]] * len(b.longest) for name, b in blocks.items()}

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
    data: DataConfig,
    loss: DistillConfig,
    tokenizer,
    *,
    seed: int,
    bad_rows: BadRows,
    layout: PairLayout | None = None,
) -> TrainData:
    """Reads, validates and tokenises --train_data, or opens what an earlier run left in the cache.

    Args:
        layout: how each query is joined with its keys to pairs; None: they are read apart.
        seed: of the sample that max_sample_num takes and of all choices of keys.
        bad_rows: gets the invalid lines of all files.

    Raises:
        InputError: a file, a row or a setting that cannot be trained on.
    """
    if not data.train_data:
        raise InputError("--train_data is missing: give the JSON-lines files to train on")
    if data.use_train_config:
        check_recipes(data.version)
    paths = training_files(data)
    cache, tokenizer_name = cache_dir(data.dataset_cache_dir), fingerprint(tokenizer)
    stores = {
        path: open_store(path, data, tokenizer, tokenizer_name, cache, bad_rows, layout)
        for path in dict.fromkeys(paths)
    }
    for path, store in stores.items():
        if store.unread:
            logger.warning("%s: %s", path, not_read(store.unread))
    datasets, repeats = [], Counter()
    for path in paths:
        folder = Path(path).absolute().parent.name
        name = f"{folder}_{repeats[folder]}" if repeats[folder] else folder
        repeats[folder] += 1
        sample_seed = (seed % 2**63, len(datasets))
        datasets.append(make_dataset(name, path, stores[path], data, loss, sample_seed))
    if data.inbatch_same_dataset is None:
        check_one_recipe(datasets)
    return TrainData(datasets, data, tokenizer.pad_token_id or 0, seed, layout)


def _padded(
    chosen: list[_Chosen], name: str, numbers: ndarray, width: int, pad_id: int
) -> tuple[ndarray, ...]:
    """Of the batch's texts with these numbers, what `padded` of their store gives."""
    columns: list[ndarray] = []
    for c in chosen:
        store, texts = c.texts(name)
        row, column = np.divmod(numbers, texts.shape[1])
        mine = np.isin(row, c.at)
        # c.at is ascending, so its entries are found by bisection.
        picked = texts[np.searchsorted(c.at, row[mine]), column[mine]]
        for i, part in enumerate(store.padded(picked, width, pad_id)):
            if i == len(columns):
                columns.append(np.empty((len(numbers), *part.shape[1:]), np.int32))
            columns[i][mine] = part
    return tuple(columns)


def _targets(chosen: _Chosen, num_positives: int) -> tuple[ndarray, ...]:
    """Teacher scores, whether there are any, identities of keys and of known positives."""
    store, rows, keys = chosen.store, chosen.rows, chosen.keys
    scores = store.scores[store.entries(rows, keys)]
    has_scores = ~np.isnan(store.rows.highest[rows])
    column = np.arange(num_positives)
    listed = column < store.rows.n_pos[rows][:, None]
    positives = store.entries(rows, np.where(listed, column, keys[:, :1]))
    return (
        np.where(has_scores[:, None], scores, 0).astype(np.float32),
        has_scores,
        _halves(store.key_hash[chosen.key_texts()]),
        _halves(store.key_hash[store.candidates[positives]]),
    )


def _halves(hashes: ndarray) -> ndarray:
    """uint64[...] -> uint32[..., 2]; jax has no 64-bit integers by default."""
    return np.ascontiguousarray(hashes).view(np.uint32).reshape(*hashes.shape, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
