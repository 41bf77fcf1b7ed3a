"""Evaluation by retrieval: the metrics of what was retrieved, and those of a training run."""

from collections import defaultdict

import jax
import numpy as np
from jax.sharding import Mesh

from llme_jax.config import Config, EvalConfig, TextConfig
from llme_jax.config.retrieval import NQ_CUTOFFS
from llme_jax.data.beir import corpus_file, queries_file
from llme_jax.data.corpus import NEED_POSITIVES, Corpus, EvalData
from llme_jax.files.storage import open_folder, result_path
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval.dense import DenseRetriever
from llme_jax.retrieval.metrics import answer_recall, ranking_metrics
from llme_jax.retrieval.mining import same_text
from llme_jax.retrieval.results import append_log, write_result, write_source


def open_data(config: TextConfig, metrics: list[str]) -> tuple[Corpus, EvalData]:
    """--corpus and --eval_data, read and validated.

    Raises:
        InputError: one of them cannot be used; names the line and the remedy.
    """
    corpus, queries = Corpus(corpus_file(config), config.key_template), queries_file(config)
    return corpus, EvalData(queries, metrics=metrics, corpus_size=len(corpus))


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


class RetrievalEvaluator:
    """Evaluates an encoder on --eval_data and --corpus as often as wanted.

    Both files are read, validated and tokenised once, when it is built.

    Args:
        encoder: the static part of the encoder; its parameters come with every call.
        mesh: with axes (data, fsdp); the first device alone when None.

    Raises:
        InputError: eval data or corpus cannot be used; names the line and the remedy.
    """

    def __init__(self, config: Config, tokenizer, encoder: DualEncoder, mesh: Mesh | None = None):
        self.config = config
        self.corpus, self.eval_data = open_data(config.data, config.evaluation.metrics)
        self._identical = Identical(config.evaluation, self.corpus, self.eval_data)
        self._retrieve = DenseRetriever(
            config.data, encoder, tokenizer, self.corpus, self.eval_data, mesh
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """How many passages and queries there are."""
        return len(self.corpus), len(self.eval_data)

    def __call__(self, params, step: int | None = None) -> dict[str, float]:
        """Metrics of the encoder with these parameters, as {"mrr@10": 0.5, ...}.

        Process 0 also writes the result file and a line of --log_path, when these are wanted.

        Args:
            step: of the training run, for the log.
        """
        settings = self.config.evaluation
        scores, ids = self.retrieve(params)
        metrics = measure(settings, self.corpus, self.eval_data, ids)
        if jax.process_index() == 0:
            if settings.save_result:
                folder = open_folder(self.config.training.output_dir)
                path = result_path(folder, self.eval_data.path, "result", settings.save_name)
                kept = np.s_[:, : settings.hits]
                write_result(path, self.eval_data.query_ids, ids[kept], scores[kept])
                write_source(path, self.eval_data.queries, self.corpus.digest, "dense")
            append_log(settings.log_path, metrics, self.config.flat(), step)
        return metrics

    def retrieve(self, params) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of every query's hits, as `search` returns them."""
        settings = self.config.evaluation
        hits = depth(settings) + self._identical.most
        found = self._retrieve(params, hits=hits, batch_size=settings.batch_size)
        return self._identical.without(*found)
