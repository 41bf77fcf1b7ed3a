"""Every task's prompt, written out."""

import math

import pytest

from llme_jax.evaluation import icl, mmlu, msc, popqa, qa, qrecc

CHOICES = {"choices": ["a", "b", "c", "d"], "subject": "world_religions", "answer": 2}


@pytest.mark.parametrize(
    ("prompt", "text", "options"),
    [
        (
            mmlu.prompt({"query": " Q1 "} | CHOICES, ["k1", "k2"], [{"query": "Q0 "} | CHOICES]),
            "Knowledge:\nk1\nk2\n\n"
            "The following are multiple choice questions (with answers) about world religions.\n\n"
            "Q0 \nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n"
            "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            (" A", " B", " C", " D"),
        ),
        (
            mmlu.prompt({"query": "Q1"} | CHOICES, [], []),
            "The following are multiple choice questions (with answers) about world religions.\n\n"
            "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            (" A", " B", " C", " D"),
        ),
        (
            popqa.prompt({"query": "who?"}, ["k1", "k2"], [{"query": "where?", "obj": "there"}]),
            "Knowledge: k1\nk2\n\nQ: where? A: there\n\nQ: who? A:",
            (),
        ),
        (
            qa.prompt({"query": "who"}, [], [{"query": "where", "answers": ["there", "here"]}]),
            "Question: where\nAnswer: there\n\nQuestion: who\nAnswer:",
            (),
        ),
        (
            qrecc.prompt({"query": "who"}, ["k1"]),
            "Knowledge: k1\n\nContext and Question: who\nAnswer:",
            (),
        ),
        (
            icl.prompt(
                {"query": "is  it?", "task_name": "rte", "options": ["yes", "no"]},
                ["nearest", "far \n one"],
            ),
            "far one\nnearest\nis it?\n",
            (" yes", " no"),
        ),
        (icl.prompt({"query": "say", "task_name": "dart", "answers": ["x"]}, []), "say\n", ()),
        (
            msc.prompt(
                {"query": " hi ", "answers": [" you ", "b"]}, ["Speaker 1: a\nSpeaker 2: b "]
            ),
            "Speaker 1: a\nSpeaker 2: b\nSpeaker 1: hi\nSpeaker 2:",
            (" you",),
        ),
    ],
)
def test_layouts(prompt, text, options):
    assert prompt.text == text
    assert prompt.options == options


def test_llama_inst():
    row = {"query": "is it?", "task_name": "rte", "options": [" yes", "no"]}
    prompt = icl.prompt(row, ["nearest", "far"], llama_inst=True)
    assert prompt.text + prompt.options[0] == "[INST] far\nnearest\nis it? [/INST]  yes"
    written = icl.prompt(row | {"task_name": "dart"}, [], llama_inst=True)
    assert (written.text, written.options) == ("[INST] is it? [/INST]", ())


# Rows, what was answered, and the metrics by hand: values above 0, ties, repeated words.
TABLES = [
    (
        mmlu.TASK,
        [{"subject": s, "answer": a} for s, a in (
            ("anatomy", 0), ("anatomy", 1), ("virology", 3), ("astronomy", 2), ("philosophy", 1),
        )],
        [0, 0, 3, 2, 2],
        {"STEM": 1.0, "Humanities": 0.0, "Others": 0.75, "All": 0.625,
         "anatomy": 0.5, "astronomy": 1.0, "philosophy": 0.0, "virology": 1.0},
    ),
    (
        popqa.TASK,
        [{"possible_answers": a} for a in (["Jane Austen", "JA"], '["ox", "cow"]', ["Rome"])],
        ["it was jane austen.", "a fox", "Paris"],
        {"accuracy": 2 / 3, "accuracy_words": 1 / 3, "words_written": 7 / 3},
    ),
    (
        qa.TASK,
        [{"answers": a} for a in (["the Nile", "Nile"], ["a red car"], ["x"])],
        ["The Nile!", "red car", ""],
        {"exact_match": 1 / 3, "exact_match_squad": 2 / 3, "f1": 2 / 3},
    ),
    (
        qrecc.TASK,
        [{"answers": ["a b c d"]}, {"answers": ["goat"]}],
        ["a x c d", "goat goat goat"],
        {"rl": (0.75 + 1) / 2, "rouge_l": (0.75 + 0.5) / 2},
    ),
    (
        icl.TASK,
        [{"task_name": n, "answers": a} for n, a in (
            ("rte", ["1"]), ("rte", ["0"]), ("qnli", ["0"]), ("multirc", ["1"]), ("multirc", ["1"]),
            ("multirc", ["0"]), ("squad_v1", ["The end", "x"]), ("dart", ["a b"]),
        )],
        [1, 1, 0, 1, 0, 1, "end", "b a"],
        {"NLI": 0.75, "ReadingComp": 0.75, "Data2Text": 0.5, "avg": 0.7, "rte": 0.5, "qnli": 1.0,
         "multirc": 0.5, "squad_v1": 1.0, "dart": 0.5},
    ),
    (msc.TASK, [{}, {}], [-1.0, -3.0], {"perplexity": math.exp(2)}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "rows", "answers", "want"), TABLES)
def test_metrics_by_hand(task, rows, answers, want):
    scores = [task.judge(row, answer) for row, answer in zip(rows, answers, strict=True)]
    # 1e-8 in the denominator is the package rouge's.
    assert task.summary(rows, answers, scores) == pytest.approx(want, abs=2e-8)


def test_every_subject_and_task_has_one_category():
    subjects = " ".join(mmlu.CATEGORIES.values()).split()
    assert len(subjects) == len({*subjects}) == 57
    assert len(icl.METRICS) == 30
