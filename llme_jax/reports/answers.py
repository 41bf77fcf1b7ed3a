"""Two evaluations with a language model on the same questions: what is won, lost, how sure."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llme_jax.data.rows import BadRows, read_lines
from llme_jax.errors import InputError
from llme_jax.reports.blocks import (
    Section,
    Table,
    Verdict,
    between,
    short,
    signed,
    to_markdown,
    won_and_lost,
)
from llme_jax.reports.bootstrap import paired_bootstrap
from llme_jax.reports.record import wrong

OUTPUT = {
    "score": float,
    "scores": {"*": float},
    "key?": [str],
    "choices?": [str],
    "options?": [str],
}
GROUPS = {"subject": "subjects", "task_name": "tasks"}  # fields whose values count the same each


class Answers(NamedTuple):
    """What an output file of llme_jax.evaluate says.

    Attributes:
        name: of the evaluation.
        scores: by name float[n], those of each row, higher is better; the first one decides.
    """

    name: str
    rows: list[dict]
    scores: dict[str, np.ndarray]

    @property
    def metric(self) -> str:
        return next(iter(self.scores))

    @property
    def values(self) -> np.ndarray:
        return self.scores[self.metric]


def read_answers(path: Path, name: str) -> Answers:
    """
    Raises:
        InputError: it is no output file; names its line.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such output file")
    rows, lines = [], {}
    for number, row in read_lines(str(path), _checked, BadRows()):
        if (first := lines.setdefault(_question(row, len(rows)), number)) != number:
            raise InputError(f"{path}:{number}: the question of line {first} again: remove one")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: has no rows, evaluate again")
    firsts = {next(iter(row["scores"])) for row in rows}  # several in icl
    scores = {firsts.pop() if len(firsts) == 1 else "score": [row["score"] for row in rows]}
    for metric in rows[0]["scores"]:
        if all(metric in row["scores"] for row in rows):
            scores[metric] = [row["scores"][metric] for row in rows]
    return Answers(name, rows, {metric: np.array(values) for metric, values in scores.items()})


def _checked(row: dict) -> dict:
    said = wrong(row, OUTPUT)
    if not said:
        try:
            good = row["scores"] and all(isinstance(cell, str) for cell in _cells(row))
        except (IndexError, KeyError, TypeError, ValueError):
            good = False
        said = None if good else "its answer fits no question"
    if said:
        raise InputError(f"{said}: give an output file of llme_jax.evaluate")
    return row


def print_comparison(before: str, after: str) -> None:
    """Prints what `compare` finds in two output files, the second one against the first."""
    paths = [Path(name).expanduser() for name in (before, after)]
    names = _apart(*paths) or [before, after]
    read = [read_answers(path, name) for path, name in zip(paths, names, strict=True)]
    print(to_markdown(f"{names[1]} against {names[0]}", compare(*read)))


def _apart(*paths: Path) -> list[str]:
    """What tells paths apart: the parts that they do not all begin or end with."""
    parts = [path.parts for path in paths]
    for _ in range(2):  # from the front, from the back
        while all(parts) and len({of_path[0] for of_path in parts}) == 1:
            parts = [of_path[1:] for of_path in parts]
        parts = [of_path[::-1] for of_path in parts]
    return ["/".join(of_path) for of_path in parts] if all(parts) else []


def compare(before: Answers, after: Answers) -> list[Section]:
    """The verdict on two evaluations, and the questions that most differ.

    Raises:
        InputError: they are of other questions or of other scores.
    """
    after, rows, verdicts = _aligned(before, after), [], []
    means = [_weights(before.rows, field) for field in (None, *GROUPS)]
    for metric, (over, weights) in product(before.scores, filter(None, means)):
        pair = [x.scores[metric] * weights for x in (before, after)]
        found, (x, y) = paired_bootstrap(*pair), (values.mean() for values in pair)
        cells = f"{x:.4f}", f"{y:.4f}", signed(found.delta), between(found), found.verdict
        rows.append([f"{metric}, mean over {over}", *cells])
        if metric == before.metric:
            said = (
                f"{after.name} has {metric} {y:.4f}, {before.name} {x:.4f}: {signed(found.delta)} "
                f"({between(found)}, {len(before.rows)} questions)"
            )
            verdicts.append(Verdict(found.verdict, said))
    head = ["", before.name, after.name, "difference", "95% interval", ""]
    columns = [f"{what} of {x.name}" for x in (before, after) for what in ("first key", "answer")]
    examples = won_and_lost(
        *("question", "questions", after.name, after.values - before.values, columns),
        lambda i: _example(i, before, after),
    )
    return [Section("", [verdicts[-1], Table(head, rows)]), examples]


def _weights(rows: Sequence[dict], field: str | None) -> tuple[str, np.ndarray] | None:
    """What a mean is over, and weights that make it one; None where rows have no such field."""
    if field is None:
        return "questions", np.ones(len(rows))
    if not all(isinstance(row.get(field), str) for row in rows):
        return None
    counts = Counter(row[field] for row in rows)
    return GROUPS[field], np.array([len(rows) / len(counts) / counts[r[field]] for r in rows])


def _aligned(before: Answers, after: Answers) -> Answers:
    """The second one's rows in the order of the first one's."""
    if before.scores.keys() != after.scores.keys():
        raise InputError(
            f"{before.name} has {', '.join(before.scores)}, {after.name} "
            f"{', '.join(after.scores)}: compare evaluations of one task"
        )
    places = [{_question(row, i): i for i, row in enumerate(x.rows)} for x in (before, after)]
    if places[0].keys() != places[1].keys():
        raise InputError(
            f"{after.name}: has other questions than {before.name}, evaluate both on the same rows"
        )
    order = [places[1][name] for name in places[0]]
    scores = {name: values[order] for name, values in after.scores.items()}
    return after._replace(rows=[after.rows[i] for i in order], scores=scores)


def _question(row: dict, number: int) -> str:
    """What tells a row from others: its query_id, else its number, and its text."""
    text = row.get("query", row.get("text"))
    return json.dumps([row.get("query_id", number), row.get("task_name"), text])


def _example(i: int, before: Answers, after: Answers) -> list[str]:
    cells = _cells(before.rows[i]) + _cells(after.rows[i])[2:]
    return [*map(short, cells), *(f"{x.values[i]:.2f}" for x in (before, after))]


def _cells(row: dict) -> list[str]:
    """A row's question, what is right, its first key, its answer."""
    key = next(iter(row.get("key", ())), "")
    return [row.get("query", row.get("text", "")), _right(row), key, _said(row)]


def _right(row: dict) -> str:
    if "choices" in row:
        return row["choices"][row["answer"]]
    answers = row.get("answers") or row.get("possible_answers") or []
    if row.get("options") and isinstance(row["output"], int):
        return row["options"][int(answers[0])]
    return answers if isinstance(answers, str) else " / ".join(answers)


def _said(row: dict) -> str:
    options, output = row.get("choices") or row.get("options"), row["output"]
    if options and isinstance(output, int):
        return options[output]
    return f"{output:.4f}" if isinstance(output, float) else output
