"""The score command: scores against a plain torch loop, kills, continues, processes, bad input."""

import json
import os
import signal
import subprocess
import sys
from time import sleep

import numpy as np
import pytest
import tiny
import torch
import transformers
from commands import finish, patient, start, start_together
from tiny import read_lines, write_lines

from llme_jax import score
from llme_jax.errors import InputError
from llme_jax.lm import scoring

QA = "Knowledge: {}\n\nQuestion: {}\n\nAnswer: "
BEFORE_ANSWER = {  # written out, for the loop to be independent of the templates
    "qa": QA,
    "convsearch": QA,
    "icl": "{}\n{}\n",
    "chat": "{}\nSpeaker 1: {}\nSpeaker 2: ",
    "lrlm": "{}{}",
    "tool": "Tool: {}\n\nRequest: {}\n\nCall: ",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    made = []
    for i, task in enumerate([*BEFORE_ANSWER] * 4):
        row = {"query": tiny.text(rng), "query_id": f"q{i}" if i % 2 else i, "task": task}
        row["answers"] = [tiny.text(rng, 1, 4) for _ in range(1 + i % 3)]
        keys = [tiny.text(rng, 2, 30) for _ in range(5)]
        row |= {"history": keys} if task == "chat" else {"pos": keys[:2], "neg": keys[2:]}
        made.append(row)
    made[1] |= {"pos": [], "neg": []}
    made[4] |= {  # lrlm with token lists
        "score_inputs": [rng.integers(2, 200, n).tolist() for n in (3, 30, 0, 7, 20)],
        "context_inputs": [5, 6, 7],
        "query_inputs": [8, 9],
        "answer_inputs": [10, 11, 12, 13],
    }
    made[6]["pos"][0] = " and an answer \n"  # stripped in qa
    made[8]["answers"] = ["\nan answer that begins with a line break"]
    return made


@pytest.fixture
def arguments(rows, llama, tmp_path):
    path = write_lines(tmp_path / "train.json", rows)
    words = f"--eval_data {path} --model_name_or_path {llama} --save_name s"
    return [*words.split(), "--context_max_length", "512"]


def scored(folder):
    return read_lines(folder / "train.scored.s.json")


def by_torch(rows, folder, reduce):
    """Pair by pair, all logits, nothing padded."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def mean_log_probability(ids, first):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return np.mean([logs[i - 1, ids[i]].item() for i in range(first, len(ids))])

    def one(row, i, answer):
        if "score_inputs" in row:
            before = row["score_inputs"][i] + row["context_inputs"] + row["query_inputs"]
            return mean_log_probability(before + row["answer_inputs"], len(before))
        keys = row.get("history") or row["pos"] + row["neg"]
        fields = [keys[i], row["query"], answer]
        if row["task"] in ("qa", "convsearch", "tool"):
            fields = [field.strip() for field in fields]
        before = BEFORE_ANSWER[row["task"]].format(*fields[:2])
        encoded = tokenizer(before + fields[2], return_offsets_mapping=True)
        first = next(j for j, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before))
        return mean_log_probability(encoded["input_ids"], first)

    scores = []
    for row in rows:
        count = len(row.get("history") or row["pos"] + row["neg"])
        scores.append([reduce([one(row, i, a) for a in row["answers"]]) for i in range(count)])
    return scores


REDUCTIONS = {
    "first": lambda values: values[0],
    "max": max,
    "mean": np.mean,
    "logsumexp": lambda values: np.log(np.sum(np.exp(values))),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_are_those_of_a_plain_loop(arguments, rows, llama, tmp_path, reduction, capsys):
    rows = [row for row in rows if reduction == "first" or "score_inputs" not in row]
    write_lines(tmp_path / "train.json", rows)
    score.main([*arguments, "--answer_reduction", reduction])
    expected = by_torch(rows, llama, REDUCTIONS[reduction])
    for row, given, want in zip(scored(tmp_path), rows, expected, strict=True):
        # fp32, sums in another order, of log-probabilities around -6.
        np.testing.assert_allclose(row.pop("teacher_scores"), want, atol=2e-5)
        assert row == {k: v for k, v in given.items() if not k.endswith("_inputs")}
    out = capsys.readouterr().out
    assert "best key is a labelled positive" in out and "--teacher_temperature" in out
    assert (tmp_path / "train.scored.s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_devices_batches_and_order_change_nothing(arguments, rows, tmp_path):
    score.main(arguments)  # 8 devices
    eight = scored(tmp_path)
    for more in (
        ["--lm_batch_size", "1"],
        ["--lm_batch_size", "7", "--context_max_length", "600"],
        ["--tensor", "4"],
        ["--fsdp", "4", "--tensor", "2"],
    ):
        (tmp_path / "train.scored.s.json").unlink()
        score.main([*arguments, "--save_name", "other", *more])
        for a, b in zip(eight, read_lines(tmp_path / "train.scored.other.json"), strict=True):
            np.testing.assert_allclose(a["teacher_scores"], b["teacher_scores"], atol=2e-6)
        (tmp_path / "train.scored.other.json").rename(tmp_path / "train.scored.s.json")
        for path in tmp_path.glob("train.scored.other.parts/*/*.npy"):
            path.unlink()  # these settings share their scores
    write_lines(tmp_path / "train.json", rows[::-1])
    score.main([*arguments, "--save_name", "back"])
    for a, b in zip(eight[::-1], read_lines(tmp_path / "train.scored.back.json"), strict=True):
        np.testing.assert_allclose(a["teacher_scores"], b["teacher_scores"], atol=2e-6)


KILLED = """
import os, sys
from llme_jax import score
from llme_jax.lm import scoring
scoring.PART = {"cpu": 4}
replace, made = os.replace, []
def kill(a, b):
    made.append(b) if str(b).endswith(".npy") else None
    os.kill(os.getpid(), 9) if len(made) == 3 else replace(a, b)
os.replace = kill
score.main(sys.argv[1:])
"""


def test_killed_it_continues_on_any_number_of_devices(arguments, tmp_path, monkeypatch):
    score.main([*arguments, "--save_name", "whole"])
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "train.scored.s.json").exists()
    (folder,) = (path for path in (tmp_path / "train.scored.s.parts").iterdir())
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.npy")}
    assert len(finished) == 2
    monkeypatch.setattr(scoring, "PART", {"cpu": 1})
    out = finish(start(arguments, devices=1, command="score"))
    assert "pairs are scored already" in out
    for name, time in finished.items():
        assert (folder / name).stat().st_mtime_ns == time
    for a, b in zip(
        scored(tmp_path), read_lines(tmp_path / "train.scored.whole.json"), strict=True
    ):
        np.testing.assert_allclose(a["teacher_scores"], b["teacher_scores"], atol=2e-6)
    # Nothing is left to do: the file is written again from the scores that are kept.
    before = (tmp_path / "train.scored.s.json").read_bytes()
    (tmp_path / "train.scored.s.json").unlink()
    score.main([*arguments, "--load_score"])
    assert (tmp_path / "train.scored.s.json").read_bytes() == before


def test_same_devices_same_bits_after_a_kill(arguments, tmp_path):
    command = [sys.executable, "-c", KILLED.replace("== 3", "== 99"), *arguments]
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole = (tmp_path / "train.scored.s.json").read_bytes()
    for path in tmp_path.glob("train.scored.s.parts/*/*.npy"):
        path.unlink()
    (tmp_path / "train.scored.s.json").unlink()
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -9
    again = [sys.executable, "-c", KILLED.replace("== 3", "== 99"), *arguments]
    assert subprocess.run(again, capture_output=True).returncode == 0
    assert (tmp_path / "train.scored.s.json").read_bytes() == whole


@patient
def test_two_processes_share_the_work(arguments, tmp_path):
    score.main([*arguments, "--save_name", "alone"])
    for process in start_together(arguments, 2, devices=2, command="score"):
        finish(process)
    for a, b in zip(
        scored(tmp_path), read_lines(tmp_path / "train.scored.alone.json"), strict=True
    ):
        np.testing.assert_allclose(a["teacher_scores"], b["teacher_scores"], atol=2e-6)


def test_sigterm_ends_two_processes_at_once(arguments, tmp_path):
    processes = start_together(arguments, 2, devices=2, command="score")
    while not any(tmp_path.glob("train.scored.s.parts/*/manifest.json")):
        sleep(0.005)
        assert processes[0].poll() is None, processes[0].communicate()
    for process in processes:
        process.terminate()
    for process in processes:
        assert process.wait(10) == -signal.SIGTERM  # which a shell calls 143
    assert not (tmp_path / "train.scored.s.json").exists()


def test_rows_of_one_candidate(arguments, rows, tmp_path, capsys):
    rows = [row | {"pos": row["pos"][:1], "neg": []} for row in rows if row["task"] == "qa"]
    write_lines(tmp_path / "train.json", rows)
    assert score.main(arguments) == 0
    assert "no row has two candidates" in capsys.readouterr().out
    assert [len(row["teacher_scores"]) for row in scored(tmp_path)] == [1] * len(rows)


def test_report_on_scores_that_are_there(tmp_path, capsys):
    row = {"query": "q", "pos": ["a"], "neg": ["b", "c"], "teacher_scores": [0.0, -1.0, -9.0]}
    path = write_lines(tmp_path / "scored.json", [row] * 3)
    score.main(["--eval_data", str(path), "--report"])
    out = capsys.readouterr().out
    assert "3 rows with 3 keys" in out and "positive: 100.0% (by chance 33.3%)" in out
    assert os.listdir(tmp_path) and (tmp_path / "scored.png").exists()


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"task": "quiz"}, [], r'train.json:3: task is "quiz": give one of qa, convsearch, icl'),
        ({"answers": []}, [], "train.json:3: answers is missing or empty"),
        ({"answers": ["a", " "]}, [], r'train.json:3: answers\[1\] is " ": there is nothing'),
        ({"query": None}, [], "train.json:3: query is missing"),
        ({"pos": "a"}, [], 'train.json:3: pos is "a": give a list of strings'),
        ({"answers": ["long " * 200]}, [], "train.json:3: the answer has 1000 tokens; give a"),
        (
            {"task": "lrlm", "score_inputs": [[1]]},
            [],
            "train.json:3: score_inputs is no list with one entry for each of pos",
        ),
        ({}, ["--lm_batch_size", "0"], "--lm_batch_size 0: give auto, or 1 or more"),
        ({}, ["--lm_dtype", "fp16"], "--lm_dtype fp16: use bf16, as fast and without"),
        ({}, ["--tensor", "3"], "--fsdp 1 --tensor 3: 3 does not divide the 8 devices"),
        ({}, ["--context_max_length", "2000"], "reads 1024 tokens, give 1024 or less"),
        ({}, ["--load_score"], r"--load_score: 115 of 115 pairs have no score yet"),
        ({}, ["--padding_side", "left"], "--padding_side has no meaning here: leave it out"),
        ({}, ["--report"], "train.json: no row has teacher_scores for two keys"),
        ({}, ["--eval_data", "none.json"], "--eval_data none.json: there is no such file"),
    ],
)
def test_bad_input_is_one_sentence(arguments, rows, tmp_path, change, more, message):
    changed = [*rows]
    changed[2] = rows[2] | change
    write_lines(tmp_path / "train.json", changed)
    with pytest.raises(InputError, match=message):
        score.main([*arguments, *more])
    assert not list(tmp_path.glob("train.scored.s.json"))
    assert json.loads((tmp_path / "train.json").open().readline()) == rows[0]


def test_token_lists_need_no_query(tmp_path):
    row = {"task": "lrlm", "pos": [], "neg": ["a"], "score_inputs": [[3]], "query_id": 1.5}
    row |= {"context_inputs": [4], "query_inputs": [5], "answer_inputs": [6]}
    path = write_lines(tmp_path / "rows.json", [row])
    data = scoring.ScoringData(path, lambda r, _: scoring.parse_scoring_row(r, scoring.TEMPLATES))
    assert data.candidates.tolist() == [1]
