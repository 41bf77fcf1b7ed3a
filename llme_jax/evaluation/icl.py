"""In-context learning: 30 tasks, whose demonstrations are what was retrieved."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from llme_jax.data.rows import query_of, shown
from llme_jax.errors import InputError
from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import Scores, Task, needs_text, needs_texts, with_categories
from llme_jax.evaluation.text_metrics import exact_match, rouge_l_of_sets

# Of each category the tasks, those that are not measured by accuracy with their metric.
# Source: `icl_utils.py` of LLM-Embedder (MIT).
CATEGORIES = {
    "CQA": "arc_c arc_e natural_questions:em",
    "Commonsense": "copa hellaswag piqa",
    "Coreference": "winogrande wsc wsc273",
    "Paraphrase": "mrpc paws qqp",
    "NLI": "rte snli mnli_m mnli_mm qnli",
    "ReadingComp": "multirc:f1 openbookqa boolq squad_v1:em",
    "Sentiment": "sentiment140 sst2 yelp",
    "Data2Text": "common_gen:rl e2e_nlg:rl dart:rl",
    "Summarize": "aeslc:rl gigaword:rl ag_news",
}
METRICS = {
    name: metric or "acc"
    for names in CATEGORIES.values()
    for name, _, metric in (entry.partition(":") for entry in names.split())
}
WRITTEN = ("em", "rl")  # metrics of tasks whose answers are written


def check(row: dict) -> None:
    query_of(row)
    needs_text(row, "task_name")
    name, answers = row["task_name"], needs_texts(row, "answers")
    if name not in METRICS:
        raise InputError(f"task_name is {shown(name)}: give one of {', '.join(METRICS)}")
    if METRICS[name] in WRITTEN:
        return
    options = needs_texts(row, "options")
    if answers[0] not in map(str, range(len(options))):
        raise InputError(
            f"answers[0] is {shown(answers[0])}: give the number of the right option, "
            f'"0" to "{len(options) - 1}"'
        )


def prompt(
    row: dict, keys: Sequence[str], shown: Sequence[dict] = (), *, llama_inst: bool = False
) -> Prompt:
    """Keys are the demonstrations, the most similar one first: it comes last, next to the query.

    What is measured by em or rl is written, any other is a choice.
    """
    options = () if METRICS[row["task_name"]] in WRITTEN else row["options"]
    texts = [f"{_single_blanks(key)}\n" for key in reversed(keys)]
    query = _single_blanks(row["query"])
    if llama_inst:
        return Prompt(
            f"{query} [/INST] " if options else f"{query} [/INST]",
            intro="[INST] ",
            demonstrations=tuple(texts),
            options=tuple(f" {option.lstrip()}" for option in options),
        )
    return Prompt(
        f"{query}\n",
        demonstrations=tuple(texts),
        options=tuple(f" {option}" for option in options),
    )


def _single_blanks(text: str) -> str:
    return re.sub(r"\s{2,}", " ", text)


def judge(row: dict, answer: int | str) -> Scores:
    metric = METRICS[row["task_name"]]
    if metric == "em":
        return {"em": exact_match(answer, row["answers"], articles=False)}
    if metric == "rl":
        return {"rl": rouge_l_of_sets(answer, row["answers"][0])}
    return {"acc": float(str(answer) == row["answers"][0])}


def summary(rows: Sequence[dict], outputs: Sequence[Any], scores: Sequence[Scores]) -> Scores:
    """Means over tasks: of each category that has any, and of all; then each task's own."""
    members = defaultdict(list)
    for i, row in enumerate(rows):
        members[row["task_name"]].append(i)
    tasks = {}
    for name in METRICS:
        if name not in members:
            continue
        if METRICS[name] == "f1":
            pairs = [(str(outputs[i]), rows[i]["answers"][0]) for i in members[name]]
            tasks[name] = _f1(pairs)
        else:
            tasks[name] = float(np.mean([next(iter(scores[i].values())) for i in members[name]]))
    categories = {
        category: [entry.partition(":")[0] for entry in names.split()]
        for category, names in CATEGORIES.items()
    }
    return with_categories(categories, tasks, "avg")


def _f1(pairs: list[tuple[str, str]]) -> float:
    """F1 of answering "1", over all rows, each (answer, right answer)."""
    hits = sum(pair == ("1", "1") for pair in pairs)
    said, right = (sum(pair[side] == "1" for pair in pairs) for side in (0, 1))
    return 2 * hits / (said + right) if hits else 0.0


TASK = Task(check, prompt, judge, summary)
WITH_INST = TASK._replace(prompt=partial(prompt, llama_inst=True))
