"""Reranking: scores, files and metrics against a plain loop; kills, processes, bad input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from commands import finish, patient, start, start_together
from tiny import read_lines, write_lines

from llme_jax import rank
from llme_jax.data.rows import parse_row
from llme_jax.errors import InputError
from llme_jax.inference.partial_results import PartialResults
from llme_jax.rerank import run

LIMIT = 24


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """A folder with a BERT and a head of one label."""
    folder = tiny.save_bert(tmp_path_factory.mktemp("model") / "bert", layers=1)
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(folder, num_labels=1)
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    """Candidates of all three kinds, with and without numbers; a positive in an odd place."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(18):
        count = int(rng.integers(2, 9))
        keys = [tiny.text(rng, 1, 20) for _ in range(count)]
        numbers = rng.permutation(100)[:count].tolist()
        row = {"query": tiny.text(rng, 1, 12), "answers": [keys[1].split()[0]], "extra": {"i": i}}
        row |= {"pos": keys[:1], "neg": keys[1:]}
        if i % 3 == 0:
            row |= {"query_id": f"q{i}", "pos_index": numbers[:1], "neg_index": numbers[1:]}
        if i % 3 == 1:
            row |= {"key": keys[::-1], "key_index": numbers[::-1], "pos_index": numbers[:1]}
            row["neg"] = row["neg"][:-1]  # what is ranked is key
        if i % 4 == 2:
            row |= {"pos": [keys[0], "a positive that is no candidate"], "key": keys}
            row |= {"query_id": 100 + i, "task": "qa" if i % 8 == 2 else "icl"}
            row.pop("key_index", None)
            row.pop("pos_index", None)
        made.append(row)
    made[5] = {"query": tiny.text(rng), "history": made[5]["neg"], "pos_index": [0]}
    made[5]["answers"] = ["w1"]
    return made


def candidates(row) -> tuple[list[str], list[int], list[int]]:
    """Texts, ids and ids of the positives, written as the page says it."""
    if "key" in row:
        keys, ids = row["key"], row.get("key_index")
    elif "history" in row:
        return row["history"], [*range(len(row["history"]))], row["pos_index"]
    else:
        keys, ids = row["pos"] + row["neg"], None
        if "pos_index" in row:
            ids = row["pos_index"] + row["neg_index"]
    if ids is None:
        ids = [*range(len(keys))]
        return keys, ids, [keys.index(p) if p in keys else -9 for p in row.get("pos", [])]
    return keys, ids, row["pos_index"]


def by_torch(folder, rows) -> list[list[float]]:
    """Pair by pair, nothing padded."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)

    def one(query, key):
        inputs = tokenizer(query, key, truncation=True, max_length=LIMIT, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).logits.item()

    return [[one(row["query"], key) for key in candidates(row)[0]] for row in rows]


@pytest.fixture(scope="module")
def expected(cross, rows):
    return by_torch(cross, rows)


@pytest.fixture
def arguments(rows, cross, tmp_path):
    path = write_lines(tmp_path / "test.json", rows)
    settings = {
        "eval_data": path,
        "ranker": cross,
        "query_max_length": 8,
        "key_max_length": LIMIT - 8,
        "output_dir": tmp_path / "out",
        "log_path": tmp_path / "performance.log",
        "dataset_cache_dir": tmp_path / "cache",
        "save_name": "s",
    }
    return [
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
        *("--cutoffs", "1", "3", "--metrics", "mrr", "recall", "ndcg", "nq"),
        *("collate_key", "collate_score"),
    ]


def output(folder, kind: str, name: str = "s"):
    return read_lines(folder / f"test.{kind}.{name}.json")


def assert_files(folder, rows, expected, hits=None, name="s"):
    """All that is written, from the scores that are expected."""
    results = read_lines(folder / f"out/test.result.{name}.json")
    keys, scored = (output(folder, kind, name) for kind in ("key", "scored"))
    for i, (row, scores) in enumerate(zip(rows, expected, strict=True)):
        texts, ids, _ = candidates(row)
        order = sorted(range(len(ids)), key=lambda j: -scores[j])[:hits]
        assert results[i]["query_id"] == row.get("query_id", i)
        assert results[i]["pred"] == [ids[j] for j in order]
        np.testing.assert_allclose(results[i]["score"], [scores[j] for j in order], atol=1e-5)
        ranked = {"key": [texts[j] for j in order]}
        if "key_index" in row or ("neg_index" in row and "key" not in row):
            ranked["key_index"] = [ids[j] for j in order]
        assert keys[i] == row | ranked
        np.testing.assert_allclose(scored[i].pop("teacher_scores"), scores, atol=1e-5)
        assert scored[i] == row | ({"teacher_scores_of": "key"} if "key" in row else {})


def metrics_by_hand(rows, expected, hits=None) -> dict[str, float]:
    found = {f"{name}@{k}": [] for name in ("mrr", "recall", "ndcg") for k in (1, 3)}
    found |= {f"answer_recall@{k}": [] for k in (1, 5, 10, 20, 100)}
    for row, scores in zip(rows, expected, strict=True):
        texts, ids, positives = candidates(row)
        order = sorted(range(len(ids)), key=lambda j: -scores[j])[:hits]
        right = [ids[j] in positives for j in order]
        for k in (1, 3):
            first = right[:k].index(True) + 1 if True in right[:k] else math.inf
            found[f"mrr@{k}"].append(1 / first)
            found[f"recall@{k}"].append(sum(right[:k]) / len(positives))
            gains = sum(1 / math.log2(r + 2) for r in range(len(right[:k])) if right[r])
            best = sum(1 / math.log2(r + 2) for r in range(min(k, len(positives))))
            found[f"ndcg@{k}"].append(gains / best)
        holds = [row["answers"][0] in texts[j].split() for j in order]
        for k in (1, 5, 10, 20, 100):
            found[f"answer_recall@{k}"].append(any(holds[:k]))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("hits", [None, 2])
def test_scores_files_and_metrics_are_those_of_a_plain_loop(
    arguments, rows, expected, tmp_path, hits, capsys
):
    rank.main([*arguments, *(["--hits", str(hits)] if hits else [])])
    assert_files(tmp_path, rows, expected, hits)
    metrics = json.loads((tmp_path / "out/test.metrics.s.json").read_text())
    assert metrics == pytest.approx(metrics_by_hand(rows, expected, hits), abs=1e-6)
    (line,) = read_lines(tmp_path / "performance.log")
    assert line["metrics"] == metrics
    said = capsys.readouterr().out
    assert "ndcg" in said and f"scores:  {tmp_path}/test.scored.s.json" in said
    assert "best key is a labelled positive" in said and "--teacher_temperature" in said
    assert (tmp_path / "test.scored.s.png").read_bytes().startswith(b"\x89PNG")


def test_devices_and_batches_change_nothing(arguments, rows, expected, tmp_path):
    finish(start([*arguments, "--save_name", "one"], devices=1, command="rank"))
    assert_files(tmp_path, rows, expected, name="one")
    rank.main([*arguments, "--save_name", "eight", "--batch_size", "1"])
    for a, b in zip(
        output(tmp_path, "scored", "one"), output(tmp_path, "scored", "eight"), strict=True
    ):
        np.testing.assert_allclose(a["teacher_scores"], b["teacher_scores"], atol=2e-6)


def test_instructions_are_those_of_each_row(arguments, rows, cross, tmp_path):
    rows = [row | {"task": ("qa", "icl")[i % 2]} for i, row in enumerate(rows)]
    write_lines(tmp_path / "test.json", rows)
    rank.main([*arguments, "--add_instruction", "--version", "e5"])
    texts = [candidates(row)[0] for row in rows]
    added = [
        {"query": "query: " + row["query"], "key": ["passage: " + key for key in keys]}
        for row, keys in zip(rows, texts, strict=True)
    ]
    for row, want in zip(output(tmp_path, "scored"), by_torch(cross, added), strict=True):
        np.testing.assert_allclose(row["teacher_scores"], want, atol=1e-5)


def test_the_hits_of_a_result_file_are_reranked(arguments, rows, cross, tmp_path, capsys):
    rng = np.random.default_rng(1)
    corpus = [{"title": f"w{i}", "text": tiny.text(rng, 1, 9)} for i in range(120)]
    corpus_file = write_lines(tmp_path / "corpus.json", corpus)
    texts = [f"{row['title']} {row['text']}" for row in corpus]
    found = []
    for i, row in enumerate(rows):
        pred = rng.permutation(120)[: rng.integers(1, 6)].tolist()
        score = sorted(rng.normal(size=len(pred)).tolist(), reverse=True)
        found.append({"query_id": row.get("query_id", i), "pred": pred, "score": score})
    del found[3]  # a query without a hit
    result = write_lines(tmp_path / "found.json", found)
    rows = [row | {"pos_index": [7], "pos": [texts[7]]} for row in rows]
    write_lines(tmp_path / "test.json", rows)
    rank.main([*arguments, "--load_result", str(result), "--corpus", str(corpus_file)])
    preds = {row["query_id"]: row["pred"] for row in found}
    ranked = [
        {"query": row["query"], "key": [texts[j] for j in preds.get(row.get("query_id", i), [])]}
        for i, row in enumerate(rows)
    ]
    scored = output(tmp_path, "scored")
    for row, given, want in zip(scored, ranked, by_torch(cross, ranked), strict=True):
        assert row["key"] == given["key"]
        np.testing.assert_allclose(row["teacher_scores"], want, atol=1e-5)
    assert any(len(row["key"]) > 2 for row in scored)
    depth = ["--rerank_depth", "2", "--save_name", "two", "--corpus", str(corpus_file)]
    rank.main([*arguments, "--load_result", str(result), *depth])
    metrics = json.loads((tmp_path / "out/test.metrics.two.json").read_text())
    assert {int(name.split("@")[1]) for name in metrics} == {1}  # 2 hits give no mrr@5
    for row, whole in zip(output(tmp_path, "scored", "two"), scored, strict=True):
        assert row["key_index"] == whole["key_index"][:2]
    mixing = ["--retriever_weight", "0.25", "--save_name", "mixed", "--corpus", str(corpus_file)]
    rank.main([*arguments, "--load_result", str(result), *mixing])
    scores = {row["query_id"]: np.array(row["score"]) for row in found}
    mixed = output(tmp_path, "scored", "mixed")
    for i, (row, alone) in enumerate(zip(mixed, scored, strict=True)):
        if not row["key"]:
            continue
        both = np.array(alone["teacher_scores"]), scores[rows[i].get("query_id", i)]
        ranker, retriever = ((x - x.mean()) / max(x.std(), 1e-9) for x in both)
        want = 0.75 * ranker + 0.25 * retriever
        # Rounding of the scores, 1e-5, is multiplied by 1 / deviation.
        np.testing.assert_allclose(row["teacher_scores"], want, atol=1e-4)
    with pytest.raises(InputError, match=r"would be overwritten .* give another --save_name"):
        again = ["--load_result", str(tmp_path / "out/test.result.s.json")]
        rank.main([*arguments, *again, "--corpus", str(corpus_file)])


KILLED = """
import os, sys
from llme_jax import rank
from llme_jax.rerank import run
run.PART = {"cpu": 5}
replace, made = os.replace, []
def kill(a, b):
    made.append(b) if str(b).endswith(".npy") else None
    os.kill(os.getpid(), 9) if len(made) == 3 else replace(a, b)
os.replace = kill
rank.main(sys.argv[1:])
"""


def test_killed_it_continues_with_the_same_bits(arguments, tmp_path):
    def go(code: str) -> int:
        return subprocess.run([sys.executable, "-c", code, *arguments]).returncode

    assert go(KILLED.replace("== 3", "== 99")) == 0
    names = ("test.scored.s.json", "test.key.s.json", "out/test.result.s.json")
    whole = [(tmp_path / name).read_bytes() for name in names]
    for path in [*map(tmp_path.joinpath, names), *tmp_path.glob("out/*.parts/*/*.npy")]:
        path.unlink()
    assert go(KILLED) == -9
    assert not any((tmp_path / name).exists() for name in names)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/*.parts/*/[0-9]*.npy")}
    assert len(finished) == 2
    assert go(KILLED.replace("== 3", "== 99")) == 0
    assert [(tmp_path / name).read_bytes() for name in names] == whole
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_twin_runs_leave_whole_files(arguments, rows, expected, tmp_path):
    for process in [start(arguments, devices=2, command="rank") for _ in range(2)]:
        finish(process)
    assert_files(tmp_path, rows, expected)


@patient
def test_two_processes_share_the_work(arguments, rows, expected, tmp_path):
    for process in start_together(arguments, 2, devices=2, command="rank"):
        finish(process)
    assert_files(tmp_path, rows, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, 'test.json:1: query is missing: every row needs "query"'),
        ({"pos": "a"}, 'test.json:1: pos is "a": give a list of strings'),
        ({"neg": [1]}, r"test.json:1: neg\[0\] is 1: give a list of strings"),
        ({"key": ["a"], "key_index": [1, 2]}, "test.json:1: key_index has 2 numbers, key has 1"),
        ({"key": ["a"], "key_index": [-1]}, r"test.json:1: key_index is \[-1\]: give a list of"),
        ({"pos": None, "neg": None}, "test.json:1: no candidates: every row needs key, or pos"),
        ({"pos": []}, "test.json:1: has neither pos nor pos_index, which mrr, recall and ndcg"),
        ({"answers": []}, "test.json:1: has no answers, which nq needs"),
        ({"task": 3}, "test.json:1: task is 3: give a string"),
        ({"key_index": [2**63], "key": ["a"]}, r"test.json:1: key_index is \[9223372036854775808"),
        ({"key": ["a"], "pos": None, "pos_index": [1]}, "test.json:1: has neither pos nor pos_in"),
        ({"query_id": [1]}, r"test.json:1: query_id is \[1\]: give an integer or a string"),
    ],
)
def test_bad_rows_are_one_sentence(arguments, tmp_path, change, message):
    row = {"query": "w1", "pos": ["w2"], "neg": ["w3"], "answers": ["w2"]} | change
    write_lines(tmp_path / "test.json", [row])
    with pytest.raises(InputError, match=message):
        rank.main(arguments)
    assert not [*tmp_path.glob("test.*.s.json"), *tmp_path.glob("out/test.result*")]


def test_scores_of_other_texts_are_not_trained_on(arguments, tmp_path):
    row = {"query": "w1", "pos": ["w2"], "neg": ["w3", "w4"], "answers": ["w2"]}
    rows = [row, row | {"key": ["w4", "w2", "w3"]}]
    path = write_lines(tmp_path / "test.json", rows)
    rank.main(arguments)
    good, other = output(tmp_path, "scored")
    assert len(parse_row(good).teacher_scores) == 3
    with pytest.raises(InputError, match=r"teacher_scores are those of key, .* rank the row with"):
        parse_row(other)
    both = row | {"history": ["w5"]}
    write_lines(path, [both, {"query": "w1", "pos": [], "neg": [], "history": ["w2", "w5"]}])
    rank.main([*arguments, "--metrics", "collate_score"])
    first, second = output(tmp_path, "scored")
    with pytest.raises(InputError, match="teacher_scores are those of pos"):
        parse_row(first)
    assert len(parse_row(second).teacher_scores) == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"query_id": [1], "pred": [0]}',
        '{"query_id": 1, "pred": [0], "score": ["a"]}',
        '{"query_id": 1, "pred": [0], "score": {"a": 1}}',
        '{"query_id": 1, "pred": [-99999999999]}',
        '{"query_id": 77, "pred": [0]}',
        "3",
    ],
)
def test_bad_result_files_are_one_sentence(arguments, tmp_path, line):
    corpus = write_lines(tmp_path / "corpus.json", [{"title": "w1", "text": "w2"}])
    (tmp_path / "found.json").write_text(line + "\n")
    more = ["--load_result", str(tmp_path / "found.json"), "--corpus", str(corpus)]
    message = r"found.json:1: (not a result|pred has)|found.json: has none of the query_ids"
    with pytest.raises(InputError, match=message):
        rank.main([*arguments, *more, "--metrics", "collate_key"])


def test_a_row_without_a_task_is_named(arguments, tmp_path):
    write_lines(tmp_path / "test.json", [{"query": "w1", "pos": ["w2"], "neg": ["w3"]}])
    with pytest.raises(InputError, match=r"test.json:1: task is missing, --version llm-embedder"):
        rank.main([*arguments, "--metrics", "mrr", "--add_instruction", "--version",
                   "llm-embedder"])  # fmt: skip


def test_rows_without_candidates_do_not_cut_parts(tmp_path):
    partial = PartialResults(tmp_path, np.array([5, 0] * 10))
    assert partial.missing(1000) == [(0, 20)]
    assert [b - a for a, b in partial.missing(10)] == [4, 4, 4, 4, 4]


@pytest.mark.parametrize("damage", ["short", "nan", "other shape"])
def test_a_damaged_part_is_scored_again(arguments, tmp_path, damage, caplog):
    rank.main([*arguments])
    result = tmp_path / "out/test.result.s.json"
    before = result.read_text()
    (part,) = (tmp_path / "out/test.result.s.parts").rglob("*.npy")
    scores = np.load(part)
    if damage == "short":
        part.write_bytes(part.read_bytes()[:-3])
    else:
        np.save(part, scores * np.nan if damage == "nan" else scores[:-1])
    rank.main([*arguments])
    assert f"{part} is damaged: its pairs are scored again" in caplog.text
    assert result.read_text() == before


def test_a_file_without_positives_is_scored(arguments, tmp_path, capsys):
    row = {"query": "w1", "history": ["w2", "w3 w4"]}
    write_lines(tmp_path / "test.json", [row, row | {"history": []}, row | {"history": ["w5"]}])
    rank.main([*arguments, "--metrics", "collate_score"])
    scored = output(tmp_path, "scored")
    assert [len(row["teacher_scores"]) for row in scored] == [2, 0, 1]
    assert not (tmp_path / "out/test.metrics.s.json").exists()
    assert "1 rows with 2 keys" in capsys.readouterr().out


def test_part_sizes_are_there_for_every_platform():
    assert {*run.PART} == {"cpu", "gpu", "tpu"}
