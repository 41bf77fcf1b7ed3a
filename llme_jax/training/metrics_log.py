"""metrics.jsonl of a run; the best step and the closing table out of it."""

import json
import logging
import math
from pathlib import Path

import jax

from llme_jax.files.atomic import atomic_write
from llme_jax.files.storage import in_bucket
from llme_jax.training.trackers import Trackers

logger = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl` of a run, one line a call, and what --report_to names besides."""

    def __init__(self, output_dir: Path, start_step: int, report_to: list[str], settings: dict):
        """Lines past `start_step` are dropped: a resumed run writes those steps again.

        Args:
            settings: of the run, by name.
        """
        self.path = output_dir / "metrics.jsonl"
        self._silent = jax.process_index() != 0
        if self._silent:
            return
        lines = read_metrics(self.path)
        self._trackers = Trackers(report_to, output_dir, settings, start_step, lines)
        self._lines = [line for line in lines if line["step"] <= start_step]
        self._write_all()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error, *_) -> None:
        if not self._silent:
            self._trackers.close(failed=error is not None)

    def write_eval(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Writes the metrics of an evaluation, and returns them, with names `eval_...`."""
        line = {f"eval_{name}": value for name, value in metrics.items()}
        self.write(step, line)
        return line

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._silent:
            return
        line = {"step": step, **values}
        if in_bucket(self.path):  # where no file grows
            self._lines.append(line)
            self._write_all()
        else:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._trackers.write(step, values)

    def _write_all(self) -> None:
        with atomic_write(self.path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self._lines))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; those that are none are left out, as the last one of a run
    that was killed."""
    lines = []
    texts = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif text.strip() and number < len(texts):
            logger.warning("%s:%d: is no line of metrics and is left out", path, number)
    return lines


class BestMetric:
    """The best value so far of the metric that picks the best checkpoint."""

    def __init__(self, wanted: str | None):
        self._wanted = wanted
        self._value = -math.inf

    def resume(self, metrics_path: Path, steps: list[int]) -> int | None:
        """Takes note of a run's evaluations; which of the checkpoints at `steps` was the best."""
        best = None
        for line in read_metrics(metrics_path):
            if line["step"] in steps and self.update(line):
                best = line["step"]
        return best

    def update(self, metrics: dict[str, float]) -> bool:
        """Whether a line of evaluation metrics is the best so far."""
        if (name := picking(metrics, self._wanted)) is None:
            return False
        value = metrics[name]
        improved = value > self._value
        self._value = max(self._value, value)
        return improved


def picking(line: dict, wanted: str | None) -> str | None:
    """The name of the metric of a line that picks the best step; None where nothing is measured.

    Args:
        wanted: --metric_for_best_model.
    """
    names = [name for name in line if name.startswith("eval_")]
    usual = f"eval_{wanted or 'ndcg@10'}"
    return usual if usual in names else next(iter(names), None)


def without_details(line: dict, wanted: str | None) -> dict:
    """A line in which each of several evaluation sets has one metric, that which picks the best.

    With ten sets and all cutoffs a table or a figure of all of them could not be read.
    """
    best = (picking(line, wanted) or "").removeprefix("eval_")
    return {
        name: value
        for name, value in line.items()
        if not name.startswith("eval_") or "/" not in name or name.endswith(f"/{best}")
    }


def compare(before: dict[str, float], after: dict[str, float]) -> str:
    """A table of two lines of evaluation metrics side by side."""
    heads = (f"step {line['step']}" for line in (before, after))
    rows = [("metric", *heads, "change")]
    for name in after:
        if name.startswith("eval_") and name in before:
            old, new = before[name], after[name]
            rows.append(
                (name.removeprefix("eval_"), f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
