"""Result files: written, read back by query_id, refused when they belong elsewhere."""

import json

import numpy as np
import pytest

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text
from llme_jax.files.storage import result_path
from llme_jax.retrieval.results import read_result, write_result

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
