"""What a reranking leaves: rows in order, their metrics, collated rows with teacher scores."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from llme_jax.config import RerankConfig
from llme_jax.config.retrieval import METRICS
from llme_jax.data.candidates import CandidateRow
from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import SCORES_OF, query_id_of, scored_source
from llme_jax.data.scoring import ScoringData
from llme_jax.files.atomic import atomic_text
from llme_jax.inference.partial_results import decimals
from llme_jax.lm.teacher_report import Report
from llme_jax.retrieval.metrics import answer_rank, answer_recall_at, ranking_metrics
from llme_jax.retrieval.results import PLACES, write_source


class Order(NamedTuple):
    """The candidates of a row, best first."""

    places: ndarray  # int[hits], which of the row's candidates
    scores: ndarray  # float32[hits]

    @classmethod
    def of(cls, scores: ndarray, hits: int | None) -> "Order":
        """By score; of equal ones the earlier first."""
        places = np.argsort(-scores, kind="stable")[:hits]
        return cls(places, scores[places])


def mixed(scores: ndarray, retrieved: ndarray, weight: float) -> ndarray:
    """What ranker and retriever say together of a query's candidates, float32[n].

    Each is brought to mean 0 and deviation 1: a ranker's logits and a retriever's similarities
    have no common unit.

    Args:
        weight: what `retrieved` counts, the others count 1 - weight.
    """
    if not len(scores):
        return scores
    both = (x.astype(np.float64) for x in (scores, retrieved))
    ranker, retriever = ((x - x.mean()) / (x.std() or 1.0) for x in both)
    return ((1 - weight) * ranker + weight * retriever).astype(np.float32)


class Measured:
    """Metrics of rows that are added one by one."""

    def __init__(self, settings: RerankConfig):
        self._settings = settings
        self._ids: list[ndarray] = []
        self._relevant: list[list[int]] = []
        self._answer_ranks: list[float] = []

    def add(self, row: CandidateRow, order: Order) -> None:
        # A passage that is listed twice counts where it stands first.
        ids = dict.fromkeys(row.ids[i] for i in order.places)
        self._ids.append(np.array([*ids], np.int64))
        self._relevant.append(row.relevant)
        if "nq" in self._settings.metrics:
            texts = (row.keys[i] for i in order.places)
            self._answer_ranks.append(answer_rank(texts, row.answers))

    def metrics(self) -> dict[str, float]:
        """As {"mrr@10": 0.5, ...}; those that are wanted."""
        found = {}
        if {*self._settings.metrics} & {*METRICS} - {"nq"}:
            ids = np.full((len(self._ids), max(1, *map(len, self._ids))), -1, np.int64)
            for row, own in zip(ids, self._ids, strict=True):
                row[: len(own)] = own
            settings = self._settings
            found |= ranking_metrics(settings.metrics, ids, self._relevant, settings.cutoffs)
        if "nq" in self._settings.metrics:
            found |= answer_recall_at(self._answer_ranks)
        return found


class Written(NamedTuple):
    """Where each kind of rows goes; None: nowhere."""

    result: Path | None
    key: Path | None
    scored: Path | None


class Writer:
    """Writes rows as they come; the files appear when the `with` block ends without an error."""

    def __init__(self, files: Written, *, found: bool):
        """
        Args:
            found: the candidates are of a result file; scored rows get them as `key`.
        """
        self._files, self._found = files, found
        self._stack, self._open = ExitStack(), {}
        self._scores: list[ndarray] = []
        self._positives: list[int] = []

    def __enter__(self) -> "Writer":
        with ExitStack() as stack:
            for name, path in self._files._asdict().items():
                if path:
                    self._open[name] = stack.enter_context(atomic_text(path))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def add(self, record: dict, number: int, row: CandidateRow, scores: ndarray, order: Order):
        """A row: its line in the file, what was made of it, the scores of all its candidates."""
        if "result" in self._open:
            first = {}  # a passage that is listed twice stands where it is better
            for place, i in enumerate(order.places):
                first.setdefault(row.ids[i], place)
            found = {"query_id": query_id_of(record, number), "pred": [*first]}
            scores_of = order.scores[[*first.values()]]
            self._write("result", found | {"score": decimals(scores_of)})
        if "key" in self._open:
            ranked = record | {"key": [row.keys[i] for i in order.places]}
            ranked.pop("key_index", None)  # places in a row are none
            if row.numbered:
                ranked["key_index"] = [row.ids[i] for i in order.places]
            self._write("key", ranked)
        if "scored" in self._open:
            keys = {"key": row.keys, "key_index": row.ids} if self._found else {}
            scored = record | keys | {"teacher_scores": decimals(scores)}
            scored.pop(SCORES_OF, None)
            if row.source != scored_source(record):  # training would read them as others'
                scored[SCORES_OF] = row.source
            self._write("scored", scored)
            right = np.isin(row.ids, row.relevant)
            self._scores.append(np.concatenate([scores[right], scores[~right]]))
            self._positives.append(int(right.sum()))

    def report(self) -> Report | None:
        """What the teacher scores are worth; None where no row has two to compare."""
        if not any(len(scores) > 1 for scores in self._scores):
            return None
        return Report(self._scores, self._positives)

    def _write(self, name: str, record: dict) -> None:
        self._open[name].write(json.dumps(record, ensure_ascii=False) + "\n")


def write_all(
    settings: RerankConfig,
    rows: ScoringData[CandidateRow],
    scores: Iterable[ndarray],
    files: Written,
    corpus: Corpus | None = None,
) -> tuple[dict[str, float], Report | None]:
    """All files and metrics of a reranking, in one pass over the rows.

    Args:
        scores: of the candidates of each row, float32[n].
        corpus: that the candidates were found in; None where rows bring their own.

    Returns:
        The metrics, and what the teacher scores are worth, see `Writer.report`.
    """
    measured, numbered = Measured(settings), True
    with Writer(files, found=settings.load_result is not None) as out:
        for i, ((record, row), own) in enumerate(zip(rows.rows(), scores, strict=True)):
            if settings.retriever_weight:
                own = mixed(own, row.retrieved, settings.retriever_weight)
            order, numbered = Order.of(own, settings.hits), numbered and row.numbered
            measured.add(row, order)
            out.add(record, i, row, own, order)
    if files.result:
        of = corpus.digest if corpus else None if numbered else PLACES
        write_source(files.result, rows.queries, of, "rank")
    return measured.metrics(), out.report()
