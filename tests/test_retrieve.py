"""The command as a person uses it: find, measure, collate, load again, bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from commands import finish, flags, patient, start, start_together
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny import read_lines, write_lines

from llme_jax import rank, retrieve
from llme_jax.errors import InputError
from llme_jax.retrieval import embeddings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.save_bert(folder / "bert")
    rng = np.random.default_rng(0)
    corpus = [{"title": f"w{i}", "text": tiny.text(rng)} for i in range(60)]
    rows = []
    for i in range(20):
        text = f"{corpus[i]['title']} {corpus[i]['text']}"
        rows.append(
            {
                "query": " ".join(text.split()[:3]),
                "query_id": f"q{i}" if i % 2 else i,
                "pos": [text],
                "neg": ["old"],
                "pos_index": [i],
                "answers": [corpus[i]["text"]],
            }
        )
    write_lines(folder / "train.json", rows)
    write_lines(folder / "corpus.json", corpus)
    return folder


@pytest.fixture
def arguments(data, tmp_path):
    settings = {
        "data_root": data,
        "eval_data": "llm-embedder:train.json",
        "corpus": "llm-embedder:corpus.json",
        "query_encoder": data / "bert",
        "dtype": "fp32",
        "query_max_length": 24,
        "key_max_length": 32,
        "dataset_cache_dir": data / "cache",
        "output_dir": tmp_path / "out",
        "log_path": tmp_path / "log",
        "hits": 15,
    }
    return [*flags(settings), "--save_to_output", "--add_instruction", "false"]


@pytest.mark.parametrize("dim", [None, 12])
def test_dense_retrieval_is_that_of_sentence_transformers(data, arguments, tmp_path, capsys, dim):
    metrics = "--metrics mrr recall ndcg nq collate_key collate_neg --cutoffs 1 10".split()
    arguments += [] if dim is None else ["--truncate_dim", str(dim)]
    assert retrieve.main([*arguments, *metrics, "--save_name", "tiny"]) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        f"train.{kind}.tiny.json"
        for kind in ("result", "source", "metrics", "key", "neg", "mining", "run")
    }
    bert = Transformer(str(data / "bert"), max_seq_length=64)
    pooling = Pooling(bert.get_embedding_dimension(), "cls")
    how = {"device": "cpu", "truncate_dim": dim}
    model = SentenceTransformer(modules=[bert, pooling, Normalize()], **how)
    rows, corpus = read_lines(data / "train.json"), read_lines(data / "corpus.json")
    texts = [f"{row['title']} {row['text']}" for row in corpus]
    queries = [row["query"] for row in rows]
    vectors = [model.encode(of, normalize_embeddings=True) for of in (queries, texts)]
    similarity = vectors[0] @ vectors[1].T
    results = read_lines(out / "train.result.tiny.json")
    assert [r["query_id"] for r in results] == [row["query_id"] for row in rows]
    for result, row in zip(results, similarity, strict=True):
        best = np.argsort(-row)[:15]
        # Two fp32 implementations of two layers; ids may differ only where scores nearly tie.
        np.testing.assert_allclose(result["score"], row[best], atol=2e-5)
        np.testing.assert_allclose(row[result["pred"]], row[best], atol=4e-5)

    found = json.loads((out / "train.metrics.tiny.json").read_text())
    first = np.mean([r["pred"][0] == i for i, r in enumerate(results)])
    assert found["recall@1"] == found["mrr@1"] == pytest.approx(first) and first > 0.1
    assert "answer_recall@20" in found
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["@1", "@5", "@10", "@20", "@100"]
    assert f"{first:.4f}" in said and "negatives for 20 queries" in said
    assert json.loads((tmp_path / "log").read_text())["metrics"] == found

    keys, mined = read_lines(out / "train.key.tiny.json"), read_lines(out / "train.neg.tiny.json")
    for i, (row, key, neg, result) in enumerate(zip(rows, keys, mined, results, strict=True)):
        assert key == row | {"key": [texts[j] for j in result["pred"]], "key_index": result["pred"]}
        assert neg["neg_index"] == [j for j in result["pred"] if j != i]
        assert neg["neg"] == [texts[j] for j in neg["neg_index"]] and neg["pos"] == row["pos"]


def test_loaded_results_give_the_same_without_a_model(arguments, tmp_path):
    out, metrics = tmp_path / "out", "--metrics mrr collate_neg --cutoffs 1 5 15".split()
    retrieve.main([*arguments, *metrics])
    before = {path.name: path.read_text() for path in out.iterdir()}
    settings = json.loads(before.pop("train.run.json"))["settings"]
    assert settings["query_max_length"] == 24 and settings["output_dir"] == str(out)
    for name in ("train.metrics.json", "train.neg.json"):
        (out / name).unlink()
    retrieve.main([*arguments, *metrics, "--load_result", "--query_encoder", "./nowhere"])
    after = {path.name: path.read_text() for path in out.iterdir()}
    assert json.loads(after.pop("train.run.json"))["settings"] == settings | {
        "load_result": True, "query_encoder": "./nowhere", "truncation_side": None,
    }  # fmt: skip
    # the second is made from what the first was rounded to in JSON, which keeps fp32 exactly
    assert after == before


def test_results_of_other_files_are_refused(data, arguments, tmp_path):
    arguments += ["--metrics", "mrr", "--retrieval_method", "random"]
    retrieve.main(arguments)
    result = tmp_path / "out/train.result.json"
    rows, corpus = (read_lines(data / f"{name}.json") for name in ("train", "corpus"))
    out = ["--output_dir", str(tmp_path / "other")]

    def load(eval_data=None, passages=None):
        for name, content in (("train", eval_data), ("corpus", passages)):
            write_lines(tmp_path / f"{name}.json", content or read_lines(data / f"{name}.json"))
        files = [str(tmp_path / name) for name in ("train.json", "corpus.json")]
        more = ["--eval_data", files[0], "--corpus", files[1]]
        retrieve.main([*arguments, *more, "--load_result"])
        retrieve.main([*arguments, *more, *out, "--fuse", str(result)])

    load()
    load(eval_data=rows[5:15])  # each row has its own query_id
    with pytest.raises(InputError, match=r"train.result.json: its numbers are those of another co"):
        load(passages=corpus[::-1])
    numbered = [{k: v for k, v in row.items() if k != "query_id"} for row in rows]
    with pytest.raises(InputError, match=r"was made for other queries than those of .*train.json"):
        load(eval_data=numbered)
    write_lines(tmp_path / "corpus.json", corpus[::-1])
    with pytest.raises(InputError, match="its numbers are those of another corpus"):
        ranking = ["--ranker", str(data / "bert"), "--load_result", str(result), "--metrics", "mrr"]
        files = ["--eval_data", str(data / "train.json"), "--corpus", str(tmp_path / "corpus.json")]
        lengths = ["--query_max_length", "16", "--key_max_length", "32"]
        rank.main([*ranking, *files, *out, *lengths])
    # Of a file that was changed, or of the reference's, nothing is known.
    result.write_text("".join(line + "\n" for line in result.read_text().splitlines()[:3]))
    load(passages=corpus[::-1])


def test_cutoffs_beyond_the_hits_that_are_kept(arguments, tmp_path, caplog):
    """recall@50 looks at 50 hits where 2 are kept; from a file of 2 hits there is none."""
    found = {}
    for hits, more in ((2, []), (60, []), (2, ["--load_result"])):
        words = [*arguments, "--metrics", "recall", "nq", "collate_key", "--cutoffs", "1", "50"]
        assert retrieve.main([*words, "--hits", str(hits), "--save_name", str(hits), *more]) == 0
        path = tmp_path / f"out/train.metrics.{hits}.json"
        found[hits, *more] = json.loads(path.read_text())
        if not more:
            pred = [row["pred"] for row in read_lines(tmp_path / f"out/train.result.{hits}.json")]
            assert {len(row) for row in pred} == {hits}
    assert found[2,] == found[60,] and found[2,]["recall@50"] > found[2,]["recall@1"]
    assert {len(row["key"]) for row in read_lines(tmp_path / "out/train.key.2.json")} == {2}
    loaded = found[2, "--load_result"]
    assert loaded == {name: found[2,][name] for name in ("recall@1", "answer_recall@1")}
    assert "no answer_recall@5, answer_recall@10, " in caplog.text
    assert "recall@50: there are 2 hits a query at most" in caplog.text


@pytest.mark.parametrize("method", ["dense", "bm25"])
def test_passages_with_the_text_of_the_query_are_no_hits(method, data, arguments, tmp_path):
    """Query 3 is passages 5 and 7, but for case and spacing; the others' hits stay."""
    corpus, rows = read_lines(data / "corpus.json"), read_lines(data / "train.json")
    query, rows[3]["pos_index"] = rows[3]["query"], [i for i in range(60) if i not in (5, 7)]
    first, rest = query.upper().split(maxsplit=1)
    corpus[5] = corpus[7] = {"title": first, "text": f" {rest} "}
    write_lines(tmp_path / "corpus.json", corpus)
    write_lines(tmp_path / "test.json", rows)
    words = [*arguments, "--corpus", str(tmp_path / "corpus.json"), "--cutoffs", "1", "13"]
    words += ["--eval_data", str(tmp_path / "test.json"), "--retrieval_method", method]
    found = []
    for more in ([], ["--load_result", "--ignore_identical"], ["--ignore_identical"]):
        assert retrieve.main([*words, *more]) == 0
        preds = [row["pred"] for row in read_lines(tmp_path / "out/test.result.json")]
        found.append((preds, json.loads((tmp_path / "out/test.metrics.json").read_text())))
    (before, with_them), (same, loaded), (after, without) = found
    assert same == before and {5, 7} == set(before[3][:2])
    assert not {5, 7} & set(after[3]) and after[3][:13] == before[3][2:] and len(after[3]) <= 15
    texts = {f"{row['title']} {row['text']}" for row in corpus}
    others = [i for i, row in enumerate(rows) if i != 3 and row["query"] not in texts]
    assert [after[i] for i in others] == [before[i] for i in others] and len(others) > 10
    assert loaded == without != with_them


def test_methods_are_fused(arguments, tmp_path):
    out = tmp_path / "out"
    retrieve.main([*arguments, "--save_name", "dense", "--metrics", "mrr"])
    more = ["--retrieval_method", "random", "--save_name", "chance", "--metrics", "collate_neg"]
    retrieve.main([*arguments, *more, "--fuse", str(out / "train.result.dense.json")])
    for i, row in enumerate(read_lines(out / "train.neg.chance.json")):
        assert set(row["neg_source"]) == {"chance", "train.result.dense"}
        assert i not in row["neg_index"] and len(set(row["neg_index"])) == len(row["neg_index"])
    random = [row["pred"] for row in read_lines(out / "train.result.chance.json")]
    assert all(len(set(pred)) == 15 for pred in random) and random[0] != random[1]


def test_embeddings_are_kept_on_request(arguments, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--load_encode: .* has no embeddings of this corpus"):
        retrieve.main([*arguments, "--load_encode"])
    retrieve.main([*arguments, "--save_encode"])
    (folder,) = (out / "embeddings").iterdir()
    before = (out / "train.result.json").read_text()
    for more in (["--load_encode"], []):  # whoever made them, a later run does not delete them
        (out / "train.result.json").unlink()
        retrieve.main([*arguments, *more])
        assert (out / "train.result.json").read_text() == before
        assert (folder / "manifest.json").exists()
    for other in (["--key_max_length", "20"], ["--truncate_dim", "8"]):
        with pytest.raises(InputError, match=r"--load_encode: .* has no embeddings of this corpus"):
            retrieve.main([*arguments, "--load_encode", *other])


def test_a_faiss_index_is_kept_on_request(arguments, tmp_path):
    out, faiss = tmp_path / "out", ["--faiss_index_factory", "HNSW16"]
    retrieve.main(arguments)
    exact = [row["pred"] for row in read_lines(out / "train.result.json")]
    with pytest.raises(InputError, match=r"--load_index: .* has no HNSW16 index of this corpus"):
        retrieve.main([*arguments, *faiss, "--load_index"])
    retrieve.main([*arguments, *faiss, "--save_index"])
    (kept,) = (out / "embeddings").iterdir()  # the embeddings themselves are not
    assert kept.name.endswith(".HNSW16.faiss")
    before = (out / "train.result.json").read_text()
    approximate = [row["pred"] for row in read_lines(out / "train.result.json")]
    assert np.mean([a[:5] == e[:5] for a, e in zip(approximate, exact, strict=True)]) > 0.8
    retrieve.main([*arguments, *faiss, "--load_index"])
    assert (out / "train.result.json").read_text() == before
    retrieve.main([*arguments, *faiss, "--truncate_dim", "8"])  # another index, of other vectors
    assert (out / "train.result.json").read_text() != before


def test_killed_while_encoding_the_finished_shards_are_kept(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 16)
    code = (
        "import os, sys; from llme_jax import retrieve; from llme_jax.retrieval import embeddings;"
        "embeddings.SHARD = 16; replace = os.replace; made = []\n"
        "def kill(a, b):\n"
        "    made.append(b) if str(b).endswith('.npy') else None\n"
        "    os.kill(os.getpid(), 9) if len(made) == 3 else replace(a, b)\n"
        "os.replace = kill; retrieve.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (folder,) = (tmp_path / "out/embeddings").iterdir()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.npy")}
    assert len(finished) == 2
    retrieve.main([*arguments, "--save_encode"])
    for name, time in finished.items():
        assert (folder / name).stat().st_mtime_ns == time
    assert len(list(folder.glob("[0-9]*.npy"))) == 4
    killed = (tmp_path / "out/train.result.json").read_text()
    retrieve.main([*arguments, "--output_dir", str(tmp_path / "other")])
    assert (tmp_path / "other/train.result.json").read_text() == killed


@pytest.mark.slow
@patient
def test_two_processes_find_the_same(arguments, tmp_path):
    metrics = "--metrics mrr collate_neg".split()
    for process in start_together([*arguments, *metrics], 2, devices=4, command="retrieve"):
        finish(process)
    together = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    # One device, one process; JSON keeps fp32 exactly, so the same files are the same bits.
    alone = [*arguments, *metrics, "--output_dir", str(tmp_path / "alone")]
    finish(start(alone, devices=1, command="retrieve"))
    found, want = (
        [json.loads(line) for line in files["train.result.json"].splitlines()]
        for files in (
            together,
            {path.name: path.read_text() for path in (tmp_path / "alone").iterdir()},
        )
    )
    assert [row["query_id"] for row in found] == [row["query_id"] for row in want]
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a["score"], b["score"], atol=1e-6)  # rounding of the encoder
    assert np.mean([a["pred"] == b["pred"] for a, b in zip(found, want, strict=True)]) > 0.9
    kinds = ("result", "source", "metrics", "neg", "mining", "run")
    assert set(together) == {f"train.{kind}.json" for kind in kinds}


def test_nothing_is_retrieved_on_request(arguments, tmp_path):
    retrieve.main([*arguments, "--retrieval_method", "no", "--metrics", "mrr", "collate_key"])
    assert {row["key"] == [] for row in read_lines(tmp_path / "out/train.key.json")} == {True}
    assert json.loads((tmp_path / "out/train.metrics.json").read_text())["mrr@10"] == 0


def test_beside_the_data_by_default(data, arguments, tmp_path):
    copy = write_lines(tmp_path / "dev.json", read_lines(data / "train.json"))
    words = [word for word in arguments if word != "--save_to_output"]
    method = "--retrieval_method random --seed -1 --hits 100".split()  # more than the corpus has
    retrieve.main([*words, "--eval_data", str(copy), *method, "--metrics", "collate_neg"])
    assert len(read_lines(tmp_path / "dev.neg.json")[0]["neg"]) == 59
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dev.result.json",
        "dev.source.json",
    }
    audit = json.loads((tmp_path / "dev.mining.json").read_text())
    assert audit["negatives"] == sum(audit["ranks"].values()) == audit["sources"]["random"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics", "map"], "--metrics map: choose from mrr, recall, ndcg, nq, collate_key"),
        (["--corpus", "none.json"], "--corpus none.json: there is no such file"),
        (["--load_result"], "train.result.json: there is no such result file"),
        (["--fuse", "none.json"], "none.json: there is no such result file"),
        (["--save_index"], "--save_index and --load_index: Flat has no index"),
        (["--faiss_index_factory", "Nonsense"], "--faiss_index_factory Nonsense: faiss says"),
        (["--range_min", "5", "--range_max", "5"], "--range_max 5: leaves no rank"),
        (["--key_max_length", "65"], "--key_max_length 65: the encoder has 64 positions"),
        (["--hits", "0"], "--hits 0: give 1 or more"),
        (["--save_name", "../x"], r"--save_name ../x: give a name without /, of 100 bytes or less"),
        (["--save_name", "é" * 51], "éé: give a name without /, of 100 bytes or less"),
        (["--embedding_name", ".."], "--embedding_name ..: give a name without /"),
        (["--max_neg", "3"], "unknown flag --max_neg: did you mean --max_neg_num?"),
        (
            ["--eval_data", "llm-embedder:far.json", "--metrics", "collate_neg"],
            "far.json:1: pos_index has 60, passages are numbered 0 to 59",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(data, arguments, tmp_path, more, message):
    write_lines(data / "far.json", [{"query": "q", "pos_index": [60]}])
    with pytest.raises(InputError) as error:
        retrieve.main([*arguments, *more])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(arguments):
    with pytest.raises(InputError, match=r"--eval_data is missing: give a JSON-lines file"):
        retrieve.main([])
