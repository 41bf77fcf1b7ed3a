"""How the texts of a batch are cut into blocks and spread over devices."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from samples import assert_same, in_order, joined, make_rows, plan_rows

from llme_jax.data import train_data
from llme_jax.data.batch import describe_shapes
from llme_jax.data.plan import Plan
from llme_jax.data.tokens import TokenStore


def test_a_slice_is_that_part_of_the_whole_batch(write_rows, prepared):
    paths = [write_rows(f"{t}/train.json", make_rows(9, s, tag=t)) for s, t in enumerate("ab")]
    data = prepared(paths, select_positive="random")
    planned = plan_rows([0, 17, 3, 9, 8, 2, 12, 1])
    whole = data.assemble(planned, 2)
    parts = [data.assemble(planned, 2, slice(i, i + 4)) for i in (0, 4)]
    jax.tree.map(np.testing.assert_array_equal, joined(parts), whole)
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
            assert_same(joined(parts), whole, hosts, 1)


def test_a_host_reads_the_texts_of_its_rows_only(write_rows, prepared, monkeypatch):
    data = prepared([write_rows("t.json", make_rows(16))], train_group_size=4)
    read = []
    padded = TokenStore.padded
    monkeypatch.setattr(
        TokenStore, "padded", lambda self, ids, *a: read.append(len(ids)) or padded(self, ids, *a)
    )
    data.assemble(plan_rows(range(16)), 8, slice(4, 8))  # the second of four hosts
    assert sum(read) == 4 + 4 * 4  # its queries and their keys


def test_batches_hold_all_texts_in_few_shapes(write_rows, prepared):
    data = prepared(write_rows("t.json", make_rows(64)), train_group_size=4, key_max_length=40)
    plan = Plan(tuple(data.sizes), 32, None, seed=0)
    whole = [data.assemble(plan(step)) for step in range(6)]
    data.settle_shapes(plan, 2)
    shapes, tokens, slots = set(), 0, 0
    for step in range(6):
        two = data.assemble(plan(step), 2)
        assert_same(whole[step], two, 1, 2)
        texts = two.texts["texts"]
        assert 1 < len(texts.widths) <= 4 and len(texts.place["query"]) == 32
        assert all(a > b for a, b in pairwise(texts.widths))
        longest = [lengths.max() for lengths in texts.lengths]
        assert all(n <= width for n, width in zip(longest, texts.widths, strict=True))
        shapes.add(describe_shapes(two))
        tokens, slots = tokens + texts.tokens, slots + len(texts.ids)
    assert len(shapes) <= train_data.SIZES
    assert tokens < slots < 1.1 * tokens


def test_a_batch_that_does_not_fit_is_padded_to_the_longest_texts(
    write_rows, prepared, monkeypatch
):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n n n"]} for _ in range(39)]
    rows.append({"query": "q", "pos": ["k " * 20], "neg": ["n"]})
    data = prepared(write_rows("t.json", rows), query_max_length=14, key_max_length=33)
    longest = 22  # [CLS], 20 times k, [SEP]
    plan = Plan((40,), 8, None, seed=0)
    steps = range(plan.steps_per_epoch)
    (outlier,) = [step for step in steps if 39 in plan(step).rows]
    assert all(39 not in planned.rows for _, planned in plan.samples(1))
    monkeypatch.setattr(train_data, "SAMPLED_BATCHES", 1)
    data.settle_shapes(plan, 1)
    batches = [data.assemble(plan(step)).texts["texts"] for step in steps]
    for step, batch in enumerate(batches):
        assert (max(batch.widths) == longest) == (step == outlier)
    # 8 queries and 8 x 3 keys, each as long as the longest of the file; queries are cut
    assert len(batches[outlier].ids) == 8 * 14 + 24 * longest
    lengths = [len(ids) for ids in in_order(batches[outlier], "key")[0]]
    assert max(lengths) > 16  # and nothing was cut off
    largest = data.assemble(plan(0), max_width=True)  # what --plan expects of such a batch
    assert largest.texts["texts"].widths == batches[outlier].widths
    assert len(largest.texts["texts"].ids) == len(batches[outlier].ids)


@pytest.mark.parametrize("method", ["epoch", "epoch-random", "random"])
def test_a_small_file_among_large_ones_has_its_own_widths(write_rows, prepared, method):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n n n"]} for _ in range(640)]
    rare = [{"query": "q", "pos": ["k " * (i % 20)], "neg": ["n"]} for i in range(32)]
    paths = [write_rows("large.json", rows), write_rows("rare.json", rare)]
    data = prepared([*paths, paths[1]], query_max_length=14, key_max_length=48)
    plan = Plan(tuple(data.sizes), 16, method, seed=0)
    data.settle_shapes(plan, 1)
    widths = {dataset: set() for dataset in range(3)}
    for step in range(2 * plan.steps_per_epoch):
        planned = plan(step)
        widths[planned.dataset].add(data.assemble(planned).texts["texts"].widths)
    assert widths[0] == {(16,)} and widths[1] == widths[2] == {(32, 16)}
