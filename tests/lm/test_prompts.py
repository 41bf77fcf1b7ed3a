"""Prompts as tokens: what is cut, where the answer is."""

import pytest
import tiny

from llme_jax.data.rows import ScoringRow
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import load_tokenizer
from llme_jax.lm.prompts import Pair, PromptMaker


@pytest.fixture(scope="module", params=[False, True], ids=["no end", "ends"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(tiny.save_llama(tmp_path_factory.mktemp("lm"), ends=request.param))


def prompt(tokenizer, row, key=500, context=500):
    """The text of a row's first pair behind <s>, and the answer's part of it."""
    make = PromptMaker(tokenizer, key_max_length=key, context_max_length=context)
    store, (length,) = make([Pair(row, 0, 0, "file:1")])
    ids = store[0].tolist()
    return tokenizer.decode(ids), tokenizer.decode(ids[len(ids) - length :]), len(ids)


def row(task, key="key", query="query", answer="so"):
    return ScoringRow(task, query, [key], 1, [answer])


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("qa", "<s>Knowledge: key\n\nQuestion: query\n\nAnswer: so"),
        ("convsearch", "<s>Knowledge: key\n\nQuestion: query\n\nAnswer: so"),
        ("icl", "<s>key\nquery\nso"),
        ("chat", "<s>key\nSpeaker 1: query\nSpeaker 2: so"),
        ("lrlm", "<s>keyqueryso"),
        ("tool", "<s>Tool: key\n\nRequest: query\n\nCall: so"),
    ],
)
def test_templates(tokenizer, task, text):
    assert prompt(tokenizer, row(task))[:2] == (text, "so")


def test_a_token_over_the_border_is_the_answers(tokenizer):
    # "Ġa" is one token: the space of the template and the first letter of the answer.
    assert prompt(tokenizer, row("qa", answer="a b"))[1] == " a b"
    assert prompt(tokenizer, row("lrlm", query="a", answer="nd"))[1] == "and"


def test_keys_are_cut_by_tokens(tokenizer):
    text, answer, _ = prompt(tokenizer, row("icl", key="an äan and more"), key=5)
    assert (text, answer) == ("<s>an äan\nquery\nso", "so")  # ä is two tokens


def test_too_long_a_context_loses_key_then_query_never_the_answer(tokenizer):
    long = row("icl", key="kkkkkk", query="qwerty", answer="answer")
    tokens = prompt(tokenizer, long)[2]
    for limit, text in (
        (tokens, "<s>kkkkkk\nqwerty\nanswer"),
        (tokens - 2, "<s>kkkk\nqwerty\nanswer"),
        (tokens - 6, "<s>\nqwerty\nanswer"),
        (tokens - 9, "<s>\nrty\nanswer"),
        (7, None),
    ):
        found, answer, length = prompt(tokenizer, long, context=limit)
        assert length == limit and answer.endswith("nswer")
        assert text is None or found == text
    with pytest.raises(InputError, match=r"file:1: the answer has . tokens; give a --context"):
        prompt(tokenizer, long, context=5)


def test_token_lists_are_taken_as_they_are(tokenizer):
    lists = ScoringRow("lrlm", "", ["k"], 0, [""], ([[5, 6, 7, 8]], [9, 10], [11], [12, 13]))
    make = PromptMaker(tokenizer, key_max_length=2, context_max_length=7)
    store, lengths = make([Pair(lists, 0, 0, "file:1")])
    assert store[0].tolist() == [5, 6, 9, 10, 11, 12, 13] and lengths.tolist() == [2]


def test_there_has_to_be_something_before_the_answer(tokenizer):
    bare = ScoringRow("lrlm", "", ["k"], 0, [""], ([[]], [], [], [12]))
    make = PromptMaker(tokenizer, key_max_length=2, context_max_length=7)
    with pytest.raises(InputError, match="file:1: key, query and answer are one token in all"):
        make([Pair(bare, 0, 0, "file:1")])
