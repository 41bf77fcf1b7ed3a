"""One reranking, from settings to files: tokenise, score, put in order, measure, write."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from llme_jax.config import RankConfig
from llme_jax.config.identity import identity
from llme_jax.config.retrieval import METRICS
from llme_jax.data.candidates import CandidateRow, Found
from llme_jax.data.corpus import Corpus
from llme_jax.data.instructions import with_model_texts
from llme_jax.data.rows import query_id_of
from llme_jax.data.scoring import ScoringData
from llme_jax.devices.agree import agree, from_first, together
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file
from llme_jax.files.cache import check_cache
from llme_jax.files.storage import check_writable, result_path
from llme_jax.hugging_face.texts import NOTHING_SAID
from llme_jax.inference.dry_run import SAMPLE, sampled
from llme_jax.inference.partial_results import PartialResults, parts_folder
from llme_jax.lm.teacher_report import show_report
from llme_jax.rerank.cross_scorer import Scoring, open_cross_scorer
from llme_jax.rerank.evaluate import open_candidates
from llme_jax.rerank.outputs import Written, write_all
from llme_jax.rerank.yes_no import open_yes_no
from llme_jax.retrieval.metrics import found_within
from llme_jax.retrieval.results import (
    check_beside,
    check_log,
    check_source,
    publish_metrics,
    read_predictions,
)
from llme_jax.sources.resolve import Files, resolve

logger = logging.getLogger(__name__)

# Pairs of one part: what a kill can cost. Large enough that lengths within it fill whole batches.
PART = {"cpu": 1 << 11, "gpu": 1 << 16, "tpu": 1 << 16}


def rerank(config: RankConfig) -> int:
    """Returns the exit code."""
    settings, output_dir = config.evaluation, Path(config.training.output_dir)
    corpus, found, facts = None, None, {}
    with together():
        files = resolve(config)
        _check_outputs(config, files)
        config, scorer = open_ranking(config)  # its errors come before a large file
        (loaded,) = files.result("load_result") or [None]
        if loaded:
            corpus = Corpus(files.corpus, config.data.key_template)
    if loaded:
        found, facts = _found(config, loaded, corpus)
    with together():
        rows = open_candidates(config, files.queries, found)
        if loaded and not rows.candidates.any():
            raise InputError(
                f"{loaded}: has none of the query_ids of --eval_data; give its own file"
            )
    if loaded:
        from_first(lambda: check_source(loaded, corpus, rows.queries, rows.path))
    if config.planning.plan:
        return scorer.plan(_sample(rows), int(rows.candidates.sum()))
    result = result_path(output_dir, rows.path, "result", settings.save_name)
    if loaded and result.expanduser().resolve() == loaded.resolve():
        raise InputError(
            f"--load_result {settings.load_result}: would be overwritten by what comes out; give "
            "another --save_name or --output_dir"
        )
    facts |= {"data": rows.digest} | scorer.describe()
    described = identity(config, "queries", "keys", "texts", "scores", **facts)
    agree(config, described)
    partial = PartialResults(parts_folder(result, described), rows.candidates)
    if partial.found:
        logger.info("%d of %d pairs are scored already", partial.found, len(partial.scores))
    missing = partial.missing(PART[jax.default_backend()] * jax.local_device_count())
    if missing:

        def tokenized(ranges) -> Iterator:
            for part in rows.parts(ranges):
                yield scorer.tokens([row for _, row in part])

        partial.fill(missing, tokenized, scorer.load())
    if jax.process_index() == 0:
        _write(config, rows, partial, result, files.beside, corpus)
    return 0


def _sample(rows: ScoringData[CandidateRow]) -> list[CandidateRow]:
    """Some rows from all over the file, the same ones in every run."""
    some = sampled(len(rows), max(SAMPLE // max(int(rows.candidates.mean()), 1), 1))
    return [row for part in rows.parts([(i, i + 1) for i in some]) for _, row in part]


def open_ranking(config: RankConfig) -> tuple[RankConfig, Scoring]:
    """The model that scores, and the settings with its own prompts where they are asked for.

    Raises:
        InputError: see `open_cross_scorer` and `open_yes_no`.
    """
    if config.ranker.ranker_method == "yes-no":
        # It has a prompt of its own, which no instruction stands before.
        data = replace(config.data, add_instruction=False)
        data = with_model_texts(data, config.ranker.ranker, NOTHING_SAID)
        config = replace(config, data=data)
        return config, open_yes_no(config)
    return open_cross_scorer(config)


def _write(
    config: RankConfig,
    rows: ScoringData,
    partial: PartialResults,
    result: Path,
    beside: Path | None,
    corpus: Corpus | None,
) -> None:
    """All files of a reranking, in one pass over the rows.

    Args:
        beside: folder for collated rows; None for --output_dir.
        corpus: that the candidates were found in; None where rows bring their own.
    """
    settings, output_dir = config.evaluation, Path(config.training.output_dir)
    beside = output_dir if settings.save_to_output else beside or output_dir

    def collated(metric: str, kind: str) -> Path | None:
        wanted = metric in settings.metrics
        return result_path(beside, rows.path, kind, settings.save_name) if wanted else None

    files = Written(
        result if settings.save_result else None,
        collated("collate_key", "key"),
        collated("collate_score", "scored"),
    )
    each = tqdm(range(len(rows)), desc="Writing", unit=" rows")
    metrics, report = write_all(settings, rows, map(partial.of_row, each), files, corpus)
    if corpus:
        metrics = found_within(metrics, int(rows.candidates.max()), len(corpus))
    if metrics:
        publish_metrics(output_dir, rows.path, settings, metrics, config.flat())
    if files.result:
        logger.info("ranked: %s", files.result)
    if files.key:
        print(f"keys:    {files.key}")
    if files.scored:
        print(f"scores:  {files.scored}")
        if report:
            show_report(report, files.scored)


def _found(config: RankConfig, path: Path, corpus: Corpus) -> tuple[Found, dict[str, str]]:
    """The candidates that a result file names, and what they depend on.

    Raises:
        InputError: the result file cannot be used.
    """
    settings = config.evaluation
    result, predictions = from_first(
        lambda: (digest_file(path), read_predictions(path, len(corpus)))
    )
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)

    def found(record: dict, number: int) -> tuple[list[int], list[str], np.ndarray]:
        ids, scores = predictions.get(query_id_of(record, number), nothing)
        there = np.flatnonzero(ids >= 0)[: settings.rerank_depth]
        return ids[there].tolist(), [corpus.text(i) for i in ids[there].tolist()], scores[there]

    return found, {"result": result, "corpus": corpus.digest}


def _check_outputs(config: RankConfig, files: Files) -> None:
    """Finds out before any long work whether the results can be written.

    Raises:
        InputError: some cannot.
    """
    check_cache(config.data.dataset_cache_dir)
    if jax.process_index() != 0:
        return
    settings = config.evaluation
    check_writable("--output_dir", config.training.output_dir)  # scores are kept there
    to_output = settings.save_to_output or files.beside is None
    if {*settings.metrics} - {*METRICS} and not to_output:
        check_beside(files.beside, "--save_to_output")
    if {*settings.metrics} & {*METRICS}:
        check_log(settings.log_path)
