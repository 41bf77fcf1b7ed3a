"""A file whose candidates are to be scored: validated in one pass, read again part by part."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from llme_jax.data.corpus import QuerySet
from llme_jax.data.rows import BadRows, parse_line, read_lines
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest_file

R = TypeVar("R")


def check_eval_data(path: Path) -> None:
    """
    Raises:
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError(f"--eval_data {path}: there is no such file")


class ScoringData(Generic[R]):
    """Rows of a JSON-lines file; of all of them, only counts are in memory.

    Args:
        path: JSON lines.
        parse: makes a row of a parsed line and its number among the rows, from 0. A row has
            `keys` and `answers`; an InputError gets file and line in front.
        queries: gets every row; None where rows need no query, as token lists do not.

    Attributes:
        candidates, answers: int32[n], how many keys and answers each row has.
        digest: hash of the file's content.
        queries: which these are, where that was asked for.

    Raises:
        InputError: there is no such file, or a row that cannot be scored: names file and line.
    """

    def __init__(
        self,
        path: str | Path,
        parse: Callable[[dict, int], R],
        queries: QuerySet | None = None,
    ):
        self.path, self._parse = Path(path).expanduser(), parse
        check_eval_data(self.path)
        candidates, answers, numbers = array("i"), array("i"), count()
        self.queries = queries

        def parsed(record: dict) -> R:
            row = parse(record, next(numbers))
            if queries is not None:
                queries.add(record)
            return row

        for _, row in read_lines(str(self.path), parsed, BadRows()):
            candidates.append(len(row.keys))
            answers.append(len(row.answers))
        if not candidates:
            raise InputError(f"{self.path}: has no rows, give --eval_data a file that does")
        self.candidates, self.answers = (
            np.array(column, np.int32) for column in (candidates, answers)
        )
        self.digest = digest_file(self.path)

    def __len__(self) -> int:
        return len(self.candidates)

    def records(self) -> Iterator[dict]:
        """Every row as it is in the file."""
        return (parse_line(line) for _, line in self._lines())

    def rows(self) -> Iterator[tuple[dict, R]]:
        """Every row as it is in the file, and what was made of it."""
        return ((record, self._parse(record, i)) for i, record in enumerate(self.records()))

    def parts(self, ranges: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, R]]]:
        """The rows of each range (start, stop), with the lines they are on.

        Ranges ascend and do not overlap; the file is read once, however many there are.
        """
        lines = enumerate(self._lines())
        for start, stop in ranges:
            part = []
            for i, (number, line) in lines:
                if i >= start:
                    part.append((number, self._parse(parse_line(line), i)))
                if i == stop - 1:
                    break
            yield part

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
