"""The command line: what is parsed, what is refused, and in which words."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llme_jax.config import Config, DoctorConfig, RankConfig, RetrieveConfig, ScoreConfig, cli
from llme_jax.config.validate import (
    validate,
    validate_doctor,
    validate_ranking,
    validate_retrieval,
    validate_scoring,
)
from llme_jax.errors import InputError
from llme_jax.sources.resolve import resolve_path


def parse(line: str) -> Config:
    return cli.parse(line.split(), "train", "")


def test_flags_are_the_words_of_the_reference():
    config = parse(
        "--train_data a.json b.json --metrics mrr ndcg --add_instruction false --stable_distill "
        "--key_template {text} --max_steps 2000 --teacher_scores_margin 0.1"
    )
    assert config.data.train_data == ["a.json", "b.json"]
    assert config.evaluation.metrics == ["mrr", "ndcg"]
    assert config.data.add_instruction is False
    assert config.loss.stable_distill is True
    assert config.data.key_template == "{text}"
    assert config.training.max_steps == 2000
    assert config.data.teacher_scores_margin == 0.1
    assert config.training.learning_rate == Config().training.learning_rate


def test_flags_override_the_experiment():
    config = parse("--config qa.py --max_steps 7")
    assert config.training.max_steps == 7
    assert config.data.query_max_length == 32  # from qa.py
    assert config.data.train_data == ["llm-embedder:qa/nq/train.json"]
    assert parse("--config qa.py:runlocal").training.max_steps < 10


def test_a_config_is_found_as_given_then_in_configs(tmp_path, monkeypatch):
    mine = "from llme_jax.config import Config\ndef get_config(arg):\n    c = Config()\n"
    (tmp_path / "mine.py").write_text(mine + "    c.training.seed = 1\n    return c\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/qa.py").write_text(mine + "    c.training.seed = 2\n    return c\n")
    monkeypatch.chdir(tmp_path)
    assert parse(f"--config {tmp_path}/mine.py").training.seed == 1
    assert parse("--config mine.py").training.seed == 1
    assert parse("--config qa.py").training.seed == 2  # ./configs before the installed ones


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max_stepz 3", "unknown flag --max_stepz: did you mean --max_steps?"),
        ("--max_steps many", "--max_steps: invalid int value: 'many'"),
        (
            "--config qu.py",
            "--config qu.py: no such file here or in ./configs; did you mean qa.py?",
        ),
        ("--config qa.py:tiny", "--config ...:tiny: the only argument is runlocal"),
        ("--deepspeed x.json", "--deepspeed has no meaning here: use --fsdp N"),
        ("--fp16 false", "--fp16 has no meaning here: use --dtype bf16"),
        ("stray", "'stray' belongs to no flag"),
        ("--select_positive best", "--select_positive: invalid choice: 'best'"),
    ],
)
def test_mistakes_are_one_sentence(line, message):
    with pytest.raises(InputError) as error:
        parse(line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--metrics mrr map", "--metrics map: choose from mrr, recall, ndcg, nq"),
        ("--pooling_method max", "--pooling_method max: choose from cls, mean, last_token, dense"),
        ("--pooling_method cls mean", "give one of cls, mean and last_token"),
        ("--dtype fp16", "--dtype fp16: use bf16"),
        ("--train_group_size 0", "--train_group_size 0: give 1 or more"),
        (f"--seed {2**63}", f"--seed {2**63}: give {-(2**63)} to {2**63 - 1}"),
        ("--seed -99999999999999999999", "--seed -99999999999999999999: give "),
        ("--save_steps 0", "--save_steps 0: give 1 or more"),
        ("--cos_temperature 0", "--cos_temperature 0.0: give a value above 0"),
        ("--contrastive_weight 0 --distill_weight 0", "are both 0"),
        ("--stable_distill --distill_loss margin_mse", "give one of them"),
        ("--contrastive_directions doc_to_query", "doc_to_query: add query_to_doc"),
        (
            "--contrastive_directions query_to_doc doc_to_doc --partition_mode per_direction",
            "--partition_mode per_direction: doc_to_doc has no positive of its own; give joint",
        ),
        ("--hardness_strength 5", "--hardness_mode None, --hardness_strength 5.0: give both"),
        ("--matryoshka_dims 64 --matryoshka_weights 1 2", "--matryoshka_weights 1.0 2.0: give 1,"),
        ("--eval_data x.json", "--eval_data x.json needs --corpus"),
        ("--eval_data beir x.jsonl", "--eval_data x.jsonl needs --corpus"),
        (
            "--eval_data a b c --corpus d e",
            "--corpus d e: give one for each of the 3 sets of --eval_data, or one for all",
        ),
        ("--metric_for_best_model map@3", "choose from mrr@1, mrr@5,"),
        ("--cutoffs 0 10", "--cutoffs 0: ranks start at 1"),
        ("--max_steps 0 --num_train_epochs 0", "nothing to train"),
        ("--sub_batch_size 8 --sub_batch_tokens 4096", "give one of them"),
        (
            "--sub_batch_tokens 99 --query_max_length 32 --key_max_length 128",
            "--sub_batch_tokens 99: the longest text may have 128, as --query_max_length and ",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(line, message):
    with pytest.raises(InputError) as error:
        validate(parse(line))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give --train_data to train a ranker, or --eval_data to rerank"),
        ("--eval_data a.json --load_result r.json", "--load_result needs --corpus"),
        ("--eval_data a.json --retriever_weight 0.5", "retriever_weight 0.5: needs --load_result"),
        ("--train_data a.json --train_group_size 1", "--train_group_size 1: give 2 or more"),
        ("--eval_data a.json --output_dir gs://b/x", "give a local folder to rerank"),
        ("--train_data a.json --metrics mrr collate_score", "--metrics collate_score: nothing is"),
        ("--train_data a.json --ranker_method yes-no", "a language model only scores"),
        ("--train_data a.json --load_result r.json --corpus c.json", "is for reranking"),
        ("--train_data a.json --stable_distill --distill_loss ranknet", "give one of them"),
        ("--train_data a.json --contrastive_weight 0 --distill_weight 0", "are both 0"),
        ("--train_data a.json --metric_for_best_model recall@3", "choose from mrr@1, mrr@5,"),
        (
            "--train_data a.json --sub_batch_tokens 99 --query_max_length 64 --key_max_length 64",
            "--sub_batch_tokens 99: the longest pair may have 128",
        ),
        ("--eval_data a.json --query_encoder x", "unknown flag --query_encoder"),
        ("--config qa.py", "--config qa.py: is for python -m llme_jax.train"),
    ],
)
def test_settings_of_a_ranker_that_cannot_work_are_refused(line, message):
    with pytest.raises(InputError) as error:
        validate_ranking(cli.parse(line.split(), "rank", "", RankConfig))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_paths_relative_to_the_data_root():
    assert resolve_path("llm-embedder:qa/nq/train.json", "/d") == "/d/qa/nq/train.json"
    assert resolve_path("qa/train.json", "/d") == "qa/train.json"


def test_help_is_quick_grouped_and_says_what_each_flag_means():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "llme_jax.train", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    for group in ("data", "encoder", "loss", "evaluation", "training"):
        assert f"\n{group}:\n" in done.stdout
    for name in Config().flat():
        assert f"--{name}" in done.stdout
    # It takes about 2 seconds alone; the bound leaves room for a machine that is also busy.
    assert seconds < 10


COMMANDS = {
    "train": (validate, Config, "--train_data a.json"),
    "retrieve": (validate_retrieval, RetrieveConfig, "--eval_data a.json --corpus c.json"),
    "score": (validate_scoring, ScoreConfig, "--eval_data a.json"),
    "rank": (validate_ranking, RankConfig, "--eval_data a.json"),
    "doctor": (validate_doctor, DoctorConfig, "--train_data a.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_has_to_be_local_is_in_no_bucket(command, monkeypatch):
    check, settings, words = COMMANDS[command]
    check(cli.parse(words.split(), command, "", settings))
    flags = {"dataset_cache_dir", "model_cache_dir", "log_path", "json", "plot"}
    flags &= {*settings().flat()}
    for flag in flags:
        given = f"{words} --{flag} gs://b/x".split()
        with pytest.raises(InputError, match=f"^--{flag} gs://b/x: give a path of this machine"):
            check(cli.parse(given, command, "", settings))
    assert flags
    monkeypatch.setenv("LLME_JAX_CACHE", "gs://b/x")
    with pytest.raises(InputError, match=r"^LLME_JAX_CACHE gs://b/x: give a path of this machine"):
        check(cli.parse(words.split(), command, "", settings))


COLLECTING = """
import gc, os, signal, sys, time
from llme_jax.config import cli
def main(argv):
    def press(phase, info):
        gc.callbacks.remove(press)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    gc.callbacks.append(press)
    gc.collect()
    time.sleep(30)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
cli.run(main)
"""


def test_ctrl_c_is_not_lost_in_the_garbage_collector():
    done = subprocess.run([sys.executable, "-c", COLLECTING], capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (130, b"stopped by Ctrl-C\n")
