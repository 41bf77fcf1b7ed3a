"""Multi-session chat: how likely the answer is after earlier turns that were found."""

import math
from collections.abc import Sequence

import numpy as np

from llme_jax.data.rows import strings_of
from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import Scores, Task, answered


def check(row: dict) -> None:
    answered(row)
    strings_of(row, "history")


def prompt(row: dict, keys: Sequence[str], shown: Sequence[dict] = ()) -> Prompt:
    """Keys are turns of the conversation, in the order in which they are read."""
    return Prompt(
        f"Speaker 1: {row['query'].strip()}\nSpeaker 2:",
        demonstrations=tuple(f"{key.strip()}\n" for key in keys),
        options=(f" {row['answers'][0].strip()}",),
    )


def judge(row: dict, likelihood: float) -> Scores:
    return {"log_likelihood": likelihood}


def summary(rows: Sequence[dict], outputs: Sequence[float], scores: Sequence[Scores]) -> Scores:
    """Perplexity of the rows' mean log-probabilities, long answers counting no more than short."""
    return {"perplexity": math.exp(-np.mean([row["log_likelihood"] for row in scores]))}


TASK = Task(check, prompt, judge, summary, shared=False)
