"""Metrics of ranked retrieval, averaged over all queries.

`ids` holds the retrieved passages of every query, best first; -1 fills up rows with fewer hits.
A query without a hit counts as 0: every row of `ids` is in the denominator.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float, Int

from llme_jax.config.retrieval import NQ_CUTOFFS

logger = logging.getLogger(__name__)


def ranking_metrics(
    names: Sequence[str],
    ids: Int[np.ndarray, "Q hits"],
    positives: Sequence[Sequence[int]],
    cutoffs: Sequence[int],
) -> dict[str, float]:
    """Those of mrr, recall and ndcg that are among `names`, as {"mrr@10": 0.5, ...}.

    Args:
        positives: distinct passages that answer the query, at least one a query.
    """
    functions = {"mrr": mrr, "recall": recall, "ndcg": ndcg}
    relevant = relevance(ids, positives)
    counts = np.array([len(row) for row in positives])
    return {
        f"{name}@{k}": float(functions[name](relevant, counts, k).mean())
        for name in names
        if name in functions
        for k in cutoffs
    }


def found_within(metrics: dict[str, float], hits: int, corpus_size: int) -> dict[str, float]:
    """Those that so many hits of such a corpus give; what is left out is said.

    recall@100 of the best 20 hits would be recall@20.
    """
    if hits >= corpus_size:
        return metrics
    kept = {name: value for name, value in metrics.items() if int(name.split("@")[1]) <= hits}
    if missing := metrics.keys() - kept:
        names = ", ".join(sorted(missing, key=lambda name: (name[0], len(name), name)))
        logger.warning("no %s: there are %d hits a query at most", names, hits)
    return kept


def relevance(
    ids: Int[np.ndarray, "Q hits"], positives: Sequence[Sequence[int]]
) -> Bool[np.ndarray, "Q hits"]:
    """Which of the retrieved passages are positives of their query."""
    rows = [np.isin(row, positive) for row, positive in zip(ids, positives, strict=True)]
    return np.stack(rows) & (ids >= 0)


def mrr(
    relevant: Bool[np.ndarray, "Q hits"], counts: Int[np.ndarray, "Q"], k: int
) -> Float[np.ndarray, "Q"]:
    """1 / rank of the first positive, 0 when it is not among the first k."""
    found = relevant[:, :k]
    return found.any(axis=1) / (found.argmax(axis=1) + 1)


def recall(
    relevant: Bool[np.ndarray, "Q hits"], counts: Int[np.ndarray, "Q"], k: int
) -> Float[np.ndarray, "Q"]:
    """Share of the positives that are among the first k."""
    return relevant[:, :k].sum(axis=1) / counts


def ndcg(
    relevant: Bool[np.ndarray, "Q hits"], counts: Int[np.ndarray, "Q"], k: int
) -> Float[np.ndarray, "Q"]:
    """DCG with gain 1 for a positive and discount log2(rank + 1), over the best possible DCG.

    The best ranking has all positives in front, whether or not they were retrieved.
    """
    discount = 1 / np.log2(np.arange(2, k + 2))
    found = relevant[:, :k]
    ideal = discount.cumsum()[np.minimum(counts, k) - 1]
    return found @ discount[: found.shape[1]] / ideal


def answer_recall(
    ids: Int[np.ndarray, "Q hits"],
    answers: Sequence[Sequence[str]],
    text: Callable[[int], str],
) -> dict[str, float]:
    """Share of the queries with a passage that contains an answer among the first 1, 5, ... 100.

    The metric of DPR (arXiv:2004.04906) for open-domain questions.

    Args:
        answers: accepted answers of each query, any of which counts.
        text: passage by index.
    """
    passages = ((text(int(i)) if i >= 0 else "" for i in row) for row in ids)
    return answer_recall_at(map(answer_rank, passages, answers))


def answer_recall_at(ranks: Iterable[float]) -> dict[str, float]:
    """`answer_recall` from the rank, see `answer_rank`, of each query's first answer."""
    ranks = np.array(list(ranks), np.float64)
    return {f"answer_recall@{k}": float((ranks < k).mean()) for k in NQ_CUTOFFS}


def answer_rank(passages: Iterable[str], answers: Sequence[str]) -> float:
    """Rank, from 0, of the first passage with an answer; infinite when there is none."""
    runs = [_token_run(answer) for answer in answers]
    for rank, passage in enumerate(islice(passages, max(NQ_CUTOFFS))):
        if _contains(_token_run(passage), runs):
            return float(rank)
    return np.inf


def has_answer(passage: str, answers: Sequence[str]) -> bool:
    """Is any answer a contiguous run of the passage's tokens?

    Tokens are runs of letters, digits and marks, or single other symbols, lower-cased after
    canonical decomposition: "us" is not found in "business", "U.S." is in "the u.s. army".
    """
    return _contains(_token_run(passage), [_token_run(answer) for answer in answers])


def _contains(passage: str, runs: Sequence[str]) -> bool:
    return any(run in passage for run in runs if run != "  ")


def _token_run(text: str) -> str:
    """Tokens between single spaces, so that substrings of it are runs of whole tokens."""
    tokens = _token_pattern().findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(tokens)} ".lower()


@cache
def _token_pattern():
    import regex  # the standard library's re has no Unicode classes

    return regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
