"""What a language model is asked: rows, their keys, and the tokens that it reads for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Of each prompt, and how many of the last are scored; none where the model writes.
Tokens = list[tuple[np.ndarray, int]]


class Keys(NamedTuple):
    """
    Attributes:
        of: of row i the texts, the best first, and their numbers in the corpus, where they are of
            one.
        digest: of all of them.
    """

    of: Callable[[int], tuple[Sequence[str], list[int] | None]]
    digest: str

    def only(self, rows: Sequence[int]) -> "Keys":
        """The keys of some rows."""
        return self._replace(of=lambda i: self.of(rows[i]))


NO_KEYS = Keys(lambda i: ((), None), "")


class Rows(NamedTuple):
    """The rows of a file.

    Attributes:
        lines: file and line of each, for messages.
    """

    path: Path
    rows: Sequence[dict]
    lines: Sequence[str]

    def only(self, chosen: Sequence[int]) -> "Rows":
        rows, lines = ([values[i] for i in chosen] for values in self[1:])
        return self._replace(rows=rows, lines=lines)


@dataclass
class Questions:
    """
    Attributes:
        prompts: of row i.
        counts: int[n], numbers that the model gives for each row; 0 where it is not asked.
        parts: int[n], parts of each row's answer that are scored one by one.
        written: bool[n], does the model write?
        keys: that it reads.
        found: digest of the keys that were found.
    """

    rows: Sequence[dict]
    prompts: Callable[[int], Tokens]
    counts: np.ndarray
    parts: np.ndarray
    written: np.ndarray
    keys: Keys
    found: str
