"""Long-range language modelling: how likely a document's end is after chunks of it that were found.

A document's tokens are cut into chunks from its end, so that the first one may be shorter. Each
chunk of the target is scored after what was found with the chunk before it, and after the window up
to it; what follows a chunk cannot change its score, and is not read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llme_jax.config.evaluation import TaskConfig
from llme_jax.evaluation.msc import summary
from llme_jax.evaluation.prompts import Prompt
from llme_jax.evaluation.task import Scores, Task, needs_text

Asked = tuple[np.ndarray, int]  # tokens, and how many of the last are scored


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
        ends = range(len(tokens), 0, -size)
        chunks = [(max(end - size, 0), end) for end in ends][::-1]
        count, target = len(chunks), settings.target_length // size
        window = max(count - settings.context_window_size // size, 0)
        # A key stands with the chunk after it, and neither is in the window.
        keys = max(window - 1, 0)
        if settings.integrate_method == "replace" and window:
            keys = window + 1
        return cls(tokens, chunks, window, keys, [*range(count - target - 1, count - 1)])

    def chunk(self, i: int, chunks: int = 1) -> np.ndarray:
        last = min(i + chunks, len(self.chunks)) - 1
        return self.tokens[self.chunks[i][0] : self.chunks[last][1]]

    def after(self, found: Sequence[int], target: int, replace: bool) -> Asked:
        """What is read for a chunk of the target, with these keys before the window."""
        first = self.window + (2 * len(found) if replace else 0)
        hits = [self.chunk(i, 2) for i in found]
        tokens = np.concatenate(
            [*hits, self.tokens[self.chunks[first][0] : self.chunks[target][1]]]
        )
        start, end = self.chunks[target]
        return tokens, min(end - start, len(tokens) - 1)


def check(row: dict) -> None:
    needs_text(row, "text")


def tokens_of(row: dict, backend, settings: TaskConfig, longest: int) -> np.ndarray | None:
    """A document's tokens without special ones; None where it is shorter than the target."""
    ids = backend.encode(row["text"][: settings.anchor_length], add_special_tokens=False).ids
    if len(ids) < max(settings.target_length, 2):  # nothing predicts the first
        return None
    return np.array(ids[-longest:], np.uint32)


def plain(tokens: np.ndarray, settings: TaskConfig) -> list[Asked]:
    """The window alone."""
    tokens = tokens[-settings.context_window_size :]
    return [(tokens, min(settings.target_length, len(tokens) - 1))]


def longest(settings: TaskConfig, method: str) -> int:
    """Tokens that are read at most."""
    hits = 2 * settings.key_num * settings.chunk_size
    concat = method != "no" and settings.integrate_method == "concat"
    return settings.context_window_size + (hits if concat else 0)


def _no_prompt(*_) -> Prompt:
    raise NotImplementedError  # tokens are read, not a text


def judge(row: dict, likelihood: float) -> Scores:
    return {"log_likelihood": likelihood}


TASK = Task(check, _no_prompt, judge, summary, shared=False)
