"""Open questions (NQ), the answer to be written; exact match."""

from collections.abc import Sequence

import numpy as np

from llme_jax.config.evaluation import TaskConfig
from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import Demonstrations, Scores, Task, answered
from llme_jax.evaluation.text_metrics import exact_match, word_f1


def prompt(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
    """Of a demonstration the first answer is shown."""
    return Prompt(
        f"Question: {row['query']}\nAnswer:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
        demonstrations=tuple(
            f"Question: {r['query']}\nAnswer: {r['answers'][0]}\n\n" for r in shown
        ),
    )


def demonstrations(
    rows: Sequence[dict], train: Sequence[dict], settings: TaskConfig, seed: int
) -> Demonstrations:
    """Rows of --train_data, drawn once."""
    rng, count = np.random.default_rng(seed % 2**63), min(settings.few_shot, len(train))
    drawn = [train[j] for j in rng.permutation(len(train))[:count]]
    return lambda _: drawn


def judge(row: dict, text: str) -> Scores:
    answers = row["answers"]
    return {
        "exact_match": exact_match(text, answers, articles=True),
        "exact_match_squad": exact_match(text, answers, articles=False),
        "f1": word_f1(text, answers),
    }


TASK = Task(answered, prompt, judge, demonstrations=demonstrations)
