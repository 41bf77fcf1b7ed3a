"""Scores as they come: parts of a file's rows on disk, so that a killed run continues."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from llme_jax.data.arrays import left_before, save_array
from llme_jax.data.prefetch import prefetch
from llme_jax.errors import RunError
from llme_jax.files.atomic import atomic_write, digest

logger = logging.getLogger(__name__)

T = TypeVar("T")


def parts_folder(out: Path, describe: dict) -> Path:
    """Where unfinished scores are kept: a folder for each set of things that they depend on.

    Args:
        out: the file that the scores are for.
        describe: these things, by name.
    """
    parts = out.with_suffix(".parts") / digest(sorted(describe.items()))
    if jax.process_index() == 0:
        with atomic_write(parts / "manifest.json") as beside:
            beside.write_text(json.dumps(describe, indent=2) + "\n")
    return parts


def decimals(scores: Iterable[np.float32]) -> list[float]:
    """The shortest decimals that are the same fp32 numbers."""
    return [float(str(score)) for score in scores]


class PartialResults:
    """Scores of all pairs of n rows; the parts that are finished are files of one folder.

    With several processes all hold the same scores, and the files are those of process 0.

    Args:
        folder: `{first row}-{row after the last}.npy`, float32[pairs], each there or not at all.
        pairs: int[n], pairs of every row.
        steps: int[n], what each row counts on the progress bar; its pairs when None.
        unit, desc: what the bar says of these.

    Attributes:
        scores: float32[all pairs], in the order of the rows; NaN where there is none yet.
        found: pairs that were finished before.
    """

    def __init__(
        self,
        folder: Path,
        pairs: np.ndarray,
        steps: np.ndarray | None = None,
        unit: str = " pairs",
        desc: str = "Scoring",
    ):
        self._folder, self._unit, self._desc = folder, unit, desc
        self._steps = pairs if steps is None else steps
        self._first = np.cumsum([0, *pairs])
        self._done = np.zeros(len(pairs), bool)
        self.scores = np.full(self._first[-1], np.nan, np.float32)
        if jax.process_index() == 0:
            for path in sorted(folder.glob("[0-9]*-[0-9]*.npy")):
                start, stop = map(int, path.stem.split("-"))
                part = left_before(path, int(self._first[stop] - self._first[start]), 1)
                if part is None or not np.isfinite(part).all():
                    logger.warning("%s is damaged: its pairs are scored again", path)
                else:
                    self._set(start, stop, part)
        if jax.process_count() > 1:
            state = self._done, self.scores
            self._done, self.scores = multihost_utils.broadcast_one_to_all(state)
            self._done, self.scores = np.array(self._done, bool), np.array(self.scores)
        self.found = int(pairs[self._done].sum())

    def missing(self, size: int) -> list[tuple[int, int]]:
        """Ranges (start, stop) of rows without scores, of about `size` pairs each."""
        ranges, start, end = [], None, len(self._done)
        # The other rows have nothing to score, and end no range.
        for row in [*np.flatnonzero(np.diff(self._first)).tolist(), end]:
            done = row == end or self._done[row]
            if start is not None and (done or self._first[row + 1] - self._first[start] > size):
                ranges.append((start, row))
                start = None
            if start is None and not done:
                start = row
        return ranges

    def add(self, ranges: Sequence[tuple[int, int]], scores: np.ndarray | None) -> None:
        """Keeps the scores of finished parts; with several processes all call this together.

        Args:
            ranges: one a process, in order of the processes; the last of them may have none.
            scores: of this process' range.
        """
        sizes = [int(self._first[stop] - self._first[start]) for start, stop in ranges]
        parts = [scores]
        if jax.process_count() > 1:
            mine = np.zeros(max(sizes), np.float32)
            if scores is not None:
                mine[: len(scores)] = scores
            parts = multihost_utils.process_allgather(mine)
        for (start, stop), size, part in zip(ranges, sizes, parts, strict=False):
            part = np.asarray(part[:size])
            if not np.isfinite(part).all():
                raise RunError(
                    f"the model gives scores that are not finite in rows {start} to {stop}: give "
                    "other weights, or fp32 instead of bf16"
                )
            self._set(start, stop, part)
            if jax.process_index() == 0:
                path = self._folder / f"{start:012d}-{stop:012d}.npy"
                save_array(path, part)

    def fill(
        self,
        missing: Sequence[tuple[int, int]],
        tokenized: Callable[[Iterable[tuple[int, int]]], Iterator[T]],
        score: Callable[[T, Callable[[int, int], None]], np.ndarray],
    ) -> None:
        """Scores what is missing, part by part; each process takes every n-th of them.

        Args:
            missing: ranges of rows, see `missing`.
            tokenized: makes the input of each range's pairs, one after the other.
            score: scores them; is told by whom to report pairs and tokens of each batch.
        """
        processes, process = jax.process_count(), jax.process_index()
        rounds = [missing[i : i + processes] for i in range(0, len(missing), processes)]
        mine = [ranges[process] for ranges in rounds if process < len(ranges)]
        # The tokenizer works on the next part while the devices work on this one.
        inputs = prefetch(tokenized(mine), depth=1)
        with tqdm(
            total=int(self._steps.sum()),
            initial=int(self._steps[self._done].sum()),
            desc=self._desc,
            unit=self._unit,
            smoothing=0.05,
            disable=process != 0,
        ) as bar:
            tokens = 0

            def done(pairs: int, more: int) -> None:
                nonlocal tokens
                tokens += more * processes
                rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update(min(pairs * processes, bar.total - bar.n))

            for ranges in rounds:
                scores = score(next(inputs), done) if process < len(ranges) else None
                self.add(ranges, scores)

    def of_row(self, row: int) -> np.ndarray:
        return self.scores[self._first[row] : self._first[row + 1]]

    def _set(self, start: int, stop: int, scores: np.ndarray) -> None:
        self.scores[self._first[start] : self._first[stop]] = scores
        self._done[start:stop] = True
