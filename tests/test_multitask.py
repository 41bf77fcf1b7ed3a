"""A run on files of several tasks: each has its recipe, every batch is of one of them."""

import time

import numpy as np
import pytest
import small_run
import tiny
from commands import finish, start
from safetensors.numpy import load_file

from llme_jax.training.metrics_log import read_metrics

SIZES = {"tool": 40, "chat": 24, "qa": 16}  # 5 + 3 + 2 batches of 8: an epoch of 10 steps
STEPS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tiny.save_bert(folder / "bert", dropout=0.1, layers=1)
    rng = np.random.default_rng(0)
    for task, size in SIZES.items():
        rows = []
        for _ in range(size):
            keys = [tiny.text(rng) for _ in range(6)]
            row = {"query": tiny.text(rng), "task": task}
            row |= {"history": keys} if task == "chat" else {"pos": keys[:1], "neg": keys[1:]}
            if task != "tool":
                row["teacher_scores"] = rng.normal(size=6).tolist()
            rows.append(row)
        tiny.write_lines(folder / f"{task}.json", rows)
    return folder


def arguments(root, out, *more: str) -> list[str]:
    words = (
        "--train_data llm-embedder:tool.json llm-embedder:chat.json llm-embedder:qa.json "
        "--version llm-embedder --use_train_config --inbatch_same_dataset epoch "
        f"--max_steps {STEPS} --save_steps 3"
    )
    return small_run.arguments(root, out, *words.split(), *more)


@pytest.fixture(scope="module")
def uninterrupted(root):
    out = root / "uninterrupted"
    said = finish(start(arguments(root, out)))
    assert "(tool), 40 rows, 50.0% of the batches" in said
    return out


def weights(out):
    return load_file(out / f"checkpoint-{STEPS}/encoder/model.safetensors")


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(root, uninterrupted, tmp_path):
    """Checkpoints are at steps 3, 6, ...: none is the end of an epoch."""
    out = tmp_path / "out"
    for moment in (5, 13):  # the middle of the first epoch, and of the second
        process = start(arguments(root, out))
        while not any(r["step"] >= moment for r in read_metrics(out / "metrics.jsonl")):
            time.sleep(0.005)
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    finish(start(arguments(root, out)))
    ours, want = weights(out), weights(uninterrupted)
    assert ours.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(o / "metrics.jsonl")]
        for o in (out, uninterrupted)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_loss_and_throughput_are_logged_by_task(root, uninterrupted):
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    for line in lines:
        (task,) = (task for task in SIZES if f"{task}/loss" in line)
        assert line[f"{task}/loss"] == line["loss"] and line[f"{task}/batches"] == 1
        if "queries_per_second" in line:
            assert line[f"{task}/queries_per_second"] == line["queries_per_second"]
            assert line[f"{task}/tokens_per_second"] > 0
        # tool is contrastive, chat is KL, qa is stable distillation: no recipe has both losses.
        assert "loss_contrastive" not in line
    epoch = lines[:10]
    for task, size in SIZES.items():
        assert sum(f"{task}/loss" in line for line in epoch) == size // 8
    assert (uninterrupted / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_one_step_of_several_batches_logs_each_under_its_task(root, uninterrupted, tmp_path):
    """Two batches a step: the first steps' batches, and so their tasks, are the same."""
    more = "--gradient_accumulation_steps 2 --max_steps 4 --logging_steps 4 --save_steps 4"
    finish(start(arguments(root, tmp_path / "out", *more.split())))
    (line,) = read_metrics(tmp_path / "out/metrics.jsonl")
    plain = read_metrics(uninterrupted / "metrics.jsonl")[:8]
    batches = {task: sum(f"{task}/loss" in r for r in plain) for task in SIZES}
    assert {task: line.get(f"{task}/batches", 0) for task in SIZES} == batches
    weighted = sum(line[f"{task}/loss"] * n for task, n in batches.items() if n) / 8
    assert weighted == pytest.approx(line["loss"], rel=1e-6)
