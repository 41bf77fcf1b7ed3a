"""Which rows are trained on and which of their candidates become keys: pure array functions.

B rows with C candidates at most, the positives first; N keys are taken from each, key 0 is the
positive. Random choices come from a counter-based hash, so that the keys of a row depend on
(seed, epoch, row) alone, whatever batch the row is in.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray


class Selection(NamedTuple):
    """How rows are filtered and keys taken; the meanings are those of DataConfig."""

    group_size: int
    positive: str
    negative: str
    stable_distill: bool  # order keys 1..N-1 by teacher score
    scores_min: float | None
    scores_margin: float | None


class Candidates(NamedTuple):
    """The candidates of B rows, padded to the longest list."""

    n_pos: ndarray  # int[B]
    n_keys: ndarray  # int[B], positives and negatives
    scores: ndarray  # float64[B, C], what is in the padding does not matter
    has_scores: ndarray  # bool[B]


class RowSummary(NamedTuple):
    """What the filters look at, one value a row."""

    n_pos: ndarray  # int[n]
    n_keys: ndarray  # int[n]
    highest: ndarray  # float64[n], the best teacher score; NaN where the row has none
    lowest: ndarray  # float64[n]
    best: ndarray  # int[n], the first candidate with the highest score


def filter_rows(rows: RowSummary, how: Selection) -> dict[str, ndarray]:
    """Where a row is dropped, bool[n] for each filter by its name; a row counts for the first."""
    has_scores = ~np.isnan(rows.highest)
    nothing = np.zeros(len(rows.n_pos), bool)
    negative_taken = (how.positive == "teacher") & has_scores & (rows.best >= rows.n_pos)
    dropped = {
        "teacher_scores_min": (
            nothing if how.scores_min is None else has_scores & (rows.highest < how.scores_min)
        ),
        "teacher_scores_margin": (
            nothing
            if how.scores_margin is None
            else has_scores & (rows.highest - rows.lowest < how.scores_margin)
        ),
        "no negatives": (
            rows.n_keys - rows.n_pos - negative_taken <= 0 if how.group_size > 1 else nothing
        ),
    }
    seen = nothing
    for name, mask in dropped.items():
        dropped[name] = mask & ~seen
        seen = seen | mask
    return dropped


def lacks_positive(rows: RowSummary, how: Selection) -> ndarray:
    """bool[n]: rows from which `how.positive` cannot take a key 0."""
    any_key_will_do = (how.positive == "teacher") & ~np.isnan(rows.highest)
    return (rows.n_pos == 0) & ~any_key_will_do


def select_keys(
    candidates: Candidates, rows: ndarray, how: Selection, *, seed: int, epoch: int
) -> ndarray:
    """Takes N candidates of every row, the positive first.

    Negatives are put in an order of priority and taken from its front; when there are fewer than
    N-1 the order is gone through again, so none repeats before all have been used. Rows without
    scores take the first positive where the teacher should choose, and random negatives.

    Args:
        rows: int[B], identities of the rows for the random draws.

    Returns:
        int64[B, N], indices into the candidates of the row.
    """
    n_pos, n_keys, scores, has_scores = candidates
    column = np.arange(scores.shape[1])
    draws = uniform(seed, epoch, rows, column)
    index = np.broadcast_to(column.astype(float), scores.shape)
    scored = has_scores[:, None]

    is_pos = column < n_pos[:, None]
    eligible, priority = is_pos, index
    if how.positive == "random":
        priority = draws
    elif how.positive in ("teacher", "teacher-pos"):
        priority = np.where(scored, -scores, index)
        if how.positive == "teacher":
            eligible = is_pos | (scored & (column < n_keys[:, None]))
    first = np.where(eligible, priority, np.inf).argmin(1)[:, None]

    eligible = ~is_pos & (column < n_keys[:, None]) & (column != first)
    if how.negative == "first":
        priority = index
    elif how.negative == "random":
        priority = draws
    else:
        priority = np.where(scored, -scores if how.negative == "teacher+" else scores, draws)
    order = np.where(eligible, priority, np.inf).argsort(1, kind="stable")
    turn = np.arange(how.group_size - 1) % eligible.sum(1)[:, None]
    rest = np.take_along_axis(order, turn, 1)

    if how.stable_distill:
        descending = np.where(scored, -np.take_along_axis(scores, rest, 1), 0)
        rest = np.take_along_axis(rest, descending.argsort(1, kind="stable"), 1)
    return np.concatenate([first, rest], 1)


def uniform(seed: int, epoch: int, rows: ndarray, columns: ndarray) -> ndarray:
    """Random numbers in [0, 1) that depend on nothing but the four arguments; float64[B, C]."""
    state = np.array([0], np.uint64)
    for part in (seed, epoch, np.asarray(rows)[:, None], columns):
        state = _splitmix64(state ^ np.asarray(part).astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: ndarray) -> ndarray:
    """One output of the generator by Steele, Lea and Flood (2014) from state x; uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
