"""The evaluate command: answers against transformers, kills, several devices, two compared."""

import json
import os
import signal
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
import transformers
from commands import finish, flags, patient, start, start_together
from tiny import read_lines, write_lines

from llme_jax import evaluate, report
from llme_jax.errors import InputError
from llme_jax.evaluation import run

SUBJECTS = ("anatomy", "astronomy", "my_own_subject")


def outputs(folder: Path, method: str = "no") -> list[dict]:
    (path,) = (folder / "out" / method).glob("*.output.*.json")
    return read_lines(path)


def metrics(folder: Path, method: str = "no", kind: str = "llama.") -> dict:
    (path,) = (folder / "out" / method).glob(f"*.metrics.{kind}json")
    return json.loads(path.read_text())


class Torch:
    """The same model in transformers, one text at a time."""

    def __init__(self, folder):
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def likelihood(self, before: str, answer: str) -> float:
        encoded = self.tokenizer(before + answer, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        first = next(i for i, end in enumerate(ends) if end > len(before))
        return self.of_tokens(encoded["input_ids"], len(ends) - first)

    def of_tokens(self, ids, last: int) -> float:
        with torch.no_grad():
            logs = self.model(torch.tensor([[*map(int, ids)]])).logits[0].log_softmax(-1)
        places = range(len(ids) - last, len(ids))
        return float(np.mean([logs[i - 1, int(ids[i])].item() for i in places]))

    def write(self, text: str, new: int) -> str:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            made = self.model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
        return self.tokenizer.decode(made, skip_special_tokens=True).split("\n")[0].strip()


@pytest.fixture(scope="module")
def oracle(llama):
    return Torch(llama)


def asked(row: dict) -> str:
    options = zip("ABCD", row["choices"], strict=True)
    return "\n".join([row["query"], *(f"{x}. {text}" for x, text in options), "Answer:"])


def test_mmlu(arguments, files, oracle, tmp_path, capsys):
    words = arguments("mmlu", retrieval_method="bm25", few_shot=1, key_num=2)
    assert evaluate.main(words) == 0
    found, dev = outputs(tmp_path, "bm25"), read_lines(files / "dev.json")
    keys = [f"{x['title']} {x['text']}" for x in read_lines(files / "corpus.json")]
    for row in found:
        shown = next((x for x in dev if x["subject"] == row["subject"]), None)
        assert row["key"] == [keys[i] for i in row["key_index"]]
        subject = row["subject"].replace("_", " ")
        text = "Knowledge:\n" + "\n".join(row["key"]) + "\n\n" if row["key"] else ""
        text += f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        text += f"{asked(shown)} {'ABCD'[shown['answer']]}\n\n{asked(row)}" if shown else asked(row)
        want = [oracle.likelihood(text, f" {letter}") for letter in "ABCD"]
        np.testing.assert_allclose(row["log_likelihoods"], want, atol=2e-5)
        assert row["output"] == int(np.argmax(want))
        assert row["score"] == (row["output"] == row["answer"])
    by = {s: np.mean([r["score"] for r in found if r["subject"] == s]) for s in SUBJECTS}
    want = {"STEM": by["astronomy"], "Others": by["anatomy"], "All": np.mean([*by.values()])}
    assert metrics(tmp_path, "bm25") == pytest.approx(want | by)
    assert "STEM " in capsys.readouterr().out
    assert json.loads((tmp_path / "log").read_text())["metrics"] == metrics(tmp_path, "bm25")


def test_qa_is_written_as_transformers_does(arguments, oracle, files, tmp_path):
    words = arguments("qa", retrieval_method="no", few_shot=2, max_new_tokens=12)
    evaluate.main(words)
    found, rows = outputs(tmp_path), read_lines(files / "qa.json")
    drawn = np.random.default_rng(42).permutation(len(rows))[:2]
    shown = "".join(
        f"Question: {rows[i]['query']}\nAnswer: {rows[i]['answers'][0]}\n\n" for i in drawn
    )
    for row in found:
        want = oracle.write(f"{shown}Question: {row['query']}\nAnswer:", 12)
        assert row["output"] == want
    assert {"exact_match", "exact_match_squad", "f1"} == metrics(tmp_path).keys()
    # Drawn: a function of seed and row, not of what else is in the batch.
    drawing = {"do_sample": True, "save_name": "x"}
    evaluate.main([*words, *flags(drawing)])
    evaluate.main([*words, *flags(drawing | {"save_name": "y", "lm_batch_size": 1})])
    x, y = (
        [r["output"] for r in read_lines(tmp_path / f"out/no/qa.output.llama.{n}.json")]
        for n in "xy"
    )
    assert x == y != [r["output"] for r in found]


def test_popqa_shows_other_relations(arguments, oracle, files, tmp_path):
    evaluate.main(arguments("popqa", retrieval_method="no", few_shot=4))
    rows = read_lines(files / "popqa.json")
    seen = set()
    for i, row in enumerate(outputs(tmp_path)):
        assert row["scores"].keys() == {"accuracy", "accuracy_words"}
        demonstrations = run.task_of(_settings("popqa", few_shot=4)).demonstrations
        shown = demonstrations(rows, [], _settings("popqa", few_shot=4), 42)(i)
        assert len(shown) == 4 and {r["prop_id"] for r in shown} == {0, 1, 2, 3} - {row["prop_id"]}
        seen.add(tuple(r["query"] for r in shown))
        text = "".join(f"Q: {r['query']} A: {r['obj']}\n\n" for r in shown)
        assert row["output"] == oracle.write(f"{text}Q: {row['query']} A:", 16)
    assert len(seen) > 4


def _settings(task, **more):
    config = evaluate.EvaluateConfig.of(task)
    for name, value in more.items():
        setattr(config.task, name, value)
    return config.task


def test_icl(arguments, oracle, files, tmp_path):
    words = arguments("icl", retrieval_method="dense", few_shot=3, max_new_tokens=5)
    evaluate.main(words)
    (method,) = [path.name for path in (tmp_path / "out").iterdir()]
    found = outputs(tmp_path, method)
    for row in found:
        assert len(row["key"]) == 3
        text = "".join(f"{key}\n" for key in row["key"][::-1]) + " ".join(row["query"].split())
        if row["task_name"] == "squad_v1":
            assert row["output"] == oracle.write(text + "\n", 5)
        else:
            want = [oracle.likelihood(text + "\n", f" {option}") for option in row["options"]]
            np.testing.assert_allclose(row["log_likelihoods"], want, atol=2e-5)
    given = metrics(tmp_path, method)
    multirc = [r for r in found if r["task_name"] == "multirc"]
    right = np.mean([r["score"] for r in multirc])  # all are "1"
    assert given["multirc"] == pytest.approx(2 * right / (1 + right))
    assert given["avg"] == pytest.approx(
        np.mean([given[n] for n in ("rte", "multirc", "squad_v1")])
    )
    assert given["ReadingComp"] == pytest.approx((given["multirc"] + given["squad_v1"]) / 2)
    # The same again takes what was found; of one task alone as well.
    again = [*words, *flags({"task_names": "rte", "save_name": "rte"})]
    evaluate.main(again)
    name = tmp_path / "out" / method / "icl.output.llama.rte.json"
    alone, rte = read_lines(name), [row for row in found if row["task_name"] == "rte"]
    assert [r["prompt_hash"] for r in alone] == [r["prompt_hash"] for r in rte]
    assert len({r["prompt_hash"] for r in found}) == len(found)


def test_same_task_random(arguments, files, tmp_path):
    evaluate.main(arguments("icl", retrieval_method="same-task-random", few_shot=2))
    names = [line["task_name"] for line in read_lines(files / "corpus.json")]
    for row in outputs(tmp_path, "same-task-random"):
        assert {names[i] for i in row["key_index"]} == {row["task_name"]}


@pytest.mark.parametrize("method", ["no", "recent", "oracle", "random", "dense"])
def test_msc(arguments, oracle, tmp_path, method):
    evaluate.main(arguments("msc", retrieval_method=method, key_num=1 if method == "oracle" else 2))
    (folder,) = [path.name for path in (tmp_path / "out").iterdir()]
    found = outputs(tmp_path, folder)
    for row in found:
        turns = [[key] for key in row["history"]] if method == "oracle" else [row.get("key", [])]
        if method == "recent":
            assert turns[0] == row["history"][-2:][::-1]
        if method in ("random", "dense"):
            assert len(turns[0]) == min(2, len(row["history"]))
        end = f"Speaker 1: {row['query']}\nSpeaker 2:"
        want = [
            oracle.likelihood(
                "".join(f"{key}\n" for key in sorted(read, key=row["history"].index)) + end,
                f" {row['answers'][0]}",
            )
            for read in turns or [[]]
        ]
        np.testing.assert_allclose(row["output"], max(want), atol=2e-5)
    likelihoods = [row["score"] for row in found]
    assert metrics(tmp_path, folder)["perplexity"] == pytest.approx(np.exp(-np.mean(likelihoods)))


WINDOWS = {
    "no": {"retrieval_method": "no"},
    "concat": {"retrieval_method": "dense"},
    "replace": {"retrieval_method": "random", "integrate_method": "replace"},
    "oracle": {"retrieval_method": "oracle", "key_num": 1},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_lrlm(arguments, oracle, files, tmp_path, name):
    sizes = {"chunk_size": 8, "context_window_size": 56, "target_length": 16, "key_num": 2}
    evaluate.main(arguments("lrlm", **(sizes | WINDOWS[name])))
    (folder,) = [path.name for path in (tmp_path / "out").iterdir()]
    found = outputs(tmp_path, folder)
    texts = [row["text"] for row in read_lines(files / "lrlm.json")]
    assert [row["text"] for row in found] == texts[:-1]  # the last has no 16 tokens
    for row in found:
        ids = oracle.tokenizer(row["text"], add_special_tokens=False).input_ids
        if name == "no":
            window = ids[-56:]
            want = oracle.of_tokens(window, min(16, len(window) - 1))
            np.testing.assert_allclose(row["output"], want, atol=2e-5)
        if name == "oracle" and len(ids) > 80:
            # By the book: whole chunks from the end, every key tried, the whole window read.
            pad = -len(ids) % 8
            chunks = [ids[max(i - pad, 0) : i + 8 - pad] for i in range(0, len(ids) + pad, 8)]
            best = []
            for target in (5, 6):
                read = [i for chunk in chunks[-7 : len(chunks) - 6 + target] for i in chunk]
                best.append(max(
                    oracle.of_tokens(chunks[j] + chunks[j + 1] + read, 8)
                    for j in range(len(chunks) - 8)
                ))  # fmt: skip
            np.testing.assert_allclose(row["output"], np.mean(best), atol=2e-5)


def test_qrecc_measures_the_retrieval_and_writes_when_asked(arguments, tmp_path, capsys):
    words = arguments("qrecc", retrieval_method="bm25", key_template="{title} {text}")
    evaluate.main(words)
    assert {"ndcg@3", "recall@100"} <= metrics(tmp_path, "bm25", "").keys()
    assert not [*(tmp_path / "out/bm25").glob("*.output.*.json")]
    evaluate.main([*words, *flags({"do_generate": True, "max_new_tokens": 4})])
    assert metrics(tmp_path, "bm25").keys() == {"rl", "rouge_l"}


def test_rows_bring_their_own_keys(arguments, files, oracle, tmp_path):
    """As those that a reranker has put in order."""
    rows = [row | {"key": ["an", "no", "yes"]} for row in read_lines(files / "mmlu.json")]
    path = write_lines(tmp_path / "reranked.json", rows)
    evaluate.main(arguments("mmlu", retrieval_method="no", eval_data=path, key_num=2))
    row = outputs(tmp_path)[0]
    subject = row["subject"].replace("_", " ")
    text = "Knowledge:\nan\nno\n\nThe following are multiple choice questions (with answers) about "
    text += f"{subject}.\n\n{asked(row)}"
    want = [oracle.likelihood(text, f" {letter}") for letter in "ABCD"]
    np.testing.assert_allclose(row["log_likelihoods"], want, atol=2e-5)


def test_hits_of_another_kind_are_not_taken_for_those_of_a_search(arguments, tmp_path):
    words = arguments("mmlu", retrieval_method="bm25")
    evaluate.main(words)
    (path,) = (tmp_path / "out/bm25").glob("*.result.json")
    searched, hits = outputs(tmp_path, "bm25"), read_lines(path)
    write_lines(path, [row | {"pred": [7], "score": [1.0]} for row in hits])
    evaluate.main([*words, "--load_result"])
    assert {tuple(row["key_index"]) for row in outputs(tmp_path, "bm25")} == {(7,)}
    evaluate.main(words)
    assert outputs(tmp_path, "bm25") == searched and read_lines(path) == hits


def test_killed_it_goes_on(arguments, tmp_path):
    words = arguments("qa", retrieval_method="bm25", few_shot=2, max_new_tokens=6)
    code = (
        "from llme_jax.evaluation import run; run.PART = {'cpu': 2};"
        "import sys; from llme_jax import evaluate; sys.exit(evaluate.main(sys.argv[1:]))"
    )
    whole = [*words, "--save_name", "whole"]
    finish(start(whole, 1, code=code))
    process = start(words, 1, code=code)
    while not [*(tmp_path / "out").rglob("*[0-9]-[0-9]*.npy")] or not _mine(tmp_path):
        assert process.poll() is None, process.communicate()
        sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out/bm25/qa.output.llama.json").exists()
    said = finish(start(words, 2, code=code))
    assert "are there already" in said
    folder = tmp_path / "out/bm25"
    text = (folder / "qa.output.llama.json").read_text()
    assert text == (folder / "qa.output.llama.whole.json").read_text()
    assert "hits:" not in said  # what was found is taken again


def _mine(folder: Path) -> list[Path]:
    return [*(folder / "out/bm25/qa.output.llama.parts").rglob("*[0-9]-[0-9]*.npy")]


@patient
def test_processes_together(arguments, tmp_path):
    words = arguments("icl", retrieval_method="bm25", few_shot=2, max_new_tokens=5)
    evaluate.main([*words, "--save_name", "one"])
    for process in start_together(words, 2, 2, "evaluate"):
        finish(process)
    folder = tmp_path / "out/bm25"
    one, two = (read_lines(folder / f"icl.output.llama{n}.json") for n in (".one", ""))
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(
            x.pop("log_likelihoods", 0), y.pop("log_likelihoods", 0), atol=2e-5
        )
        assert x == y


def test_two_evaluations_are_compared(arguments, tmp_path, capsys):
    for method in ("no", "bm25"):
        evaluate.main(arguments("mmlu", retrieval_method=method))
    paths = [str(next((tmp_path / "out" / m).glob("*.output.*.json"))) for m in ("no", "bm25")]
    capsys.readouterr()
    evaluate.main(["--compare", *paths])
    out = capsys.readouterr().out
    scores = [[row["score"] for row in read_lines(Path(path))] for path in paths]
    won = sum(y > x for x, y in zip(*scores, strict=True))
    assert f"{won} questions are better with bm25" in out
    assert "accuracy, mean over questions" in out and "accuracy, mean over subjects" in out
    folders = [str(Path(path).parent) for path in paths]
    report.main([*folders, "--output_dir", str(tmp_path / "report")])
    page = (tmp_path / "report/report.md").read_text()
    assert "Answers of a language model" in page and "questions are better with" in page
    evaluate.main(arguments("popqa", retrieval_method="no"))
    with pytest.raises(InputError, match="accuracy_words: compare evaluations of one"):
        evaluate.main(["--compare", paths[0], str(tmp_path / "out/no/popqa.output.llama.json")])
