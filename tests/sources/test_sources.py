"""Names of data become local files: TFDS splits read back as they were built, buckets, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from named import expand_paths, files_of, local_file
from samples import assert_same, make_rows, plan_rows

from llme_jax import build_tfds
from llme_jax.config import LMConfig, RetrieveConfig, ScoreConfig, TextConfig
from llme_jax.data.rows import parse_scoring_row
from llme_jax.data.scoring import ScoringData
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file
from llme_jax.lm import scoring
from llme_jax.lm.prompts import TEMPLATES
from llme_jax.retrieval.evaluate import open_data
from llme_jax.retrieval.run import retrieve
from llme_jax.sources import tfds_builder
from llme_jax.sources.resolve import is_remote, resolve_path

CORPUS = [{"title": f"t{i}", "text": f"passage {i} é\x00", "id": i} for i in range(9)]
QUERIES = [
    {"query": f"q{i}", "query_id": i if i % 2 else f"id{i}", "pos_index": [i], "task": "qa"}
    for i in range(5)
]
ODD_ROWS = [
    {"query": "é\x00", "pos": ["", "a\x00"], "neg": [], "task": "", "answers": ["x"]},
    {"query": "q", "query_id": 0, "pos": ["a"], "neg": ["b"], "teacher_scores": [1 / 3, 1e-300]},
    {"query": "q", "query_id": "0", "pos": ["a"], "neg": ["b"], "teacher_scores": [2, -0.1]},
    {"query": "q", "query_id": 2**70, "history": ["a", "b"], "key": ["a"], "key_index": [7]},
    {
        "query": "q",
        "task": "lrlm",
        "history": ["a", "b"],
        "score_inputs": [[1, 2], []],
        "context_inputs": [],
        "query_inputs": [3],
        "answer_inputs": [4, 5],
    },
    {"query": "q", "pos": [], "neg": ["b"], "pos_index": [], "neg_source": ["bm25"]},
    {"query": "q", "pos": ["a"], "extra": {"of": [None, "é"]}, "answers": "a string", "other": 1.5},
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Nothing is read from or written to the folders of whoever runs the tests."""
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def build(write_rows, tmp_path):
    """build(name, train, test, corpus): the dataset in $TFDS_DATA_DIR; the files it is made of."""

    def call(name, train=None, test=None, corpus=None):
        flags = ["--name", name]
        files = {}
        given = {"train_data": train, "eval_data": test, "corpus": corpus}
        for flag, rows in given.items():
            if rows:
                files[flag] = write_rows(f"{flag}/{name}.json", rows)
                flags += [f"--{flag}", files[flag]]
        assert build_tfds.main(flags) == 0
        return files

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is read under gs://."""
    root = tmp_path / "buckets"
    root.mkdir()

    class Bucket(DirFileSystem):
        protocol = "gs"
        cachable = False

        def __init__(self, **_):
            super().__init__(path=str(root), fs=LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("gs://").rstrip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    return root


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read(name: str) -> list[dict]:
    return rows_of(local_file(name, "/nowhere"))


def test_rows_read_back_as_they_were(build, capsys):
    build("nq", ODD_ROWS, QUERIES, CORPUS)
    names = capsys.readouterr().out.splitlines()[1:]
    assert names == [
        "tfds:llm_embedder/nq:train",
        "tfds:llm_embedder/nq:test",
        "tfds:llm_embedder/nq_corpus:corpus",
    ]
    for name, rows in zip(names, (ODD_ROWS, QUERIES, CORPUS), strict=True):
        back = read(name)
        assert back == rows
        for row, expected in zip(back, rows, strict=True):
            assert {k: type(v) for k, v in row.items()} == {k: type(v) for k, v in expected.items()}
    assert read("tfds:llm_embedder/nq") == ODD_ROWS  # train, when no split is named
    assert read("tfds:llm_embedder/nq/1.0.0:test[1:3]") == QUERIES[1:3]
    assert read("tfds:llm_embedder/nq:test+train[:1]") == [*QUERIES, ODD_ROWS[0]]


def test_shards_keep_the_order(build, monkeypatch):
    monkeypatch.setattr(tfds_builder.cut, "__defaults__", (2000,))
    rows = make_rows(200)
    build("many", rows)
    assert len([*Path("tfds/llm_embedder/many/1.0.0").glob("*.array_record*")]) > 10
    assert read("tfds:llm_embedder/many:train") == rows


def test_a_file_is_made_once_and_again_when_the_data_changes(build):
    build("nq", ODD_ROWS)
    name = "tfds:llm_embedder/nq:train"
    path = Path(local_file(name, "/nowhere"))
    assert path.parts[-4] == "sources"
    assert path.parts[-2:] == ("nq", "llm_embedder.nq.train.json")
    made = path.stat().st_mtime_ns
    assert local_file(name, "/nowhere") == str(path)
    assert path.stat().st_mtime_ns == made
    assert Path(local_file(f"{name}[:2]", "/nowhere")).name == "llm_embedder.nq.train_-2.json"
    shutil.rmtree("tfds/llm_embedder/nq")
    build("nq", ODD_ROWS[:2])
    assert read(name) == ODD_ROWS[:2]


@pytest.mark.parametrize("content", ["evil", "{"])
def test_a_folder_cannot_name_a_class_to_import(build, monkeypatch, content):
    build("nq", ODD_ROWS)
    (path,) = Path("tfds/llm_embedder/nq").rglob("features.json")
    if content == "evil":
        Path("evil.py").write_text("raise SystemExit('imported')\n")
        monkeypatch.syspath_prepend(".")
        features = json.loads(path.read_text())
        assert features["pythonClassName"].startswith("tensorflow_datasets.")
        first = next(iter(features["featuresDict"]["features"].values()))
        first["pythonClassName"] = "evil.Payload"
        content = json.dumps(features)
    path.write_text(content)
    with pytest.raises(InputError, match=r"features\.json (names the class evil\.Pay|is not read)"):
        read("tfds:llm_embedder/nq:train")


def test_training_batches_are_those_of_the_file(build, prepared):
    files = build("nq", make_rows(40))
    data = prepared("tfds:llm_embedder/nq:train")
    other = prepared(files["train_data"])
    assert data.sizes == other.sizes
    assert data.names == ["nq"]
    for rows in ([0, 7, 39, 12], [3, 1, 30, 8]):
        assert_same(data.assemble(plan_rows(rows)), other.assemble(plan_rows(rows)))
    assert rows_of(data.paths[0]) == rows_of(files["train_data"])
    assert expand_paths(["tfds:llm_embedder/nq", files["train_data"]], "/nowhere") == [
        data.paths[0],
        files["train_data"],
    ]


def test_evaluation_and_scoring_data_are_those_of_the_file(build):
    files = build("nq", make_rows(9), QUERIES, CORPUS)
    config = TextConfig(
        eval_data="tfds:llm_embedder/nq:test", corpus="tfds:llm_embedder/nq_corpus:corpus"
    )
    corpus, eval_data = open_data(files_of(config), config.key_template, ["mrr"])
    plain = TextConfig(eval_data=files["eval_data"], corpus=files["corpus"])
    other_corpus, other = open_data(files_of(plain), plain.key_template, ["mrr"])
    assert list(corpus) == list(other_corpus)
    for field in ("texts", "query_ids", "positives", "task"):
        assert getattr(eval_data, field) == getattr(other, field)

    rows = [row | {"answers": ["a", "b"]} for row in make_rows(9)]
    files = build("scored", rows)
    name = "tfds:llm_embedder/scored:train"
    parse = lambda row, _: parse_scoring_row(row, TEMPLATES)  # noqa: E731
    one, other = (ScoringData(local_file(n, ""), parse) for n in (name, files["train_data"]))
    np.testing.assert_array_equal(one.candidates, other.candidates)
    assert [*one.records()] == [*other.records()] == rows


def test_results_go_to_the_output_folder(build, tmp_path):
    build("nq", make_rows(9), QUERIES, CORPUS)
    config = RetrieveConfig()
    config.data.eval_data = "tfds:llm_embedder/nq:test"
    config.data.corpus = "tfds:llm_embedder/nq_corpus:corpus"
    config.evaluation.metrics, config.evaluation.log_path = ["mrr", "collate_neg"], None
    config.retrieval.retrieval_method, config.retrieval.output_dir = "random", str(tmp_path / "out")
    assert retrieve(config) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "llm_embedder.nq.test.metrics.json",
        "llm_embedder.nq.test.mining.json",
        "llm_embedder.nq.test.neg.json",
        "llm_embedder.nq.test.result.json",
        "llm_embedder.nq.test.run.json",
        "llm_embedder.nq.test.source.json",
    ]


def test_scores_go_here(build, tmp_path, monkeypatch):
    build("nq", [row | {"answers": ["a"]} for row in make_rows(3)])
    config = ScoreConfig(lm=LMConfig(model_name_or_path="none"))
    config.scoring.eval_data, config.scoring.save_name = "tfds:llm_embedder/nq", "lm"

    class FoundOut(Exception):
        pass

    def result_path(folder, path, kind, name):
        raise FoundOut(folder / f"{path.stem}.{kind}.{name}.json")

    class Model:
        max_length = 4096

    monkeypatch.setattr(scoring, "open_causal_lm", lambda *_, **__: (Model(), None, None))
    monkeypatch.setattr(scoring, "result_path", result_path)
    with pytest.raises(FoundOut) as found:
        scoring.score(config)
    assert found.value.args == (tmp_path / "llm_embedder.nq.train.scored.lm.json",)


def test_neither_building_nor_reading_needs_tensorflow(write_rows, tmp_path):
    path = write_rows("nq.json", ODD_ROWS)
    code = f"""
import sys
from llme_jax.sources.resolve import Files
heavy = {{"tensorflow_datasets", "fsspec", "jax"}} & set(sys.modules)
assert not heavy, heavy
from llme_jax.build_tfds import main
main(["--name", "nq", "--train_data", {path!r}, "--data_dir", {str(tmp_path / "tfds")!r}])
Files({{}}).local("tfds:llm_embedder/nq")
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_data_root_may_hold_the_dataset(build, tmp_path, monkeypatch):
    build("nq", ODD_ROWS)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    path = local_file("tfds:llm_embedder/nq", str(tmp_path / "tfds"))
    assert rows_of(path) == ODD_ROWS


def test_files_of_a_bucket_are_fetched_once(bucket, write_rows):
    rows = make_rows(4)
    for name in ("a.json", "b.json"):
        write_rows(f"buckets/of/nq/{name}", rows)
    first = local_file("gs://of/nq/a.json", "/nowhere")
    assert Path(first).parts[-2:] == ("nq", "a.json")
    assert digest_file(Path(first)) == digest_file(bucket / "of/nq/a.json")
    made = os.stat(first).st_mtime_ns
    assert local_file("llm-embedder:nq/a.json", "gs://of") == first
    assert os.stat(first).st_mtime_ns == made
    globbed = expand_paths(["gs://of/nq/*.json"], "/nowhere")
    assert [Path(path).name for path in globbed] == ["a.json", "b.json"]
    assert globbed[0] == first
    with pytest.raises(InputError, match="matches 2 files"):
        local_file("gs://of/nq/*.json", "/nowhere")
    write_rows("buckets/of/nq/a.json", rows[:2])
    assert rows_of(local_file("gs://of/nq/a.json", "/nowhere")) == rows[:2]


def test_a_dataset_in_a_bucket(build, bucket, tmp_path, monkeypatch):
    build("nq", ODD_ROWS, QUERIES)
    (tmp_path / "tfds").rename(bucket / "data")
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://data")
    assert read("tfds:llm_embedder/nq:test") == QUERIES
    file = Path(local_file("tfds:llm_embedder/nq:test", ""))
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no shard is left
    with pytest.raises(InputError, match=r"in gs://data .which has llm_embedder"):
        read("tfds:other")


def test_local_names_stay():
    assert local_file("a/*.json", "/d") == "a/*.json"
    assert local_file("llm-embedder:a.json", "/d") == "/d/a.json"
    remote = ["tfds:nq", "gs://b/a.json", "a.json", "llm-embedder:a.json"]
    assert [is_remote(name) for name in remote] == [True, True, False, False]
    assert is_remote(resolve_path("llm-embedder:a.json", "gs://d"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tfds:", "write tfds:NAME/CONFIG:SPLIT"),
        ("tfds:../nq", "write tfds:NAME/CONFIG:SPLIT"),
        (
            "tfds:squad",
            r"no dataset squad .*which has llm_embedder.*tfds build squad --file_format",
        ),
        ("tfds:llm_embedder", "has configs, give one of nq, nq_corpus"),
        (
            "tfds:llm_embedder/hot",
            "no config hot, give one of nq, .*llme_jax.build_tfds --name hot",
        ),
        ("tfds:llm_embedder/nq:dev", r"no split dev, give train, or a part as in train\[:1000\]"),
        ("tfds:llm_embedder/nq:train[", r"no split train\["),
        ("tfds:llm_embedder/nq:train[:0]", r"there are no rows in train\[:0\]: give a part"),
        ("tfds:llm_embedder/nq:train[:1%]", r"there are no rows in train\[:1%\]: give a part"),
        ("gs://of/none.json", "there is no such file"),
        ("gs://of/*.json", "no file matches"),
        ("gs://of/folder", r"is a folder, give gs://of/folder/\*.json"),
        ("other://of/a.json", "pip install what reads other://"),
    ],
)
def test_refusals(build, bucket, name, said):
    (bucket / "of/folder").mkdir(parents=True)
    build("nq", ODD_ROWS[:1], None, CORPUS)
    with pytest.raises(InputError, match=said) as error:
        local_file(name, "/nowhere")
    assert str(error.value).startswith(f"{name}: ")


def test_other_formats_and_missing_packages_are_refused(build, monkeypatch, tmp_path):
    build("nq", ODD_ROWS[:1])
    info = tmp_path / "tfds/llm_embedder/nq/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match=r"holds tfrecord, .* --file_format array_record"):
        read("tfds:llm_embedder/nq")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'llme_jax\[tfds\]'"):
        read("tfds:llm_embedder/nq")


@pytest.mark.parametrize(
    ("flag", "rows", "said"),
    [
        ("train_data", [ODD_ROWS[0], {"query": 5}], r"train_data.json:2: query is 5"),
        ("eval_data", [QUERIES[0], QUERIES[0]], r"eval_data.json:2: query_id"),
        ("eval_data", [QUERIES[0] | {"pos_index": [9]}], r"eval_data.json:1: pos_index has 9"),
        ("corpus", [CORPUS[0], {"title": "t"}], r"corpus.json:2: has no field 'text'"),
    ],
)
def test_invalid_rows_are_found_before_anything_is_written(write_rows, tmp_path, flag, rows, said):
    files = {"train_data": ODD_ROWS[:1], "eval_data": QUERIES, "corpus": CORPUS} | {flag: rows}
    flags = ["--name", "nq"]
    for name, content in files.items():
        flags += [f"--{name}", write_rows(f"{name}.json", content)]
    with pytest.raises(InputError, match=said):
        build_tfds.main(flags)
    assert not (tmp_path / "tfds").exists()


def test_what_exists_is_not_overwritten(build):
    build("nq", ODD_ROWS)
    with pytest.raises(InputError, match="exists already: delete it"):
        build("nq", ODD_ROWS)
    build("nq", None, None, CORPUS)  # the corpus is a config of its own
    with pytest.raises(InputError, match="nothing to build"):
        build_tfds.main(["--name", "nq"])
    with pytest.raises(InputError, match="give a local folder"):
        build_tfds.main(["--name", "nq", "--corpus", "c.json", "--data_dir", "gs://b"])
