"""Corpus and eval data: content, random access, and the sentence an invalid line gives."""

import json

import pytest

from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.errors import InputError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_random_access_equals_iteration_and_the_template(tmp_path):
    rows = [
        {"title": "α", "text": "été 東京", "extra": 1},
        {"title": "", "text": ""},
        {"text": "x" * 100_000, "title": "long"},
    ]
    corpus = Corpus(write(tmp_path / "c.json", rows), "{title} | {text} | {title}")
    expected = [f"{row['title']} | {row['text']} | {row['title']}" for row in rows]
    assert len(corpus) == 3
    assert list(corpus) == expected
    assert [corpus.text(i) for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    for outside in (3, -1):
        with pytest.raises(IndexError):
            corpus.text(outside)


def test_blank_lines_and_a_missing_last_newline_do_not_count(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\n{"text": "a"}\r\n\n \n{"text": "b"}')
    corpus = Corpus(tmp_path / "c.json", "{text}")
    assert list(corpus) == ["a", "b"] == [corpus.text(0), corpus.text(1)]


def test_the_digest_follows_the_content(tmp_path):
    paths = [write(tmp_path / f"{t}.json", [{"text": t[0]}]) for t in ("a", "a2", "b")]
    first, same, other = (Corpus(path, "{text}").digest for path in paths)
    assert first == same != other


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', r"c.json:2: has no field 'title', only text: give a --key_template"),
        ('{"title": 3, "text": "a"}', "c.json:2: title is 3: give a string"),
        ('{"title": null, "text": "a"}', "c.json:2: title is null: give a string"),
        ('{"title": "\\ud800", "text": "a"}', "c.json:2: has half a surrogate pair"),
        ('["a"]', r'c.json:2: \["a"\] is no JSON object'),
        ('{"title": ', "c.json:2: not valid JSON"),
        (b'{"title": "\xff", "text": ""}', "c.json:2: not valid UTF-8"),
    ],
)
def test_an_invalid_passage_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "c.json").write_bytes(b'{"title": "", "text": ""}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        Corpus(tmp_path / "c.json", "{title} {text}")


@pytest.mark.parametrize("template", ["text", "{}", "{0}", "{text.upper}", "{text", "{a[b]}"])
def test_a_template_has_to_name_fields(tmp_path, template):
    with pytest.raises(InputError, match="--key_template"):
        Corpus(write(tmp_path / "c.json", [{"text": "a"}]), template)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_corpus_without_passages_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=r"c\.json"):
        Corpus(tmp_path / "c.json", "{text}")


def load(path, rows, metrics=("mrr",), corpus_size=10):
    return EvalData(write(path / "q.json", rows), metrics=metrics, corpus_size=corpus_size)


def test_eval_data(tmp_path):
    rows = [
        {"query": "a", "query_id": "x7", "pos_index": [3, 3, 1], "task": "qa"},
        {"query": "", "pos_index": [9], "answers": ["b", "c"], "task": "qa"},
    ]
    data = load(tmp_path, rows)
    assert data.texts == ["a", ""]
    assert data.query_ids == ["x7", 1]  # the row's number where there is none
    assert data.positives == [[3, 1], [9]]
    assert data.answers is None
    assert (data.task, len(data)) == ("qa", 2)
    only_nq = load(tmp_path, rows[1:], metrics=("nq",), corpus_size=1)
    assert only_nq.positives is None  # so that its pos_index is not looked at
    assert only_nq.answers == [["b", "c"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": None}, 'query is null: every row needs "query"'),
        ({"pos_index": None}, "has no pos_index, .* ask for --metrics nq"),
        ({"pos_index": []}, "has no pos_index"),
        ({"pos_index": 4}, "pos_index is 4"),
        ({"pos_index": [10]}, "pos_index has 10, passages are numbered 0 to 9: give the --corpus"),
        ({"pos_index": [-1]}, "pos_index has -1"),
        ({"pos_index": [True]}, "pos_index has true"),
        ({"pos_index": [1.5]}, "pos_index has 1.5"),
        ({"answers": None}, "has no answers, which nq needs"),
        ({"answers": "a"}, 'answers is "a": give a list of strings'),
        ({"answers": ["a", 1]}, "answers is"),
        ({"query_id": 1.5}, "query_id is 1.5: give an integer or a string"),
        ({"query_id": 0}, "query_id 0 is that of line 1 too"),
        ({"task": "qa"}, 'task is "qa", in the rows before it null'),
    ],
)
def test_an_invalid_query_is_named(tmp_path, row, message):
    good = {"query": "a", "pos_index": [1], "answers": ["b"]}
    with pytest.raises(InputError, match=rf"q.json:2: {message}"):
        load(tmp_path, [good, good | row], metrics=("recall", "nq"))


@pytest.mark.parametrize("row", [{"answers": "river"}, {"pos": "text"}, {"pos": ["a", 1]}])
def test_rows_to_mine_for_are_checked_as_training_rows_are(tmp_path, row):
    good = {"query": "a", "pos_index": [1], "pos": ["b"], "answers": ["b"]}
    assert len(load(tmp_path, [good, good | row | {"query_id": 7}], metrics=("recall",))) == 2
    with pytest.raises(
        InputError, match=r"q.json:2: (answers|pos)(\[1\])? is .*: give a list of st"
    ):
        load(tmp_path, [good, good | row], metrics=("recall", "collate_neg"))


def test_whole_numbers_of_other_tools(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('{"query": "q", "pos_index": [17.0]}\n')
    assert EvalData(path, metrics=["mrr"], corpus_size=20).positives == [[17]]
    path.write_text('{"query": "q", "pos_index": [17.5]}\n')
    with pytest.raises(InputError, match=r"pos_index has 17\.5, passages are numbered 0 to 19"):
        EvalData(path, metrics=["mrr"], corpus_size=20)


@pytest.mark.parametrize("change", ["emptied", "shorter", "other"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "corpus.json"
    path.write_text("".join(f'{{"text": "passage {i}"}}\n' for i in range(2000)))
    corpus = Corpus(path, "{text}")
    with path.open("r+") as file:
        file.truncate(0 if change == "emptied" else 4000)
        file.write("x" * 9000 if change == "other" else "")
    with pytest.raises(InputError, match=r"corpus\.json: was changed while it was read"):
        list(corpus)
