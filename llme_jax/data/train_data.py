"""Training data: files -> stores -> rows that survive the filters -> batches of token ids."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from llme_jax.config import DataConfig, DistillConfig
from llme_jax.data.batch import Batch, Order, Shape, Texts, pack_texts
from llme_jax.data.dataset import Dataset, check_one_recipe, make_dataset
from llme_jax.data.instructions import check_recipes
from llme_jax.data.pairs import PairLayout, Pairs
from llme_jax.data.plan import Plan, PlannedBatch
from llme_jax.data.rows import BadRows, not_read
from llme_jax.data.select import select_keys
from llme_jax.data.tokens import TokenStore
from llme_jax.data.train_store import TeacherVectors, TrainStore, open_store
from llme_jax.data.widths import choose_sizes, usual_width
from llme_jax.hugging_face.tokenizer import fingerprint

logger = logging.getLogger(__name__)

SAMPLED_BATCHES = 32  # how many of each file decide the shapes of batches
SIZES = 3  # how many numbers of tokens a file's batches are padded to

Streams = dict[str, tuple[str, ...]]  # fields that go through a model together, by a common name


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
        if name == "pair" and self.store.pairs is not None:
            return self.store.pairs, self.store.entries(self.rows, self.keys)
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
        streams: Streams | None = None,
    ):
        self._datasets, self._data = datasets, data
        self._streams = streams or {"texts": ("query", "key")}
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
        # What no text is longer than; a folder's limit may be far beyond that.
        self._longest = {field: self._longest_of(field) for field in self._limits}
        # Widths of blocks and numbers of tokens, ascending, by path and name of the stream.
        self._shapes: dict[str | None, dict[str, tuple[list[int], list[int]]]] = {}

    def _longest_of(self, field: str) -> int:
        """Tokens of the longest text of any file, at most the limit."""
        found = 1
        for store in self.stores.values():
            found = max(found, store.longest(field))
        return min(self._limits[field], found)

    @property
    def stores(self) -> dict[str, TrainStore]:
        """The store of every file, by path."""
        return {d.path: d.store for d in self._datasets}

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

    def settle_shapes(self, plan: Plan, devices: int) -> None:
        """Chooses what the batches of a file are padded to.

        It comes from some batches of each file, so that nearly all batches fit: there are a few
        programs a file, whatever the lengths of its texts.
        """
        seen: dict[str | None, dict[str, list[Order]]] = {}
        for _, planned in plan.samples(SAMPLED_BATCHES):
            of_file = seen.setdefault(self._path(planned.dataset), {})
            for name, order in self._orders(self._choose(planned), devices).items():
                of_file.setdefault(name, []).append(order)
        self._shapes = {
            path: {name: self._usual_shape(name, orders) for name, orders in of_file.items()}
            for path, of_file in seen.items()
        }

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

        The shapes come from the whole batch, so that all hosts agree on them.

        Args:
            devices: how many share the whole batch.
            max_width: gives it the shapes of one whose texts are longer than usual.
        """
        chosen = self._choose(planned)
        orders = self._orders(chosen, devices)
        shapes = None if max_width else self._fitting_shapes(planned.dataset, orders)
        shapes = shapes or self._most(chosen, devices)
        positives = max(int(c.num_positives().max()) for c in chosen)
        num_positives = max(self._usual_positives, _power_of_two(positives))

        size = len(planned.rows)
        start, stop, _ = positions.indices(size)
        local = [c.of(np.arange(start, stop)) for c in chosen]
        parts = [_targets(c, num_positives) for c in local]
        at = np.argsort(np.concatenate([c.at for c in local]))
        scores, has_scores, key_hash, positive_hash, *vectors = (
            np.concatenate(field)[at] for field in zip(*parts, strict=True)
        )
        owned = slice(start * devices // size, stop * devices // size)
        rows = slice(start, stop)
        texts = {
            name: self._texts(local, rows, self._streams[name], order, shapes[name], owned)
            for name, order in orders.items()
        }
        hashes = key_hash.reshape(-1, 2), positive_hash
        return Batch(texts, scores, has_scores, *hashes, *vectors)

    def _texts(
        self,
        local: list[_Chosen],
        rows: slice,
        fields: tuple[str, ...],
        order: Order,
        shape: Shape,
        owned: slice,
    ) -> Texts:
        """The texts of these fields on the `owned` devices, whose rows of the batch these are."""
        packed = {}
        for field in fields:
            columns = self._padded(local, rows, field, order.longest[0])
            columns[1] = np.maximum(columns[1], 1)  # an empty text is a token of padding
            count = owned.stop - owned.start
            packed[field] = [x.reshape(count, -1, *x.shape[2:]) for x in columns]
        return pack_texts(
            *(packed, order.rows[owned], shape), first=owned.start, devices=len(order.rows)
        )

    def _padded(
        self, local: list[_Chosen], rows: slice, field: str, width: int
    ) -> list[Int32[ndarray, "rows n *d"]]:
        """Of the n texts of a field in each row, what `padded` of their store gives."""
        columns: list[ndarray] = []
        for c in local:
            store, texts = c.texts(field)
            for i, part in enumerate(store.padded(texts.ravel(), width, self._pad_id)):
                part = part.reshape(*texts.shape, *part.shape[1:])
                if i == len(columns):
                    columns.append(np.empty((rows.stop - rows.start, *part.shape[1:]), np.int32))
                columns[i][c.at - rows.start] = part
        return columns

    def _choose(self, planned: PlannedBatch) -> list[_Chosen]:
        return [
            _Chosen(d.store, at, rows, self._select(d, rows, planned.rows[at], planned.epoch))
            for d, at, rows in self._by_dataset(planned)
        ]

    def _orders(
        self, chosen: list[_Chosen], devices: int, *, longest: bool = False
    ) -> dict[str, Order]:
        """Of every stream; as if all texts were as long as can be when `longest`."""
        size, orders = sum(len(c.at) for c in chosen), {}
        for name, fields in self._streams.items():
            parts = []
            for field in fields:
                lengths = None
                for c in chosen:
                    store, texts = c.texts(field)
                    if lengths is None:
                        lengths = np.empty((size, texts.shape[1]), np.int64)
                    lengths[c.at] = self._longest[field] if longest else store.lengths_of(texts)
                parts.append(np.maximum(lengths, 1).reshape(devices, -1))
            orders[name] = Order(np.concatenate(parts, axis=1))
        return orders

    def _usual_shape(self, name: str, orders: list[Order]) -> tuple[list[int], list[int]]:
        """Widths of blocks, and numbers of tokens, for batches such as these."""
        longest = np.max([order.longest for order in orders], axis=0).tolist()
        limit = max(self._limits[field] for field in self._streams[name])
        sizes = choose_sizes([order.tokens for order in orders], SIZES)
        return [usual_width(n, limit) for n in longest], sizes

    def _fitting_shapes(
        self, dataset: int | None, orders: dict[str, Order]
    ) -> dict[str, Shape] | None:
        """None: there are none among those that were settled."""
        settled = self._shapes.get(self._path(dataset))
        if settled is None:
            settled = {name: self._usual_shape(name, [order]) for name, order in orders.items()}
        shapes = {}
        for name, order in orders.items():
            widths, sizes = settled[name]
            size = next((n for n in sizes if order.fits(widths, n)), None)
            if size is None:
                return None
            shapes[name] = order.shape(widths, size)
        return shapes

    def _most(self, chosen: list[_Chosen], devices: int) -> dict[str, Shape]:
        """One more program serves all batches that do not fit."""
        orders = self._orders(chosen, devices, longest=True)
        return {name: order.shape(order.longest, order.tokens) for name, order in orders.items()}

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
    paths: Sequence[str],
    cache: Path,
    data: DataConfig,
    loss: DistillConfig,
    tokenizer,
    *,
    seed: int,
    bad_rows: BadRows,
    layout: PairLayout | None = None,
    streams: Streams | None = None,
    teacher_width: int | None = None,
) -> TrainData:
    """Reads, validates and tokenises --train_data, or opens what an earlier run left in the cache.

    Args:
        paths: its files.
        cache: where what is made of them is kept.
        layout: how each query is joined with its keys to pairs; None: they are read apart.
        streams: which of them go through a model together; None: all.
        seed: of the sample that max_sample_num takes and of all choices of keys.
        bad_rows: gets the invalid lines of all files.
        teacher_width: numbers of the vectors that batches bring, zeros until the stores get a
            teacher's; None: they bring none.

    Raises:
        InputError: a file, a row or a setting that cannot be trained on.
    """
    if data.use_train_config:
        check_recipes(data.version)
    tokenizer_name = fingerprint(tokenizer)
    stores = {
        path: open_store(path, data, tokenizer, tokenizer_name, cache, bad_rows, layout)
        for path in dict.fromkeys(paths)
    }
    for path, store in stores.items():
        if store.unread:
            logger.warning("%s: %s", path, not_read(store.unread))
        if teacher_width:
            store.teacher = TeacherVectors.zeros(store, teacher_width)
    datasets, repeats = [], Counter()
    for path in paths:
        folder = Path(path).absolute().parent.name
        name = f"{folder}_{repeats[folder]}" if repeats[folder] else folder
        repeats[folder] += 1
        sample_seed = (seed % 2**63, len(datasets))
        datasets.append(make_dataset(name, path, stores[path], data, loss, sample_seed))
    if data.inbatch_same_dataset is None:
        check_one_recipe(datasets)
    return TrainData(datasets, data, tokenizer.pad_token_id or 0, seed, layout, streams)


def _targets(chosen: _Chosen, num_positives: int) -> tuple[ndarray, ...]:
    """Teacher scores, whether there are any, identities of keys and of known positives; then a
    teacher's vectors, where there is one."""
    store, rows, keys = chosen.store, chosen.rows, chosen.keys
    scores = store.scores[store.entries(rows, keys)]
    has_scores = ~np.isnan(store.rows.highest[rows])
    column = np.arange(num_positives)
    listed = column < store.rows.n_pos[rows][:, None]
    positives = store.entries(rows, np.where(listed, column, keys[:, :1]))
    vectors = [] if store.teacher is None else [store.teacher.of(store.lines[rows], keys)]
    return (
        np.where(has_scores[:, None], scores, 0).astype(np.float32),
        has_scores,
        _halves(store.key_hash[chosen.key_texts()]),
        _halves(store.key_hash[store.candidates[positives]]),
        *vectors,
    )


def _halves(hashes: ndarray) -> ndarray:
    """uint64[...] -> uint32[..., 2]; jax has no 64-bit integers by default."""
    return np.ascontiguousarray(hashes).view(np.uint32).reshape(*hashes.shape, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
