"""How sure a difference between two systems is: paired bootstrap over queries, and the verdict."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22  # queries drawn at a time


class Difference(NamedTuple):
    """Of a metric's mean, the second system less the first."""

    delta: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """WIN where the whole interval is above 0, REGRESSION where it is below, else MARGINAL."""
        if self.low > 0:
            return "WIN"
        return "REGRESSION" if self.high < 0 else "MARGINAL"


def paired_bootstrap(
    before: Float[np.ndarray, "Q"], after: Float[np.ndarray, "Q"], seed: int = 0
) -> Difference:
    """The mean difference with its 95% percentile interval (Efron 1979; Koehn 2004 of metrics).

    Queries are drawn with replacement, each with what both systems have for it; SAMPLES times.

    Args:
        before, after: a metric of each query, in the same order.
        seed: of the draws; the same numbers give the same interval.
    """
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    rng, count = np.random.default_rng(seed), len(differences)
    together = max(1, CHUNK // count)
    means = [
        differences[rng.integers(0, count, (min(together, SAMPLES - done), count))].mean(axis=1)
        for done in range(0, SAMPLES, together)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high))
