"""The data doctor against a slow, obvious computation; its findings, files and exit codes."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llme_jax.config import DataConfig, LossConfig
from llme_jax.data.instructions import NO_INSTRUCTION, find_instruction
from llme_jax.doctor.__main__ import main
from llme_jax.doctor.counts import HashSet, Lengths
from llme_jax.doctor.facts import read_facts
from llme_jax.doctor.report import short_names
from llme_jax.errors import InputError
from llme_jax.hugging_face.reading import Cutter
from llme_jax.hugging_face.texts import NO_LIMIT

GOOD = {"query": "a b", "pos": ["p"], "neg": ["n", "o"]}


def random_rows(rng: random.Random, count: int) -> list:
    """Rows with all kinds of flaws; a string is an invalid line."""

    def text() -> str:
        return " ".join(rng.choices("abcdefg", k=rng.randint(0, 9)))

    rows = []
    for _ in range(count):
        pos, neg = ([text() for _ in range(rng.randint(0, most))] for most in (3, 6))
        row = {"query": text(), "pos": pos, "neg": neg, "task": rng.choice(["qa", "tool"])}
        if rng.random() < 0.1:
            row = {"query": text(), "history": neg, "task": "chat"}
        if rng.random() < 0.5:
            row["teacher_scores"] = [rng.gauss(0, 1) for _ in [*row.get("pos", []), *neg]]
        kind = rng.random()
        rows.append("{" if kind < 0.05 else row | {"query": 5} if kind < 0.1 else row)
    return rows


def spread(counts: list[int]) -> dict:
    return {"min": min(counts), "median": np.median(counts), "max": max(counts)}


def tokens(lengths: list[int], limit: int) -> dict:
    truncated = sum(n > limit for n in lengths)
    return {
        **{f"{q}%": np.percentile(lengths, q, method="inverted_cdf") for q in (50, 90, 99)},
        "max": max(lengths),
        "limit": limit,
        "truncated": truncated,
        "truncated_share": truncated / len(lengths),
    }


def flaw(lines: list[int]) -> dict:
    return {"count": len(lines), "first_lines": lines[:10]}


def slow_summary(rows: list, data: DataConfig, tokenizer) -> dict:
    """All of `FileFacts.summary` but what make_dataset decides, with texts in memory."""
    numbered = [(i, row) for i, row in enumerate(rows, 1)]
    bad = [i for i, row in numbered if isinstance(row, str) or row["query"] == 5]
    valid = [(i, r, r.get("pos", []), r.get("neg") or r.get("history", []))
             for i, r in numbered if i not in bad]  # fmt: skip
    queries, keys, repeated = [], {}, []
    for i, row, pos, neg in valid:
        use = (
            find_instruction(data.version, row["task"]) if data.add_instruction else NO_INSTRUCTION
        )
        queries.append(len(tokenizer(use.query + row["query"])["input_ids"]))
        keys |= {use.key + key: len(tokenizer(use.key + key)["input_ids"]) for key in pos + neg}
        if any(row["query"] == before["query"] for at, before, _, _ in valid if at < i):
            repeated.append(i)
    scored = [(r["teacher_scores"], len(p)) for _, r, p, _ in valid if r.get("teacher_scores")]
    labelled = [(s, p) for s, p in scored if 0 < p < len(s)]
    scores = [score for row, _ in scored for score in row]
    n_neg = [len(neg) for _, _, _, neg in valid]
    return {
        "rows": len(valid),
        "tasks": dict(Counter(row["task"] for _, row, _, _ in valid)),
        "query_tokens": tokens(queries, data.query_max_length),
        "key_tokens": tokens(list(keys.values()), data.key_max_length),
        "keys": sum(len(pos) + len(neg) for _, _, pos, neg in valid),
        "distinct_keys": len(keys),
        "positives": spread([len(pos) for _, _, pos, _ in valid]),
        "negatives": spread(n_neg),
        "no_positives": sum(not pos for _, _, pos, _ in valid),
        "no_negatives": n_neg.count(0),
        "group_negatives": data.train_group_size - 1,
        "few_negatives": sum(n < data.train_group_size - 1 for n in n_neg),
        "teacher_scores": {
            "rows": len(scored),
            "mean": pytest.approx(np.mean(scores)),
            "min": min(scores),
            "max": max(scores),
            "median_spread": np.median([max(row) - min(row) for row, _ in scored]),
            "best_is_positive": np.mean([np.argmax(s) < p for s, p in labelled]),
            "by_chance": pytest.approx(np.mean([p / len(s) for s, p in labelled])),
        },
        "duplicate_queries": flaw(repeated),
        "repeated_keys": flaw(
            [i for i, _, *both in valid if any(len(set(k)) < len(k) for k in both)]
        ),
        "positive_among_negatives": flaw([i for i, _, pos, neg in valid if set(pos) & set(neg)]),
        "empty_texts": flaw([i for i, row, pos, neg in valid if "" in (row["query"], *pos, *neg)]),
    }


@pytest.mark.parametrize("add_instruction", [True, False])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_against_a_slow_computation(
    write_rows, make_tokenizer, monkeypatch, add_instruction, chunk
):
    rows = random_rows(random.Random(chunk), 400)
    path = write_rows("train.json", rows)
    data = DataConfig(
        version="llm-embedder",
        add_instruction=add_instruction,
        query_max_length=8,
        key_max_length=7,
        train_group_size=4,
    )
    monkeypatch.setattr("llme_jax.doctor.facts.CHUNK_TEXTS", chunk)
    plain = make_tokenizer()
    plain.backend_tokenizer.no_padding()
    plain.backend_tokenizer.no_truncation()
    facts = read_facts(path, data, Cutter(make_tokenizer(), NO_LIMIT, "right"))
    summary = facts.summary(data, LossConfig())
    expected = slow_summary(rows, data, plain)
    assert {name: summary[name] for name in expected} == expected
    assert summary["bad_rows"]["count"] == len(rows) - expected["rows"] > 10
    assert len(summary["bad_rows"]["first"]) == 10


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"select_positive": "teacher"},
        {"select_positive": "teacher", "teacher_scores_min": 0.5, "teacher_scores_margin": 2.0},
        {"teacher_scores_min": 100.0},
        {"max_sample_num": 5},
    ],
)
@pytest.mark.parametrize("positives", [0, 1])
def test_training_uses_as_many_rows_or_stops_with_the_same_words(
    write_rows, tokenizer, prepared, settings, positives
):
    rows = [
        row
        for row in random_rows(random.Random(1), 200)
        if isinstance(row, str) or len(row.get("pos", [])) >= positives
    ]
    path = write_rows("train.json", rows)
    data = DataConfig(train_data=[path], **settings)
    kept, stops = read_facts(path, data, Cutter(tokenizer, NO_LIMIT, "right")).trained_on(
        data, LossConfig()
    )
    try:
        expected = prepared(path, **settings, max_bad_rows=len(rows)).sizes[0], None
    except InputError as error:
        expected = 0, str(error)
    assert (kept, stops) == expected


def test_every_length_is_that_of_the_tokenizer(write_rows, make_tokenizer):
    texts = ["", "a", "a b c", "query: " * 300, "abc1 ### x", "ü\u0301 \x00 é", "z" * 5000]
    rows = [{"query": text, "pos": [text], "neg": ["n"]} for text in texts]
    facts = read_facts(
        write_rows("t.json", rows),
        DataConfig(version="e5"),
        Cutter(make_tokenizer(), NO_LIMIT, "right"),
    )
    plain = make_tokenizer()
    plain.backend_tokenizer.no_padding()
    plain.backend_tokenizer.no_truncation()
    for lengths, before, more in (
        (facts.query_lengths, "query: ", []),
        (facts.key_lengths, "passage: ", ["n"]),
    ):
        expected = sorted(len(plain(before + text)["input_ids"]) for text in texts + more)
        assert lengths.values().tolist() == expected


def test_a_set_of_hashes():
    rng, slow, fast = np.random.default_rng(0), set(), HashSet()
    for _ in range(200):
        hashes = rng.integers(-300, 300, rng.integers(0, 9))
        assert fast.contains(hashes).tolist() == [h in slow for h in hashes]
        new = []
        for h in hashes.tolist():
            new.append(h not in slow)
            slow.add(h)
        assert fast.add(hashes).tolist() == new
        assert len(fast) == len(slow)
    assert len(fast._parts) < 12


def test_no_lengths():
    assert Lengths().summary(5) is None


def test_several_files_side_by_side(doctor, write_rows):
    files = [write_rows(f"{name}/train.json", [GOOD | {"task": name}] * 2) for name in "abcde"]
    code, printed = doctor(*files, "--add_instruction", "false")
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].split() == [f"{name}/train.json" for name in "abcd"]
    assert "e/train.json" in printed and max(map(len, lines)) <= 100
    rows = next(line for line in lines if line.startswith("rows"))
    assert rows.split() == ["rows", "2", "2", "2", "2"]
    assert "- a/train.json: 1 row has the query of an earlier row, first in line 2: join" in printed
    assert printed.endswith("These files can be trained on.\n")


def test_names_are_as_short_as_can_be():
    assert short_names(["/x/nq/train.json", "/x/ms/train.json", "/y/dev.json"]) == [
        "nq/train.json",
        "ms/train.json",
        "dev.json",
    ]
    assert short_names(["train.json", "/a/train.json"]) == ["train.json", "a/train.json"]


def test_bad_rows_of_several_kinds(doctor, found, write_rows):
    path = write_rows(
        "train.json",
        [GOOD, "{", "", GOOD | {"query": None}, "[1]", GOOD | {"teacher_scores": [1]}, GOOD],
    )
    code, printed = doctor(path)
    assert code == 1
    assert "- train.json: 4 lines are invalid: correct them, or skip them with" in printed
    assert "    line 4: query is missing" in printed
    assert "    line 6: teacher_scores has 1 values, pos + neg has 3" in printed
    assert "see the first finding." in printed
    code, report = found(path, "--max_bad_rows", "4")
    assert code == 0 and not report["stops_training"]
    assert report["files"][0]["bad_rows"]["count"] == 4
    assert [bad["line"] for bad in report["files"][0]["bad_rows"]["first"]] == [2, 4, 5, 6]
    code, report = found(path, "--max_bad_rows", "4", "--version", "llm-embedder")
    assert code == 1  # no row has a task, so that none has an instruction
    assert "task is missing" in report["stops_training"][0]
    assert report["stops_training"][1] == "train.json: no line of it is a valid row"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"neg": ["n", "p", "o"]}, "1 row has a positive among the negatives, first in line 8"),
        ({"neg": ["n", "n", "m"]}, "1 row has a key twice among pos or among neg, first in line 8"),
        ({"negatives": ["n"]}, "training does not read these fields: negatives"),
        ({"neg": []}, "1 row has no negatives and cannot be trained on"),
        ({"neg": ["n"]}, "1 row has fewer than the 2 negatives that --train_group_size 3 takes"),
        ({"pos": [" "]}, "1 row has an empty query or key, first in line 8"),
        ({"query": "a " * 9}, "12.5% of queries are longer than --query_max_length 10"),
        ({"neg": ["x y", "z " * 40]}, "20.0% of distinct keys are longer than --key_max_length 12"),
        ({"teacher_scores": [0, 1, 2]}, "7 rows have no teacher_scores and are not distilled"),
        ({"teacher_scores": [0, 1, 2]}, "is a positive in 0.0% of rows, by chance it would be in "),
        ({"teacher_scores": [1, 1, 1]}, "in most rows all teacher_scores are the same"),
    ],
)
def test_remarks(found, write_rows, row, sentence):
    rows = [GOOD | {"query": f"q {i}"} for i in range(7)] + [GOOD | row]
    flags = "--add_instruction false --train_group_size 3 --query_max_length 10 --key_max_length 12"
    code, report = found(write_rows("train.json", rows), *flags.split())
    assert code == 0
    assert any(sentence in remark for remark in report["remarks"]), report["remarks"]


def test_nothing_to_worry_about(doctor, write_rows):
    path = write_rows("train.json", [GOOD])
    assert "\n- nothing to worry about\n" in doctor(path, "--train_group_size", "3")[1]


def test_overlap_with_the_evaluation(found, doctor, write_rows):
    train = write_rows("train.json", [GOOD, GOOD | {"query": "c", "pos": ["T1 x"]}])
    corpus = write_rows("corpus.json", [{"title": f"T{i}", "text": "x"} for i in range(4)])
    test = write_rows(
        "test.json",
        [
            {"query": "a b", "pos_index": [0]},
            {"query": "a b", "pos_index": [1, 2]},  # the same query counts each time
            {"query": "new", "pos_index": [1, 1]},
        ],
    )
    code, report = found(train, "--eval_data", test, "--corpus", corpus)
    assert code == 0
    assert report["files"][0]["eval"] == {
        "file": test,
        "queries": 3,
        "queries_in_training": 2,
        "queries_with_positives": 3,
        "queries_with_positives_in_training": 2,
    }
    assert any("2 of 3 queries of test.json are trained on" in r for r in report["remarks"])
    code, printed = doctor(train, "--eval_data", test)
    assert "of 3 eval queries" in printed and "positives trained on" not in printed
    wrong = write_rows("wrong.json", [{"query": "q", "pos_index": [4]}, {"query": 3}])
    code, report = found(train, "--eval_data", wrong, "--corpus", corpus)
    assert code == 1
    (stop,) = report["stops_training"]
    assert "2 lines are invalid" in stop and "line 1: pos_index has 4, passages are" in stop


def test_files_that_are_written(doctor, write_rows, tmp_path):
    scored = write_rows("train.json", [GOOD | {"teacher_scores": [2, 1, 0]}] * 3)
    out = tmp_path / "out"
    code, printed = doctor(scored, "--json", f"{out}/data.json", "--plot", f"{out}/data.png")
    assert code == 0 and "Findings:" in printed
    report = json.loads((out / "data.json").read_text())
    assert report["files"][0]["teacher_scores"]["median_spread"] == 2
    four = (out / "data.png").read_bytes()
    assert four.startswith(b"\x89PNG")
    doctor(write_rows("plain.json", [GOOD]), "--plot", f"{out}/data.png")
    three = (out / "data.png").read_bytes()  # without scores, a panel less
    assert int.from_bytes(four[16:20]) * 3 == int.from_bytes(three[16:20]) * 4
    doctor(write_rows("empty.json", []), "--plot", f"{out}/nothing.png")
    assert not (out / "nothing.png").exists()


def test_an_experiment_names_the_files(found, write_rows, tmp_path):
    path = write_rows("root/train.json", [GOOD])
    config = "from llme_jax.config import Config\ndef get_config(arg):\n    c = Config()\n"
    config += "    c.data.train_data = ['llm-embedder:train.json']\n    c.training.max_steps = 3\n"
    (tmp_path / "mine.py").write_text(config + "    return c\n")
    code, report = found("--config", f"{tmp_path}/mine.py", "--data_root", f"{tmp_path}/root")
    assert code == 0 and [file["file"] for file in report["files"]] == [path]
    code, report = found("--train_data", f"{tmp_path}/root/*.json", path)
    assert [file["file"] for file in report["files"]] == [path]  # a file is read once


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("missing.json", "there is no file missing.json"),
        ("{good} --train_data {good}", "and --train_data: name the files in one of the two ways"),
        ("--key_max_length 12", "there is no file to look at: name training files, or a --config"),
        ("{good} --key_max_length 0", "--key_max_length 0: give 1 or more"),
        ("{good} --key_max_lenght 3", "did you mean --key_max_length?"),
        ("{good} --eval_data no.json", "--eval_data no.json: there is no such file"),
        ("{good} --eval_data {empty}", "the file is empty, give one with JSON lines"),
        ("{good} --eval_data {blank}", "has no queries, give --eval_data a file that does"),
        ("{good} --metrics map", "--metrics map: choose from mrr, recall, ndcg, nq"),
        ("{good} --use_train_config", "--version bge has no training recipes"),
        ("{good} --query_encoder /no/folder", "its tokenizer: --query_encoder FOLDER"),
    ],
)
def test_what_is_refused(encoder, write_rows, argv, message):
    files = {"good": write_rows("train.json", [GOOD]), "empty": write_rows("empty.json", [])}
    files["blank"] = write_rows("blank.json", [""])
    argv = argv.format(**files).split()
    argv += [] if "--query_encoder" in argv else ["--query_encoder", encoder]
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        main(argv)


def test_the_command(write_rows, encoder):
    path = write_rows("train.json", [GOOD, "{"])
    code = "import sys, runpy, atexit; atexit.register(lambda: print('jax' in sys.modules))\n"
    code += "runpy.run_module('llme_jax.doctor', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    for argv, expected in (
        ([path, "--query_encoder", encoder], 1),
        ([path, "--query_encoder", encoder, "--max_bad_rows", "1"], 0),
        (["missing.json"], 2),
    ):
        done = subprocess.run([*command, *argv], cwd=root, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert done.stdout.endswith("False\n")  # starts fast: jax is not needed
    assert done.stderr.startswith("error: --train_data missing.json")


def test_the_former_name_names_the_command():
    words = [sys.executable, "-m", "llme_jax.data", "train.json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: the data doctor is python -m llme_jax.doctor: same flags\n"
