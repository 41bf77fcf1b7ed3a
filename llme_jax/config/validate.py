"""Settings that cannot work together are refused here, before any file is read.

What a single setting cannot be stands at its declaration.
"""

import os

from llme_jax.config.commands import Config, DoctorConfig, RetrieveConfig, ScoreConfig
from llme_jax.config.model import EncoderConfig
from llme_jax.config.retrieval import NQ_CUTOFFS, EvalConfig
from llme_jax.errors import InputError
from llme_jax.files.storage import in_bucket


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before any file is read.

    Raises:
        InputError: names the setting, its value and the remedy.
    """
    data, encoder, loss, ev, train, _ = config.groups()
    _check_encoder(encoder)
    _check_cache_variable()
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        raise InputError("nothing to train: give --max_steps or --num_train_epochs above 0")
    if loss.contrastive_weight <= 0 and loss.distill_weight <= 0 and not data.use_train_config:
        raise InputError(
            "--contrastive_weight and --distill_weight are both 0: give at least one a weight"
        )
    names = measured(ev)
    if train.metric_for_best_model not in (None, *names):
        raise InputError(
            f"--metric_for_best_model {train.metric_for_best_model}: choose from {', '.join(names)}"
        )
    if data.eval_data and not data.corpus:
        raise InputError("--eval_data needs --corpus, the passages that are searched")


def measured(ev: EvalConfig) -> list[str]:
    """The names of all metrics of an evaluation, as mrr@10."""
    ranked = [metric for metric in ev.metrics if metric != "nq"]
    names = [f"{metric}@{cutoff}" for metric in ranked for cutoff in ev.cutoffs]
    return names + [f"answer_recall@{cutoff}" for cutoff in NQ_CUTOFFS if "nq" in ev.metrics]


def validate_retrieval(config: RetrieveConfig) -> None:
    """As `validate`, for llme_jax.retrieve."""
    data, encoder, _, retrieval, mining, _ = config.groups()
    for flag in ("eval_data", "corpus"):
        if getattr(data, flag) is None:
            raise InputError(f"--{flag} is missing: give a JSON-lines file")
    _check_encoder(encoder)
    _check_cache_variable()
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
    _check_cache_variable()
    if lm.lm_batch_size != "auto" and not (
        lm.lm_batch_size.isdecimal() and int(lm.lm_batch_size) > 0
    ):
        raise InputError(f"--lm_batch_size {lm.lm_batch_size}: give auto, or 1 or more")


def validate_doctor(config: DoctorConfig) -> None:
    """As `validate`, for llme_jax.doctor."""
    if not config.data.train_data:
        raise InputError("there is no file to look at: name training files, or a --config")
    _check_cache_variable()


def _check_cache_variable() -> None:
    folder = os.environ.get("LLME_JAX_CACHE")
    if folder and in_bucket(folder):
        raise InputError(
            f"LLME_JAX_CACHE {folder}: give a path of this machine, it cannot be in a bucket"
        )


def _check_encoder(encoder: EncoderConfig) -> None:
    if len({"cls", "mean"} & set(encoder.pooling_method)) != 1:
        raise InputError(
            f"--pooling_method {' '.join(encoder.pooling_method)}: give exactly one of cls and "
            "mean, with dense behind it if you want the extra layer"
        )
