"""Metrics against values worked out by hand and against trec_eval and ir-measures."""

import ir_measures
import numpy as np
import pytest
import pytrec_eval

from llme_jax.retrieval.metrics import answer_recall, has_answer, ranking_metrics

# Four queries: first hit right; a positive at rank 3 and one not retrieved; no hit at all; two
# of two positives at ranks 2 and 4.
IDS = np.array([[5, 1, 2, 3], [0, 1, 7, 2], [-1, -1, -1, -1], [4, 9, 0, 8]], np.int32)
POSITIVES = [[5], [7, 30], [2], [8, 9]]


def test_by_hand():
    metrics = ranking_metrics(["ndcg", "mrr", "recall"], IDS, POSITIVES, [1, 3, 10])
    assert list(metrics) == [f"{m}@{k}" for m in ("ndcg", "mrr", "recall") for k in (1, 3, 10)]
    ideal2 = 1 + 1 / np.log2(3)
    expected = {
        "mrr@1": 1 / 4,
        "mrr@3": (1 + 1 / 3 + 0 + 1 / 2) / 4,
        "mrr@10": (1 + 1 / 3 + 0 + 1 / 2) / 4,
        "recall@1": 1 / 4,
        "recall@3": (1 + 1 / 2 + 0 + 1 / 2) / 4,
        "recall@10": (1 + 1 / 2 + 0 + 1) / 4,
        "ndcg@1": 1 / 4,
        "ndcg@3": (1 + 0.5 / ideal2 + 0 + 1 / np.log2(3) / ideal2) / 4,
        "ndcg@10": (1 + 0.5 / ideal2 + 0 + (1 / np.log2(3) + 1 / np.log2(5)) / ideal2) / 4,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_equal_to_other_implementations():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(60)[:40] for _ in range(200)]).astype(np.int32)
    for row, found in zip(ids, rng.integers(0, 41, 200), strict=True):
        row[found:] = -1
    positives = [rng.permutation(60)[: rng.integers(1, 9)].tolist() for _ in range(200)]
    cutoffs = [1, 5, 10, 30, 100]
    ours = ranking_metrics(["mrr", "recall", "ndcg"], ids, positives, cutoffs)

    judged = {str(q): {str(i): 1 for i in row} for q, row in enumerate(positives)}
    run = {
        str(q): {str(i): 1.0 - rank / 1000 for rank, i in enumerate(row) if i >= 0}
        for q, row in enumerate(ids)
    }
    names = [measure + ",".join(map(str, cutoffs)) for measure in ("ndcg_cut.", "recall.")]
    trec = pytrec_eval.RelevanceEvaluator(judged, names).evaluate(run)
    for k in cutoffs:
        for name, trec_name in (("ndcg", f"ndcg_cut_{k}"), ("recall", f"recall_{k}")):
            # Divided by all queries: trec_eval leaves out those that retrieved nothing.
            mean = sum(values[trec_name] for values in trec.values()) / len(ids)
            assert ours[f"{name}@{k}"] == pytest.approx(mean, abs=1e-12)
        rr = ir_measures.RR @ k
        assert ours[f"mrr@{k}"] == pytest.approx(
            ir_measures.calc_aggregate([rr], judged, run)[rr], abs=1e-12
        )


@pytest.mark.parametrize(
    ("passage", "answer", "found"),
    [
        ("a business trip", "us", False),
        ("It is US.", "us", True),
        ("the U.S. army", "U.S.", True),
        ("the U.S. army", "US", False),
        ("Zoe\u0308 lives", "zo\u00eb", True),  # composed and decomposed
        ("Zoe lives", "zo\u00eb", False),
        ("born  1986\u00a0\n in Paris", "1986 in PARIS", True),  # white space of any kind
        ("1986 in old Paris", "1986 in Paris", False),  # not contiguous
        ("well-known", "well known", False),  # the hyphen is a token
        ("well - known", "well-known", True),
        ("東京都", "東京", False),  # one run of letters
        ("passage", "", False),
        ("passage", " \u200b", False),  # no token either
        ("", "a", False),
        ("a\u200bb", "b", True),  # a format character separates
    ],
)
def test_answers_match_whole_tokens(passage, answer, found):
    assert has_answer(passage, [answer]) is found
    assert has_answer(passage, ["not there", answer]) is found


def test_answer_recall():
    texts = ["nothing", "Paris, France", "the paris metro", "comparison"]
    ids = np.full((4, 25), 0, np.int32)
    ids[0, 0] = 1  # rank 1
    ids[1, 19] = 2  # rank 20
    ids[2] = 3  # "paris" is inside another word
    ids[3] = -1  # no hits
    metrics = answer_recall(
        ids, [["London", "Paris"], ["paris"], ["paris"], ["paris"]], texts.__getitem__
    )
    assert metrics == {
        "answer_recall@1": 0.25,
        "answer_recall@5": 0.25,
        "answer_recall@10": 0.25,
        "answer_recall@20": 0.5,
        "answer_recall@100": 0.5,
    }
