"""What an earlier run left changes nothing: every setting, and every file that is read, is changed
behind a run with its cache and its results, and gives what it gives where nothing was before."""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny
from campaign import MAINS, command_line, lay_out, quietly
from samples import near

from llme_jax import evaluate
from llme_jax.config import Config, RankConfig, RetrieveConfig, ScoreConfig
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.setting import kind_of
from llme_jax.errors import InputError, RunError

LM = ["--model_name_or_path", "llama", "--context_max_length", "48", "--lm_batch_size", "4"]
FOUND = ["--query_encoder", "bert", "--query_max_length", "16", "--key_max_length", "24",
         "--dataset_cache_dir", "cache", "--log_path", "out/log", "--output_dir", "out",
         "--eval_data", "test.json", "--corpus", "corpus.json", "--key_template",
         "{text}"]  # fmt: skip
# A command, its settings, and what it is given: enough for every setting to matter somewhere.
RUNS = {
    "retrieve": (RetrieveConfig, [*command_line("retrieve"), "--save_encode", "--save_trec"]),
    "retrieve bm25": (
        RetrieveConfig, [*command_line("retrieve"), "--retrieval_method", "bm25"],
    ),
    "rank": (RankConfig, command_line("rank")),
    "rank found": (
        RankConfig,
        [*command_line("rank"), "--load_result", "found.json", "--corpus", "corpus.json"],
    ),
    "score": (ScoreConfig, command_line("score")),
    "evaluate popqa": (
        EvaluateConfig,
        [*FOUND, *LM, "--task", "popqa", "--few_shot", "1", "--max_new_tokens", "3",
         "--metrics", "mrr", "--hits", "5"],
    ),
    "evaluate tool": (EvaluateConfig, [*FOUND, "--task", "tool", "--hits", "5"]),
    "evaluate msc": (
        EvaluateConfig,
        [*LM, "--task", "msc", "--eval_data", "chat.json", "--query_encoder", "bert",
         "--output_dir", "out", "--log_path", "out/log", "--dataset_cache_dir", "cache",
         "--query_max_length", "16", "--key_max_length", "24"],
    ),
    "train": (Config, [*command_line("train+eval"), "--output_dir", "{out}"]),
    "rank train": (RankConfig, [*command_line("rank train"), "--output_dir", "{out}"]),
}  # fmt: skip
DAILY = ("retrieve", "score", "evaluate popqa")  # the others take ten minutes more
# Settings with which everything is done in another place, or nothing is.
ELSEWHERE = {"output_dir", "dataset_cache_dir", "model_cache_dir", "data_root", "log_path", "plan",
             "coordinator_address", "num_processes", "process_id", "compare", "push_to_hub",
             "load_encode", "load_index", "load_score", "topology", "device_memory"}  # fmt: skip
# Those that change numbers by rounding alone; what is there is taken for what they would give.
ROUNDING = {"batch_size", "lm_batch_size", "tensor", "fsdp"}
# Another value, where none can be guessed.
OTHER = {
    "eval_data": "test2.json", "corpus": "corpus2.json", "train_data": "train2.json",
    "train_corpus": "corpus2.json", "train_queries": "test2.json", "key_template": "{title}",
    "query_encoder": "other", "key_encoder": "other", "ranker": "other", "teacher_encoder": "other",
    "model_name_or_path": "llama2", "query_instruction": "w3", "key_instruction": "w4",
    "version": "e5", "query_max_length": "3", "key_max_length": "5", "truncation_side": "left",
    "truncate_dim": "4", "pooling_method": "mean", "attention": "plain", "dtype": "bf16",
    "lm_dtype": "bf16", "context_max_length": "40", "lm_batch_size": "2", "save_name": "name",
    "embedding_name": "vectors", "faiss_index_factory": "HNSW8", "hits": "3", "cutoffs": "2",
    "load_result": "found2.json", "fuse": "found.json", "rerank_result": "found.json",
    "task_names": "rte", "task": "qa", "language": "de", "rerank_depth": "2", "max_neg_num": "2",
    "range_min": "1", "range_max": "3", "metrics": "ndcg", "matryoshka_dims": "8",
    "matryoshka_weights": "2", "lora_target": "query", "lora_rank": "2", "max_steps": "1",
    "early_exit_steps": "1", "metric_for_best_model": "mrr@1", "report_to": "tensorboard",
    "contrastive_directions": "query_to_doc doc_to_query", "yes_no_instruction": "w5",
    "retriever_weight": "0.5", "per_device_train_batch_size": "1", "fsdp": "2", "tensor": "2",
    "sub_batch_tokens": "64", "sub_batch_size": "1",
}  # fmt: skip
# Files that are changed, each to one of the same size and time.
INPUTS = ("test.json", "corpus.json", "train.json", "chat.json", "found.json", "bert/vocab.txt",
          "bert/model.safetensors", "llama/model.safetensors",
          "llama/generation_config.json")  # fmt: skip


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory, compiled_once):
    folder = tmp_path_factory.mktemp("warm") / "inputs"
    folder.mkdir()
    lay_out(folder)
    tiny.save_llama(folder / "llama2", seed=1)
    rows = tiny.read_lines(folder / "test.json")
    for i, row in enumerate(rows):
        row |= {"prop_id": i % 2, "obj": "w1", "possible_answers": '["w1"]'}
    tiny.write_lines(folder / "test.json", rows)
    for name in ("test", "train", "corpus"):
        lines = tiny.read_lines(folder / f"{name}.json")
        tiny.write_lines(folder / f"{name}2.json", lines[::-1])
    rng = np.random.default_rng(0)
    chat = [{"query": tiny.text(rng), "answers": [tiny.text(rng)],
             "history": [tiny.text(rng) for _ in range(3)]} for _ in range(3)]  # fmt: skip
    tiny.write_lines(folder / "chat.json", chat)
    for name, first in (("found", 0), ("found2", 6)):
        found = [{"query_id": i, "pred": [*range(first, first + 5)], "score": [5, 4, 3, 2, 1]}
                 for i in range(4)]  # fmt: skip
        tiny.write_lines(folder / f"{name}.json", found)
    return folder


def run(folder: Path, name: str, words: list[str], out: str) -> tuple[str | int, dict[str, bytes]]:
    """How a command ended in a folder, and what it has left that people read."""
    main = MAINS.get(name) or {"evaluate": evaluate.main, "retrieve": MAINS["retrieve"],
                               "rank": MAINS["rank"]}[name.split()[0]]  # fmt: skip
    with chdir(folder):
        try:
            ended = quietly(main, [out if word == "{out}" else word for word in words])
        except (InputError, RunError) as error:
            ended = str(error)
    left = {}
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        result = re.search(r"\.(result|neg|scored|metrics|output)\S*\.json$|trec$|tensors$", place)
        kept = "cache/" in place or ".parts/" in place or "embeddings/" in place
        if path.is_file() and result and not kept:
            left[place] = path.read_bytes()
    return ended, left


def other_value(f, declared) -> list[str]:
    """Words behind the flag."""
    if f.name in OTHER:
        return OTHER[f.name].split()
    kind = kind_of(f.type)
    options = [o for o in (*kind.literals, *declared.choices) if o != f.default]
    if options:
        return options[:1]
    if kind.base is bool:
        return [str(not f.default).lower()]
    if kind.base in (int, float):
        return ["2" if kind.base is int else "0.3"]
    raise AssertionError(f"give --{f.name} another value in OTHER, or say why it has none")


def settings_of(name: str) -> list[tuple[str, list[str]]]:
    found = {}
    for group in RUNS[name][0]().groups():
        for f in fields(group):
            idle = name in ("rank", "rank found") and f.metadata["setting"].decides == ("weights",)
            if f.name not in ELSEWHERE and not idle:
                found[f.name] = other_value(f, f.metadata["setting"])
    return [*found.items()]


def warm_is_fresh(laid_out, tmp_path, name, change, *, exact=True) -> Sequence[str]:
    """What is wrong: how both ended, or the files that differ.

    Args:
        change: gets a folder; the words that it adds to the command.
    """
    words = RUNS[name][1]
    warm = tmp_path / "warm"
    if not warm.exists():
        shutil.copytree(laid_out, warm)
        ended, _ = run(warm, name, words, "out")
        assert ended == "exit 0", ended
    ended = []
    for kind, start in (("again", warm), ("fresh", laid_out)):
        folder = shutil.copytree(start, tmp_path / kind, symlinks=True)
        more = change(folder)
        out = "out2" if "train" in name else "out"
        ended.append(run(folder, name, [*words, *more], out))
        shutil.rmtree(folder)
    (warm_end, warm_left), (fresh_end, fresh_left) = ended
    if warm_end != fresh_end:
        return warm_end, fresh_end
    wrong = [
        path for path, content in fresh_left.items()
        if warm_left.get(path) != content and (exact or not near(warm_left.get(path), content))
    ]  # fmt: skip
    return sorted(wrong)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in DAILY else pytest.mark.large)
    for name in RUNS
])  # fmt: skip
def test_every_setting(laid_out, tmp_path, name):
    found = {}
    for flag, value in settings_of(name):
        words = [f"--{flag}", *value]
        change, exact = lambda _, words=words: words, flag not in ROUNDING
        if wrong := warm_is_fresh(laid_out, tmp_path, name, change, exact=exact):
            found[flag] = wrong
    assert not found


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in DAILY else pytest.mark.large)
    for name in RUNS
])  # fmt: skip
def test_every_input(laid_out, tmp_path, name):
    found = {}
    for place in INPUTS:

        def change(folder, place=place):
            path = folder / place
            stat, content = path.stat(), path.read_bytes()
            path.write_bytes(changed(place, content))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert path.stat().st_size == stat.st_size
            return []

        if wrong := warm_is_fresh(laid_out, tmp_path, name, change):
            found[place] = wrong
    assert not found


def changed(place: str, content: bytes) -> bytes:
    """Another content of the same size."""
    if place.endswith(".safetensors"):
        return content[:-64] + content[-128:-64]
    if place.endswith("vocab.txt"):
        return content.replace(b"w10\nw11\n", b"w11\nw10\n")
    if place.endswith("generation_config.json"):
        return content.replace(b'"eos_token_id": 2', b'"eos_token_id": 7')
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[1:], lines[0]]) if b"query_id" not in lines[0] else content.replace(
        b'w1', b'w2')  # fmt: skip
