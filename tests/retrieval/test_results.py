"""Result files: written, read back by query_id, refused when they belong elsewhere."""

import json

import ir_measures
import numpy as np
import pytest
from ir_measures import nDCG

from llme_jax.data.corpus import Corpus, QuerySet
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text
from llme_jax.files.storage import result_path
from llme_jax.retrieval.metrics import ranking_metrics
from llme_jax.retrieval.results import (
    PLACES,
    check_source,
    check_trec,
    read_result,
    write_result,
    write_source,
    write_trec,
)

SCORES = np.array([[3.0, 1.5, -np.inf], [0.25, -np.inf, -np.inf]], np.float32)
IDS = np.array([[7, 0, -1], [3, -1, -1]], np.int32)


def test_names(tmp_path):
    assert result_path(tmp_path, tmp_path / "dev.set.json", "neg", "bge").name == (
        "dev.set.neg.bge.json"
    )
    assert result_path(tmp_path, tmp_path / "test.json", "result", None).name == "test.result.json"


def test_what_was_written_is_read_by_query_id(tmp_path):
    path = tmp_path / "new" / "r.json"
    write_result(path, ["a", 5], IDS, SCORES)
    scores, ids = read_result(path, [5, "missing", "a"], 8)
    assert ids.tolist() == [[3, -1], [-1, -1], [7, 0]]
    assert scores.tolist() == [[0.25, -np.inf], [-np.inf, -np.inf], [3.0, 1.5]]
    assert scores.dtype == np.float32 and ids.dtype == np.int32


def test_the_reference_writes_no_scores(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"query_id": 0, "pred": [4, 2, 9]}\n')
    scores, ids = read_result(path, [0], 10)
    assert ids.tolist() == [[4, 2, 9]] and scores.tolist() == [[0, -1, -2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "r.json:2: not a result"),
        ('{"query_id": 1}', "r.json:2: not a result"),
        ('{"query_id": 1, "pred": [1, 2], "score": [1]}', "r.json:2: not a result"),
        ('{"query_id": 1, "pred": [8]}', "r.json:2: pred has 8, the corpus 8 passages"),
        ('{"query_id": 1, "pred": [3, 2, 3, -1, -1]}', "r.json:2: pred has a passage twice"),
        ('{"query_id": 0, "pred": [1]}', "r.json:2: query_id 0 is that of an earlier line too"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, line, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"query_id": 0, "pred": [1]}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        read_result(path, [0, 1], 8)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such result file; run once without --load_result"):
        read_result(tmp_path / "r.json", [0], 8)
    write_result(tmp_path / "r.json", ["a", "b"], IDS, SCORES)
    with pytest.raises(InputError, match=r"has none of the query_ids of --eval_data"):
        read_result(tmp_path / "r.json", [0, 1], 8)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_text(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_equal_scores_are_read_in_our_order(tmp_path):
    """ir-measures puts equal ones into the order of their ids, the last first."""
    path = tmp_path / "corpus.json"
    path.write_text("".join(f'{{"_id": "d{i}", "text": "x"}}\n' for i in range(5)))
    corpus, ids = Corpus(path, "{text}"), np.array([[1, 3, 0, 4, 2]], np.int32)
    for scores in ([[0.5] * 5], [[1, 1, 0.25, 0.25, -7]], [[0.0] * 5]):
        write_trec(tmp_path / "run.trec", ["q"], ids, np.array(scores, np.float32), corpus, "us")
        judged = [ir_measures.Qrel("q", f"d{i}", 1) for i in (0, 3)]
        read = ir_measures.read_trec_run(str(tmp_path / "run.trec"))
        wanted = ir_measures.calc_aggregate([nDCG @ 3], judged, read)[nDCG @ 3]
        assert ranking_metrics(["ndcg"], ids, [[0, 3]], [3])["ndcg@3"] == pytest.approx(wanted)
    path.write_text('{"_id": "a b", "text": "x"}\n')
    with pytest.raises(InputError, match="--save_trec: the id 'a b' has a blank"):
        check_trec([0], Corpus(path, "{text}"))


def test_places_in_rows_are_no_passages(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "x"}\n')
    write_result(tmp_path / "t.result.json", [0], IDS[:1], SCORES[:1])
    queries = QuerySet()
    write_source(tmp_path / "t.result.json", queries, PLACES, "rank")
    with pytest.raises(InputError, match="its numbers are places in the rows that were ranked"):
        check_source(tmp_path / "t.result.json", Corpus(path, "{text}"), queries, path)
