"""Every task's prompt, written out."""

import pytest

from llme_jax.evaluation import tasks

CHOICES = {"choices": ["a", "b", "c", "d"], "subject": "world_religions", "answer": 2}


@pytest.mark.parametrize(
    ("prompt", "text", "options"),
    [
        (
            tasks.mmlu({"query": " Q1 "} | CHOICES, ["k1", "k2"], [{"query": "Q0 "} | CHOICES]),
            "Knowledge:\nk1\nk2\n\n"
            "The following are multiple choice questions (with answers) about world religions.\n\n"
            "Q0 \nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n"
            "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            (" A", " B", " C", " D"),
        ),
        (
            tasks.mmlu({"query": "Q1"} | CHOICES, [], []),
            "The following are multiple choice questions (with answers) about world religions.\n\n"
            "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            (" A", " B", " C", " D"),
        ),
        (
            tasks.popqa({"query": "who?"}, ["k1", "k2"], [{"query": "where?", "obj": "there"}]),
            "Knowledge: k1\nk2\n\nQ: where? A: there\n\nQ: who? A:",
            (),
        ),
        (
            tasks.qa({"query": "who"}, [], [{"query": "where", "answers": ["there", "here"]}]),
            "Question: where\nAnswer: there\n\nQuestion: who\nAnswer:",
            (),
        ),
        (
            tasks.qrecc({"query": "who"}, ["k1"]),
            "Knowledge: k1\n\nContext and Question: who\nAnswer:",
            (),
        ),
        (
            tasks.icl({"query": "is  it?", "options": ["yes", "no"]}, ["nearest", "far \n one"]),
            "far one\nnearest\nis it?\n",
            (" yes", " no"),
        ),
        (tasks.icl({"query": "say", "answers": ["x"]}, []), "say\n", ()),
        (
            tasks.msc(
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
