"""What was retrieved becomes keys to read or negatives to train on: rows in, rows out, in order."""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from llme_jax.config import MiningConfig
from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import SCORES_OF, BadRows, read_lines
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text
from llme_jax.retrieval.metrics import has_answer

# Fields that say something of the negatives that a row had before.
OF_OTHERS = {"teacher_scores", "pos_scores", "neg_scores", SCORES_OF, "neg_id"}
NEARLY = 0.9  # of all words of two texts; what is so alike is rather a positive
BINS = 40  # of the histograms of scores


class Ranking(NamedTuple):
    """One method's hits for all queries, best first; id -1 fills up."""

    name: str
    scores: Float32[ndarray, "Q hits"]
    ids: Int32[ndarray, "Q hits"]

    def first(self, hits: int) -> "Ranking":
        return self._replace(scores=self.scores[:, :hits], ids=self.ids[:, :hits])


class Hit(NamedTuple):
    """A passage in a ranking."""

    id: int
    source: str  # name of the ranking
    rank: int  # from 0
    score: float


@dataclass
class Report:
    """What mining did; counts are passages unless they say queries."""

    queries: int = 0
    negatives: int = 0
    without_any: int = 0  # queries
    too_few: int = 0  # queries with fewer than max_neg_num
    positive_not_found: int = 0  # queries, in the first ranking
    judged: int = 0  # hits that a reranker has scored
    positive_not_judged: int = 0  # queries
    near_copies: int = 0  # negatives with nearly the text of a positive
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)  # negatives of each ranking
    ranks: dict[int, int] = field(default_factory=dict)  # negatives of each rank, from 0
    # In the first ranking: of each query's best positive, of all negatives.
    positive_scores: array = field(default_factory=lambda: array("d"))
    negative_scores: array = field(default_factory=lambda: array("d"))

    def drop(self, reason: str) -> None:
        _count(self.dropped, reason)

    def add(self, hits: list[Hit], positives: set[int], taken: list[Hit], wanted: int) -> None:
        """Counts a query: its hits in the first ranking and the negatives taken for it."""
        self.queries += 1
        self.negatives += len(taken)
        self.without_any += not taken
        self.too_few += len(taken) < wanted
        for hit in taken:
            _count(self.sources, hit.source)
            _count(self.ranks, hit.rank)
        found = [hit.score for hit in hits if hit.id in positives]
        self.positive_not_found += bool(positives) and not found
        if found:
            self.positive_scores.append(max(found))
        if hits:
            first = hits[0].source
            self.negative_scores.extend(hit.score for hit in taken if hit.source == first)

    def facts(self) -> dict:
        """Everything as JSON; of the scores, how many lie in each of BINS equal bins."""
        kept = ("positive_scores", "negative_scores")
        facts = {name: value for name, value in vars(self).items() if name not in kept}
        facts["ranks"] = dict(sorted(self.ranks.items()))
        scores = np.concatenate([self.positive_scores, self.negative_scores])
        if scores.size:
            edges = np.linspace(scores.min(), scores.max(), BINS + 1)
            facts["score_edges"] = edges.tolist()
            for name in kept:
                facts[name] = np.histogram(getattr(self, name), edges)[0].tolist()
        return facts

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        lines = [
            f"{self.negatives} negatives for {self.queries} queries",
            f"queries with none: {self.without_any}, with fewer than --max_neg_num: {self.too_few}",
            f"passages left out: {dropped or 'none'}",
        ]
        if self.near_copies:
            lines.append(f"negatives with nearly the text of a positive: {self.near_copies}")
        if self.positive_scores or self.positive_not_found:
            lines.append(f"queries whose positives are not among the hits: "
                         f"{self.positive_not_found}")  # fmt: skip
        if self.positive_not_judged:
            lines.append(f"queries whose positives the reranker has not scored, so that "
                         f"--rerank_margin drops nothing: {self.positive_not_judged}")  # fmt: skip
        for name in ("positive", "negative"):
            scores = getattr(self, f"{name}_scores")
            if scores:
                low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9])
                lines.append(f"{name} scores, 10% / median / 90%: "
                             f"{low:.4f} / {middle:.4f} / {high:.4f}")  # fmt: skip
        return "\n".join(lines)


def _count(counts: dict, name) -> None:
    counts[name] = counts.get(name, 0) + 1


def collate_key(path: Path, eval_data: Path, corpus: Corpus, ranking: Ranking) -> None:
    """Every row of `eval_data` with `key` and `key_index`: the texts and numbers of its hits."""
    with atomic_text(path) as out:
        for i, row in _rows(eval_data):
            ids = [int(id) for id in ranking.ids[i] if id >= 0]
            row |= {"key": [corpus.text(id) for id in ids], "key_index": ids}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def collate_neg(
    path: Path,
    eval_data: Path,
    corpus: Corpus,
    rankings: list[Ranking],
    settings: MiningConfig,
    reranker: Sequence[dict[int, float]] | None = None,
) -> Report:
    """Every row of `eval_data` with `neg` and `neg_index` replaced by what was retrieved.

    Several rankings take turns: the best of each, then the second of each, and so on. The row
    says in `neg_source`, `neg_rank` (from 0) and `neg_score` where each came from; its
    scores belonged to other negatives and are removed.

    Args:
        rankings: of the queries of `eval_data`, in its order.
        reranker: a reranker's scores of each query's hits, by their ids; `neg_reranker_score` has
            those of the negatives.

    Raises:
        InputError: the reranker has scored none of the hits.
    """
    report = Report()
    with atomic_text(path) as out:
        for i, row in _rows(eval_data):
            scores = reranker and reranker[i]
            taken = mine(row, [_hits(r, i) for r in rankings], corpus, settings, report, scores)
            row["neg"], row["neg_index"] = list(taken.values()), [hit.id for hit in taken]
            row["neg_source"] = [hit.source for hit in taken]
            row["neg_rank"] = [hit.rank for hit in taken]
            row["neg_score"] = [hit.score for hit in taken]
            row.pop("neg_reranker_score", None)
            if scores is not None:
                row["neg_reranker_score"] = [scores[hit.id] for hit in taken]
            for name in OF_OTHERS:
                row.pop(name, None)
            if not row.get("pos") and row.get("pos_index"):  # BEIR's rows name theirs by id
                row["pos"] = [corpus.text(n) for n in row["pos_index"]]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        if reranker is not None and not report.judged:
            raise InputError(
                f"--rerank_result {settings.rerank_result}: scores none of these hits; rerank "
                "their result file with llme_jax.rank --load_result"
            )
    return report


def mine(
    row: dict,
    rankings: list[list[Hit]],
    corpus: Corpus,
    settings: MiningConfig,
    report: Report,
    reranker: dict[int, float] | None = None,
) -> dict[Hit, str]:
    """The negatives of one row and their texts, at most `max_neg_num`, in the order taken.

    Left out are positives, by number and by text (a corpus may hold a text twice), the query's own
    text (a corpus of questions holds the queries), what was taken already, and what the settings
    ask for. Texts that differ in case and spacing alone are the same.
    """
    positives, answers = set(row.get("pos_index") or []), row.get("answers") or []
    query = same_text(row.get("query") or "")
    texts = {same_text(t) for t in [*(row.get("pos") or []), *(corpus.text(i) for i in positives)]}
    right = [{*text.split()} for text in texts]
    allowed = [_allowed(hits, positives, settings, report) for hits in rankings]
    if reranker is not None:
        report.judged += sum(hit.id in reranker for hits in rankings for hit in hits)
    ceiling = _reranker_ceiling(reranker, positives, settings, report)
    taken: dict[Hit, str] = {}
    for hit in chain.from_iterable(zip_longest(*allowed)):
        if len(taken) == settings.max_neg_num:
            break
        if hit is None:
            continue
        text = corpus.text(hit.id)
        same = same_text(text)
        if same == query:
            report.drop("with the text of the query")
        elif same in texts:
            report.drop("with the text of a positive or of another negative")
        elif settings.filter_answers and has_answer(text, answers):
            report.drop("with an answer")
        elif reranker is not None and hit.id not in reranker:
            report.drop("without a score of the reranker")
        elif reranker is not None and reranker[hit.id] > ceiling:
            report.drop("scored too high by the reranker")
        else:
            texts.add(same)
            taken[hit] = text
            report.near_copies += any(map(partial(_nearly_same, {*same.split()}), right))
    report.add(rankings[0], positives, list(taken), settings.max_neg_num)
    return taken


def _nearly_same(one: set[str], other: set[str]) -> bool:
    """Whether nine in ten of the words of two texts are the same."""
    return len(one & other) >= NEARLY * len(one | other) > 0


def same_text(text: str) -> str:
    """Equal for texts that differ in case and spacing alone."""
    return " ".join(text.split()).casefold()


def _allowed(
    hits: list[Hit], positives: set[int], settings: MiningConfig, report: Report
) -> list[Hit]:
    """The hits that are no positives, inside the rank window, and not scored too high."""
    last = len(hits) if settings.range_max is None else settings.range_max
    ceiling = _ceiling(hits, positives, settings)
    allowed = []
    for hit in hits:
        if hit.id in positives:
            continue
        if not settings.range_min <= hit.rank < last:
            report.drop("outside the rank window")
        elif hit.score > ceiling:
            report.drop("scored too high")
        else:
            allowed.append(hit)
    return allowed


def _reranker_ceiling(
    scores: dict[int, float] | None, positives: set[int], settings: MiningConfig, report: Report
) -> float:
    """The reranker's score above which a passage is more likely an unmarked positive."""
    if scores is None:
        return np.inf
    bounds = [np.inf if settings.rerank_max_score is None else settings.rerank_max_score]
    if settings.rerank_margin is not None:
        own = [scores[i] for i in positives if i in scores]
        bounds += [max(own) - settings.rerank_margin] if own else []
        report.positive_not_judged += not own
    return min(bounds)


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    return enumerate(row for _, row in read_lines(str(path), lambda row: row, BadRows()))


def _hits(ranking: Ranking, query: int) -> list[Hit]:
    pairs = zip(ranking.ids[query].tolist(), ranking.scores[query].tolist(), strict=True)
    return [Hit(id, ranking.name, rank, s) for rank, (id, s) in enumerate(pairs) if id >= 0]


def _ceiling(hits: list[Hit], positives: set[int], settings: MiningConfig) -> float:
    """The score above which a passage is more likely a positive nobody has marked.

    The margins count from the best positive's score; one that is not among the hits scores no
    higher than the last of them.
    """
    bounds = [np.inf]
    if settings.max_score is not None:
        bounds.append(settings.max_score)
    if positives and hits and (settings.margin is not None or settings.relative_margin is not None):
        best = max((h.score for h in hits if h.id in positives), default=hits[-1].score)
        if settings.margin is not None:
            bounds.append(best - settings.margin)
        if settings.relative_margin is not None:
            bounds.append(best - abs(best) * settings.relative_margin)
    return min(bounds)
