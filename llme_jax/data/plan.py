"""The plan: which rows make the batch of a step, a pure function of (sizes, seed, step)."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy import ndarray


class PlannedBatch(NamedTuple):
    """The rows of one global batch."""

    dataset: int | None  # the one that all rows come from; None: they are mixed
    epoch: int
    rows: ndarray  # int64[B], indices into the concatenation of the datasets


@dataclass(frozen=True)
class Plan:
    """Batches of B rows from datasets of the given sizes; `plan(step)` may be asked in any order.

    Methods, named as in LLM-Embedder's `--inbatch_same_dataset`; all but None fill a batch from
    one dataset:

    - None: all rows shuffled together, anew in every epoch.
    - "epoch": rows shuffled within their dataset, batches shuffled, both anew in every epoch.
    - "epoch-static": as "epoch", but the batches stay as they are, only their order changes.
    - "epoch-random": for each batch a dataset is drawn in proportion to its remaining rows.
    - "random": for each batch a dataset is drawn in proportion to its size, then rows of it;
      an epoch is so many steps as rows fill batches.

    Rows that do not fill a batch are left out of an epoch; another shuffle brings them back. A
    dataset smaller than a batch fills one by repeating its rows.
    """

    sizes: tuple[int, ...]
    batch_size: int
    method: str | None
    seed: int

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (sum(self.sizes),) if self.method is None else self.sizes

    @property
    def steps_per_epoch(self) -> int:
        if self.method == "random":
            return max(1, sum(self.sizes) // self.batch_size)
        return sum(_batch_counts(self._sizes, self.batch_size))

    def batches_per_epoch(self) -> list[int] | None:
        """How many batches of an epoch are of each dataset; None where that is left to chance."""
        if self.method in (None, "random"):
            return None
        return _batch_counts(self.sizes, self.batch_size)

    def shares(self) -> list[float]:
        """How much of all batches each dataset has; a single 1 where they are mixed."""
        counts = self.batches_per_epoch() or self._sizes
        return [count / sum(counts) for count in counts]

    def samples(self, count: int) -> Iterator[tuple[float, PlannedBatch]]:
        """Up to `count` batches of each dataset, those of the first epoch or such as it has.

        With each comes the share of all batches for which it stands.
        """
        batches, of = _shuffled_batches(self._sizes, self.batch_size, self.seed % 2**63, 0)
        for dataset, share in enumerate(self.shares()):
            numbers = np.flatnonzero(of == dataset)[:count]
            name = None if self.method is None else dataset
            for number in numbers:
                yield share / len(numbers), PlannedBatch(name, 0, batches[number].copy())

    def __call__(self, step: int) -> PlannedBatch:
        epoch, position = divmod(step, self.steps_per_epoch)
        seed = self.seed % 2**63
        if self.method == "random":
            return _draw(self.sizes, self.batch_size, seed, step, epoch)
        shuffle = 0 if self.method == "epoch-static" else epoch
        batches, datasets = _shuffled_batches(self._sizes, self.batch_size, seed, shuffle)
        if self.method == "epoch-random":
            batch = _drawn_order(self.sizes, self.batch_size, seed, epoch)[position]
        else:
            batch = _permutation(len(batches), seed, epoch)[position]
        dataset = None if self.method is None else int(datasets[batch])
        return PlannedBatch(dataset, epoch, batches[batch].copy())


def _batch_counts(sizes: tuple[int, ...], batch_size: int) -> list[int]:
    return [max(1, size // batch_size) for size in sizes]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(count)


@lru_cache(maxsize=2)
def _shuffled_batches(
    sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int
) -> tuple[ndarray, ndarray]:
    """Every dataset's rows shuffled and cut: int64[steps, B] rows, int64[steps] their datasets."""
    counts = _batch_counts(sizes, batch_size)
    rows, start = [], 0
    for dataset, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        shuffled = np.random.default_rng((seed, epoch, 1 + dataset)).permutation(size)
        rows.append(start + np.resize(shuffled, count * batch_size))  # repeats when too few
        start += size
    batches = np.concatenate(rows).reshape(-1, batch_size)
    return batches, np.repeat(np.arange(len(sizes)), counts)


@lru_cache(maxsize=2)
def _drawn_order(sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> ndarray:
    """Batch indices in the order in which datasets are drawn by their remaining rows."""
    counts = _batch_counts(sizes, batch_size)
    following = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    remaining = list(sizes)
    draws = np.random.default_rng((seed, epoch, 0)).random(sum(counts)).tolist()
    order = np.empty(len(draws), np.int64)
    for position, draw in enumerate(draws):
        ends = list(accumulate(remaining))
        dataset = bisect_right(ends, draw * ends[-1])
        order[position] = following[dataset]
        following[dataset] += 1
        remaining[dataset] -= batch_size
        if remaining[dataset] < batch_size:
            remaining[dataset] = 0
    return order


def _draw(
    sizes: tuple[int, ...], batch_size: int, seed: int, step: int, epoch: int
) -> PlannedBatch:
    """A dataset by size, then rows of it without replacement."""
    rng = np.random.default_rng((seed, step))
    ends = list(accumulate(sizes))
    dataset = bisect_right(ends, int(rng.integers(ends[-1])))
    size = sizes[dataset]
    rows = rng.choice(size, min(size, batch_size), replace=False)
    return PlannedBatch(dataset, epoch, ends[dataset] - size + np.resize(rows, batch_size))
