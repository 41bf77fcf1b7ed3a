"""What an evaluation needs to know of a task; one short module each fills it in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llme_jax.config.evaluation import TaskConfig
from llme_jax.data.rows import query_of, shown, strings_of
from llme_jax.errors import InputError
from llme_jax.evaluation.prompts import Prompt

Scores = dict[str, float]  # of one row; the first one is what two evaluations are compared by
# The demonstrations before row i.
Demonstrations = Callable[[int], Sequence[dict]]


def _none(*_) -> Demonstrations:
    return lambda _: ()


def means(rows: Sequence[dict], outputs: Sequence[Any], scores: Sequence[Scores]) -> Scores:
    """Each score's mean over the rows."""
    return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}


def with_categories(
    categories: Mapping[str, Iterable[str]], values: Scores, over_all: str
) -> Scores:
    """Means over the values of each category that has any, and over all; then each value."""
    metrics = {}
    for category, names in categories.items():
        if members := [values[name] for name in names if name in values]:
            metrics[category] = float(np.mean(members))
    return metrics | {over_all: float(np.mean([*values.values()]))} | values


def rng_of(seed: int, row: int) -> np.random.Generator:
    """Chance as a function of seed and row."""
    return np.random.default_rng([seed % 2**63, row])


class Task(NamedTuple):
    """
    Attributes:
        check: raises an InputError that says what is wrong with a row, without file and line.
        prompt: of a row, its keys and its demonstrations.
        judge: the scores of a row by what the model answered: the option's index, what it wrote,
            or the mean log-probability of its answer.
        summary: of all rows, their answers and scores.
        demonstrations: out of the rows, those of --train_data, settings and seed.
        shared: options of a question share what stands before them.
    """

    check: Callable[[dict], None]
    prompt: Callable[[dict, Sequence[str], Sequence[dict]], Prompt]
    judge: Callable[[dict, Any], Scores]
    summary: Callable[[Sequence[dict], Sequence[Any], Sequence[Scores]], Scores] = means
    demonstrations: Callable[[Sequence[dict], Sequence[dict], TaskConfig, int], Demonstrations] = (
        _none
    )
    shared: bool = True


def needs_text(row: dict, *names: str) -> None:
    for name in names:
        if not isinstance(row.get(name), str):
            raise InputError(f"{name} is {shown(row.get(name))}: give a string")


def needs_texts(row: dict, name: str) -> list[str]:
    texts = strings_of(row, name)
    if not texts or not all(text.strip() for text in texts):
        raise InputError(f"{name} is {shown(row.get(name))}: give a list of texts, none empty")
    return texts


def answered(row: dict) -> None:
    """A row that asks something and knows what is right."""
    query_of(row)
    needs_texts(row, "answers")
