"""Settings refuse what they cannot be, from flags and from experiment files."""

import math
from dataclasses import fields

import pytest

from llme_jax.config import (
    Config,
    DoctorConfig,
    LossConfig,
    MergingConfig,
    PipelineConfig,
    RankConfig,
    ReportingConfig,
    RetrieveConfig,
    ScoreConfig,
    TrainConfig,
    cli,
)
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.setting import Setting, kind_of
from llme_jax.config.validate import validate_doctor
from llme_jax.errors import InputError

COMMANDS = {
    "train": Config,
    "retrieve": RetrieveConfig,
    "score": ScoreConfig,
    "rank": RankConfig,
    "doctor": DoctorConfig,
    "pipeline": PipelineConfig,
    "report": ReportingConfig,
    "merge": MergingConfig,
    "evaluate": EvaluateConfig,
}
# Every numeric flag of all commands, written down a second time: its type, and whether it may be
# -1, 0 and 1e30 (as a number: a whole number is not written so); last a value that it may have.
NUMBERS = {
    "adam_beta1": (float, False, True, False, "0.5"),
    "adam_beta2": (float, False, True, False, "0.98"),
    "adam_epsilon": (float, False, False, True, "1e-6"),
    "anchor_length": (int, False, False, False, "8000"),
    "b": (float, False, True, False, "1"),
    "batch_size": (int, False, False, False, "64"),
    "chunk_size": (int, False, False, False, "64"),
    "context_max_length": (int, False, False, False, "2"),
    "context_window_size": (int, False, False, False, "512"),
    "contrastive_weight": (float, False, True, True, "0.3"),
    "cos_temperature": (float, False, False, True, "0.02"),
    "cutoffs": (int, False, False, False, "3"),
    "device_memory": (float, False, False, True, "15.75"),
    "distill_weight": (float, False, True, True, "0.5"),
    "early_exit_steps": (int, False, False, False, "1"),
    "embedding_weight": (float, False, True, True, "100"),
    "eval_steps": (int, False, False, False, "10"),
    "false_negative_margin": (float, True, True, True, "0.1"),
    "few_shot": (int, False, True, False, "5"),
    "fsdp": (int, False, False, False, "8"),
    "gradient_accumulation_steps": (int, False, False, False, "2"),
    "hardness_strength": (float, False, True, True, "5"),
    "hits": (int, False, False, False, "1"),
    "iterations": (int, False, False, False, "4"),
    "k1": (float, False, True, True, "0.9"),
    "key_max_length": (int, False, False, False, "128"),
    "key_num": (int, False, False, False, "3"),
    "lora_alpha": (float, False, False, True, "32"),
    "lora_rank": (int, False, False, False, "8"),
    "learning_rate": (float, False, False, True, "1e-5"),
    "logging_steps": (int, False, False, False, "1"),
    "margin": (float, False, True, True, "0.1"),
    "matryoshka_dims": (int, False, False, False, "64"),
    "matryoshka_weights": (float, False, False, True, "0.5"),
    "max_bad_rows": (int, False, True, False, "3"),
    "max_grad_norm": (float, False, True, True, "1"),
    "max_neg_num": (int, False, False, False, "15"),
    "max_new_tokens": (int, False, False, False, "16"),
    "max_sample_num": (int, False, False, False, "100"),
    "max_score": (float, True, True, True, "0.9"),
    "max_steps": (int, True, True, False, "2000"),
    "num_processes": (int, False, False, False, "2"),
    "num_train_epochs": (float, False, True, True, "0.5"),
    "per_device_train_batch_size": (int, False, False, False, "4"),
    "process_id": (int, False, True, False, "1"),
    "query_max_length": (int, False, False, False, "32"),
    "range_max": (int, False, True, False, "100"),
    "range_min": (int, False, True, False, "10"),
    "relative_margin": (float, False, True, True, "0.05"),
    "rerank_depth": (int, False, False, False, "20"),
    "rerank_margin": (float, False, True, True, "0.5"),
    "rerank_max_score": (float, True, True, True, "-1.5"),
    "retriever_weight": (float, False, True, False, "0.2"),
    "save_steps": (int, False, False, False, "50"),
    "save_total_limit": (int, False, False, False, "2"),
    "seed": (int, True, True, False, "-5"),
    "spread_weight": (float, False, True, True, "0.1"),
    "student_temperature": (float, False, False, True, "1"),
    "sub_batch_size": (int, False, False, False, "8"),
    "sub_batch_tokens": (int, False, False, False, "1024"),
    "target_length": (int, False, False, False, "256"),
    "teacher_scores_margin": (float, False, True, True, "0.1"),
    "teacher_scores_min": (float, True, True, True, "-2.5"),
    "teacher_temperature": (float, False, False, True, "0.1"),
    "temperature": (float, False, False, True, "0.7"),
    "tensor": (int, False, False, False, "4"),
    "threads": (int, False, False, False, "4"),
    "top_p": (float, False, False, False, "0.9"),
    "train_group_size": (int, False, False, False, "8"),
    "truncate_dim": (int, False, False, False, "64"),
    "warmup_ratio": (float, False, True, False, "1"),
    "weight_decay": (float, False, True, True, "0.01"),
    "weights": (float, True, True, True, "0.5"),
}
TRIED = ("-1", "0", "1e30")


def numeric(settings) -> set[str]:
    return {f.name for _, f, _ in settings().declared() if kind_of(f.type).base in (int, float)}


def test_the_table_has_every_number_of_every_command():
    assert set().union(*map(numeric, COMMANDS.values())) == {*NUMBERS}


FLAGS = [
    (command, name) for command, config in COMMANDS.items() for name in sorted(numeric(config))
]


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_numbers(command, name):
    kind, *allowed, right = NUMBERS[name]
    settings = COMMANDS[command]

    def parse(value: str):
        found = cli.parse([f"--{name}={value}"], command, "", settings).flat()[name]
        if isinstance(found, list):
            (found,) = found
        return found

    def refused(value: str) -> str:
        with pytest.raises(InputError, match=f"^--{name}\\b") as error:
            parse(value)
        assert "\n" not in str(error.value)
        return str(error.value)

    for value in ("nan", "inf", "-inf"):
        said = refused(value)
        assert ("give a finite number" if kind is float else "invalid int value") in said
    for value, right_too in zip(TRIED, allowed, strict=True):
        if right_too:
            found = parse(value)
            assert found == kind(value), value
        else:
            refused(value)
    found = parse(right)
    assert found == kind(right)
    if kind is float:  # what float32 does not hold
        assert "give a finite number" in refused("1e39")
    else:
        refused(str(2**63))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rate nan", "--learning_rate nan: give a finite number, a value above 0"),
        ("--learning_rate 1e-50", "--learning_rate 1e-50: give a value above 0"),  # 0 in float32
        ("--adam_beta1 1.5", "--adam_beta1 1.5: give 0 or more, less than 1"),
        ("--adam_beta2 0.99999999999", "--adam_beta2 0.99999999999: give 0 or more, less than 1"),
        ("--warmup_ratio 2", "--warmup_ratio 2.0: give 0 to 1"),
        ("--weight_decay -1", "--weight_decay -1.0: give 0 or more"),
        ("--device_memory -3", "--device_memory -3.0: give a value above 0"),
        ("--teacher_scores_min inf", "--teacher_scores_min inf: give a finite number"),
        (f"--save_steps {2**31}", f"--save_steps {2**31}: give {2**31 - 1} or less"),
        ("--stable_distill maybe", "--stable_distill: 'maybe' is neither true nor false"),
    ],
)
def test_the_remedy_is_the_range(line, message):
    with pytest.raises(InputError) as error:
        cli.parse(line.split(), "train", "")
    assert str(error.value) == message


def test_every_setting_says_what_it_is():
    for settings in COMMANDS.values():
        for _, f, declared in settings().declared():
            assert isinstance(declared, Setting)
            assert declared.help[0].isupper() and declared.help.endswith((".", "]."))
            assert "?" not in declared.help, f.name


def test_a_group_keeps_no_wrong_value():
    config = Config()
    for name, value in {
        "max_steps": 2.5,
        "learning_rate": "1e-5",
        "learning_rat": 1e-5,
        "gradient_checkpointing": 1,
        "warmup_ratio": math.nan,
        "lr_scheduler_type": "cosin",
        "save_steps": None,
    }.items():
        before = config.flat()
        with pytest.raises(InputError):
            setattr(config.training, name, value)
        assert config.flat() == before
    config.training.learning_rate = 1  # a whole number is a number
    with pytest.raises(InputError, match="--cos_temperature 0"):
        LossConfig(cos_temperature=0)
    with pytest.raises(InputError, match="training is 3: give a TrainConfig"):
        config.training = 3


def experiment(tmp_path, lines: str) -> str:
    path = tmp_path / "mine.py"
    head = "from llme_jax.config import Config\n\n\ndef get_config(arg):\n    c = Config()\n"
    path.write_text(f"{head}    {lines}\n    return c\n")
    return str(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "c.training.max_step = 5",
            "6: the group training has no max_step: did you mean max_steps?",
        ),
        ("c.trainin = None", "6: Config has no trainin: did you mean training?"),
        (
            "c.trainin.max_steps = 5",
            "6: AttributeError: 'Config' object has no attribute 'trainin', did you mean training?",
        ),
        (
            "c.data.select_positive = 'best'",
            "6: --select_positive best: choose from first, random, teacher, teacher-pos",
        ),
        ("c.evaluation.metrics = ['map']", "6: --metrics map: choose from mrr, recall, ndcg, nq"),
        ("c.evaluation.metrics = 'nq'", "6: --metrics 'nq': give a list, as in ['nq']"),
        ("c.training.max_steps = '5'", "6: --max_steps 5: give a whole number"),
        ("c.loss.cos_temperature = 0.0", "6: --cos_temperature 0.0: give a value above 0"),
        ("1 / 0", "6: ZeroDivisionError: division by zero: correct the experiment file"),
        ("import nothing", "6: ModuleNotFoundError: No module named 'nothing': correct the"),
        ("c = (", "6: SyntaxError: '(' was never closed"),
    ],
)
def test_an_experiment_file_is_refused_with_its_line(tmp_path, lines, message):
    path = experiment(tmp_path, lines)
    with pytest.raises(InputError) as error:
        cli.parse(["--config", path], "train", "")
    assert str(error.value).startswith(f"{path}:{message}") and "\n" not in str(error.value)


def test_what_an_experiment_does_not_give_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    for text, message in (
        ("x = 1\n", "has no get_config(arg), write one that returns a Config"),
        (
            "get_config = print\n",
            "get_config has to return a Config, RankConfig or PipelineConfig of llme_jax.config",
        ),
    ):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            cli.parse(["--config", str(path)], "train", "")
        assert str(error.value) == f"{path}: {message}"


def test_a_command_takes_over_what_an_experiment_sets(tmp_path):
    lines = (
        "c.data.key_max_length = 99; c.data.data_root = '/d'; c.data.eval_data = 'test.json'; "
        "c.encoder.model_cache_dir = '/m'; c.training.fsdp = 4; c.training.seed = 7; "
        "c.evaluation.metrics = ['nq']; c.evaluation.save_name = 'mine'"
    )
    argv = ["--config", experiment(tmp_path, lines)]
    score = cli.parse(argv, "score", "", ScoreConfig)
    changed = {name for name, value in score.flat().items() if value != ScoreConfig().flat()[name]}
    assert changed == {"data_root", "model_cache_dir"}
    assert cli.parse(["--config", "icl.py"], "score", "", ScoreConfig) == ScoreConfig()
    assert cli.parse(["--config", "qa.py"], "score", "", ScoreConfig).scoring.eval_data is None

    found = cli.parse(argv, "retrieve", "", RetrieveConfig)
    assert found.data.key_max_length == 99 and found.retrieval.seed == 7
    assert found.evaluation.metrics == ["nq"] and found.evaluation.save_name == "mine"
    doctor = cli.parse(argv, "doctor", "", DoctorConfig)
    assert doctor.data.key_max_length == 99 and doctor.evaluation.metrics == ["nq"]
    # Flags go before the file.
    assert cli.parse([*argv, "--seed", "8"], "retrieve", "", RetrieveConfig).retrieval.seed == 8


def test_one_value_or_several(tmp_path):
    for line, expected in (("x.json", "x.json"), ("x.json y.json", ["x.json", "y.json"])):
        argv = ["--eval_data", *line.split()]
        assert cli.parse(argv, "train", "").data.eval_data == expected
        argv = ["--config", experiment(tmp_path, f"c.data.eval_data = {expected!r}")]
        assert cli.parse(argv, "train", "").data.eval_data == expected
    # Several are no value of a command that takes one, whose flag says which.
    assert cli.parse(argv, "retrieve", "", RetrieveConfig).data.eval_data is None
    with pytest.raises(InputError, match=r"'y.json' belongs to no flag"):
        cli.parse(["--eval_data", "x.json", "y.json"], "retrieve", "", RetrieveConfig)
    doctor = cli.parse([*argv, "--train_data", "t.json"], "doctor", "", DoctorConfig)
    with pytest.raises(InputError, match=r"x.json y.json: is looked at one at a time"):
        validate_doctor(doctor)
    config = Config()
    config.data.eval_data = []
    assert config.data.eval_data is None
    with pytest.raises(InputError, match="--eval_data 3: give a text"):
        config.data.eval_data = ["a", 3]


def test_who_may_differ_is_said_once():
    config = Config()
    assert config.names("per_host") == {
        *("data_root", "dataset_cache_dir", "model_cache_dir", "log_path"),
        *("coordinator_address", "process_id"),
    }
    trained = {f.name for f in fields(LossConfig)} | {"learning_rate", "max_steps", "train_data"}
    assert not trained & config.names("may_change")
    assert {"fsdp", "eval_data", "per_device_train_batch_size"} <= config.names("may_change")
    assert TrainConfig().title == "training"


def test_the_line_is_named_for_a_relative_path_too(tmp_path, monkeypatch):
    experiment(tmp_path, "c.training.max_step = 5")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^mine.py:6: the group training has no max_step"):
        cli.parse(["--config", "mine.py"], "train", "")
