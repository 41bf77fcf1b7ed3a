"""QReCC: the last question of a conversation, all of which is the query."""

from collections.abc import Sequence

from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import Scores, Task, answered
from llme_jax.evaluation.text_metrics import rouge_l, rouge_l_of_sets


def prompt(row: dict, keys: Sequence[str], shown: Sequence[dict] = ()) -> Prompt:
    return Prompt(
        f"Context and Question: {row['query']}\nAnswer:",
        knowledge="\n".join(keys),
        frame=("Knowledge: ", "\n\n"),
    )


def judge(row: dict, text: str) -> Scores:
    right = row["answers"][0]
    return {"rl": rouge_l_of_sets(text, right), "rouge_l": rouge_l(text, right)}


TASK = Task(answered, prompt, judge)
