"""PopQA: facts about entities few have heard of, to be written."""

import json
from collections.abc import Sequence

import numpy as np

from llme_jax.config.evaluation import TaskConfig
from llme_jax.data.rows import query_of, shown
from llme_jax.errors import InputError
from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import (
    Demonstrations,
    Scores,
    Task,
    means,
    needs_text,
    needs_texts,
    rng_of,
)
from llme_jax.evaluation.text_metrics import contains, contains_words


def check(row: dict) -> None:
    query_of(row)
    needs_text(row, "obj")
    if type(row.get("prop_id")) not in (int, str):
        raise InputError(f"prop_id is {shown(row.get('prop_id'))}: give the relation's number")
    possible_answers(row)


def possible_answers(row: dict) -> list[str]:
    """Hugging Face's file has the list as one string of JSON."""
    value = row.get("possible_answers")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"possible_answers is {shown(value)}: give a list of texts") from None
    return needs_texts({"possible_answers": value}, "possible_answers")


def prompt(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
    return Prompt(
        f"Q: {row['query']} A:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
        demonstrations=tuple(f"Q: {r['query']} A: {r['obj']}\n\n" for r in shown),
    )


def demonstrations(
    rows: Sequence[dict], train: Sequence[dict], settings: TaskConfig, seed: int
) -> Demonstrations:
    """Rows of the other relations, as many of each, or one more of some; drawn for each row."""
    of_relation = {}
    for i, row in enumerate(rows):
        of_relation.setdefault(row["prop_id"], []).append(i)
    relations = sorted(of_relation, key=lambda name: (isinstance(name, str), name))

    def of_row(i: int) -> list[dict]:
        others = [name for name in relations if name != rows[i]["prop_id"]]
        if not others:
            return []
        rng = rng_of(seed, i)
        wanted = np.full(len(others), settings.few_shot // len(others))
        wanted[rng.permutation(len(others))[: settings.few_shot % len(others)]] += 1
        drawn = []
        for name, count in zip(others, wanted, strict=True):
            members = of_relation[name]
            drawn += rng.choice(members, min(count, len(members)), replace=False).tolist()
        return [rows[j] for j in drawn]

    return of_row


def judge(row: dict, text: str) -> Scores:
    answers = possible_answers(row)
    return {
        "accuracy": contains(text, answers),
        "accuracy_words": contains_words(text, answers),
    }


def summary(rows: Sequence[dict], outputs: Sequence[str], scores: Sequence[Scores]) -> Scores:
    """A long text is more likely to hold an answer, so how long they are is said too."""
    words = float(np.mean([len(text.split()) for text in outputs]))
    return means(rows, outputs, scores) | {"words_written": words}


TASK = Task(check, prompt, judge, summary, demonstrations)
