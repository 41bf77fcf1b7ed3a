"""Settings that cannot work together are refused here, before any file is read.

What a single setting cannot be stands at its declaration.
"""

import os
from dataclasses import fields

from llme_jax.config.commands import (
    Config,
    DoctorConfig,
    RankConfig,
    RetrieveConfig,
    ScoreConfig,
)
from llme_jax.config.evaluation import METHODS, TASKS, EvaluateConfig, TaskConfig, asks, searches
from llme_jax.config.lm import ReaderConfig
from llme_jax.config.merge import MergingConfig
from llme_jax.config.model import EncoderConfig
from llme_jax.config.plan import PlanConfig
from llme_jax.config.rank import RANK_COLLATIONS
from llme_jax.config.retrieval import METRICS, NQ_CUTOFFS, EvalConfig, RetrievalConfig
from llme_jax.config.setting import as_list
from llme_jax.config.training import LossConfig
from llme_jax.errors import InputError
from llme_jax.files.storage import in_bucket


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before any file is read.

    Raises:
        InputError: names the setting, its value and the remedy.
    """
    check_encoder(config.encoder)
    _check_loss(config.loss)
    _check_training(config)
    sets, corpora = as_list(config.data.eval_data), as_list(config.data.corpus)
    rows = [name for name in sets if name.endswith((".json", ".jsonl"))]
    if rows and not corpora:  # of others it is seen once they are there, see data/beir.py
        raise InputError(f"--eval_data {rows[0]} needs --corpus, the passages that are searched")
    if len(corpora) > 1 and len(corpora) != len(sets):
        raise InputError(
            f"--corpus {' '.join(corpora)}: give one for each of the {len(sets)} sets of "
            "--eval_data, or one for all"
        )
    if not config.data.train_data:
        raise InputError("--train_data is missing: give the JSON-lines files to train on")


def validate_ranking(config: RankConfig) -> None:
    """As `validate`, for llme_jax.rank."""
    data, ranker, _, ev, train, *_ = config.groups()
    if ev.load_result and not data.corpus:
        raise InputError("--load_result needs --corpus, the passages whose numbers it holds")
    if ev.retriever_weight and not ev.load_result:
        raise InputError(
            f"--retriever_weight {ev.retriever_weight}: needs --load_result, whose scores it weighs"
        )
    if data.train_data:
        _check_training(config)
        if written := {*ev.metrics} & {*RANK_COLLATIONS}:
            raise InputError(
                f"--metrics {min(written)}: nothing is written while a ranker trains; run again "
                "with the trained --ranker and without --train_data"
            )
        if ranker.ranker_method == "yes-no":
            raise InputError(
                "--ranker_method yes-no: a language model only scores; leave --train_data out, or "
                "train a cross-encoder"
            )
        if ev.load_result:
            raise InputError(
                "--load_result: is for reranking; write rows with --metrics collate_key of "
                "llme_jax.retrieve, and give them to --eval_data"
            )
        return
    _check_cache_variable()
    _check_planning(config.planning)
    if not data.eval_data:
        raise InputError("give --train_data to train a ranker, or --eval_data to rerank")
    if train.push_to_hub:
        raise InputError("--push_to_hub: uploads what was trained, give --train_data")
    if in_bucket(train.output_dir):
        raise InputError(f"--output_dir {train.output_dir}: give a local folder to rerank")


def _check_loss(loss: LossConfig) -> None:
    directions = {*loss.contrastive_directions}
    if "query_to_doc" not in directions:
        raise InputError(
            f"--contrastive_directions {' '.join(loss.contrastive_directions)}: add query_to_doc, "
            "which has the pair of query and positive"
        )
    if (loss.hardness_mode is None) != (loss.hardness_strength == 0):
        raise InputError(
            f"--hardness_mode {loss.hardness_mode}, --hardness_strength {loss.hardness_strength}: "
            "give both, the strength above 0"
        )
    if (loss.teacher_encoder is None) != (loss.embedding_weight == 0):
        raise InputError(
            f"--teacher_encoder {loss.teacher_encoder}, --embedding_weight "
            f"{loss.embedding_weight}: give both, the weight above 0"
        )
    if loss.partition_mode != "joint" and (alone := directions - {"query_to_doc", "doc_to_query"}):
        raise InputError(
            f"--partition_mode {loss.partition_mode}: {min(alone)} has no positive of its own; "
            "give joint"
        )
    dims, weights = loss.matryoshka_dims or [], loss.matryoshka_weights
    if weights is not None and len(weights) != len(dims):
        raise InputError(
            f"--matryoshka_weights {' '.join(map(str, weights))}: give {len(dims)}, one for each "
            "of --matryoshka_dims"
        )


def _check_training(config: Config | RankConfig) -> None:
    data, loss, ev, train = config.data, config.loss, config.evaluation, config.training
    _check_cache_variable()
    _check_planning(config.planning)
    if "none" in train.report_to and len(train.report_to) > 1:
        raise InputError(f"--report_to {' '.join(train.report_to)}: leave out none, or the others")
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        raise InputError("nothing to train: give --max_steps or --num_train_epochs above 0")
    weights = loss.contrastive_weight, loss.distill_weight, loss.embedding_weight
    if not any(weights) and not data.use_train_config:
        raise InputError(
            "--contrastive_weight and --distill_weight are both 0: give at least one a weight"
        )
    if loss.stable_distill and loss.distill_loss != "kl":
        raise InputError(
            f"--distill_loss {loss.distill_loss}: --stable_distill distils in its own way; "
            "give one of them"
        )
    check_sub_batches(config)
    names = measured(ev)
    if train.metric_for_best_model not in (None, *names):
        raise InputError(
            f"--metric_for_best_model {train.metric_for_best_model}: choose from {', '.join(names)}"
        )


def check_sub_batches(config: Config | RankConfig) -> None:
    """Refuses sub-batches that do not hold the longest text; again once a model's folder has said
    how long texts are.

    Raises:
        InputError: names the setting, its value and the remedy.
    """
    train, lengths = config.training, (config.data.query_max_length, config.data.key_max_length)
    if (tokens := train.sub_batch_tokens) is None:
        return
    if train.sub_batch_size is not None:
        raise InputError(
            f"--sub_batch_size {train.sub_batch_size}, --sub_batch_tokens {tokens}: give one of "
            "them"
        )
    if None in lengths:
        return
    longest, what = max(lengths), "text"
    if isinstance(config, RankConfig):
        longest, what = sum(lengths), "pair"
    if tokens < longest:
        raise InputError(
            f"--sub_batch_tokens {tokens}: the longest {what} may have {longest}, as "
            f"--query_max_length and --key_max_length say; give {longest} or more, or lower these"
        )


def measured(ev: EvalConfig) -> list[str]:
    """The names of all metrics of an evaluation, as mrr@10."""
    ranked = [metric for metric in ev.metrics if metric in METRICS and metric != "nq"]
    names = [f"{metric}@{cutoff}" for metric in ranked for cutoff in ev.cutoffs]
    return names + [f"answer_recall@{cutoff}" for cutoff in NQ_CUTOFFS if "nq" in ev.metrics]


def validate_retrieval(config: RetrieveConfig) -> None:
    """As `validate`, for llme_jax.retrieve."""
    data, encoder, _, retrieval, mining, *_ = config.groups()
    for flag in ("eval_data", "corpus"):
        if getattr(data, flag) is None:
            raise InputError(f"--{flag} is missing: give a JSON-lines file")
    check_encoder(encoder)
    _check_cache_variable()
    _check_retrieval(retrieval)
    _check_planning(config.planning)
    if config.planning.plan and (retrieval.retrieval_method != "dense" or retrieval.load_result):
        raise InputError(
            "--plan: says what encoding and searching take; give --retrieval_method dense and no "
            "--load_result"
        )
    for name in ("rerank_max_score", "rerank_margin"):
        if getattr(mining, name) is not None and not mining.rerank_result:
            raise InputError(f"--{name} needs --rerank_result, where the reranker's scores are")
    if mining.range_max is not None and mining.range_max <= mining.range_min:
        raise InputError(
            f"--range_max {mining.range_max}: leaves no rank, give more than --range_min "
            f"{mining.range_min}"
        )


def _check_planning(planning: PlanConfig) -> None:
    if planning.topology and not planning.plan:
        raise InputError("--topology: says for which devices --plan compiles; give --plan")


def _check_retrieval(retrieval: RetrievalConfig) -> None:
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


def validate_scoring(config: ScoreConfig) -> None:
    """As `validate`, for llme_jax.score."""
    scoring, lm, *_ = config.groups()
    if scoring.eval_data is None:
        raise InputError("--eval_data is missing: give a JSON-lines file")
    if config.planning.plan and (scoring.report or scoring.load_score):
        raise InputError("--plan: says what scoring takes; leave out --report and --load_score")
    _check_planning(config.planning)
    _check_cache_variable()
    check_batch_size(lm)


def validate_evaluation(config: EvaluateConfig) -> None:
    """As `validate`, for llme_jax.evaluate."""
    settings, data, encoder, _, retrieval, lm, _ = config.groups()
    if settings.compare is not None:
        if len(settings.compare) != 2:
            raise InputError("--compare: give two output files")
        return
    if settings.task is None:
        raise InputError(f"--task is missing: choose from {', '.join(TASKS)}")
    _check_has_meaning(settings)
    method, methods = retrieval.retrieval_method, METHODS[settings.task]
    if method not in methods:
        raise InputError(
            f"--retrieval_method {method}: --task {settings.task} has {', '.join(methods)}"
        )
    if method == "no" and not asks(settings):
        raise InputError(
            f"--retrieval_method no: --task {settings.task} measures the retrieval, and asks no "
            "language model" + (" without --do_generate" if settings.task == "qrecc" else "")
        )
    if data.corpus is None and searches(config):
        raise InputError("--corpus is missing: give a JSON-lines file")
    if settings.task == "lrlm":
        _check_chunks(settings, method)
    if method == "oracle" and settings.key_num != 1:
        raise InputError(f"--key_num {settings.key_num}: --retrieval_method oracle finds 1")
    check_encoder(encoder)
    _check_cache_variable()
    check_batch_size(lm)
    _check_retrieval(retrieval)


def _check_has_meaning(settings: TaskConfig) -> None:
    """Refuses what is for other tasks."""
    known = {"task", "compare", *TASKS[settings.task]}
    known |= {"task_names"} if settings.task == "icl" else set()
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.default is None and value is not None and f.name not in known:
            raise InputError(f"--{f.name} {value}: has no meaning for --task {settings.task}")


def _check_chunks(settings: TaskConfig, method: str) -> None:
    size, window, target = (
        getattr(settings, name) for name in ("chunk_size", "context_window_size", "target_length")
    )
    if target > window:
        raise InputError(
            f"--target_length {target}: is scored within --context_window_size {window}, give less"
        )
    if method == "no":
        return
    for name in ("context_window_size", "target_length"):
        if getattr(settings, name) % size:
            raise InputError(
                f"--{name} {getattr(settings, name)}: give a multiple of --chunk_size {size}"
            )
    if settings.integrate_method == "replace":
        needed = target + size + 2 * settings.key_num * size
        if window < needed:
            raise InputError(
                f"--context_window_size {window}: --integrate_method replace needs {needed} for "
                f"{settings.key_num} keys"
            )


def check_batch_size(lm: ReaderConfig) -> None:
    """Refuses what is neither a number nor auto.

    Raises:
        InputError: names the value.
    """
    if lm.lm_batch_size != "auto" and not (
        lm.lm_batch_size.isdecimal() and int(lm.lm_batch_size) > 0
    ):
        raise InputError(f"--lm_batch_size {lm.lm_batch_size}: give auto, or 1 or more")


def validate_merging(config: MergingConfig) -> None:
    """As `validate`, for llme_jax.merge."""
    models, weights = config.merge.models or [], config.merge.weights
    if len(models) < 2:
        raise InputError("name two encoders or more, to be averaged")
    if weights is None:
        return
    if len(weights) != len(models):
        raise InputError(
            f"--weights {' '.join(map(str, weights))}: give {len(models)}, one for each model"
        )
    if abs(sum(weights) - 1) > 1e-6:
        raise InputError(
            f"--weights {' '.join(map(str, weights))}: they add up to {sum(weights):g}, not to 1"
        )


def validate_doctor(config: DoctorConfig) -> None:
    """As `validate`, for llme_jax.doctor."""
    if not config.data.train_data:
        raise InputError("there is no file to look at: name training files, or a --config")
    for flag in ("eval_data", "corpus"):
        if len(names := as_list(getattr(config.data, flag))) > 1:
            raise InputError(f"--{flag} {' '.join(names)}: is looked at one at a time, give one")
    _check_cache_variable()


def _check_cache_variable() -> None:
    folder = os.environ.get("LLME_JAX_CACHE")
    if folder and in_bucket(folder):
        raise InputError(
            f"LLME_JAX_CACHE {folder}: give a path of this machine, it cannot be in a bucket"
        )


def check_encoder(encoder: EncoderConfig) -> None:
    """Refuses ways of pooling that exclude each other.

    Raises:
        InputError: names them.
    """
    pooling = encoder.pooling_method
    if pooling is not None and (not pooling or len({*pooling} - {"dense"}) > 1):
        raise InputError(
            f"--pooling_method {' '.join(pooling)}: give one of cls, mean and last_token, with "
            "dense behind it if you want the extra layer"
        )
