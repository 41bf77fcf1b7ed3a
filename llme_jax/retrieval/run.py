"""One retrieval, from settings to files: find, save, measure, collate."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from llme_jax.config import RetrieveConfig
from llme_jax.config.retrieval import COLLATIONS
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import with_model_texts
from llme_jax.devices import sharding, topology
from llme_jax.devices.agree import agree, from_first, together
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file
from llme_jax.files.cache import check_cache
from llme_jax.files.storage import check_writable, result_path
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder
from llme_jax.models.space import encoder_texts
from llme_jax.retrieval.bm25 import lucene_search
from llme_jax.retrieval.dense import DenseRetriever
from llme_jax.retrieval.dry_run import show_plan
from llme_jax.retrieval.evaluate import Identical, depth, measure, open_data
from llme_jax.retrieval.metrics import found_within
from llme_jax.retrieval.mining import Ranking, collate_key, collate_neg
from llme_jax.retrieval.results import (
    check_beside,
    check_log,
    check_source,
    check_trec,
    publish_metrics,
    read_predictions,
    read_result,
    write_json,
    write_result,
    write_source,
    write_trec,
)
from llme_jax.sources.resolve import Files, resolve

logger = logging.getLogger(__name__)


def retrieve(config: RetrieveConfig) -> int:
    """Returns the exit code."""
    if config.planning.plan:
        return plan(config)
    with together():
        files = resolve(config)
    retrieved(config, files)
    return 0


def retrieved(config: RetrieveConfig, files: Files) -> tuple[Corpus, EvalData, Ranking]:
    """What was found, when all that is asked for is written; the same on every process."""
    settings, how = config.evaluation, config.retrieval
    loaded = None
    with together():
        _check_outputs(config, files)
        if how.retrieval_method == "dense" and not how.load_result:
            config, loaded = open_encoder(config)  # its errors come before a large corpus is read
        corpus, eval_data = open_data(files, config.data.key_template, settings.metrics)
        if how.save_trec:
            check_trec(eval_data.query_ids, corpus)
    if jax.process_count() > 1:
        agree(config, _common(corpus, eval_data, loaded))
    output_dir = Path(how.output_dir)
    fused = [_read(path, corpus, eval_data) for path in files.result("fuse")]
    reranker = _read_reranker(files.result("rerank_result"), corpus, eval_data)
    result = result_path(output_dir, eval_data.path, "result", settings.save_name)
    name = settings.save_name or how.retrieval_method
    identical = Identical(settings, corpus, eval_data)
    if how.load_result:
        ranking = _read(result, corpus, eval_data, name)
    else:
        hits = depth(settings) + identical.most
        ranking = Ranking(name, *_search(config, corpus, eval_data, files.cache, loaded, hits))
    ranking = Ranking(name, *identical.without(ranking.scores, ranking.ids))
    found = ranking.ids
    if not how.load_result:
        ranking = ranking.first(settings.hits)
    if jax.process_index() != 0:
        return corpus, eval_data, ranking

    if settings.save_result and not how.load_result:
        write_result(result, eval_data.query_ids, ranking.ids, ranking.scores)
        write_source(result, eval_data.queries, corpus.digest, how.retrieval_method)
        logger.info("hits: %s", result)
    if how.save_trec:
        hits = ranking.ids, ranking.scores
        write_trec(result.with_suffix(".trec"), eval_data.query_ids, *hits, corpus, name)
    metrics = measure(settings, corpus, eval_data, found)
    if how.load_result:
        metrics = found_within(metrics, found.shape[1], len(corpus))
    if metrics:
        publish_metrics(output_dir, eval_data.path, settings, metrics, config.flat())

    if {*settings.metrics} & {*COLLATIONS} and digest_file(eval_data.path) != eval_data.digest:
        raise InputError(f"{eval_data.path}: was changed since it was read; start again")
    beside = output_dir if how.save_to_output else files.beside or output_dir
    if "collate_key" in settings.metrics:
        path = result_path(beside, eval_data.path, "key", settings.save_name)
        collate_key(path, eval_data.path, corpus, ranking)
        print(f"keys:      {path}")
    if "collate_neg" in settings.metrics:
        path = result_path(beside, eval_data.path, "neg", settings.save_name)
        rankings = [ranking, *fused]
        report = collate_neg(path, eval_data.path, corpus, rankings, config.mining, reranker)
        audit = result_path(beside, eval_data.path, "mining", settings.save_name)
        write_json(audit, report.facts())
        print(f"{report}\nnegatives: {path}")
    return corpus, eval_data, ranking


def open_encoder(
    config: RetrieveConfig, *, weights: bool = True
) -> tuple[RetrieveConfig, tuple[DualEncoder, dict, object]]:
    """What `load_dual_encoder` gives, and the settings with what its folder says of texts."""
    encoder, limits = config.encoder, config.data
    loaded = load_dual_encoder(encoder, new_dense=False, weights=weights)
    own = encoder_texts(encoder, loaded[2], loaded[0].max_length)
    data = with_model_texts(limits, encoder.query_encoder, own)
    loaded[0].check_lengths(data.query_max_length, data.key_max_length)
    return replace(config, data=data), loaded


def plan(config: RetrieveConfig) -> int:
    """Says what encoding and searching take; returns the exit code."""
    files = resolve(config)
    config, (encoder, params, tokenizer) = open_encoder(config, weights=False)
    corpus, eval_data = open_data(files, config.data.key_template, config.evaluation.metrics)
    mesh = sharding.make_mesh(devices=topology.devices(config.planning.topology))
    hits = depth(config.evaluation) + Identical(config.evaluation, corpus, eval_data).most
    return show_plan(config, encoder, params, tokenizer, corpus, eval_data, mesh, hits)


def _common(corpus: Corpus, eval_data: EvalData, loaded: tuple | None) -> dict[str, object]:
    """What all processes have to search, and with what."""
    common = {"--corpus, its content": corpus.digest, "--eval_data, its content": eval_data.digest}
    if loaded:
        encoder, params, tokenizer = loaded
        common["--query_encoder, as its folder says"] = repr(encoder)
        common["--query_encoder, its weights"] = fingerprint_params(params)
        common["--query_encoder, its tokenizer"] = fingerprint(tokenizer)
    return common


def _check_outputs(config: RetrieveConfig, files: Files) -> None:
    """Finds out before any long work whether the results can be written.

    Raises:
        InputError: some cannot.
    """
    data, settings, how = config.data, config.evaluation, config.retrieval
    method = None if how.load_result else how.retrieval_method
    if method in ("dense", "bm25"):
        check_cache(data.dataset_cache_dir)
    first = jax.process_index() == 0
    metrics = set(settings.metrics)
    measures, collates = metrics - {*COLLATIONS}, metrics & {*COLLATIONS}
    to_output = how.save_to_output or files.beside is None
    results = (
        measures or how.save_trec or (method and settings.save_result) or (collates and to_output)
    )
    if method == "dense" or (first and results):  # every process writes embeddings
        check_writable("--output_dir", how.output_dir)
    if not first:
        return
    if collates and not to_output:
        check_beside(files.beside, "--save_to_output")
    if measures:
        check_log(settings.log_path)


def _search(
    config: RetrieveConfig,
    corpus: Corpus,
    eval_data: EvalData,
    cache: Path,
    loaded: tuple | None,
    hits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids [Q, hits] of the method that is wanted.

    Args:
        loaded: what `load_dual_encoder` gave, for dense retrieval.
    """
    settings, how = config.evaluation, config.retrieval
    shape = len(eval_data), min(hits, len(corpus))
    if how.retrieval_method == "no":
        return np.full((shape[0], 1), -np.inf, np.float32), np.full((shape[0], 1), -1, np.int32)
    if how.retrieval_method == "random":
        rng = np.random.default_rng(how.seed % 2**63)
        ids = [rng.choice(len(corpus), shape[1], replace=False) for _ in range(shape[0])]
        return np.tile(-np.arange(shape[1], dtype=np.float32), (shape[0], 1)), np.array(
            ids, np.int32
        )
    if how.retrieval_method == "bm25":
        return lucene_search(corpus, eval_data.texts, hits, how, cache)
    encoder, params, tokenizer = loaded
    mesh = sharding.make_mesh()
    search = DenseRetriever(config.data, encoder, tokenizer, corpus, eval_data, cache, mesh)
    return search.from_disk(params, how, hits=hits, batch_size=settings.batch_size)


def _read_reranker(
    paths: list[Path], corpus: Corpus, eval_data: EvalData
) -> list[dict[int, float]] | None:
    """A reranker's scores of every query's passages; None without a file."""
    if not paths:
        return None
    (place,) = paths

    def read():
        found = read_predictions(place, len(corpus))
        check_source(place, corpus, eval_data.queries, eval_data.path)
        return found

    found = from_first(read)
    rows = (found.get(query_id, ([], [])) for query_id in eval_data.query_ids)
    return [{int(i): float(s) for i, s in zip(*row, strict=True)} for row in rows]


def _read(path: Path, corpus: Corpus, eval_data: EvalData, name: str | None = None) -> Ranking:
    def read():
        found = read_result(path, eval_data.query_ids, len(corpus))
        check_source(path, corpus, eval_data.queries, eval_data.path)
        return found

    scores, ids = from_first(read)
    return Ranking(name or path.name.removesuffix(".json"), scores, ids)
