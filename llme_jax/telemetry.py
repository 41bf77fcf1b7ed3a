"""What a run reports: metrics.jsonl, TensorBoard, the progress bar, the closing table."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from llme_jax.config import LossConfig
from llme_jax.data.batch import Batch
from llme_jax.data.plan import PlannedBatch
from llme_jax.data.train_data import TrainData
from llme_jax.errors import InputError, RunError
from llme_jax.step import StepMetrics

logger = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl` of a run, one line a call, and TensorBoard beside it when wanted."""

    def __init__(self, output_dir: Path, start_step: int, tensorboard: bool = False):
        """Lines past `start_step` are dropped: a resumed run writes those steps again.

        Raises:
            InputError: TensorBoard is wanted and its writer is not installed.
        """
        self.path = Path(output_dir) / "metrics.jsonl"
        self._writer = _tensorboard(output_dir) if tensorboard else None
        self._silent = jax.process_index() != 0
        if self._silent:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        beside = self.path.with_suffix(".jsonl.tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, self.path)

    def write_eval(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Writes the metrics of an evaluation, and returns them, with names `eval_...`."""
        line = {f"eval_{name}": value for name, value in metrics.items()}
        self.write(step, line)
        return line

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._silent:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _tensorboard(output_dir: Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("--report_to tensorboard: run `pip install tensorboardX` first") from None
    return SummaryWriter(str(output_dir)) if jax.process_index() == 0 else None


class Throughput:
    """Queries and tokens a second, and the share of padding, since the last report.

    Only time spent training counts: evaluations, checkpoints and compilation do not.
    """

    def __init__(self):
        self.seconds, self.queries, self.tokens, self.slots = 0.0, 0, 0, 0

    def add(self, seconds: float, counts: list[tuple[int, int, int]]) -> None:
        self.seconds += seconds
        for queries, tokens, slots in counts:
            self.queries += queries
            self.tokens += tokens
            self.slots += slots

    def report(self) -> dict[str, float]:
        if not self.queries:
            return {}
        values = {
            "queries_per_second": round(self.queries / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "padding_fraction": round(1 - self.tokens / self.slots, 4),
        }
        self.__init__()
        return values


def count(batch: Batch, processes: int) -> tuple[int, int, int]:
    """Queries, tokens and token slots of a batch; other processes count as much as this one."""
    tokens = sum(int(x.sum()) for texts in (batch.query, batch.key) for x in texts.lengths)
    slots = sum(x.size for texts in (batch.query, batch.key) for x in texts.ids)
    return processes * len(batch.query.place), processes * tokens, processes * slots


class StepInput(NamedTuple):
    """What one optimizer step reads: gradient_accumulation_steps batches and their losses."""

    batches: list[Batch]  # on the mesh
    recipes: list[LossConfig]
    plans: list[PlannedBatch]
    counts: list[tuple[int, int, int]]  # queries, tokens, slots of every batch


class Recorder:
    """Follows the loss: fetches it one step late, logs it, stops the run when it is not finite."""

    def __init__(
        self,
        log: MetricsLog,
        data: TrainData,
        learning_rate: optax.Schedule,
        logging_steps: int,
        steps_per_epoch: int,
    ):
        self._log, self._data, self._learning_rate = log, data, learning_rate
        self._logging_steps, self._steps_per_epoch = logging_steps, steps_per_epoch
        self._throughput = Throughput()
        self._pending: tuple[int, StepInput, StepMetrics] | None = None
        self._losses: list[dict[str, float]] = []
        self._compiled: set = set()
        self.resume()

    def resume(self) -> None:
        """Training goes on here: what took time until now was something else."""
        self._since = time.perf_counter()

    def begin(self, step: int, item: StepInput, metrics: StepMetrics, bar) -> None:
        """Takes note of a step that is under way, and finishes the one before."""
        self.finish(bar)
        self._pending = (step, item, metrics)
        now = time.perf_counter()
        if not self._compiles(item):
            self._throughput.add(now - self._since, item.counts)
        self._since = now

    def _compiles(self, item: StepInput) -> bool:
        """Whether a step of these shapes and losses is new; says so."""
        new = False
        for batch, recipe in zip(item.batches, item.recipes, strict=True):
            shapes = [[x.shape for x in texts.ids] for texts in (batch.query, batch.key)]
            program = (str(shapes), recipe)
            if program not in self._compiled:
                new = True
                self._compiled.add(program)
                described = [" + ".join("x".join(map(str, s)) for s in f) for f in shapes]
                logger.info("compiled the step for queries %s and keys %s", *described)
        return new

    def finish(self, bar) -> None:
        """Waits for the pending step, checks its loss, logs every logging_steps.

        Raises:
            RunError: the loss or the gradient is not finite; names step and rows.
        """
        if self._pending is None:
            return
        step, item, metrics = self._pending
        self._pending = None
        values = {"loss": float(metrics.loss)}
        if len(metrics.parts) > 1:
            values |= {f"loss_{name}": float(part) for name, part in metrics.parts.items()}
        grad_norm = float(metrics.grad_norm)
        if not (math.isfinite(values["loss"]) and math.isfinite(grad_norm)):
            rows = [row for planned in item.plans for row in self._data.describe(planned)]
            raise RunError(
                f"step {step}: loss {values['loss']}, gradient norm {grad_norm}; lower "
                "--learning_rate or look at the rows of its batch: " + ", ".join(rows)
            )
        self._losses.append(values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        bar.update()
        if step % self._logging_steps == 0:
            names = {name: None for values in self._losses for name in values}
            means = {
                name: float(np.mean([v[name] for v in self._losses if name in v])) for name in names
            }
            extra = {
                "grad_norm": grad_norm,
                "learning_rate": float(self._learning_rate(step - 1)),
                "epoch": round(step / self._steps_per_epoch, 4),
            }
            self._log.write(step, {**means, **extra, **self._throughput.report()})
            self._losses = []


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
