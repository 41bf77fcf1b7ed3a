"""Evaluation by retrieval: the metrics of what was retrieved, and those of a training run."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llme_jax.config import Config, EvalConfig
from llme_jax.config.retrieval import NQ_CUTOFFS
from llme_jax.data.corpus import NEED_POSITIVES, Corpus, EvalData
from llme_jax.files.storage import open_folder, result_path
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval.dense import DenseRetriever, Extent
from llme_jax.retrieval.metrics import answer_recall, ranking_metrics
from llme_jax.retrieval.mining import same_text
from llme_jax.retrieval.results import append_log, write_result, write_source
from llme_jax.sources.resolve import Files


def open_data(
    files: Files, key_template: str, metrics: list[str], known: Corpus | None = None
) -> tuple[Corpus, EvalData]:
    """Passages and queries, read and validated.

    Args:
        known: a corpus that was read with the same template; it may be this one.

    Raises:
        InputError: one of them cannot be used; names the line and the remedy.
    """
    corpus = known
    if corpus is None or corpus.path != files.corpus:
        corpus = Corpus(files.corpus, key_template)
    return corpus, EvalData(files.queries, metrics=metrics, corpus_size=len(corpus))


def depth(settings: EvalConfig) -> int:
    """Keys that are looked for: as many as are kept, and as the metrics look at."""
    ranks = settings.cutoffs if {*settings.metrics} & NEED_POSITIVES else []
    return max([settings.hits, *ranks, *(NQ_CUTOFFS if "nq" in settings.metrics else [])])


class Identical:
    """Passages that are no hits as their text is the query's own; none where that is not asked for.

    Attributes:
        most: how many more hits have to be looked for, so that enough are left.
    """

    def __init__(self, settings: EvalConfig, corpus: Corpus, eval_data: EvalData):
        queries, self._passages = defaultdict(list), defaultdict(list)
        if settings.ignore_identical:
            for i, text in enumerate(eval_data.texts):
                queries[same_text(text)].append(i)
            for passage, text in enumerate(corpus):
                for i in queries.get(same_text(text), ()):
                    self._passages[i].append(passage)
        self.most = max(map(len, self._passages.values()), default=0)

    def without(self, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids [Q, hits] of what is left, in order; -1 fills up."""
        if not self._passages:
            return scores, ids
        scores, ids, width = scores.copy(), ids.copy(), ids.shape[1]
        for i, passages in self._passages.items():
            left = ~np.isin(ids[i], passages)
            for values, fill in ((scores, -np.inf), (ids, -1)):
                values[i] = np.pad(values[i][left], (0, width - left.sum()), constant_values=fill)
        return scores, ids


def measure(
    settings: EvalConfig, corpus: Corpus, eval_data: EvalData, ids: np.ndarray
) -> dict[str, float]:
    """The metrics that are wanted, as {"mrr@10": 0.5, ...}."""
    metrics = {}
    if eval_data.positives is not None:
        metrics |= ranking_metrics(settings.metrics, ids, eval_data.positives, settings.cutoffs)
    if eval_data.answers is not None:
        metrics |= answer_recall(ids, eval_data.answers, corpus.text)
    return metrics


class EvalSet(NamedTuple):
    """One set of --eval_data and its corpus: read, validated and tokenised."""

    corpus: Corpus
    eval_data: EvalData
    identical: Identical
    retrieve: DenseRetriever


class RetrievalEvaluator:
    """Evaluates an encoder on the sets of --eval_data as often as wanted.

    All files are read, validated and tokenised once, when it is built.

    Args:
        encoder: the static part of the encoder; its parameters come with every call.
        mesh: with axes (data, fsdp); the first device alone when None.

    Attributes:
        sets: by name.

    Raises:
        InputError: eval data or corpus cannot be used; names the line and the remedy.
    """

    def __init__(
        self,
        config: Config,
        files: Files,
        tokenizer,
        encoder: DualEncoder,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.sets: dict[str, EvalSet] = {}
        settings, data, corpus = config.evaluation, config.data, None
        for name, one in files.sets.items():
            corpus, queries = open_data(one, data.key_template, settings.metrics, corpus)
            identical = Identical(settings, corpus, queries)
            texts = corpus, queries, files.cache
            retriever = DenseRetriever(data, encoder, tokenizer, *texts, mesh)
            self.sets[name] = EvalSet(corpus, queries, identical, retriever)
        # Programs are compiled for the largest set, and serve them all.
        extents = zip(*(one.retrieve.extent for one in self.sets.values()), strict=True)
        self._largest = Extent(*map(max, extents)) if len(self.sets) > 1 else None
        self._hits = depth(settings) + max(one.identical.most for one in self.sets.values())

    @property
    def contents(self) -> list[str]:
        """Names passages and queries of each set, by content."""
        return [x.digest for one in self.sets.values() for x in (one.corpus, one.eval_data)]

    def __call__(self, params, step: int | None = None) -> dict[str, float]:
        """Metrics of the encoder with these parameters, as {"mrr@10": 0.5, ...}.

        Of several sets these are the means, and each one's own follow as "{set}/mrr@10". Process 0
        also writes the result files and a line of --log_path, when these are wanted.

        Args:
            step: of the training run, for the log.
        """
        settings, measured, known = self.config.evaluation, {}, {}
        for name, one in self.sets.items():
            scores, ids = self.retrieve(params, name, known)
            measured[name] = measure(settings, one.corpus, one.eval_data, ids)
            if jax.process_index() == 0 and settings.save_result:
                self._write(name, scores, ids)
        metrics = averaged(measured)
        if jax.process_index() == 0:
            append_log(settings.log_path, metrics, self.config.flat(), step)
        return metrics

    def retrieve(
        self, params, name: str, known: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of the hits of a set's queries, see `DenseRetriever`."""
        one = self.sets[name]
        found = one.retrieve(
            params,
            hits=self._hits,
            batch_size=self.config.evaluation.batch_size,
            largest=self._largest,
            known=known,
        )
        return one.identical.without(*found)

    def _write(self, name: str, scores: np.ndarray, ids: np.ndarray) -> None:
        settings, one = self.config.evaluation, self.sets[name]
        folder, kept = open_folder(self.config.training.output_dir), np.s_[:, : settings.hits]
        # Files of several sets may have the same name; sets do not.
        named = one.eval_data.path if len(self.sets) == 1 else Path(f"{name}.json")
        path = result_path(folder, named, "result", settings.save_name)
        write_result(path, one.eval_data.query_ids, ids[kept], scores[kept])
        write_source(path, one.eval_data.queries, one.corpus.digest, "dense")


def averaged(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over the sets of each metric, then those of each as "{set}/{metric}"; of one set
    its metrics."""
    first, *others = measured.values()
    if not others:
        return first
    means = {name: float(np.mean([m[name] for m in measured.values()])) for name in first}
    own = {f"{s}/{name}": value for s, m in measured.items() for name, value in m.items()}
    return means | own
