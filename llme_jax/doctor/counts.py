"""What is kept of more texts than memory holds: hashes, counts of lengths, the first lines."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from llme_jax.data.rows import BadRows

SHOWN = 10  # lines that are named of those with the same flaw


class HashSet:
    """A set of 64-bit hashes that takes 8 bytes for each."""

    def __init__(self):
        self._parts: list[ndarray] = []  # sorted, disjoint, each longer than the next

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def contains(self, hashes: ndarray) -> ndarray:
        """bool[n]: which of int64[n] are in the set."""
        found = np.zeros(len(hashes), bool)
        for part in self._parts:
            at = np.minimum(np.searchsorted(part, hashes), len(part) - 1)
            found |= part[at] == hashes
        return found

    def add(self, hashes: ndarray) -> ndarray:
        """bool[n]: which of int64[n] were new; of several alike, the first one is."""
        distinct, first = np.unique(hashes, return_index=True)
        new = ~self.contains(distinct)
        if new.any():
            self._parts.append(distinct[new])
        # Parts at least halve from one to the next, so that there are few, and each hash is
        # merged few times.
        while len(self._parts) > 1 and 2 * len(self._parts[-1]) > len(self._parts[-2]):
            last, before = self._parts.pop(), self._parts.pop()
            self._parts.append(np.sort(np.concatenate([before, last]), kind="stable"))
        is_new = np.zeros(len(hashes), bool)
        is_new[first[new]] = True
        return is_new


class Lengths:
    """How many texts have how many tokens: `counts[n]` have n."""

    def __init__(self):
        self.counts = np.zeros(1, np.int64)

    def add(self, lengths: list[int]) -> None:
        more = np.bincount(lengths, minlength=len(self.counts))
        more[: len(self.counts)] += self.counts
        self.counts = more

    def values(self) -> ndarray:
        """The length of every text, shortest first."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    def summary(self, limit: int) -> dict | None:
        """Percentiles, and how many texts are longer than `limit`; None without texts."""
        total = self.counts.sum()
        if not total:
            return None
        reached = self.counts.cumsum()
        percentiles = {
            f"{q}%": int(np.searchsorted(reached, total * q / 100)) for q in (50, 90, 99)
        }
        truncated = int(self.counts[limit + 1 :].sum())
        return {
            **percentiles,
            "max": len(self.counts) - 1,
            "limit": limit,
            "truncated": truncated,
            "truncated_share": truncated / int(total),
        }


@dataclass
class Lines(BadRows):
    """Lines with the same flaw: all are counted, and the first ones noted."""

    count: int = 0

    def add(self, path: str, line: int, reason: str = "") -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.found.append((path, line, reason))

    def summary(self) -> dict:
        return {"count": self.count, "first_lines": [line for _, line, _ in self.found]}
