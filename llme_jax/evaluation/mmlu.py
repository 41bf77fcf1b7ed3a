"""MMLU: which of four choices is right; accuracy by subject."""

from collections import defaultdict
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
    needs_text,
    needs_texts,
    with_categories,
)

LETTERS = "ABCD"
# Source: `eval_mmlu.py` of LLM-Embedder (MIT), after hendrycks/test (MIT).
CATEGORIES = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics "
    "electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
    "high_school_computer_science high_school_mathematics high_school_physics "
    "high_school_statistics machine_learning",
    "Social Sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "Humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "Others": "anatomy business_ethics clinical_knowledge college_medicine global_facts "
    "human_aging management marketing medical_genetics miscellaneous nutrition "
    "professional_accounting professional_medicine virology",
}


def check(row: dict) -> None:
    query_of(row)
    needs_text(row, "subject")
    if len(needs_texts(row, "choices")) != len(LETTERS):
        raise InputError(f"choices has {len(row['choices'])} texts: give {len(LETTERS)}")
    if type(row.get("answer")) is not int or not 0 <= row["answer"] < len(LETTERS):
        raise InputError(f"answer is {shown(row.get('answer'))}: give 0 to {len(LETTERS) - 1}")


def prompt(row: dict, keys: Sequence[str], shown: Sequence[dict]) -> Prompt:
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


def demonstrations(
    rows: Sequence[dict], train: Sequence[dict], settings: TaskConfig, seed: int
) -> Demonstrations:
    """The first rows of the same subject, in the order of the file."""
    of_subject = defaultdict(list)
    for row in train:
        of_subject[row["subject"]].append(row)
    return lambda i: of_subject[rows[i]["subject"]][: settings.few_shot]


def judge(row: dict, chosen: int) -> Scores:
    return {"accuracy": float(chosen == row["answer"])}


def summary(rows: Sequence[dict], outputs: Sequence[int], scores: Sequence[Scores]) -> Scores:
    """Means over subjects: of each category that has any, and of all; then each subject's own."""
    found = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        found[row["subject"]].append(score["accuracy"])
    subjects = {subject: float(np.mean(found[subject])) for subject in sorted(found)}
    categories = {category: names.split() for category, names in CATEGORIES.items()}
    return with_categories(categories, subjects, "All")


TASK = Task(check, prompt, judge, summary, demonstrations)
