"""How the texts of a batch are cut into blocks and spread over devices."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from samples import assert_same, in_order, joined, make_rows, plan_rows

from llme_jax.data import train_data
from llme_jax.data.plan import Plan
from llme_jax.data.tokens import TokenStore


def test_a_slice_is_that_part_of_the_whole_batch(write_rows, prepared):
    paths = [write_rows(f"{t}/train.json", make_rows(9, s, tag=t)) for s, t in enumerate("ab")]
    data = prepared(paths, select_positive="random")
    planned = plan_rows([0, 17, 3, 9, 8, 2, 12, 1])
    whole = data.assemble(planned, 2)
    assert_same(joined([data.assemble(planned, 2, slice(i, i + 4)) for i in (0, 4)]), whole)
    assert data.describe(planned)[:3] == [f"{paths[0]}:1", f"{paths[1]}:9", f"{paths[0]}:4"]


def test_a_full_run_is_the_same_for_any_number_of_hosts(write_rows, prepared):
    data = prepared([write_rows(f"{t}/t.json", make_rows(20, tag=t)) for t in "ab"], seed=1)
    plan = Plan(tuple(data.sizes), 8, None, seed=1)
    for step in (0, 3, 11):
        planned = plan(step)
        whole = data.assemble(planned)
        for hosts in (2, 4, 8):
            share = 8 // hosts
            starts = range(0, 8, share)
            parts = [data.assemble(planned, hosts, slice(i, i + share)) for i in starts]
            assert len({str(jax.tree.map(np.shape, part)) for part in parts}) == 1
            assert_same(joined(parts), whole)


def test_a_host_reads_the_texts_of_its_rows_only(write_rows, prepared, monkeypatch):
    data = prepared([write_rows("t.json", make_rows(16))], train_group_size=4)
    read = []
    padded = TokenStore.padded
    monkeypatch.setattr(
        TokenStore, "padded", lambda self, ids, *a: read.append(len(ids)) or padded(self, ids, *a)
    )
    data.assemble(plan_rows(range(16)), 8, slice(4, 8))  # the second of four hosts
    assert sum(read) == 4 + 4 * 4  # its queries and their keys


def test_blocks_hold_all_texts_with_less_padding(write_rows, prepared):
    data = prepared(write_rows("t.json", make_rows(64)), train_group_size=4, key_max_length=40)
    plan = Plan(tuple(data.sizes), 32, None, seed=0)
    whole = [data.assemble(plan(step)) for step in range(6)]
    data.settle_widths(plan, 2)
    shapes = set()
    for step in range(6):
        two = data.assemble(plan(step), 2)
        assert_same(whole[step], two)
        assert 1 < len(two.texts["key"].ids) <= 4 and len(two.texts["query"].ids) == 1
        widths = [ids.shape[1] for ids in two.texts["key"].ids]
        assert all(a > b for a, b in pairwise(widths))
        longest = [lengths.max() for lengths in two.texts["key"].lengths]
        assert all(n <= width for n, width in zip(longest, widths, strict=True))
        shapes.add(str(jax.tree.map(np.shape, two)))
    assert len(shapes) == 1  # one program for all batches


def test_a_batch_that_does_not_fit_is_padded_to_the_limits(write_rows, prepared, monkeypatch):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n n n"]} for _ in range(39)]
    rows.append({"query": "q", "pos": ["k " * 20], "neg": ["n"]})
    data = prepared(write_rows("t.json", rows), query_max_length=14, key_max_length=33)
    plan = Plan((40,), 8, None, seed=0)
    steps = range(plan.steps_per_epoch)
    (outlier,) = [step for step in steps if 39 in plan(step).rows]
    assert all(39 not in planned.rows for _, planned in plan.samples(1))
    monkeypatch.setattr(train_data, "SAMPLED_BATCHES", 1)
    data.settle_widths(plan, 1)
    for step in steps:
        batch = data.assemble(plan(step))
        widths = {x.shape[1] for x in batch.texts["key"].ids}
        assert widths == ({33} if step == outlier else {16})
        assert {x.shape[1] for x in batch.texts["query"].ids} == {14}
    keys = data.assemble(plan(outlier)).texts["key"]
    assert in_order(keys)[1].max() > 16  # and nothing was cut off
    longest = data.assemble(plan(0), max_width=True)  # what --plan expects of such a batch
    assert [x.shape for x in longest.texts["key"].ids] == [x.shape for x in keys.ids]


@pytest.mark.parametrize("method", ["epoch", "epoch-random", "random"])
def test_a_small_file_among_large_ones_has_its_own_widths(write_rows, prepared, method):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n n n"]} for _ in range(640)]
    rare = [{"query": "q", "pos": ["k " * (i % 20)], "neg": ["n"]} for i in range(32)]
    paths = [write_rows("large.json", rows), write_rows("rare.json", rare)]
    data = prepared([*paths, paths[1]], query_max_length=14, key_max_length=48)
    plan = Plan(tuple(data.sizes), 16, method, seed=0)
    data.settle_widths(plan, 1)
    widths = {dataset: set() for dataset in range(3)}
    for step in range(2 * plan.steps_per_epoch):
        planned = plan(step)
        batch = data.assemble(planned)
        widths[planned.dataset].add(tuple(x.shape for x in batch.texts["key"].ids))
    assert widths[0] == {((48, 16),)} and widths[1] == widths[2] and len(widths[1]) == 1
    (blocks,) = widths[1]
    assert blocks == ((16, 32), (32, 16))
