"""The evaluation of a reranker while it trains."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from llme_jax.config import RankConfig
from llme_jax.data.candidates import CandidateRow, Found, parse_candidates
from llme_jax.data.corpus import QuerySet
from llme_jax.data.instructions import instruction_of
from llme_jax.data.pairs import PairLayout
from llme_jax.data.rows import query_id_of
from llme_jax.data.scoring import ScoringData
from llme_jax.files.storage import open_folder, result_path
from llme_jax.models.cross_encoder import CrossEncoder
from llme_jax.rerank.cross_scorer import CrossScorer
from llme_jax.rerank.outputs import Written, write_all
from llme_jax.retrieval.results import append_log


def open_candidates(
    config: RankConfig, path: Path, found: Found | None = None
) -> ScoringData[CandidateRow]:
    """--eval_data, validated.

    Args:
        path: its rows.
        found: see `parse_candidates`.

    Raises:
        InputError: the file or a row cannot be used; names the line and the remedy.
    """
    data, metrics = config.data, config.evaluation.metrics

    def parse(record: dict, number: int) -> CandidateRow:
        query_id_of(record, number)
        row = parse_candidates(record, number, metrics=metrics, found=found)
        if config.ranker.ranker_method == "cross-encoder":
            instruction_of(data, row.task, row.prompt)  # is there one?
        return row

    return ScoringData(path, parse, QuerySet())


class RerankEvaluator:
    """Reranks --eval_data as often as wanted; it is read and tokenised once, when this is made.

    Args:
        path: its rows.
        mesh: whose devices share the pairs.

    Raises:
        InputError: the file or a row cannot be used; names the line and the remedy.
    """

    def __init__(
        self,
        config: RankConfig,
        path: Path,
        encoder: CrossEncoder,
        tokenizer,
        layout: PairLayout,
        mesh: Mesh,
    ):
        self._config = config
        self._data = open_candidates(config, path)
        self._scorer = CrossScorer(
            *(config.data, encoder, tokenizer, layout, mesh), config.evaluation.batch_size
        )
        rows = [row for _, row in self._data.rows()]
        self._tokens = self._scorer.tokens(rows, f"Tokenising {self._data.path.name}")

    @property
    def contents(self) -> list[str]:
        """Names what is read, by content."""
        return [self._data.digest]

    def __call__(self, params, step: int | None = None) -> dict[str, float]:
        """Metrics of these parameters, as {"mrr@10": 0.5, ...}.

        Process 0 also writes the result file and a line of --log_path, when these are wanted.

        Args:
            step: of the training run, for the log.
        """
        settings, first = self._config.evaluation, jax.process_index() == 0
        with tqdm(
            total=len(self._tokens[0]),
            desc="Reranking",
            unit=" pairs",
            leave=False,
            disable=not first,
        ) as bar:
            scores = self._scorer.bound(params)(self._tokens, lambda pairs, _: bar.update(pairs))
        path = None
        if settings.save_result and first:
            folder = open_folder(self._config.training.output_dir)
            path = result_path(folder, self._data.path, "result", settings.save_name)
        of_rows = np.split(scores, np.cumsum(self._data.candidates)[:-1])
        metrics, _ = write_all(settings, self._data, of_rows, Written(path, None, None))
        if first:
            append_log(settings.log_path, metrics, self._config.flat(), step)
        return metrics
