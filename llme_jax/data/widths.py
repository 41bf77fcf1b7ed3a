"""Texts in batches of similar length and few shapes, the longest first."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

STEP = 16  # widths are multiples of this


def batches_by_length(
    lengths: np.ndarray, width: Callable[[int], int], rows: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Every text once.

    Longest first: what does not fit into memory fails at once, and the texts that fill up the last
    batch are the cheapest.

    Args:
        lengths: tokens of every text.
        width: columns of the batch whose longest text has so many tokens.
        rows: rows of a batch of that width.

    Yields:
        The texts of a batch; the same filled up to its rows with its last text (one of length 0
        would have no mean); its width.
    """
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        columns = width(int(lengths[order[start]]))
        count = rows(columns)
        texts = order[start : start + count]
        start += count
        yield texts, np.pad(texts, (0, count - len(texts)), mode="edge"), columns


def choose_widths(lengths: np.ndarray, longest: int, most: int) -> list[int]:
    """At most `most` widths, ascending, with which texts of these lengths have the least padding.

    Args:
        lengths: a sample; the last width is `longest`, for texts that are not in it.
    """
    steps = -(-np.asarray(lengths) // STEP)
    count = np.bincount(steps, minlength=-(-longest // STEP) + 1).astype(float)
    below = np.cumsum(count)  # texts of so many steps or fewer
    top = len(count) - 1
    # cost[j]: slots, in steps, of all texts of up to j steps in the widths so far, the last one j.
    cost, chosen = below * np.arange(top + 1), [np.zeros(top + 1, int)]
    for _ in range(most - 1):
        # Texts above i and up to j steps get width j; j <= i is out of the question.
        options = cost[:, None] + (below[None] - below[:, None]) * np.arange(top + 1)
        options[np.tril_indices(top + 1, -1)] = np.inf
        chosen.append(options.argmin(0))
        cost = options.min(0)
    widths, at = [], top
    for previous in reversed(chosen):
        widths.append(min(int(at) * STEP, longest))
        at = previous[at]
        if at == 0:
            break
    return sorted(set(widths))


def choose_sizes(seen: Sequence[int], most: int) -> list[int]:
    """At most `most` sizes, ascending, that batches of so many tokens are padded to with least.

    Args:
        seen: tokens of some batches; the last size has room for larger ones.
    """
    seen = sorted(seen)
    top = seen[-1] + max((seen[-1] - seen[len(seen) // 2]) // 2, seen[-1] // 16)
    step = max(STEP, (1 << (top.bit_length() - 1)) // 64)

    def padded(cuts: tuple[int, ...]) -> int:
        """Tokens of all when each cut is a size."""
        counts = np.diff([0, *(bisect_right(seen, cut) for cut in cuts), len(seen)])
        return int(np.dot(counts, [*cuts, top]))

    cuts = min(combinations(seen, min(most - 1, len(seen))), key=padded)
    return sorted({-(-size // step) * step for size in [*cuts, top]})


def fitting(widths: list[int], length: int) -> int:
    """The smallest width that holds `length` tokens."""
    return widths[bisect_left(widths, length)]


def usual_width(length: int, max_length: int) -> int:
    """The smallest of 16, 32, 48, 64, 96, 128, 192, 256, ... that holds `length` tokens.

    Few widths mean few compiled programs; the widths between the powers of two keep the padding
    of a full row below a third. Never more than `max_length`.
    """
    power = max(16, 1 << (int(length) - 1).bit_length())
    between = power * 3 // 4
    return min(between if power > 32 and length <= between else power, max_length)


def fine_width(length: int, max_length: int) -> int:
    """As `usual_width`, of twice as many widths: 16, 32, 48, ... 128, 160, 192, ... 256, 320, ...

    For what takes long enough to be worth more programs: of pairs whose keys are as long as
    passages 8% is padding, with the usual widths 15%.
    """
    step = max(STEP, (1 << (int(length) - 1).bit_length()) // 8)
    return min(-(-int(length) // step) * step, max_length)
