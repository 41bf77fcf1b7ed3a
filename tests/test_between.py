"""What one command writes the next reads: from BEIR's training split to a distilled retriever."""

import shutil
from contextlib import chdir

import numpy as np
import pytest
import tiny
from campaign import MAINS, quietly

from llme_jax.errors import InputError
from llme_jax.retrieval import run

pytestmark = pytest.mark.slow
LENGTHS = ["--query_max_length", "16", "--key_max_length", "24", "--dataset_cache_dir", "cache",
           "--log_path", "log"]  # fmt: skip
STEPS = ["--max_steps", "2", "--train_group_size", "2", "--per_device_train_batch_size", "1",
         "--save_steps", "2", "--contrastive_weight", "1"]  # fmt: skip
TEST = ["--eval_data", "set", "--corpus", "set"]
# Each reads what those before it wrote. {x} is the file or folder that a step has left.
CHAIN = {
    "untrained": ("retrieve", "--query_encoder bert --eval_data set --corpus set --metrics mrr"),
    "mined": (
        "retrieve",
        "--query_encoder bert --eval_data set/qrels/train.tsv --corpus set --metrics mrr "
        "collate_neg --max_neg_num 4 --save_trec",
    ),
    "trained": ("train", "--query_encoder bert --train_data mined/set.train.neg.json --eval_data "
                         "set --corpus set"),
    "ranker": ("rank", "--ranker bert --train_data mined/set.train.neg.json"),
    "reranked": ("rank", "--ranker ranker/best/ranker --eval_data mined/set.train.neg.json "
                         "--metrics mrr collate_score --save_to_output"),
    "reranked hits": ("rank", "--ranker ranker/best/ranker --eval_data set/qrels/train.tsv "
                              "--corpus set --load_result mined/set.train.result.json --metrics "
                              "mrr collate_key"),
    "mined again": (
        "retrieve",
        "--query_encoder trained/best/encoder --eval_data set/qrels/train.tsv --corpus set "
        "--metrics collate_neg --fuse mined/set.train.result.json --rerank_result "
        "reranked-hits/set.train.result.json --max_neg_num 2",
    ),
    "scored": ("score", "--model_name_or_path llama --eval_data answers.json"),
    "distilled": ("train", "--query_encoder trained/best/encoder --train_data "
                           "reranked/set.train.neg.scored.json --distill_weight 1"),
    "distilled of a language model": (
        "train",
        "--query_encoder trained/best/encoder --train_data scored/answers.scored.lm.json "
        "--distill_weight 1",
    ),
    "distilled rank": ("rank", "--ranker ranker/best/ranker --train_data "
                               "reranked/set.train.neg.scored.json --distill_weight 1"),
    "merged": ("merge", "trained/best/encoder distilled/best/encoder"),
    "measured": ("retrieve", "--query_encoder merged/encoder --eval_data set --corpus set"),
}  # fmt: skip


def test_the_chain(tmp_path):
    tiny.save_bert(tmp_path / "bert", layers=1, width=16)
    tiny.save_llama(tmp_path / "llama")
    write_set(tmp_path / "set")
    with chdir(tmp_path):
        for name, (command, words) in CHAIN.items():
            if name == "scored":
                rows = tiny.read_lines(tmp_path / "mined/set.train.neg.json")
                tiny.write_lines(tmp_path / "answers.json", [
                    row | {"answers": ["w1"], "task": "qa"} for row in rows
                ])  # fmt: skip
            argv = [*words.split(), "--output_dir", name.replace(" ", "-")]
            argv += ["--save_name", "lm"] if command == "score" else []
            argv += LENGTHS if command in ("retrieve", "train", "rank") else []
            argv += STEPS if "train_data" in words else []
            main = MAINS["rank train" if command == "rank" else command]
            assert quietly(main, argv) == "exit 0", name
    mined, again = (tiny.read_lines(tmp_path / f"{n}/set.train.neg.json")
                    for n in ("mined", "mined-again"))  # fmt: skip
    assert all(row["pos"] and row["neg"] for row in mined)
    assert {s for row in again for s in row["neg_source"]} <= {"dense", "set.train.result"}
    assert all(len(row["neg"]) == len(row["neg_reranker_score"]) for row in again)


def test_queries_that_change_while_they_are_searched(tmp_path, monkeypatch):
    tiny.save_bert(tmp_path / "bert", layers=1, width=16)
    write_set(tmp_path / "set")
    rows = [{"query": "w1", "pos_index": [0]}, {"query": "w2", "pos_index": [1]}]
    tiny.write_lines(tmp_path / "rows.json", rows)
    search = run._search

    def meanwhile(*given):
        tiny.write_lines(tmp_path / "rows.json", rows[::-1])
        return search(*given)

    monkeypatch.setattr(run, "_search", meanwhile)
    words = "--query_encoder bert --eval_data rows.json --corpus set --metrics collate_neg"
    with (
        chdir(tmp_path),
        pytest.raises(InputError, match=r"rows\.json: was changed since"),
    ):
        quietly(MAINS["retrieve"], [*words.split(), *LENGTHS, "--output_dir", "out"])
    assert not (tmp_path / "rows.neg.json").exists()


def write_set(folder) -> None:
    """A BEIR folder of 12 passages, with 8 queries to train on and 4 to test."""
    rng = np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)
    tiny.write_lines(folder / "corpus.jsonl", [
        {"_id": f"d{i}", "title": f"w{i}", "text": tiny.text(rng)} for i in range(12)
    ])  # fmt: skip
    tiny.write_lines(folder / "queries.jsonl", [
        {"_id": f"q{i}", "text": tiny.text(rng, 1, 4)} for i in range(12)
    ])  # fmt: skip
    for split, queries in (("train", range(8)), ("test", range(8, 12))):
        lines = [f"q{i}\td{(5 * i) % 12}\t1" for i in queries]
        (folder / f"qrels/{split}.tsv").write_text("\n".join(["q\td\ts", *lines, ""]))
    shutil.rmtree(folder.parent / "cache", ignore_errors=True)
