"""Training a reranker through the command: kills, continues, devices, processes, bad input."""

import json
import signal
import time
from functools import partial

import numpy as np
import pytest
from commands import finish, flags, patient, start, start_together
from safetensors.numpy import load_file
from small_run import STEPS, arguments, assert_same_bits, write_data
from tiny import read_lines, write_lines

from llme_jax import rank
from llme_jax.config import RankConfig, cli
from llme_jax.errors import InputError
from llme_jax.training.metrics_log import read_metrics

begin = partial(start, command="rank")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def command(data, out, *more: str) -> list[str]:
    words = arguments(data, out, *more)
    words[words.index("--query_encoder")] = "--ranker"
    return words


def weights(out, step: int = STEPS) -> dict[str, np.ndarray]:
    return load_file(out / f"checkpoint-{step}/ranker/model.safetensors")


def assert_same_to_rounding(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith(("self.key.bias", "classifier.bias")):  # no loss depends on them
            np.testing.assert_allclose(a[name], b[name], atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(data):
    out = data / "uninterrupted"
    said = finish(begin(command(data, out)))
    assert "has no bert.pooler.dense and no classifier, which starts from random" in said
    assert f"ranker:  {out}/checkpoint-{STEPS}/ranker" in said
    return out


def test_a_run_with_evaluation(data, tmp_path):
    """What is measured is what the command measures with the checkpoint; the best one is kept."""
    out, path = tmp_path / "out", tmp_path / "eval.json"
    rows = read_lines(data / "train.json")[:12]
    write_lines(path, rows)
    measuring = ["--eval_data", str(path), "--cutoffs", "1", "3", "--metrics", "mrr", "recall"]
    more = ["--eval_steps", "4", "--eval_on_start", "--metric_for_best_model", "mrr@3"]
    said = finish(begin(command(data, out, *measuring, *more)))
    lines = read_metrics(out / "metrics.jsonl")
    found = {line["step"]: line for line in lines if "eval_mrr@3" in line}
    assert [*found] == [0, 4, 8] and f"step 0  step {STEPS}" in said
    assert all({"loss_contrastive", "loss_distill"} <= line.keys() for line in lines[1:3])
    best = max((4, 8), key=lambda step: found[step]["eval_mrr@3"])
    assert (out / "best").resolve().name == f"checkpoint-{best}"
    ranker = ["--ranker", str(out / "checkpoint-8/ranker")]
    lengths = ["--query_max_length", "24", "--key_max_length", "32"]
    rank.main([*measuring, *ranker, *lengths, "--output_dir", str(tmp_path / "again"),
               "--log_path", str(tmp_path / "log")])  # fmt: skip
    metrics = json.loads((tmp_path / "again/eval.metrics.json").read_text())
    assert metrics == {n.removeprefix("eval_"): found[8][n] for n in found[8] if n != "step"}
    same = [(out / "eval.result.json"), tmp_path / "again/eval.result.json"]
    preds = [[row["pred"] for row in read_lines(p)] for p in same]
    assert preds[0] == preds[1]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights(
    data, uninterrupted, tmp_path
):
    """kill -9 while starting, while a checkpoint is written, near the end; SIGTERM between."""
    out = tmp_path / "out"
    argv = command(data, out)

    def run_until(condition, how=signal.SIGKILL) -> None:
        process = begin(argv)
        while not condition() and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.send_signal(how)
        process.communicate()

    def logged(step):
        return lambda: any(line["step"] >= step for line in read_metrics(out / "metrics.jsonl"))

    run_until(lambda: (out / "run.json").exists())
    run_until(logged(1), signal.SIGTERM)
    run_until(lambda: any(out.glob("checkpoint-4/*")))
    run_until(logged(STEPS - 1))
    finish(begin(argv))
    assert_same_bits(weights(out), weights(uninterrupted))
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [*range(1, STEPS + 1)]


def test_twin_runs_are_the_same(data, uninterrupted, tmp_path):
    for process in [begin(command(data, tmp_path / name)) for name in ("a", "b")]:
        finish(process)
    for name in ("a", "b"):
        assert_same_bits(weights(tmp_path / name), weights(uninterrupted))


@pytest.mark.parametrize(
    ("devices", "batch", "more"),
    [
        (1, 8, []),
        (2, 4, ["--gradient_checkpointing"]),
        (8, 1, ["--fsdp", "4", "--sub_batch_size", "2"]),
    ],
)
def test_devices_change_nothing(data, uninterrupted, tmp_path, devices, batch, more):
    more = ["--per_device_train_batch_size", str(batch), *more]
    finish(begin(command(data, tmp_path / "out", *more), devices=devices))
    assert_same_to_rounding(weights(tmp_path / "out"), weights(uninterrupted))


@pytest.mark.slow
@patient
def test_two_processes_of_four_devices(data, uninterrupted, tmp_path):
    out, path = tmp_path / "out", tmp_path / "eval.json"
    write_lines(path, read_lines(data / "train.json")[:7])
    more = ["--eval_data", str(path), "--eval_steps", "8", "--metrics", "mrr"]
    for process in start_together(command(data, out, *more), 2, devices=4, command="rank"):
        finish(process)
    assert_same_to_rounding(weights(out), weights(uninterrupted))
    assert any("eval_mrr@1" in line for line in read_metrics(out / "metrics.jsonl"))


def test_what_it_takes_is_said(data, tmp_path, capsys):
    assert rank.main(command(data, tmp_path / "out", "--plan")) == 0
    said = capsys.readouterr().out
    assert "tokens of pairs in 32x" in said and "GiB of a device" in said
    assert not (tmp_path / "out").exists()


def test_other_settings_do_not_continue_a_run(data, uninterrupted):
    with pytest.raises(InputError, match="holds a run with --distill_loss kl, now it is ranknet"):
        rank.main(command(data, uninterrupted, "--distill_loss", "ranknet"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "w1", "pos": ["w2"], "neg": ["w3"], "teacher_scores": [1.0]}, "has 1 values"),
        ({"query": "w1", "pos": "w2", "neg": ["w3"]}, 'pos is "w2": give a list of strings'),
        ({"query": "w1"}, "no candidates: every row needs pos and neg, or history"),
    ],
)
def test_bad_rows_are_one_sentence(data, tmp_path, row, message):
    path = write_lines(tmp_path / "bad.json", [*read_lines(data / "train.json")[:3], row])
    with pytest.raises(InputError, match=f"bad.json:4: .*{message}"):
        rank.main(command(data, tmp_path / "out", "--train_data", str(path)))
    assert not (tmp_path / "out/run.json").exists()


def test_the_published_recipe(data, tmp_path, capsys):
    """The experiment is the command; shrunk, it trains and evaluates."""
    folder = "llm-embedder:qa/nq"
    words = {
        "ranker": "microsoft/deberta-v3-large",
        "train_data": f"{folder}/train.neg.bge.json",
        "eval_data": f"{folder}/test.key.bge.json",
        "key_max_length": 128,
        "query_max_length": 32,
        "learning_rate": 5e-6,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 8,
        "metrics": "nq",
        "metric_for_best_model": "answer_recall@10",
        "save_steps": 920,
        "save_total_limit": 2,
        "output_dir": "data/outputs/nq/ranker",
    }
    said = cli.parse(flags(words), "rank", "", RankConfig)
    assert cli.parse(["--config", "ranker.py"], "rank", "", RankConfig) == said

    rows = read_lines(data / "train.json")
    (tmp_path / "qa/nq").mkdir(parents=True)
    write_lines(tmp_path / "qa/nq/train.neg.bge.json", rows)
    ranked = [{"query": r["query"], "key": r["neg"], "answers": [r["neg"][0][:2]]} for r in rows]
    write_lines(tmp_path / "qa/nq/test.key.bge.json", ranked[:10])
    small = {
        "config": "ranker.py:runlocal",
        "data_root": tmp_path,
        "dataset_cache_dir": tmp_path / "cache",
        "ranker": data / "bert",
        "key_max_length": 32,
        "query_max_length": 24,
        "output_dir": tmp_path / "out",
        "log_path": tmp_path / "log",
    }
    assert rank.main(flags(small)) == 0
    assert any("eval_answer_recall@10" in r for r in read_metrics(tmp_path / "out/metrics.jsonl"))
    assert f"{tmp_path}/out/checkpoint-4/ranker" in capsys.readouterr().out


def test_pairs_longer_than_the_model_reads_are_refused(data, tmp_path):
    longer = ["--key_max_length", "100"]
    with pytest.raises(InputError, match=r"124 tokens together: .* has 64 positions, give 64"):
        rank.main(command(data, tmp_path / "out", *longer))


@pytest.mark.slow
def test_accumulation_and_pairwise_losses_train(data, tmp_path):
    rows = [row for row in read_lines(data / "train.json") if "teacher_scores" in row]
    path = write_lines(tmp_path / "scored.json", rows)
    how = ["--train_data", str(path), "--distill_loss", "lambdaloss", "--max_steps", "4"]
    for i, more in enumerate((["--gradient_accumulation_steps", "2"], [])):
        out = tmp_path / str(i)
        finish(begin(command(data, out, *how, *more), devices=4))
        losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
        assert len(losses) == 4 and np.isfinite(losses).all()
