"""Approximate search: any index that faiss can make of a factory string, on the CPU."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write
from llme_jax.files.checksums import is_sealed, seal_file
from llme_jax.retrieval.exact import Rows

logger = logging.getLogger(__name__)

TRAINED_ON = 1 << 18  # keys at most; k-means itself takes 256 a centroid
ADDED = 1 << 16  # keys at a time


def index_path(folder: Path, name: str, factory: str) -> Path:
    """Where the index of the embeddings called `name` is kept."""
    return folder / f"{name}.{re.sub(r'[^A-Za-z0-9]+', '-', factory)}.faiss"


def open_index(path: Path):
    """Reads a saved index; None where there is none, or it is not as it was written."""
    if not path.is_file():
        return None
    if not is_sealed(path):
        logger.warning("%s is damaged: it is not used", path)
        return None
    return _faiss().read_index(str(path))


def empty_index(width: int, factory: str, metric: Literal["cos", "ip", "l2"]):
    """The index that `factory` describes, as in "IVF1024,PQ32" or "HNSW32".

    Raises:
        InputError: faiss is missing or does not know the string.
    """
    faiss = _faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    return _tried(factory, lambda: faiss.index_factory(width, factory, kind))


def build_index(keys: Rows, factory: str, metric: Literal["cos", "ip", "l2"], seed: int):
    """`empty_index`, trained on the keys and filled with them.

    Raises:
        InputError: as for `empty_index`, or the corpus is too small for the index.
    """
    index = empty_index(keys.shape[1], factory, metric)
    if not index.is_trained:
        rng = np.random.default_rng(seed % 2**63)
        chosen = np.sort(rng.choice(len(keys), min(len(keys), TRAINED_ON), replace=False))
        _tried(factory, lambda: index.train(np.concatenate([keys[i : i + 1] for i in chosen])))
    with tqdm(total=len(keys), desc=f"Building {factory}", unit=" keys", leave=False) as bar:
        for start in range(0, len(keys), ADDED):
            rows = np.ascontiguousarray(keys[start : start + ADDED], np.float32)
            index.add(rows)
            bar.update(len(rows))
    return index


def save_index(index, path: Path) -> None:
    with atomic_write(path) as beside:
        _faiss().write_index(index, str(beside))
        seal_file(beside)


def search_index(
    index, queries: np.ndarray, hits: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and ids int32 [Q, hits] as `index.search` gives them: higher is better, l2
    scores are negative squared distances, -inf and -1 fill up."""
    l2 = index.metric_type == _faiss().METRIC_L2
    scores, ids = [], []
    for start in tqdm(
        range(0, len(queries), batch_size), desc="Searching", unit=" batches", leave=False
    ):
        values, found = index.search(queries[start : start + batch_size], hits)
        scores.append(np.where(found >= 0, -values if l2 else values, -np.inf))
        ids.append(found.astype(np.int32))
    return np.concatenate(scores).astype(np.float32), np.concatenate(ids)


def _tried(factory: str, make: Callable):
    try:
        return make()
    except RuntimeError as error:
        # faiss puts file, line and the failed assertion in front
        reason = str(error).splitlines()[-1].rsplit("failed: ", 1)[-1].strip()
        raise InputError(
            f"--faiss_index_factory {factory}: faiss says '{reason}'; give Flat or a string from "
            "faiss' guide that fits the corpus"
        ) from None


def _faiss():
    try:
        import faiss
    except ImportError:
        raise InputError(
            "--faiss_index_factory other than Flat needs faiss: pip install 'llme_jax[faiss]'"
        ) from None
    return faiss
