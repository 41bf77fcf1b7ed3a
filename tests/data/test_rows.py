"""Reading rows: what is accepted, and every message for what is not."""

import json
import logging

import pytest
from named import expand_paths

from llme_jax.data.rows import BadRows, parse_row, read_lines
from llme_jax.errors import InputError

GOOD = {"query": "q", "pos": ["p"], "neg": ["n0", "n1"], "teacher_scores": [1, 0.5, -2]}


def test_a_row():
    row = parse_row(GOOD | {"task": "qa", "query_id": "x", "answers": None, "whatever": 1})
    assert row == ("q", ["p", "n0", "n1"], 1, [1, 0.5, -2], "qa", None, {"whatever"})


def test_history_stands_for_candidates_without_positives():
    row = parse_row({"query": "q", "history": ["a", "b"], "teacher_scores": [0, 1]})
    assert row[:5] == ("q", ["a", "b"], 0, [0, 1], None)


APART = {"query": "q", "pos": ["p"], "neg": ["n0", "n1"], "pos_scores": [9], "neg_scores": [1, 2]}


def test_scores_of_positives_and_negatives_apart():
    """As FlagEmbedding's newer tools write them."""
    assert parse_row(APART).teacher_scores == [9, 1, 2]
    assert parse_row(APART | {"teacher_scores": [3, 2, 1]}).teacher_scores == [3, 2, 1]
    assert parse_row(APART | {"pos": [], "pos_scores": None}).teacher_scores == [1, 2]
    assert parse_row(APART | {"pos_scores": None, "neg_scores": None}).teacher_scores is None


def test_nulls_are_as_good_as_nothing():
    row = parse_row({"query": "q", "pos": ["p"], "neg": None, "history": None, "task": None})
    assert row == ("q", ["p"], 1, None, None, None, frozenset())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, 'query is missing: every row needs "query", a string'),
        ({"query": 7}, 'query is 7: every row needs "query", a string'),
        ({"prompt": 3}, "prompt is 3: give a string, the text before the query"),
        ({"task": ["qa"]}, 'task is ["qa"]: give a string, as in qa or tool'),
        ({"pos": "p"}, 'pos is "p": give a list of strings'),
        ({"neg": ["n0", 1]}, "neg[1] is 1: give a list of strings"),
        ({"history": {"a": 1}}, 'history is {"a": 1}: give a list of strings'),
        ({"pos": None, "neg": None}, "no candidates: every row needs pos and neg, or history"),
        ({"teacher_scores": [1, 2]}, "teacher_scores has 2 values, pos + neg has 3"),
        ({"history": ["a"]}, "teacher_scores has 3 values, history has 1"),
        ({"teacher_scores": 3}, "teacher_scores is 3: give a list of numbers"),
        ({"teacher_scores": [1, "2", 3]}, 'teacher_scores[1] is "2": give a list of numbers'),
        ({"teacher_scores": [1, True, 3]}, "teacher_scores[1] is true: give a list of numbers"),
        (
            {"teacher_scores": [1, 2, float("nan")]},
            "teacher_scores[2] is nan: score the row again or leave teacher_scores out",
        ),
        (
            {"teacher_scores": [0, -1e39, 2]},  # beyond float32
            "teacher_scores[1] is -1e+39: score the row again or leave teacher_scores out",
        ),
        (
            {"teacher_scores": None, "neg_scores": [1, 2]},
            "pos_scores is missing: give a list of numbers",
        ),
        (
            {"teacher_scores": None, "pos_scores": [1], "neg_scores": [1]},
            "neg_scores has 1 values, neg has 2",
        ),
        (
            {"teacher_scores": [float("-inf"), 2, 3]},
            "teacher_scores[0] is -inf: score the row again or leave teacher_scores out",
        ),
    ],
)
def test_messages_name_file_line_value_and_remedy(write_rows, change, message):
    path = write_rows("train.json", [GOOD, "", GOOD | change])
    with pytest.raises(InputError) as error:
        list(read_lines(path, parse_row, BadRows()))
    assert str(error.value) == f"{path}:3: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q",', "not valid JSON, Expecting property name .* at column 15: write one"),
        (b"[1, 2]", r"\[1, 2\] is no JSON object: write one object a line"),
        (b'{"query": "\xff"}', "not valid UTF-8, invalid start byte: save the file as UTF-8"),
        (b'{"query": "\\ud800"}', "has half a surrogate pair"),
        (b"[" * 100_000, "not readable JSON"),
    ],
)
def test_lines_that_are_no_objects(tmp_path, line, message):
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + line + b"\r\n")
    with pytest.raises(InputError, match=f"^{path}:2: {message}"):
        list(read_lines(str(path), parse_row, BadRows()))


def test_bad_rows_are_skipped_up_to_a_number_and_listed(write_rows, tmp_path, caplog):
    path = write_rows("train.json", ["x", GOOD, {"query": 1}, GOOD])
    bad_rows = BadRows(allowed=2)
    assert [line for line, _ in read_lines(path, parse_row, bad_rows)] == [2, 4]
    listed = tmp_path / "out/bad_rows.jsonl"
    with caplog.at_level(logging.WARNING):
        bad_rows.report(listed)
    assert f"skipped 2 invalid lines, see {listed}" in caplog.text
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(r["file"], r["line"]) for r in records] == [(path, 1), (path, 3)]
    assert records[1]["reason"].startswith("query is 1")
    with pytest.raises(InputError, match=r":3: query is 1.*\(after 1 skipped lines\)"):
        list(read_lines(path, parse_row, BadRows(allowed=1)))


def test_no_list_without_bad_rows(tmp_path):
    BadRows(3).report(tmp_path / "bad_rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_paths_expand(write_rows, tmp_path):
    b, a, odd = (write_rows(name, []) for name in ("d/b.json", "d/a.json", "d/[x].json"))
    assert expand_paths([f"{tmp_path}/d/?.json"], "") == [a, b]
    assert expand_paths([odd, odd], "") == [odd, odd]  # a file whose name looks like a glob
    assert expand_paths(["llm-embedder:d/a.json"], str(tmp_path)) == [a]


def test_paths_that_are_not_there(tmp_path):
    (tmp_path / "d").mkdir()
    for pattern, message in (
        (f"{tmp_path}/x.json", f"--train_data {tmp_path}/x.json: there is no file"),
        ("llm-embedder:x.json", f"there is no file {tmp_path}/x.json, is --data_root right?"),
        (f"{tmp_path}/*.json", f"no file matches {tmp_path}/*.json"),
        (f"{tmp_path}/d", f"{tmp_path}/d is a folder, give {tmp_path}/d/*.json"),
    ):
        with pytest.raises(InputError) as error:
            expand_paths([pattern], str(tmp_path))
        assert message in str(error.value)
