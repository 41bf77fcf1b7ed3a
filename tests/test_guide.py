"""Every command of the fine-tuning guide, to the letter: only the launcher is replaced.

Further flags make model and data small; the files that a command writes are what the guide says.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from guide import COMMANDS, LAUNCHERS, launched, write_data_root
from tiny import read_lines

from llme_jax.config import cli
from llme_jax.training.metrics_log import read_metrics

# The guide's six single-task experiments, in its order.
EXPERIMENTS = ["qa", "icl", "lrlm", "chat", "tool", "convsearch"]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("llm-embedder"))


SMALL = "--query_max_length 24 --key_max_length 32 --dataset_cache_dir {root}/cache"
TRAINING = (
    f"{SMALL} --query_encoder {{root}}/bert --max_steps 2 --save_steps 2 --logging_steps 1 "
    "--per_device_train_batch_size 1 --train_group_size 4"
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiment_is_the_command(name):
    program, words = launched(COMMANDS[EXPERIMENTS.index(name)])
    assert program == "run_dense.py"
    said = cli.parse(words, "train", "")
    assert cli.parse(["--config", f"{name}.py"], "train", "").flat() == said.flat()


@pytest.mark.parametrize("words", COMMANDS, ids=[f"{i}" for i in range(len(COMMANDS))])
def test_the_command_runs(words, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, words = launched(words)
    more = f"--data_root {root} "
    if program == "run_dense.py":
        more += TRAINING.format(root=root)
    elif program == "evaluation.eval_retrieval":
        more += f"{SMALL} --query_encoder {{root}}/bert".format(root=root)
    else:
        more += f"--model_name_or_path {root}/llama"
    LAUNCHERS[program]([*words, *more.split()])
    if program == "run_dense.py":
        out = Path(value(words, "--output_dir"))
        lines = read_metrics(out / "metrics.jsonl")
        assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
        assert (out / "checkpoint-2/encoder/model.safetensors").is_file()
        if "--eval_data" in words:
            metric = {"nq": "answer_recall@5", "ndcg": "ndcg@10"}[value(words, "--metrics")]
            assert any(f"eval_{metric}" in line for line in lines)
    elif program == "evaluation.eval_retrieval":
        mined = read_lines(root / f"qa/nq/train.neg.{value(words, '--save_name')}.json")
        assert len(mined) == 20 and any(row["neg"] for row in mined)
        assert not any(set(row["neg"]) & set(row["pos"]) for row in mined)
    else:
        scored = read_lines(root / "qa/msmarco/train.scored.llama2-7b-chat.json")
        assert [len(row["teacher_scores"]) for row in scored] == [7] * 20


@pytest.mark.slow
def test_one_model_for_six_tasks(root, tmp_path):
    """scripts/llm-embedder.sh trains with every task's recipe and evaluates three by retrieval.

    What a language model makes of the others: test_docs.py.
    """
    more = f"{TRAINING} --max_steps 10".format(root=root)
    how = {"DATA_ROOT": str(root), "OUTPUT": "out/mine", "SKIP_LM": "1"}
    done = run_script("llm-embedder.sh", more, tmp_path, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    for task, metric in (("tool", "ndcg@5"), ("qrecc", "ndcg@3"), ("nq", "answer_recall@5")):
        (path,) = (tmp_path / "data/results" / task).glob("mine*/*.metrics.json")
        assert metric in path.read_text()


def run_script(name: str, flags: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    xla = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment |= {"XLA_FLAGS": xla, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", ROOT / "scripts" / name, *flags.split()],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_what_the_multi_task_script_cannot_do_is_refused(tmp_path):
    done = run_script("llm-embedder.sh", "--output_dir new", tmp_path)
    assert done.returncode == 2 and "--output_dir: set OUTPUT or DATA_ROOT" in done.stderr
    done = run_script("llm-embedder.sh", "", tmp_path, OUTPUT="gs://bucket/out")
    assert done.returncode == 2 and "OUTPUT=gs://bucket/out: give a local folder" in done.stderr


def test_the_multi_task_script_can_plan(root, tmp_path):
    more = f"{TRAINING} --plan".format(root=root)
    done = run_script("llm-embedder.sh", more, tmp_path, DATA_ROOT=str(root))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no limit is known here" in done.stdout and not any(tmp_path.iterdir())
