"""Datasets of the package `datasets`: columns become rows, the same batches as from JSON."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from named import expand_paths, is_made, local_file, training_files
from samples import assert_same, make_rows, plan_rows

from llme_jax.config import DataConfig
from llme_jax.errors import InputError
from llme_jax.sources.hf_datasets import is_dataset

PAIRS = {"anchor": ["q0", "q1", "q2"], "positive": ["é0", "a1", "a2"]}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Nothing is read from or written to the folders of whoever runs the tests."""
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.chdir(tmp_path)


def save(columns: dict, path="saved") -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return f"hf:{path}"


def read(name: str) -> list[dict]:
    path = local_file(name, "/nowhere")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"anchor": "q", "positive": "a"}, {"query": "q", "pos": ["a"]}),
        ({"question": "q", "answer": ["a", "b"]}, {"query": "q", "pos": ["a", "b"]}),
        ({"sentence1": "q", "sentence2": "a"}, {"query": "q", "pos": ["a"]}),
        (
            {"query": "q", "passage": "a", "negative": "n", "id": 3},
            {"query": "q", "pos": ["a"], "neg": ["n"], "id": 3},
        ),
        (
            {"negative_10": "n10", "anchor": "q", "positive": "a", "negative_2": "n2", "answer": 1},
            {"query": "q", "pos": ["a"], "neg": ["n2", "n10"], "answer": 1},
        ),
        (
            {"anchor": "q", "positive": "a", "negatives": ["n", "m"], "label": [1.5, 1 / 3, 0.0]},
            {"query": "q", "pos": ["a"], "neg": ["n", "m"], "teacher_scores": [1.5, 1 / 3, 0.0]},
        ),
        (
            {"query": "q", "pos": ["a"], "neg": ["b"], "answer": "x", "score": 2.0, "key": None},
            {"query": "q", "pos": ["a"], "neg": ["b"], "answer": "x", "score": 2.0},
        ),
        ({"question": "q", "pos_id": ["d1"]}, {"query": "q", "pos_id": ["d1"]}),
        (
            {"anchor": "q", "positive": "a", "neg": ["n"], "pos_index": [7]},
            {"query": "q", "pos": ["a"], "neg": ["n"], "pos_index": [7]},
        ),
        ({"_id": "d1", "title": "t", "text": "p"}, {"_id": "d1", "title": "t", "text": "p"}),
        ({"qid": 7, "text": "q"}, {"qid": 7, "text": "q"}),
        (
            {"query_id": "7", "positive_id": "1", "negative_id": "2", "negative": "text"},
            {"query_id": "7", "pos_id": ["1"], "neg_id": ["2"], "negative": "text"},
        ),
        (
            {"query": 7, "positive": 1, "negative_2": 3, "negative_1": 2},
            {"query_id": 7, "pos_id": [1], "neg_id": [2, 3]},
        ),
        (
            {"anchor": "q", "positive_ids": [1, 4], "negative_ids": [2], "scores": [2.0, 1.0, 0.0]},
            {"query": "q", "pos_id": [1, 4], "neg_id": [2], "teacher_scores": [2.0, 1.0, 0.0]},
        ),
        (
            {"query_id": 7, "query": "q", "positive": "a", "positive_id": 1},
            {"query": "q", "pos": ["a"], "query_id": 7, "positive_id": 1},
        ),
    ],
)
def test_columns_become_rows(columns, row):
    assert read(save({name: [value] for name, value in columns.items()})) == [row]


def test_what_a_row_lacks_is_left_out():
    columns = {"anchor": ["q", "r"], "positive": ["a", None], "negative_1": ["n", None]}
    assert read(save(columns)) == [
        {"query": "q", "pos": ["a"], "neg": ["n"]},
        {"query": "r", "pos": [], "neg": []},
    ]


def test_training_batches_are_those_of_the_file(write_rows, prepared):
    rows = make_rows(40)
    renamed = {"query": "question", "pos": "passage", "neg": "negative", "teacher_scores": "scores"}
    columns = {new: [row.get(old) for row in rows] for old, new in renamed.items()}
    name = save(columns | {"task": ["qa"] * 40}, "of/nq")
    one, other = prepared(name), prepared(write_rows("nq.json", rows))
    assert one.names == ["nq"]
    assert one.sizes == other.sizes
    for chosen in ([0, 7, 39, 12], [3, 1, 30, 8]):
        assert_same(one.assemble(plan_rows(chosen)), other.assemble(plan_rows(chosen)))


@pytest.fixture
def by_id(write_rows):
    """Rows with texts; the same with ids as JSON lines, and as hf:of/nq; settings that resolve
    them."""
    ids, rows, texts = {}, [], []
    for i, row in enumerate(make_rows(40)):
        found = {name: row[name] for name in ("query", "pos", "neg")}
        scores = {name: row[name] for name in ("teacher_scores",) if name in row}
        made = {"query_id": 100 + i} | {
            f"{kind}_id": [ids.setdefault(key, 1000 - len(ids)) for key in row[kind]]
            for kind in ("pos", "neg")
        }
        rows.append(made | scores)
        texts.append(found | made | scores)
    save({"pid": [*ids.values()], "text": [*ids]}, "of/passages")
    asked = [row["query"] for row in texts]
    save({"qid": [row["query_id"] for row in rows], "text": asked}, "of/queries")
    named = {"query": "query_id", "positive": "pos_id", "negatives": "neg_id"}
    named["scores"] = "teacher_scores"
    save({new: [row.get(old) for row in rows] for new, old in named.items()}, "of/nq")
    files = {"train_queries": "hf:of/queries", "train_corpus": "hf:of/passages"}
    return texts, write_rows("nq.json", rows), files | {"key_template": "{text}"}


def test_ids_become_texts(by_id, write_rows, prepared):
    texts, path, files = by_id
    data = DataConfig(train_data=["hf:of/nq", path], **files)
    made, same = map(Path, training_files(data))
    assert made.read_bytes() == same.read_bytes() and made.parts[-2:] == ("nq", "nq.json")
    assert [json.loads(line) for line in made.read_text().splitlines()] == texts
    assert training_files(data) == [str(made), str(same)]  # made once
    one, other = prepared("hf:of/nq", **files), prepared(write_rows("texts.json", texts))
    assert_same(one.assemble(plan_rows([0, 7, 39])), other.assemble(plan_rows([0, 7, 39])))

    # Without a corpus for training, --corpus has the passages.
    data.corpus, data.train_corpus = data.train_corpus, None
    assert training_files(data)[0] == str(made)
    data.corpus = [data.corpus, "other.json"]
    with pytest.raises(InputError, match=r"nq.json: names its passages by id: give the --train_c"):
        training_files(data)


def test_an_id_that_nothing_has(by_id, caplog):
    _, path, files = by_id
    row = {"query_id": 100, "pos_id": [1000]}
    Path(path).write_text("".join(json.dumps(row | {"neg_id": i}) + "\n" for i in ([999], [77])))
    data = DataConfig(train_data=[path], **files)
    said = (
        r"nq.json:2: neg_id has 77, which no line of \S+passages.json has: give the --train_corpus"
    )
    with pytest.raises(InputError, match=said):
        training_files(data)
    data.max_bad_rows = 1
    (made,) = training_files(data)
    assert len(Path(made).read_text().splitlines()) == 1
    assert "nq.json:2: neg_id has 77" in caplog.text and "left out" in caplog.text
    data.train_queries = None
    with pytest.raises(InputError, match=r"nq.json: names its queries by id: give the --train_q"):
        training_files(data)


def test_splits_and_folders(tmp_path):
    whole = datasets.Dataset.from_dict(PAIRS)
    datasets.DatasetDict(train=whole, dev=whole.select([2])).save_to_disk("saved")
    whole.to_parquet("files/data/train-0.parquet")
    whole.to_json("lines/dev.jsonl")
    rows = [{"query": q, "pos": [a]} for q, a in zip(*PAIRS.values(), strict=True)]
    assert read("hf:saved") == read(f"hf:{tmp_path}/saved:train") == rows
    assert read("hf:saved:dev+train[1:2]") == [rows[2], rows[1]]
    assert read("hf:files:train[:2]") == rows[:2]
    assert Path(local_file("hf:saved:train[:2]", "")).parts[-2:] == ("saved", "saved.train_2.json")
    assert read("hf:lines:validation") == rows  # as `datasets` calls it
    assert is_made("hf:saved", "") and not is_dataset("hf://datasets/org/name/a.json")
    assert expand_paths(["hf:saved"], "") == [local_file("hf:saved", "")]


def test_a_file_is_made_once_and_again_when_the_data_changes():
    name = save(PAIRS)
    made = Path(local_file(name, "")).stat().st_mtime_ns
    assert Path(local_file(name, "")).stat().st_mtime_ns == made
    save({"anchor": ["other"], "positive": ["a"]})
    assert read(name) == [{"query": "other", "pos": ["a"]}]


def test_what_the_hub_is_asked(monkeypatch):
    whole, asked = datasets.Dataset.from_dict(PAIRS), []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((*a, k["split"])) or whole
    )
    assert len(read("hf:org/name:a-b:train[:5%]")) == len(read("hf:org/name:a-b:train[:5%]")) == 3
    assert len(read("hf:org/name")) == 3
    assert asked == [("org/name", "a-b", "train[:5%]"), ("org/name", None, "train")]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"premise": "q", "note": "a"}, "has the columns premise, note: .*query, anchor, question"),
        ({"question": "q", "note": "a"}, "has the columns question, note: .*pos, positive, answer"),
        ({"question": "q", "answer": "a", "passage": "p"}, "answer and passage could each be the"),
        ({"sentence1": "q", "sentence2": "a", "score": 0.1}, "score is one number a row"),
    ],
)
def test_columns_that_are_no_rows(columns, said):
    name = save({name: [value] for name, value in columns.items()})
    with pytest.raises(InputError, match=f"^{name}: {said}"):
        read(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:", "write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("hf:~", "is the home folder, or above it: give that of the data set"),
        ("hf:/", "is the home folder, or above it"),
        ("hf:saved:", "write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("hf:saved:a:b:c", "write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("hf:saved:dev", r"cannot be loaded, .*Unknown split .dev.. Should be one of \['train'\]"),
        ("hf:saved:conf:train", "cannot be loaded, .*has no config conf"),
        ("hf:saved:train[:0]", "has no rows: give a split"),
    ],
)
def test_refusals(name, said):
    save(PAIRS)
    with pytest.raises(InputError, match=said) as error:
        local_file(name, "/nowhere")
    assert str(error.value).startswith(f"{name}: ")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hf:any/name: .*pip install 'llme_jax\[datasets\]'"):
        local_file("hf:any/name", "")


def test_reading_needs_no_torch():
    code = f"""
import sys
from llme_jax.sources.resolve import Files
assert "datasets" not in sys.modules
Files({{}}).local({save(PAIRS)!r})
assert not {{"torch", "tensorflow", "jax"}} & {{*sys.modules}}
"""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "LLME_JAX_CACHE": "cache"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_folder_is_known_by_its_content_whatever_its_readme_says(tmp_path):
    """The package itself knows a folder whose README names its files by that README."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    for name, text in (("one", "first"), ("two", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(readme)
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"query": text, "pos": ["a"]}) + "\n")
    assert [read(f"hf:{name}")[0]["query"] for name in ("one", "two")] == ["first", "second"]
    (tmp_path / "one/a.jsonl").write_text(json.dumps({"query": "third", "pos": ["a"]}) + "\n")
    assert read("hf:one")[0]["query"] == "third"
