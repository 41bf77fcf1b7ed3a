"""Metrics of texts: by hand, and against the packages that define them."""

import numpy as np
import pytest
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from llme_jax.evaluation.text_metrics import (
    contains,
    contains_words,
    exact_match,
    rouge_l,
    rouge_l_of_sets,
    word_f1,
)


@pytest.mark.parametrize(
    ("output", "answers", "with_articles", "without"),
    [
        (" The  Beatles!\n", ["the beatles"], 1, 1),
        ("Beatles", ["The Beatles"], 0, 1),
        ("a-b", ["ab"], 1, 1),
        ("Anne", ["Ann", "anne."], 1, 1),
        ("an ant", ["ant"], 0, 1),
        ("Paris, France", ["Paris"], 0, 0),
        ("", ["x"], 0, 0),
        ("x", [], 0, 0),
    ],
)
def test_exact_match(output, answers, with_articles, without):
    assert exact_match(output, answers, articles=True) == with_articles
    assert exact_match(output, answers, articles=False) == without


@pytest.mark.parametrize(
    ("output", "answers", "want"),
    [
        ("The cat sat", ["a cat"], 2 / 3),
        ("cat cat cat", ["cat cat"], 4 / 5),
        ("dog", ["cat", "the dog."], 1),
        ("", ["cat"], 0),
        ("the", ["an"], 0),
    ],
)
def test_word_f1(output, answers, want):
    assert word_f1(output, answers) == pytest.approx(want)


@pytest.mark.parametrize(
    ("output", "answers", "substring", "words"),
    [
        ("It was Jane Austen.", ["jane austen"], 0, 1),
        ("it was jane austen", ["Jane Austen"], 1, 1),
        ("Actor", ["actor"], 1, 1),
        ("a tractor", ["actor"], 1, 0),
        ("C++ is one", ["C++"], 1, 1),
        ("", ["x"], 0, 0),
    ],
)
def test_substrings(output, answers, substring, words):
    assert contains(output, answers) == substring
    assert contains_words(output, answers) == words


def texts(count=300):
    """Pairs that share many words, with full stops, capitals and repetitions."""
    rng = np.random.default_rng(0)
    words = ["a", "b", "c.", "d", "A", "e,", "f", "a.", "3.5"]
    for _ in range(count):
        yield tuple(" ".join(rng.choice(words, rng.integers(1, 14))) for _ in range(2))


def test_rouge_l_against_the_packages():
    """As LLM-Embedder calls `rouge`, whose choice between equally long subsequences counts."""
    ours, theirs, usual = Rouge(), [], RougeScorer(["rougeL"])
    for output, reference in texts():
        want = ours.get_scores([output + "\n"], [reference + "\n"])[0]["rouge-l"]["f"]
        assert rouge_l_of_sets(output, reference) == pytest.approx(want, abs=1e-7)
        theirs.append(want)
        want = usual.score(reference, output)["rougeL"].fmeasure
        assert rouge_l(output, reference) == pytest.approx(want, abs=1e-9)
    assert 0.2 < np.mean(theirs) < 0.9 and {0.0} < {*np.round(theirs, 3)}


def test_rouge_l_by_hand():
    assert rouge_l("the cat sat", "the cat is sitting") == pytest.approx(4 / 7)
    assert rouge_l("goat goat goat", "goat") == pytest.approx(1 / 2)
    assert rouge_l_of_sets("goat goat goat", "goat") == pytest.approx(1)
    assert rouge_l_of_sets("a b c. d e f.", "d e f. a b c.") == pytest.approx(1)
    assert rouge_l_of_sets("Goat", "goat") == 0 and rouge_l_of_sets("", "goat") == 0
    assert rouge_l("", "goat") == 0
