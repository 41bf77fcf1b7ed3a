"""The plan's properties: coverage, purity, one dataset a batch, proportions."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from llme_jax.data import plan as plan_module
from llme_jax.data.plan import Plan

SIZES = (37, 23, 40)
ENDS = np.cumsum(SIZES)
METHODS = [None, "epoch", "epoch-static", "epoch-random", "random"]
EPOCHS = [None, "epoch", "epoch-static", "epoch-random"]


def _epoch(plan: Plan, epoch: int) -> list:
    steps = plan.steps_per_epoch
    return [plan(step) for step in range(epoch * steps, (epoch + 1) * steps)]


def _clear():
    for function in ("_permutation", "_shuffled_batches", "_drawn_order"):
        getattr(plan_module, function).cache_clear()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_a_function_of_the_step(method):
    plan = Plan(SIZES, 4, method, seed=7)
    forward = [plan(step) for step in range(80)]
    _clear()  # another process
    for step in np.random.default_rng(0).permutation(80):
        again = Plan(SIZES, 4, method, seed=7)(int(step))
        assert again[:2] == forward[step][:2]
        np.testing.assert_array_equal(again.rows, forward[step].rows)
    other = [Plan(SIZES, 4, method, seed=8)(step) for step in range(80)]
    different = [(a.rows != b.rows).any() for a, b in zip(forward, other, strict=True)]
    assert np.mean(different) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_epochs(method):
    plan = Plan(SIZES, 4, method, seed=0)
    assert plan.steps_per_epoch == (25 if method in (None, "random") else 9 + 5 + 10)
    for step in range(60):
        planned = plan(step)
        assert planned.epoch == step // plan.steps_per_epoch
        assert planned.rows.shape == (4,) and planned.rows.dtype == np.int64
        assert len(set(planned.rows.tolist())) == 4
        assert planned.rows.min() >= 0 and planned.rows.max() < 100


@pytest.mark.parametrize("method", METHODS)
def test_samples_stand_for_all_batches(method):
    plan = Plan(SIZES, 4, method, seed=3)
    samples = list(plan.samples(2))
    assert [planned.dataset for _, planned in samples] == (
        [None, None] if method is None else [0, 0, 1, 1, 2, 2]
    )
    shares = np.array([share for share, _ in samples]).reshape(-1, 2)
    wanted = {None: [1], "random": [0.37, 0.23, 0.4]}.get(method, [9 / 24, 5 / 24, 10 / 24])
    np.testing.assert_allclose(shares.sum(axis=1), wanted)
    for _, planned in samples:
        assert planned.epoch == 0 and len({*planned.rows.tolist()}) == 4
        if method is not None:
            assert {*np.searchsorted(ENDS, planned.rows, side="right")} == {planned.dataset}
    if method != "random":  # they are batches that are trained on
        trained = {tuple(batch.rows) for batch in _epoch(plan, 0)}
        assert {tuple(planned.rows) for _, planned in samples} <= trained
    assert len(list(plan.samples(99))) == (25 if method is None else 24)


@pytest.mark.parametrize("method", METHODS[1:])
def test_one_dataset_a_batch(method):
    plan = Plan(SIZES, 4, method, seed=0)
    for step in range(60):
        planned = plan(step)
        of_row = np.searchsorted(ENDS, planned.rows, side="right")
        assert (of_row == planned.dataset).all()


@pytest.mark.parametrize("method", EPOCHS)
def test_no_row_twice_in_an_epoch_and_only_remainders_missing(method):
    plan = Plan(SIZES, 4, method, seed=0)
    for epoch in range(3):
        batches = _epoch(plan, epoch)
        rows = np.concatenate([b.rows for b in batches])
        assert len(set(rows.tolist())) == len(rows) == plan.steps_per_epoch * 4
        if method:
            assert Counter(b.dataset for b in batches) == {0: 9, 1: 5, 2: 10}


@pytest.mark.parametrize("method", ["epoch", "epoch-random"])
def test_another_shuffle_brings_remainders_back(method):
    plan = Plan(SIZES, 4, method, seed=0)
    seen = {row for epoch in range(10) for b in _epoch(plan, epoch) for row in b.rows.tolist()}
    assert seen == set(range(100))
    assert not np.array_equal(_epoch(plan, 0)[0].rows, _epoch(plan, 1)[0].rows)


def test_static_batches_change_their_order_only():
    plan = Plan(SIZES, 4, "epoch-static", seed=0)
    first, second = ([tuple(b.rows.tolist()) for b in _epoch(plan, epoch)] for epoch in (0, 1))
    assert first != second and set(first) == set(second)


def test_random_draws_in_proportion_to_size():
    plan = Plan((100, 300), 4, "random", seed=0)
    share = np.mean([plan(step).dataset for step in range(4000)])
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)


def test_epoch_random_draws_in_proportion_to_what_remains():
    first = [Plan((40, 120), 4, "epoch-random", seed)(0).dataset for seed in range(2000)]
    assert abs(np.mean(first) - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 2000)
    plan = Plan((40, 4000), 4, "epoch-random", seed=0)
    where = [i for i, b in enumerate(_epoch(plan, 0)) if b.dataset == 0]
    assert max(b - a for a, b in pairwise(where)) > 20  # spread over the epoch, not at its front


@pytest.mark.parametrize("method", METHODS)
def test_a_small_dataset_is_repeated(method):
    sizes = (3,) if method is None else (3, 50)
    plan = Plan(sizes, 8, method, seed=0)
    small = [b for b in (plan(step) for step in range(200)) if b.dataset in (None, 0)]
    for planned in small:
        assert sorted(Counter(planned.rows.tolist()).values()) == [2, 3, 3]


def test_small_datasets_fill_batches_together():
    assert Plan((3, 50), 8, None, seed=0).steps_per_epoch == 6


def test_ten_million_rows():
    plan = Plan((9_000_000, 1_000_000), 256, "epoch", seed=0)
    last = plan(plan.steps_per_epoch - 1)
    assert len(set(last.rows.tolist())) == 256
    draw = Plan((9_000_000, 1_000_000), 256, "random", seed=0)(12345)
    assert len(set(draw.rows.tolist())) == 256
