"""What must hold behind a stage before the next one starts."""

from pathlib import Path

import numpy as np

from llme_jax.config import HaveNegatives, NotBelow, UsefulScores
from llme_jax.config.pipeline import Gate
from llme_jax.data.rows import BadRows, read_lines
from llme_jax.errors import InputError
from llme_jax.lm.teacher_report import read_report
from llme_jax.reports.record import read_json
from llme_jax.stages.plan import Planned


def check(gate: Gate, stage: Planned, others: dict[str, Planned]) -> tuple[bool, str]:
    """Whether the gate is open, and what was found, with what to look at where it is not."""
    match gate:
        case NotBelow():
            return _not_below(gate, stage, others)
        case UsefulScores():
            return _useful_scores(stage)
        case HaveNegatives():
            return _have_negatives(gate, stage)


def _not_below(gate: NotBelow, stage: Planned, others: dict[str, Planned]) -> tuple[bool, str]:
    values = []
    for one in (stage, others[gate.than]):
        measured = read_json(one_file(one.folder, "*.metrics*.json"), {"*": float})
        if gate.metric not in measured:
            raise InputError(
                f"stage {one.stage.name}: {gate.metric} is not among what it measures, "
                f"{', '.join(measured) or 'nothing'}: correct the gate of {stage.stage.name}"
            )
        values.append(measured[gate.metric])
    found = f"{gate.metric} {values[0]:.4f}, {gate.than} has {values[1]:.4f}"
    if values[0] >= values[1] - gate.by:
        return True, found
    return False, (
        f"{found}: below it by more than {gate.by:g}; look at the curves and the negatives in "
        "report.html"
    )


def _useful_scores(stage: Planned) -> tuple[bool, str]:
    report = read_report(one_file(stage.folder, "*.scored*.json"))
    if report.right is None:
        return True, "no row has positives and other keys to tell apart"
    found = f"best key is a labelled positive in {report.right:.1%}, by chance {report.chance:.1%}"
    if report.useful:
        return True, found
    return False, f"{found}: these scores hardly know the positives, look at the teacher first"


def _have_negatives(gate: HaveNegatives, stage: Planned) -> tuple[bool, str]:
    path = one_file(stage.folder, "*.neg*.json")
    rows = [bool(row.get("neg")) for _, row in read_lines(str(path), dict, BadRows())]
    share = float(np.mean(rows)) if rows else 0.0
    found = f"{share:.1%} of {len(rows)} rows have negatives"
    if share >= gate.share:
        return True, found
    return False, (
        f"{found}, less than {gate.share:.0%}: look at --hits, --margin and --max_score, and at "
        "what was left out"
    )


def one_file(folder: Path, pattern: str) -> Path:
    """The one file of a stage with such a name.

    Raises:
        InputError: there is none.
    """
    files = sorted(p for p in folder.glob(pattern) if p.is_file())
    if not files:
        raise InputError(f"{folder}: has no {pattern}, which the gate of this stage reads")
    return files[0]
