"""Mined rows against a slow reading of the rules, the reference's files, and by hand."""

import json
import random

import numpy as np
import pytest

from llme_jax.config import MiningConfig
from llme_jax.data.corpus import Corpus
from llme_jax.errors import InputError
from llme_jax.retrieval.mining import OF_OTHERS, Ranking, collate_key, collate_neg

TEXTS = ["zero", "one two", "one two", "the U.S. army", "business", "five", "six", "seven"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Corpus(path, "{text}")


def ranking(ids, scores=None, name="run"):
    ids = np.array(ids, np.int32)
    scores = -np.arange(ids.shape[1]) * np.ones(ids.shape) if scores is None else scores
    return Ranking(name, np.array(scores, np.float32), ids)


@pytest.fixture
def mined(corpus, tmp_path):
    """mined(rows, rankings, **settings): the rows that come out, and the report."""

    def run(rows, *rankings, reranker=None, **settings):
        data, out = tmp_path / "train.json", tmp_path / "out" / "train.neg.json"
        data.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        report = collate_neg(out, data, corpus, list(rankings), MiningConfig(**settings), reranker)
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        return [json.loads(line) for line in out.open()], report

    return run


def test_positives_are_left_out_by_number_and_by_text(mined):
    row = {"query": "q", "query_id": "x", "pos": ["five"], "pos_index": [1], "neg": ["old"],
           "teacher_scores": [1, 2], "task": "qa"}  # fmt: skip
    (out,), report = mined([row], ranking([[1, 2, 5, 0, 6, -1]]))
    assert out["neg"] == ["zero", "six"] and out["neg_index"] == [0, 6]
    assert out["neg_rank"] == [3, 4] and out["neg_score"] == [-3, -4]
    assert "teacher_scores" not in out
    assert {k: out[k] for k in ("query", "query_id", "pos", "pos_index", "task")} == {
        k: row[k] for k in ("query", "query_id", "pos", "pos_index", "task")
    }
    assert report.dropped == {"with the text of a positive or of another negative": 2}
    assert list(report.positive_scores) == [0] and list(report.negative_scores) == [-3, -4]


def test_the_text_of_the_query_is_no_negative(mined):
    """A corpus of questions holds the queries; case and spacing may differ."""
    rows = [{"query": "Business ", "pos_index": [5]}, {"query": "six", "pos": ["SEVEN"]}]
    out, report = mined(rows, ranking([[4, 5, 6], [6, 7, 0]]))
    assert [row["neg"] for row in out] == [["six"], ["zero"]]
    assert report.dropped == {
        "with the text of the query": 2,
        "with the text of a positive or of another negative": 1,
    }


def test_near_copies_of_a_positive_are_counted(tmp_path):
    words = [f"w{i}" for i in range(19)]
    other = " ".join([*words[:18], "new"])  # 18 of 20 words
    less = " ".join([*words[:17], "new"])  # 17 of 20
    lines = [json.dumps({"text": text}) + "\n" for text in (" ".join(words), other, less)]
    (tmp_path / "c.json").write_text("".join(lines))
    (tmp_path / "q.json").write_text(json.dumps({"query": "q", "pos_index": [0]}) + "\n")
    corpus = Corpus(tmp_path / "c.json", "{text}")
    files = tmp_path / "out.json", tmp_path / "q.json"
    report = collate_neg(*files, corpus, [ranking([[0, 1, 2]])], MiningConfig())
    assert report.negatives == 2 and report.near_copies == 1 == report.facts()["near_copies"]
    assert "negatives with nearly the text of a positive: 1" in str(report)


def test_every_row_comes_out_in_order(mined):
    rows = [{"query": f"q{i}", "pos_index": [i]} for i in range(3)]
    out, report = mined(rows, ranking([[5, 6], [-1, -1], [2, -1]]), max_neg_num=1)
    assert [row["query"] for row in out] == ["q0", "q1", "q2"]
    assert [row["neg_index"] for row in out] == [[5], [], []]
    assert (report.queries, report.without_any, report.too_few) == (3, 2, 2)
    assert report.positive_not_found == 2
    assert "queries with none: 2, with fewer than --max_neg_num: 2" in str(report)


def test_answers_are_matched_by_token(mined):
    row = {"query": "q", "answers": ["us", "u.s."]}
    (kept,), _ = mined([row], ranking([[3, 4, 5]]))
    (filtered,), report = mined([row], ranking([[3, 4, 5]]), filter_answers=True)
    assert kept["neg_index"] == [3, 4, 5]
    assert filtered["neg_index"] == [4, 5]  # "us" is no token of "business"
    assert report.dropped == {"with an answer": 1}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [4, 0, 5, 6]),
        ({"max_neg_num": 2}, [4, 0]),
        ({"range_min": 1, "range_max": 4}, [0, 5]),
        ({"max_score": 0.7}, [5, 6]),
        ({"margin": 0.15}, [5, 6]),  # the positive has 0.8
        ({"relative_margin": 0.5}, [6]),
        ({"margin": 0.15, "max_score": 0.5}, [6]),
    ],
)
def test_windows_and_margins(mined, settings, kept):
    row = {"query": "q", "pos_index": [3, 7]}
    hits = ranking([[4, 0, 3, 5, 6]], [[0.9, 0.85, 0.8, 0.6, 0.3]])
    (out,), _ = mined([row], hits, **settings)
    assert out["neg_index"] == kept


def test_a_positive_that_was_not_found_scores_as_the_last_hit(mined):
    row = {"query": "q", "pos_index": [3]}
    (out,), _ = mined([row], ranking([[4, 0, 5]], [[9, 5, 1]]), margin=0)
    assert out["neg_index"] == [5]


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({}, [4, 0, 5], {"without a score of the reranker": 1}),
        ({"rerank_max_score": 2.5}, [0, 5], {"scored too high by the reranker": 1}),
        ({"rerank_margin": 1}, [5], {"scored too high by the reranker": 2}),
        ({"rerank_margin": 4, "max_neg_num": 1}, [], {"scored too high by the reranker": 3}),
    ],
)
def test_a_reranker_decides(mined, settings, kept, dropped):
    """The positive has 3, of the hits 6 has no score."""
    row, scores = {"query": "q", "pos_index": [3]}, {3: 3.0, 4: 4.0, 0: 2.5, 5: 0.0, 7: 9.0}
    hits = ranking([[4, 0, 3, 5, 6]])
    (out,), report = mined([row], hits, reranker=[scores], **settings)
    assert out["neg_index"] == kept
    assert out["neg_reranker_score"] == [scores[i] for i in kept]
    assert report.dropped.items() >= dropped.items() and report.judged == 4
    assert all(reason in str(report) for reason in dropped)


def test_a_positive_that_the_reranker_has_not_scored(mined):
    row = {"query": "q", "pos_index": [3]}
    settings = {"rerank_margin": 1, "rerank_max_score": 2}
    out, report = mined([row], ranking([[4, 0]]), reranker=[{4: 4.0, 0: 1.0}], **settings)
    assert out[0]["neg_index"] == [0] and report.positive_not_judged == 1
    assert "the reranker has not scored, so that --rerank_margin drops nothing: 1" in str(report)


def test_a_reranker_of_other_hits_is_refused(mined):
    with pytest.raises(InputError, match=r"--rerank_result r\.json: scores none of these hits"):
        mined([{"query": "q"}], ranking([[4, 0]]), reranker=[{7: 1.0}], rerank_result="r.json")


def test_several_rankings_take_turns(mined):
    row = {"query": "q", "pos_index": [3]}
    dense, bm25 = ranking([[3, 4, 0, 5]], name="dense"), ranking([[0, 6, -1, -1]], name="bm25")
    (out,), report = mined([row], dense, bm25)
    assert out["neg_index"] == [4, 0, 6, 5]
    assert out["neg_source"] == ["dense", "bm25", "bm25", "dense"]
    assert out["neg_rank"] == [1, 0, 1, 3]
    assert list(report.negative_scores) == [-1, -3]  # scores of two methods are not to be mixed


def test_keys(corpus, tmp_path):
    data, out = tmp_path / "t.json", tmp_path / "t.key.json"
    rows = [{"query": "q", "pos": ["p"]}, {"query": "r"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collate_key(out, data, corpus, ranking([[3, 0, -1], [-1, -1, -1]]))
    first, second = map(json.loads, out.open())
    assert first == rows[0] | {"key": ["the U.S. army", "zero"], "key_index": [3, 0]}
    assert second == rows[1] | {"key": [], "key_index": []}


def test_against_a_slow_reading_of_the_rules(mined):
    rng = random.Random(0)
    rows, ids, scores = [], [], []
    for _ in range(60):
        rows.append({"query": "q", "pos_index": rng.sample(range(8), rng.randint(0, 2))})
        found = rng.sample(range(8), 6)
        ids.append(found)
        scores.append(sorted((rng.random() for _ in found), reverse=True))
    settings = {"max_neg_num": 3, "range_min": 1, "relative_margin": 0.1, "max_score": 0.9}
    out, _ = mined(rows, ranking(ids, scores), **settings)
    for row, found, score in zip(out, ids, np.float32(scores).tolist(), strict=True):
        positives = row["pos_index"]
        best = [s for i, s in zip(found, score, strict=True) if i in positives] or [score[-1]]
        limit = max(best) * 0.9 if positives else 9
        want, seen = [], {TEXTS[i] for i in positives}
        for rank, (i, s) in enumerate(zip(found, score, strict=True)):
            if rank >= 1 and s <= limit and s <= 0.9 and TEXTS[i] not in seen and len(want) < 3:
                want.append(i)
                seen.add(TEXTS[i])
        assert row["neg_index"] == want


def test_what_was_said_of_other_negatives_is_left_out(mined):
    row = {"query": "q", "pos_index": [1], "neg": ["x"], "neg_id": ["i"], "teacher_scores": [1, 2]}
    row |= {"pos_scores": [1], "neg_scores": [2], "teacher_scores_of": "key"}
    assert {*row} >= OF_OTHERS
    (out,), _ = mined([row], ranking([[0, 1, 4]]))
    assert not {"neg_id", "teacher_scores", "pos_scores", "neg_scores", "teacher_scores_of"} & {
        *out
    }
    assert out["pos"] == ["one two"] and out["neg"] == ["zero", "business"]
