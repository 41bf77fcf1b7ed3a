"""Retrieved keys on disk: result files, metrics files, the log of all evaluations."""

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from llme_jax.config import EvalConfig
from llme_jax.data.corpus import Corpus, QuerySet
from llme_jax.devices.runtime import versions
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest_file
from llme_jax.files.storage import check_writable, in_bucket, result_path

logger = logging.getLogger(__name__)

PLACES = "places in rows"  # what numbers are that are of no corpus


def write_result(
    path: Path,
    query_ids: Sequence[int | str],
    ids: Int32[ndarray, "Q hits"],
    scores: Float32[ndarray, "Q hits"],
) -> None:
    """One line a query, in order: {"query_id", "pred": ids, "score"}, best first."""
    with atomic_text(path) as file:
        for query_id, pred, score in zip(query_ids, ids, scores, strict=True):
            found = pred >= 0
            row = {"query_id": query_id, "pred": pred[found].tolist()}
            row["score"] = score[found].tolist()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_trec(
    path: Path,
    query_ids: Sequence[int | str],
    ids: Int32[ndarray, "Q hits"],
    scores: Float32[ndarray, "Q hits"],
    corpus: Corpus,
    name: str,
) -> None:
    """The hits as a TREC run: query, Q0, passage, rank from 1, score, `name`.

    Passages have the ids of their lines in the corpus, or their numbers where these have none.
    Who reads such a file puts equal scores into an order of its own: ours fall at every rank, by
    the least that a float can.
    """
    with atomic_text(path) as file:
        for query_id, pred, score in zip(query_ids, ids, scores, strict=True):
            found, last = pred >= 0, np.float32(np.inf)
            for rank, (i, s) in enumerate(zip(pred[found], score[found], strict=True), 1):
                s = last = min(s, np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{query_id} Q0 {corpus.name(int(i))} {rank} {s} {name}\n")


def check_trec(query_ids: Sequence[int | str], corpus: Corpus) -> None:
    """
    Raises:
        InputError: an id has a blank, which ends a column of a TREC run.
    """
    names = chain(map(str, query_ids), map(corpus.name, range(len(corpus))))
    if wrong := next((name for name in names if not name or re.search(r"\s", name)), None):
        raise InputError(f"--save_trec: the id {wrong!r} has a blank; give ids without")


def write_source(result: Path, queries: QuerySet, corpus: str | None, method: str) -> None:
    """Says beside a result file what it was made from.

    Args:
        corpus: digest of the passages that its numbers are of; None where rows brought the numbers,
            PLACES where these are places in rows.
    """
    if in_bucket(result):
        return
    source = {"result": digest_file(result), "method": method, "corpus": corpus}
    source |= {"queries": queries.digest, "own_ids": queries.own_ids}
    write_json(_source_path(result), source)


def check_source(result: Path, corpus: Corpus, queries: QuerySet, named: Path) -> None:
    """Refuses a result file whose numbers are not those of these passages and queries.

    One without a word about that, or which was changed since, is taken as it is.

    Args:
        named: the file of the queries.

    Raises:
        InputError: it was made from others.
    """
    try:
        source = json.loads(_source_path(result).read_text(encoding="utf-8"))
        known = source["result"] == digest_file(result)
        of_corpus, of_queries, own_ids = (source[n] for n in ("corpus", "queries", "own_ids"))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not known:
        return
    if of_corpus == PLACES:
        raise InputError(
            f"{result}: its numbers are places in the rows that were ranked, not passages of a "
            "corpus; rank the hits of a result file of retrieve (llme_jax.rank --load_result)"
        )
    if of_corpus not in (None, corpus.digest):
        raise InputError(
            f"{result}: its numbers are those of another corpus than {corpus.path}, or of what "
            "that was before; give the --corpus that was searched, or retrieve again"
        )
    if of_queries != queries.digest and not (own_ids and queries.own_ids):
        raise InputError(
            f"{result}: was made for other queries than those of {named}, and no query_id tells "
            "which are the same; retrieve again, or give every row a query_id"
        )


def _source_path(result: Path) -> Path:
    """`test.result.bm25.json` -> `test.source.bm25.json`"""
    stem, _, rest = result.name.rpartition(".result.")
    return result.with_name(f"{stem}.source.{rest}")


def read_result(
    path: Path, query_ids: Sequence[int | str], corpus_size: int
) -> tuple[Float32[ndarray, "Q hits"], Int32[ndarray, "Q hits"]]:
    """Scores and ids of a result file, by query_id in the order of `query_ids`.

    A query that the file does not name has no hits; a line without scores, as the reference
    writes them, has scores that fall by 1 a rank.

    Raises:
        InputError: the file is missing, a line is malformed, or it belongs to another corpus.
    """
    found = read_predictions(path, corpus_size)
    if not set(found) & set(query_ids):
        raise InputError(f"{path}: has none of the query_ids of --eval_data; give its own file")
    rows = [found.get(query_id, ([], [])) for query_id in query_ids]
    hits = max(1, *(len(pred) for pred, _ in rows))
    scores = np.full((len(rows), hits), -np.inf, np.float32)
    ids = np.full((len(rows), hits), -1, np.int32)
    for i, (pred, score) in enumerate(rows):
        ids[i, : len(pred)], scores[i, : len(pred)] = pred, score
    return scores, ids


def read_predictions(
    path: Path, corpus_size: int
) -> dict[int | str, tuple[Int32[ndarray, "hits"], Float32[ndarray, "hits"]]]:
    """Ids and scores of every query_id of a result file, see `read_result`.

    Raises:
        InputError: the file is missing, a line is malformed, or it belongs to another corpus.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such result file; run once without --load_result")
    found = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                query_id, pred = row["query_id"], row["pred"]
                score = row.get("score") or [-float(rank) for rank in range(len(pred))]
                scores = np.array(score, np.float32)
                wrong = type(query_id) not in (int, str) or scores.shape != (len(pred),)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                wrong = True
            if wrong:
                raise InputError(
                    f"{path}:{number}: not a result, which has query_id, pred and as many score; "
                    "retrieve again without --load_result"
                )
            if any(type(i) is not int or not -(2**31) <= i < corpus_size for i in pred):
                raise InputError(
                    f"{path}:{number}: pred has {max(pred, key=str)}, the corpus {corpus_size} "
                    "passages; give the --corpus that was searched"
                )
            if len({i for i in pred if i >= 0}) < sum(i >= 0 for i in pred):
                raise InputError(
                    f"{path}:{number}: pred has a passage twice, which would count twice; keep its "
                    "best place only"
                )
            if query_id in found:
                raise InputError(
                    f"{path}:{number}: query_id {query_id} is that of an earlier line too; keep one"
                )
            found[query_id] = np.array(pred, np.int32), scores
    return found


def check_beside(folder: Path, remedy: str) -> None:
    """Finds out before any long work whether collated rows can be written beside --eval_data.

    Raises:
        InputError: they cannot; says the flag that writes them elsewhere.
    """
    if folder.is_dir():
        check_writable("--eval_data", folder, remedy=f"collated rows go there, give {remedy}")


def publish_metrics(
    output_dir: Path, eval_data: Path, how: EvalConfig, metrics: dict[str, float], settings: dict
) -> None:
    """Writes the metrics of a command beside its results, logs and prints them.

    Args:
        settings: all of the command, for the log.
    """
    path = result_path(output_dir, eval_data, "metrics", how.save_name)
    write_json(path, metrics)
    record = {"command": " ".join(sys.argv), "settings": settings, "versions": versions()}
    record |= {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    write_json(result_path(output_dir, eval_data, "run", how.save_name), record)
    append_log(how.log_path, metrics, settings)
    print(_table(metrics))
    logger.info("metrics: %s", path)


def write_json(path: Path, value: dict) -> None:
    with atomic_text(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _table(metrics: dict[str, float]) -> str:
    """Metrics in rows, cutoffs in columns; one column where there are none."""
    if not all("@" in name for name in metrics):
        width = max(map(len, metrics))
        return "\n".join(f"{name.ljust(width)}{value:12.4f}" for name, value in metrics.items())
    names = list(dict.fromkeys(name.split("@")[0] for name in metrics))
    cutoffs = sorted({int(name.split("@")[1]) for name in metrics})
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{f'@{k}':>9}" for k in cutoffs)]
    for name in names:
        values = (metrics.get(f"{name}@{k}") for k in cutoffs)
        cells = (f"{value:9.4f}" if value is not None else " " * 9 for value in values)
        lines.append(name.ljust(width) + "".join(cells).rstrip())
    return "\n".join(lines)


def check_log(path: str | None) -> None:
    """Finds out before any long work whether `append_log` will work; leaves nothing behind.

    Raises:
        InputError: it will not.
    """
    if not path:
        return
    file = Path(path).expanduser()
    if not os.path.lexists(file):
        check_writable("--log_path", path, is_file=True)
        return
    if file.is_fifo() or file.is_socket():
        raise InputError(f"--log_path {path}: is no file, opening it could wait for ever: give one")
    try:
        file.open("a").close()
    except OSError as error:
        raise InputError(
            f"--log_path {path}: cannot be written to ({error.strerror}): give another file"
        ) from None


def append_log(
    path: str | None, metrics: dict[str, float], settings: dict, step: int | None = None
) -> None:
    """A line of --log_path: when, what was asked for, what came out; nothing when it is None."""
    if not path:
        return
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "metrics": metrics,
        "command": " ".join(sys.argv),
        "settings": settings,
    }
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line, ensure_ascii=False) + "\n")
