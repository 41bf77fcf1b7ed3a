"""Intervals against scipy's bootstrap and a closed form; the verdict."""

import numpy as np
import pytest
from scipy import stats

from llme_jax.reports.bootstrap import Difference, paired_bootstrap


@pytest.fixture(params=[20, 300, 5000])
def pairs(request):
    rng = np.random.default_rng(request.param)
    before = rng.beta(0.3, 0.3, request.param)  # mostly near 0 and 1, as metrics of a query are
    after = np.clip(before + rng.normal(0.03, 0.3, request.param), 0, 1)
    return before, after


def test_against_scipy(pairs):
    """Two sets of 10,000 samples: the ends differ by noise, here up to 4% of the width."""
    before, after = pairs
    ours = paired_bootstrap(before, after)
    theirs = stats.bootstrap(
        (before, after),
        lambda a, b, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        confidence_level=0.95,
        method="percentile",
        random_state=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.delta == pytest.approx(np.mean(after) - np.mean(before), abs=1e-12)
    np.testing.assert_allclose([ours.low, ours.high], [*theirs], atol=0.04 * width)


def test_against_the_normal_distribution():
    differences = np.random.default_rng(0).normal(0.1, 1, 20_000)
    found = paired_bootstrap(np.zeros(20_000), differences)
    half = 1.96 * differences.std() / np.sqrt(20_000)
    np.testing.assert_allclose(
        [found.low, found.high], found.delta + np.array([-half, half]), atol=0.05 * half
    )


def test_the_same_numbers_give_the_same_interval(pairs):
    assert paired_bootstrap(*pairs) == paired_bootstrap(*pairs)
    before, _ = pairs
    found = paired_bootstrap(before, before)
    assert (found.delta, found.low, found.high) == (0, 0, 0) and found.verdict == "MARGINAL"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.001, 0.1, "WIN"), (-0.1, -0.001, "REGRESSION"), (-0.1, 0.1, "MARGINAL"),
     (0.0, 0.1, "MARGINAL")],
)  # fmt: skip
def test_the_verdict(low, high, verdict):
    assert Difference((low + high) / 2, low, high).verdict == verdict
