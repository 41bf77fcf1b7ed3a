"""Rows that are long documents: their end is asked for, after chunks of them that were found.

A document's tokens are cut into chunks from its end, so that the first one may be shorter. Each
chunk of the target is scored after what was found with the chunk before it, and after the window up
to it; what follows a chunk cannot change its score, and is not read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llme_jax.config.evaluation import EvaluateConfig, TaskConfig
from llme_jax.errors import InputError
from llme_jax.evaluation.own_keys import drawn, nearest
from llme_jax.evaluation.questions import NO_KEYS, Questions, Rows, Tokens
from llme_jax.files.atomic import digest
from llme_jax.hugging_face.tokenizer import plain_backend

# Of each chunk of the target, the keys that are read together; several where all are tried.
Found = list[list[list[int]]]


class Document(NamedTuple):
    """
    Attributes:
        tokens: the last --context_max_length of them.
        chunks: each one's first token and the one after its last.
        window: the chunk that the window begins with.
        keys: chunks, from the first, that can be found.
        queries: the chunk before each of the target's.
    """

    tokens: np.ndarray
    chunks: list[tuple[int, int]]
    window: int
    keys: int
    queries: list[int]

    @classmethod
    def of(cls, tokens: np.ndarray, settings: TaskConfig) -> "Document":
        size = settings.chunk_size
        chunks = [(max(end - size, 0), end) for end in range(len(tokens), 0, -size)][::-1]
        count, target = len(chunks), settings.target_length // size
        window = max(count - settings.context_window_size // size, 0)
        # A key stands with the chunk after it, and neither is in the window.
        keys = max(window - 1, 0)
        if settings.integrate_method == "replace" and window:
            keys = window + 1
        return cls(tokens, chunks, window, keys, [*range(count - target - 1, count - 1)])

    def chunk(self, i: int, chunks: int = 1) -> np.ndarray:
        """The tokens of chunk i, or of so many from it on."""
        last = min(i + chunks, len(self.chunks)) - 1
        return self.tokens[self.chunks[i][0] : self.chunks[last][1]]

    def after(self, found: Sequence[int], target: int, replace: bool) -> tuple[np.ndarray, int]:
        """What is read for a chunk of the target, with these keys before the window."""
        first = self.window + (2 * len(found) if replace else 0)
        start, end = self.chunks[target]
        hits = [self.chunk(i, 2) for i in found]
        tokens = np.concatenate([*hits, self.tokens[self.chunks[first][0] : end]])
        return tokens, min(end - start, len(tokens) - 1)

    def alone(self, settings: TaskConfig) -> tuple[np.ndarray, int]:
        """The window, without any keys."""
        tokens = self.tokens[-settings.context_window_size :]
        return tokens, min(settings.target_length, len(tokens) - 1)


def longest(settings: TaskConfig, method: str) -> int:
    """Tokens that are read at most."""
    hits = 2 * settings.key_num * settings.chunk_size
    before = method != "no" and settings.integrate_method == "concat"
    return settings.context_window_size + (hits if before else 0)


def document_questions(config: EvaluateConfig, cache: Path, rows: Rows, tokenizer) -> Questions:
    """
    Raises:
        InputError: no document is as long as the target.
    """
    settings, backend = config.task, plain_backend(tokenizer)
    documents: list[Document | None] = []
    for row in rows.rows:
        text = row["text"][: settings.anchor_length]
        ids = backend.encode(text, add_special_tokens=False).ids
        enough = len(ids) >= max(settings.target_length, 2)  # nothing predicts the first
        ids = np.array(ids[-config.lm.context_max_length :], np.uint32)
        documents.append(Document.of(ids, settings) if enough else None)
    if not any(documents):
        raise InputError(
            f"{rows.path}: no text has {settings.target_length} tokens, give a shorter "
            "--target_length"
        )
    found = _found(config, cache, rows, documents, backend)
    replace = settings.integrate_method == "replace"

    def prompts(i: int) -> Tokens:
        document = documents[i]
        if document is None:
            return []
        if i not in found:
            return [document.alone(settings)]
        return [
            document.after(keys, query + 1, replace)
            for query, tried in zip(document.queries, found[i], strict=True)
            for keys in tried
        ]

    def number(of_found) -> np.ndarray:
        of_row = [of_found(found[i]) if i in found else 1 for i in range(len(documents))]
        return np.array([n if d else 0 for n, d in zip(of_row, documents, strict=True)])

    return Questions(
        rows.rows,
        prompts,
        counts=number(lambda parts: sum(map(len, parts))),
        parts=number(len),
        written=np.zeros(len(documents), bool),
        keys=NO_KEYS,
        found=digest(sorted(found.items())),
    )


def _found(
    config: EvaluateConfig,
    cache: Path,
    rows: Rows,
    documents: Sequence[Document | None],
    backend,
) -> dict[int, Found]:
    """Of each document that has keys, those that are read."""
    settings, how = config.task, config.retrieval
    places = [i for i, document in enumerate(documents) if document and document.keys]
    searched = [documents[i] for i in places]
    if how.retrieval_method == "no":
        return {}
    if how.retrieval_method == "oracle":
        return {
            i: [[[key] for key in range(document.keys)] for _ in document.queries]
            for i, document in zip(places, searched, strict=True)
        }
    if how.retrieval_method == "random":
        asked, keys = [len(d.queries) for d in searched], [d.keys for d in searched]
        found = drawn(how.seed, asked, keys, settings.key_num)
    else:

        def decoded(document: Document, chunks: Sequence[int], width: int = 1) -> list[str]:
            tokens = (document.chunk(i, width).tolist() for i in chunks)
            return [backend.decode(ids, skip_special_tokens=True) for ids in tokens]

        width = 2 if settings.add_key_continuation else 1
        queries = [decoded(d, d.queries) for d in searched]
        keys = [decoded(d, range(d.keys), width) for d in searched]
        found = nearest(config, cache, "lrlm", rows.path, queries, keys, settings.key_num)
    in_order = sorted if settings.order_method == "sequential" else lambda keys: keys[::-1]
    return {
        i: [[in_order(of_query.tolist())] for of_query in of_row]
        for i, of_row in zip(places, found, strict=True)
    }
