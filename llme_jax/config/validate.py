"""Settings that cannot work are refused here, before any file is read."""

import os

from llme_jax.config import (
    COLLATIONS,
    METRICS,
    NQ_CUTOFFS,
    POOLINGS,
    Config,
    DoctorConfig,
    EncoderConfig,
    Groups,
    RetrieveConfig,
    ScoreConfig,
)
from llme_jax.errors import InputError
from llme_jax.files.storage import in_bucket

LEAST = {  # the smallest value that makes sense
    "train_group_size": 2,  # a positive and a negative
    "query_max_length": 1,
    "key_max_length": 1,
    "max_sample_num": 1,
    "max_bad_rows": 0,
    "hits": 1,
    "batch_size": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sub_batch_size": 1,
    "fsdp": 1,
    "tensor": 1,
    "context_max_length": 2,  # a token of the answer, and one before it
    "save_steps": 1,
    "eval_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 1,
    "early_exit_steps": 1,
    "threads": 1,
    "max_neg_num": 1,
    "range_min": 0,
    "k1": 0,
    "b": 0,
    "margin": 0,
    "relative_margin": 0,
}
ABOVE_ZERO = ("cos_temperature", "teacher_temperature", "student_temperature", "learning_rate")
LOCAL = ("dataset_cache_dir", "model_cache_dir", "log_path", "json", "plot")  # never in a bucket
SEEDS = range(-(2**63), 2**63)  # of 64 bits, as jax takes them


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before any file is read.

    Raises:
        InputError: names the setting, its value and the remedy.
    """
    data, encoder, loss, ev, train, _ = config.groups()
    _one_of("--metrics", ev.metrics, METRICS)
    _check_encoder(encoder)
    _check_numbers(config)
    _check_paths(config)
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        raise InputError("nothing to train: give --max_steps or --num_train_epochs above 0")
    if loss.contrastive_weight <= 0 and loss.distill_weight <= 0 and not data.use_train_config:
        raise InputError(
            "--contrastive_weight and --distill_weight are both 0: give at least one a weight"
        )
    names = [f"{metric}@{cutoff}" for metric in ev.metrics for cutoff in ev.cutoffs]
    names = [name for name in names if not name.startswith("nq@")]
    names += [f"answer_recall@{cutoff}" for cutoff in NQ_CUTOFFS if "nq" in ev.metrics]
    if train.metric_for_best_model not in (None, *names):
        raise InputError(
            f"--metric_for_best_model {train.metric_for_best_model}: choose from {', '.join(names)}"
        )
    if data.eval_data and not data.corpus:
        raise InputError("--eval_data needs --corpus, the passages that are searched")


def validate_retrieval(config: RetrieveConfig) -> None:
    """As `validate`, for llme_jax.retrieve."""
    data, encoder, ev, retrieval, mining, _ = config.groups()
    for flag in ("eval_data", "corpus"):
        if getattr(data, flag) is None:
            raise InputError(f"--{flag} is missing: give a JSON-lines file")
    _one_of("--metrics", ev.metrics, (*METRICS, *COLLATIONS))
    _check_encoder(encoder)
    _check_numbers(config)
    _check_paths(config)
    if in_bucket(retrieval.output_dir):
        raise InputError(
            f"--output_dir {retrieval.output_dir}: give a local folder, where embeddings can be "
            "read piece by piece, and copy what you want to keep"
        )
    exact = retrieval.retrieval_method == "dense" and retrieval.faiss_index_factory == "Flat"
    if exact and (retrieval.save_index or retrieval.load_index):
        raise InputError(
            "--save_index and --load_index: Flat has no index, its embeddings are kept with "
            "--save_encode; give another --faiss_index_factory"
        )
    if mining.range_max is not None and mining.range_max <= mining.range_min:
        raise InputError(
            f"--range_max {mining.range_max}: leaves no rank, give more than --range_min "
            f"{mining.range_min}"
        )


def validate_scoring(config: ScoreConfig) -> None:
    """As `validate`, for llme_jax.score."""
    scoring, lm, _ = config.groups()
    if scoring.eval_data is None:
        raise InputError("--eval_data is missing: give a JSON-lines file")
    _check_numbers(config)
    _check_paths(config)
    _check_dtype("--lm_dtype", lm.lm_dtype)
    if lm.lm_batch_size != "auto" and not (
        lm.lm_batch_size.isdecimal() and int(lm.lm_batch_size) > 0
    ):
        raise InputError(f"--lm_batch_size {lm.lm_batch_size}: give auto, or 1 or more")


def validate_doctor(config: DoctorConfig) -> None:
    """As `validate`, for llme_jax.data."""
    if not config.data.train_data:
        raise InputError("there is no file to look at: name training files, or a --config")
    _one_of("--metrics", config.evaluation.metrics, METRICS)
    _check_numbers(config)
    _check_paths(config)


def _check_numbers(config: Groups) -> None:
    values = config.flat()
    for name, value in values.items():
        if name in LEAST and value is not None and value < LEAST[name]:
            raise InputError(f"--{name} {value}: give {LEAST[name]} or more")
        if name in ABOVE_ZERO and not value > 0:
            raise InputError(f"--{name} {value}: give a value above 0")
    if (seed := values.get("seed", 0)) not in SEEDS:
        raise InputError(f"--seed {seed}: give {SEEDS[0]} to {SEEDS[-1]}")
    if (first := min(values.get("cutoffs", [1]), default=1)) < 1:
        raise InputError(f"--cutoffs {first}: ranks start at 1")


def _check_paths(config: Groups) -> None:
    named = {f"--{name}": value for name, value in config.flat().items() if name in LOCAL}
    named["LLME_JAX_CACHE"] = os.environ.get("LLME_JAX_CACHE")
    for name, path in named.items():
        if path and in_bucket(path):
            raise InputError(
                f"{name} {path}: give a path of this machine, it cannot be in a bucket"
            )


def _check_encoder(encoder: EncoderConfig) -> None:
    _one_of("--pooling_method", encoder.pooling_method, POOLINGS)
    if len({"cls", "mean"} & set(encoder.pooling_method)) != 1:
        raise InputError(
            f"--pooling_method {' '.join(encoder.pooling_method)}: give exactly one of cls and "
            "mean, with dense behind it if you want the extra layer"
        )
    _check_dtype("--dtype", encoder.dtype)


def _check_dtype(flag: str, value: str) -> None:
    if value not in ("auto", "fp32", "bf16"):
        remedy = "use bf16, as fast and without loss scaling" if value == "fp16" else ""
        raise InputError(f"{flag} {value}: {remedy or 'give auto, fp32 or bf16'}")


def _one_of(flag: str, values: list[str], allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise InputError(f"{flag} {value}: choose from {', '.join(allowed)}")
