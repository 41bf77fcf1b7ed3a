"""A file whose candidates are to be scored: validated in one pass, read again part by part."""

import json
from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from llme_jax.data.rows import BadRows, ScoringRow, parse_scoring_row, read_lines
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file


class ScoringData:
    """Rows of a JSON-lines file; of all of them, only counts are in memory.

    Args:
        path: JSON lines with `task`, `query`, `answers` and `pos` and `neg`, or `history`.
        tasks: those that there is a prompt for.

    Attributes:
        candidates, positives, answers: int32[n], how many each row has; the positives come first
            among the candidates.
        digest: hash of the file's content.

    Raises:
        InputError: there is no such file, or a row that cannot be scored: names file and line.
    """

    def __init__(self, path: str | Path, tasks: Collection[str]):
        self.path, self._tasks = Path(path).expanduser(), tasks
        if not self.path.is_file():
            raise InputError(f"--eval_data {path}: there is no such file")
        candidates, positives, answers = array("i"), array("i"), array("i")
        parse = partial(parse_scoring_row, tasks=tasks)
        for _, row in read_lines(str(self.path), parse, BadRows()):
            candidates.append(len(row.keys))
            positives.append(row.positives)
            answers.append(len(row.answers))
        if not candidates:
            raise InputError(f"{self.path}: has no rows, give --eval_data a file that does")
        self.candidates, self.positives, self.answers = (
            np.array(column, np.int32) for column in (candidates, positives, answers)
        )
        self.digest = digest_file(self.path)

    def __len__(self) -> int:
        return len(self.candidates)

    def records(self) -> Iterator[dict]:
        """Every row as it is in the file."""
        return (json.loads(line) for _, line in self._lines())

    def parts(self, ranges: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, ScoringRow]]]:
        """The rows of each range (start, stop), with the lines they are on.

        Ranges ascend and do not overlap; the file is read once, however many there are.
        """
        lines = enumerate(self._lines())
        for start, stop in ranges:
            part = []
            for i, (number, line) in lines:
                if i >= start:
                    part.append((number, parse_scoring_row(json.loads(line), self._tasks)))
                if i == stop - 1:
                    break
            yield part

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
