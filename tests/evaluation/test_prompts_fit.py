"""Prompts by hand: order, budget, which tokens are the option's."""

import numpy as np
import pytest
import tiny

from llme_jax.errors import InputError
from llme_jax.evaluation.prompts import Prompt, PromptFitter
from llme_jax.hugging_face.tokenizer import load_tokenizer

FRAME = ("Knowledge: ", "\n\n")
PROMPT = Prompt(
    "Q: who? A:",
    knowledge="one two\nthree",
    frame=FRAME,
    intro="Go.\n",
    demonstrations=("Q: a? A: b\n", "Q: c? A: d\n"),
    options=(" yes", " no, or yes"),
)
WHOLE = "Knowledge: one two\nthree\n\nGo.\nQ: a? A: b\nQ: c? A: d\nQ: who? A:"


@pytest.fixture(scope="module", params=[False, True])
def tokenizer(tmp_path_factory, request):
    """About a token a byte, behind <s>; one of the two ends every text with </s>."""
    folder = tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama", ends=request.param)
    return load_tokenizer(folder)


def texts(tokenizer, prompt, limit, new=0):
    (made,) = PromptFitter(tokenizer, limit, new)([prompt], ["test.json:1"])
    for tokens, _ in made:
        assert tokens[0] == tokenizer.bos_token_id and len(tokens) <= limit - new
        assert tokenizer.eos_token_id not in tokens
    split = ((np.split(tokens[1:], [len(tokens) - 1 - n])) for tokens, n in made)
    return [tuple(tokenizer.decode(part) for part in parts) for parts in split]


def length(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False)) + 1  # <s>


def test_what_fits_is_whole(tokenizer):
    longest = length(tokenizer, WHOLE + " no, or yes")
    found = texts(tokenizer, PROMPT, longest)
    assert found == [(WHOLE, " yes"), (WHOLE, " no, or yes")]
    without = PROMPT._replace(knowledge="")
    want = WHOLE.removeprefix("Knowledge: one two\nthree\n\n")
    assert texts(tokenizer, without, longest)[0] == (want, " yes")
    written = PROMPT._replace(options=())
    assert texts(tokenizer, written, length(tokenizer, WHOLE) + 7, new=7) == [(WHOLE, "")]


@pytest.mark.parametrize(
    ("less", "want"),
    [
        (1, WHOLE.replace("three", "thre")),
        (6, WHOLE.replace("\nthree", "")),
        (8, WHOLE.replace("two\nthree", "t")),
        (9, WHOLE.replace(" two\nthree", "")),
        (12, WHOLE.replace("ne two\nthree", "")),
        (13, WHOLE.removeprefix("Knowledge: one two\nthree\n\n")),
        (25, WHOLE.removeprefix("Knowledge: one two\nthree\n\n")),  # "no" is one token
        (35, "Go.\nQ: c? A: d\nQ: who? A:"),  # " a" too
        (36, "Go.\nQ: who? A:"),
        (46, "Go.\nQ: who? A:"),
    ],
)
def test_knowledge_loses_its_end_then_the_first_demonstrations_go(tokenizer, less, want):
    limit = length(tokenizer, WHOLE + " no, or yes") - less
    assert {text for text, _ in texts(tokenizer, PROMPT, limit)} == {want}


def test_the_question_is_never_cut(tokenizer):
    needed = length(tokenizer, "Go.\nQ: who? A: no, or yes")
    texts(tokenizer, PROMPT, needed)
    with pytest.raises(InputError) as error:
        texts(tokenizer, PROMPT, needed - 2)
    assert str(error.value) == (
        "test.json:1: the question is 2 tokens too long: give a --context_max_length of "
        f"{needed} or more"
    )
    with pytest.raises(InputError, match=f"give a --context_max_length of {needed} or more"):
        PromptFitter(tokenizer, needed - 2).check(PROMPT, "test.json:1")
    PromptFitter(tokenizer, needed).check(PROMPT, "test.json:1")


def test_characters_of_several_tokens(tokenizer):
    prompt = PROMPT._replace(knowledge="x 🦙🦙", options=())
    whole = length(tokenizer, prompt.text)
    found = [texts(tokenizer, prompt, whole - less)[0][0][11:].split("\n")[0] for less in range(8)]
    assert found == ["x 🦙🦙", *["x 🦙"] * 4, *["x"] * 3]
