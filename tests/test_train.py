"""The command as a person uses it: runs, kills, continues, several processes, bad input."""

import json
import signal
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import finish, patient, start, start_together
from sentence_transformers import SentenceTransformer
from small_run import (
    EVALUATION,
    STEPS,
    arguments,
    assert_same_bits,
    assert_same_to_rounding,
    weights,
    write_data,
)

from llme_jax import train
from llme_jax.config import EncoderConfig
from llme_jax.data.instructions import find_instruction
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


KINDS = {
    "plain": [],
    "adapters": ["--lora_rank", "2"],
    "losses": "--matryoshka_dims 8 32 --contrastive_directions query_to_doc doc_to_doc "
    "--spread_weight 0.1 --hardness_mode all_negatives --hardness_strength 2 "
    "--distill_loss margin_mse --teacher_temperature 5 --teacher_encoder {data}/bert "
    "--embedding_weight 8".split(),
}
slow = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def of_kind(kind: str, data: Path, output_dir: Path, *more: str) -> list[str]:
    words = (word.format(data=data) for word in KINDS[kind])
    return arguments(data, output_dir, *words, *more)


@pytest.fixture(scope="module")
def undisturbed(data):
    """undisturbed(kind): the folder of a run of a kind that nothing happened to."""

    @cache
    def run(kind: str) -> Path:
        finish(start(of_kind(kind, data, data / kind)))
        return data / kind

    return run


@pytest.fixture(scope="module")
def uninterrupted(undisturbed):
    return undisturbed("plain")


def test_a_run_with_evaluation(data, tmp_path):
    out = tmp_path / "out"
    more = "--eval_on_start --save_total_limit 1 --report_to tensorboard".split()
    said = finish(start(arguments(data, out, *EVALUATION, *more)))

    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"loss_contrastive", "loss_distill", "grad_norm", "learning_rate"} <= steps[0].keys()
    assert steps[0]["learning_rate"] == 0
    rated = [line for line in steps if "queries_per_second" in line]
    assert rated and all(0 <= line["padding_fraction"] < 1 for line in rated)
    assert all(line["tokens_per_second"] > line["queries_per_second"] > 0 for line in rated)
    evaluations = [line for line in lines if "eval_ndcg@10" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]

    # The table, the curves, and the best and the newest checkpoint only.
    assert f"step 0  step {STEPS}" in said and f"encoder: {out}/checkpoint-{STEPS}/encoder" in said
    assert (out / "curves.png").stat().st_size > 10_000
    assert any(out.glob("events.out.tfevents.*"))
    best = max(evaluations[1:], key=lambda line: line["eval_ndcg@10"])["step"]
    assert (out / "best").resolve().name == f"checkpoint-{best}"
    kept = {path.name for path in out.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{STEPS}"}
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3 and record["global_batch"] == 8
    results = [json.loads(line) for line in (out / "test.result.json").open()]
    assert [r["query_id"] for r in results] == list(range(20))
    assert json.loads(out.with_suffix(".log").read_text().splitlines()[-1])["step"] == STEPS


def test_the_encoder_opens_in_sentence_transformers(data, uninterrupted):
    folder = uninterrupted / f"checkpoint-{STEPS}/encoder"
    theirs = SentenceTransformer(str(folder), device="cpu")
    encoder, params, tokenizer = load_dual_encoder(EncoderConfig(query_encoder=str(folder)))
    rng = np.random.default_rng(1)
    texts = [tiny.text(rng) for _ in range(20)]
    prompt = find_instruction("bge", "qa").query
    assert theirs.prompts["query"] == prompt
    ids = [tokenizer(prompt + text)["input_ids"] for text in texts]
    lengths = np.array([len(i) for i in ids], np.int32)
    padded = np.array([i + [0] * (lengths.max() - len(i)) for i in ids], np.int32)
    import jax

    ours = jax.jit(lambda p, *x: encoder.encode(p, *x, field="query"))(params, padded, lengths)
    want = theirs.encode(texts, prompt_name="query")
    np.testing.assert_allclose(np.asarray(ours), want, atol=1e-5)


@pytest.mark.parametrize("kind", slow)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights(
    data, undisturbed, tmp_path, kind
):
    """kill -9 while starting, between checkpoints, while one is written, and near the end."""
    out, uninterrupted = tmp_path / "out", undisturbed(kind)
    argv = of_kind(kind, data, out)

    def run_until(condition) -> None:
        process = start(argv)
        while not condition() and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()

    def logged(step):
        return lambda: any(line["step"] >= step for line in read_metrics(out / "metrics.jsonl"))

    run_until(lambda: (out / "run.json").exists())
    run_until(logged(3))
    run_until(lambda: any(out.glob("checkpoint-4/*")))  # the encoder or the state, half written
    run_until(logged(STEPS - 1))
    finish(start(argv))
    assert_same_bits(weights(out), weights(uninterrupted))
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))  # no step is missing or logged twice
    losses = [[r["loss"] for r in read_metrics(o / "metrics.jsonl")] for o in (out, uninterrupted)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_sigterm_and_ctrl_c_save_and_leave(data, uninterrupted, tmp_path, number):
    out = tmp_path / "out"
    argv = arguments(data, out, "--save_steps", "1000")
    # What a shell runs in the background ignores Ctrl-C, and hands that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(argv)
    signal.signal(signal.SIGINT, before)
    while not (out / "metrics.jsonl").exists() or not read_metrics(out / "metrics.jsonl"):
        time.sleep(0.005)
    process.send_signal(number)
    said = finish(process, code=128 + number)
    assert f"stopped by {number.name} and saved at step" in said
    finish(start(argv))
    assert_same_bits(weights(out), weights(uninterrupted))


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_ends(data, uninterrupted, tmp_path):
    """Nobody reads what it says any more; it must not wait for a checkpoint nobody finishes."""
    out = tmp_path / "out"
    argv = arguments(data, out)
    process = start(argv)
    while not (out / "checkpoint-2/state").exists():
        time.sleep(0.005)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    finish(start(argv))
    assert_same_bits(weights(out), weights(uninterrupted))


@pytest.mark.slow
def test_continued_on_other_devices_the_batch_is_kept(data, uninterrupted, tmp_path):
    out = tmp_path / "out"
    argv = arguments(data, out)
    finish(start([*argv, "--early_exit_steps", "4"]))
    said = finish(start([*argv, "--fsdp", "2", "--sub_batch_size", "3"], devices=4))
    assert "goes on with the batches of 8 queries that it was begun with, instead of 4" in said
    assert_same_to_rounding(weights(out), weights(uninterrupted))
    process = start(argv, devices=3)
    assert "batches of 8 queries, which 3 devices cannot share" in finish(process, code=2)


def test_an_encoder_of_several_tasks_has_the_prompts_of_each(data, tmp_path):
    rows = (data / "train.json").read_text()
    (data / "tool.json").write_text(rows.replace('"task": "qa"', '"task": "tool"'))
    files = "--train_data llm-embedder:train.json llm-embedder:tool.json".split()
    more = [*files, "--version", "llm-embedder", "--max_steps", "1"]
    finish(start(arguments(data, tmp_path / "out", *more)))
    model = SentenceTransformer(str(tmp_path / "out/checkpoint-1/encoder"), device="cpu")
    qa, tool = (find_instruction("llm-embedder", task) for task in ("qa", "tool"))
    assert model.prompts["query"] == model.prompts["qa-query"] == qa.query
    assert model.prompts["tool-query"] == tool.query
    assert model.prompts["tool-document"] == tool.key


@pytest.mark.parametrize("kind", ["plain", *slow[1:]])
@patient
def test_two_processes_with_four_devices_each(data, undisturbed, tmp_path, kind):
    argv = of_kind(kind, data, tmp_path / "out", *EVALUATION)
    uninterrupted = undisturbed(kind)
    processes = start_together(argv, processes=2, devices=4)
    for process in processes:
        finish(process)
    ours, want = (
        [(r["loss"], r["grad_norm"]) for r in read_metrics(o / "metrics.jsonl") if "loss" in r]
        for o in (tmp_path / "out", uninterrupted)
    )
    evaluated = [r["step"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if "loss" not in r]
    assert evaluated == [4, 8] and (tmp_path / "out/best").exists()
    np.testing.assert_allclose(ours[0], want[0], rtol=1e-6)  # same weights: rounding only
    np.testing.assert_allclose(ours, want, rtol=1e-4)
    assert_same_to_rounding(weights(tmp_path / "out"), weights(uninterrupted))


@pytest.mark.slow
@patient
def test_a_lost_host_ends_the_run_and_it_goes_on(data, uninterrupted, tmp_path):
    out = tmp_path / "out"
    argv = arguments(data, out)
    survivor, victim = start_together(argv, processes=2, devices=4)
    while not any(line["step"] >= 5 for line in read_metrics(out / "metrics.jsonl")):
        time.sleep(0.005)
        assert survivor.poll() is None, survivor.communicate()
    victim.kill()
    victim.communicate()
    said = finish(survivor, code=1)
    assert "error: process 0 lost another process of this run" in said
    assert "same command on all hosts" in said and "Traceback" not in said
    for process in start_together(argv, processes=2, devices=4):
        finish(process)
    assert_same_to_rounding(weights(out), weights(uninterrupted))


def test_the_best_checkpoint_is_found_again(data, tmp_path):
    """A run may be killed after it saved its best checkpoint and before it linked it."""
    out = tmp_path / "out"
    argv = arguments(data, out, *EVALUATION, "--save_total_limit", "1")
    finish(start([*argv, "--early_exit_steps", "4"]))
    (out / "best").unlink()
    log = out / "metrics.jsonl"
    lines = read_metrics(log)
    for line in lines:
        if "eval_ndcg@10" in line:
            line["eval_ndcg@10"] = 1.0  # no later one is better
    tiny.write_lines(log, lines)
    finish(start(argv))
    assert (out / "best").resolve().name == "checkpoint-4"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


def test_a_run_is_not_continued_on_other_data(data, tmp_path):
    """As many rows, but others."""
    (tmp_path / "data").mkdir()
    copy = tmp_path / "data/train.json"
    copy.write_text((data / "train.json").read_text())
    argv = arguments(data, tmp_path / "out", "--train_data", str(copy), "--early_exit_steps")
    train.main([*argv, "1"])
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join([*lines[1:], lines[0]]))
    message = f"{copy}: was changed since the run in {tmp_path}/out began: give another"
    with pytest.raises(InputError, match=message):
        train.main([*argv, "2"])


def test_negatives_of_a_device_need_as_many_devices(data, tmp_path):
    argv = arguments(data, tmp_path / "out", "--negative_cross_device", "false")
    finish(start([*argv, "--early_exit_steps", "1"], devices=2))
    said = finish(start(argv, devices=1), code=2)
    assert f"error: {tmp_path}/out was begun on 2 devices, and with" in said


def test_a_run_is_not_continued_with_other_settings(data, uninterrupted):
    argv = arguments(data, uninterrupted, "--learning_rate", "1e-4")
    with pytest.raises(InputError, match=r"holds a run with --learning_rate 0.001, now it is"):
        train.main(argv)
    with pytest.raises(InputError, match=r"a run with --matryoshka_dims None, now it is \[8\]"):
        train.main(arguments(data, uninterrupted, "--matryoshka_dims", "8"))
    tiny.save_bert(data / "wide", width=64)
    run_file = uninterrupted / "run.json"
    text = run_file.read_text()
    try:
        # As if the model's folder had been replaced by another under the same name.
        run_file.write_text(text.replace(str(data / "bert"), str(data / "wide")))
        with pytest.raises(InputError, match=r"holds another model: .* is \(\d+.*give another"):
            train.main(arguments(data, uninterrupted, "--query_encoder", str(data / "wide")))
    finally:
        run_file.write_text(text)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    out = tmp_path / "out"
    said = finish(start(arguments(data, out, "--learning_rate", "1e30")), code=1)
    assert "error: step 3: loss nan" in said or "error: step 2: loss nan" in said
    assert f"{data}/train.json:" in said and "lower --learning_rate" in said
    assert "Traceback" not in said
    assert {path.name for path in out.glob("checkpoint-*")} <= {"checkpoint-2"}


BAD_INPUT = {
    "missing file": (["--train_data", "nowhere.json"], "nowhere.json"),
    "glob without match": (["--train_data", "llm-embedder:no-*.json"], "no-*.json"),
    "missing corpus": (
        ["--eval_data", "llm-embedder:test.json", "--corpus", "none.json"],
        "--corpus none.json: there is no such file",
    ),
    "template": (
        "--eval_data llm-embedder:test.json --corpus llm-embedder:corpus.json "
        "--key_template {body}".split(),
        "corpus.json:1: has no field 'body'",
    ),
    "no answers for nq": (
        "--eval_data llm-embedder:test.json --corpus llm-embedder:corpus.json --metrics nq".split(),
        "test.json:1: has no answers, which nq needs",
    ),
    "filters": (
        ["--train_data", "llm-embedder:low.json", "--teacher_scores_min", "1"],
        "low.json: none of the 1 rows is left, dropped are 1 by teacher_scores_min",
    ),
    "malformed": (["--train_data", "llm-embedder:malformed.json"], "malformed.json:2"),
    "score count": (
        ["--train_data", "llm-embedder:scores.json"],
        "scores.json:1: teacher_scores has 1 values, pos + neg has 3",
    ),
    "too long": (["--key_max_length", "65"], "--key_max_length 65: the encoder has 64 positions"),
    "too wide": (
        "--matryoshka_dims 8 33".split(),
        "--matryoshka_dims 33: the encoder's vectors have 32 numbers, give 32 or less",
    ),
    "no such model": (["--query_encoder", "./nowhere"], "./nowhere: no such folder"),
    "nothing to train on": ([], "--train_data is missing: give the JSON-lines files"),
}


@pytest.mark.parametrize(("more", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_and_nothing_is_written(data, tmp_path, more, message):
    row = '{"query": "w1", "pos": ["w2"], "neg": ["w3", "w4"]'
    (data / "malformed.json").write_text(f"{row}}}\n{row}\n")
    (data / "low.json").write_text(f'{row}, "teacher_scores": [0.5, 0.2, 0.1]}}\n')
    (data / "scores.json").write_text(f'{row}, "teacher_scores": [1.0]}}\n')
    argv = arguments(data, tmp_path / "out", *more)
    if not more:
        at = argv.index("--train_data")
        del argv[at : at + 2]
    with pytest.raises(InputError) as error:
        train.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_exit_code_of_bad_input(data, tmp_path):
    said = finish(start(arguments(data, tmp_path / "out", "--metrics", "map")), code=2)
    assert said == "error: --metrics map: choose from mrr, recall, ndcg, nq\n"


def test_bad_rows_can_be_skipped(data, tmp_path):
    lines = (data / "train.json").read_text().splitlines()
    lines[3] = '{"query": "w1"'
    lines[5] = '{"pos": ["w1"], "neg": ["w2"]}'
    (data / "dirty.json").write_text("\n".join(lines))
    dirty = ["--train_data", "llm-embedder:dirty.json", "--max_steps", "1"]
    with pytest.raises(InputError, match=r"dirty.json:6"):
        train.main(arguments(data, tmp_path / "out", *dirty, "--max_bad_rows", "1"))
    out = tmp_path / "out"
    said = finish(start(arguments(data, out, *dirty, "--max_bad_rows", "2")))
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").open()]
    assert [row["line"] for row in bad] == [4, 6]
    assert "bad_rows.jsonl" in said
