"""How each task asks: the prompt of a row, with its passages and demonstrations.

Source of the layouts: `evaluation/eval_*.py` of LLM-Embedder (MIT).
"""

import re
from collections.abc import Sequence

from llme_jax.evaluation.prompts import Prompt

LETTERS = "ABCD"


def mmlu(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
    """Which of four choices; demonstrations are rows of the same subject."""
    subject = row["subject"].replace("_", " ")
    return Prompt(
        _choices(row | {"query": row["query"].strip()}),
        knowledge="\n".join(keys),
        frame=("Knowledge:\n", "\n\n"),
        intro=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
        demonstrations=tuple(f"{_choices(r)} {LETTERS[r['answer']]}\n\n" for r in shown),
        options=tuple(f" {letter}" for letter in LETTERS),
    )


def _choices(row: dict) -> str:
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return "\n".join([row["query"], *lines, "Answer:"])


def popqa(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
    """A fact about an entity, to be written; demonstrations are rows about other relations."""
    return Prompt(
        f"Q: {row['query']} A:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
        demonstrations=tuple(f"Q: {r['query']} A: {r['obj']}\n\n" for r in shown),
    )


def qa(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
    """A question (NQ), the answer to be written; of a demonstration the first answer is shown."""
    return Prompt(
        f"Question: {row['query']}\nAnswer:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
        demonstrations=tuple(
            f"Question: {r['query']}\nAnswer: {r['answers'][0]}\n\n" for r in shown
        ),
    )


def qrecc(row: dict, keys: Sequence[str], shown: Sequence[dict] = ()) -> Prompt:
    """The last question of a conversation, all of which is the query."""
    return Prompt(
        f"Context and Question: {row['query']}\nAnswer:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
    )


def icl(row: dict, keys: Sequence[str], shown: Sequence[dict] = ()) -> Prompt:
    """Keys are the demonstrations, the most similar one first: it comes last, next to the query.

    A row with options is a choice, any other is written.
    """
    return Prompt(
        f"{_single_blanks(row['query'])}\n",
        demonstrations=tuple(f"{_single_blanks(key)}\n" for key in reversed(keys)),
        options=tuple(f" {option}" for option in row.get("options") or ()),
    )


def _single_blanks(text: str) -> str:
    return re.sub(r"\s{2,}", " ", text)


def msc(row: dict, keys: Sequence[str], shown: Sequence[dict] = ()) -> Prompt:
    """Keys are turns of the conversation, in the order in which they are read."""
    return Prompt(
        f"Speaker 1: {row['query'].strip()}\nSpeaker 2:",
        demonstrations=tuple(f"{key.strip()}\n" for key in keys),
        options=(f" {row['answers'][0].strip()}",),
    )
