"""Widths against all possible ones; batches cover everything once."""

from itertools import combinations

import numpy as np
import pytest

from llme_jax.data.widths import STEP, batches_by_length, choose_widths, fitting


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("longest", [96, 100])
def test_no_other_widths_pad_less(most, longest):
    rng = np.random.default_rng(most)
    lengths = rng.integers(1, 97, 40)

    def slots(widths):
        return sum(fitting(list(widths), length) for length in lengths)

    steps = range(STEP, longest, STEP)
    best = min(
        slots((*chosen, longest))
        for count in range(most)
        for chosen in combinations(steps, count)
    )  # fmt: skip
    widths = choose_widths(lengths, longest, most)
    assert len(widths) <= most and widths[-1] == longest
    assert slots(widths) <= best + len(lengths) * STEP * (longest % STEP > 0)
    assert longest % STEP or slots(widths) == best


def test_every_text_once_the_longest_first():
    lengths = np.random.default_rng(0).integers(1, 60, 101)
    seen, last = [], 64
    for texts, filled, width in batches_by_length(
        lengths, lambda n: 16 * -(-n // 16), lambda width: 128 // width
    ):
        assert len(filled) == 128 // width and (filled[: len(texts)] == texts).all()
        assert lengths[texts].max() <= width <= last
        seen += texts.tolist()
        last = width
    assert sorted(seen) == list(range(101))
