"""Widths against all possible ones; batches cover everything once."""

from itertools import combinations

import numpy as np
import pytest

from llme_jax.data.widths import STEP, batches_by_length, choose_widths, fine_width, fitting


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


def test_fine_widths_hold_every_length_and_are_few():
    widths = [fine_width(length, 510) for length in range(1, 511)]
    assert all(length <= width for length, width in enumerate(widths, 1))
    assert widths == sorted(widths) and all(w % STEP == 0 or w == 510 for w in widths)
    assert len(set(widths)) == 16
    assert all(width - n < max(STEP, width / 4.9) for n, width in enumerate(widths, 1))
