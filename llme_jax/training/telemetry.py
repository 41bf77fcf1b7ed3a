"""What a training loop reports of its steps: loss and throughput, also by task; programs."""

import logging
import math
import time
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import optax

from llme_jax.config import DistillConfig
from llme_jax.data.batch import Batch, describe_shapes
from llme_jax.data.plan import PlannedBatch
from llme_jax.data.train_data import TrainData
from llme_jax.errors import RunError
from llme_jax.training.metrics_log import MetricsLog
from llme_jax.training.step import StepMetrics

logger = logging.getLogger(__name__)


class Count(NamedTuple):
    """What is in a batch, over all processes."""

    queries: int
    tokens: int
    slots: int  # tokens and padding


class Throughput:
    """Queries and tokens a second, and the share of padding, since the last report.

    Only time spent training counts: evaluations, checkpoints and compilation do not.
    """

    def __init__(self):
        self.seconds, self.queries, self.tokens, self.slots = 0.0, 0, 0, 0

    def add(self, seconds: float, count: Count) -> None:
        self.seconds += seconds
        self.queries += count.queries
        self.tokens += count.tokens
        self.slots += count.slots

    def report(self) -> dict[str, float]:
        return {
            "queries_per_second": round(self.queries / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "padding_fraction": round(1 - self.tokens / self.slots, 4),
        }


def count(batch: Batch, processes: int) -> Count:
    """Counts a batch; the other processes count as much as this one."""
    tokens = sum(texts.tokens for texts in batch.texts.values())
    slots = sum(len(texts.ids) for texts in batch.texts.values())
    return Count(processes * len(batch.has_scores), processes * tokens, processes * slots)


class StepInput(NamedTuple):
    """What one optimizer step reads: gradient_accumulation_steps batches and their losses."""

    batches: list[Batch]  # on the mesh
    recipes: list[DistillConfig]
    plans: list[PlannedBatch]
    counts: list[Count]


class Recorder:
    """Follows the loss: fetches it one step late, logs it, stops the run when it is not finite.

    Where every batch is of one dataset, loss and throughput are also logged by task, as in
    `qa/loss`; `qa/batches` is how many the numbers are of.
    """

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
        self._throughput: defaultdict[str, Throughput] = defaultdict(Throughput)
        self._pending: tuple[int, StepInput, StepMetrics] | None = None
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._compiled: set = set()

    def resume(self) -> None:
        """Training goes on here: what took time until now was something else."""
        self._since = time.perf_counter()

    def begin(self, step: int, item: StepInput, metrics: StepMetrics, bar) -> None:
        """Takes note of a step that is under way, and finishes the one before."""
        compiled = self._compiles(item)
        if self._pending is None:
            self.resume()
        else:
            self.finish(bar, timed=not compiled)
        self._pending = (step, item, metrics)

    def _compiles(self, item: StepInput) -> bool:
        """Whether a step of these shapes and losses is new; says so."""
        new = False
        for batch, recipe in zip(item.batches, item.recipes, strict=True):
            program = (describe_shapes(batch), recipe)
            if program not in self._compiled:
                new = True
                self._compiled.add(program)
                logger.info("compiled the step for %s", describe_shapes(batch))
        return new

    def finish(self, bar, timed: bool = True) -> None:
        """Waits for the pending step, checks its loss, logs every logging_steps.

        Args:
            timed: whether the time since then was the step's alone.

        Raises:
            RunError: the loss or the gradient is not finite; names step and rows.
        """
        if self._pending is None:
            return
        step, item, metrics = self._pending
        self._pending = None
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        seconds = time.perf_counter() - self._since
        self.resume()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            rows = [row for planned in item.plans for row in self._data.describe(planned)]
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; lower "
                "--learning_rate or look at the rows of its batch: " + ", ".join(rows)
            )
        self._note(item, metrics, seconds if timed else None)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        if step % self._logging_steps == 0:
            self._write(step, grad_norm)

    def _note(self, item: StepInput, metrics: StepMetrics, seconds: float | None) -> None:
        """Adds a step to what the next line of metrics.jsonl is about."""
        self._losses["loss"].append(float(metrics.loss))
        if len(metrics.parts) > 1:
            for name, part in metrics.parts.items():
                self._losses[f"loss_{name}"].append(float(part))
        slots = sum(count.slots for count in item.counts)
        losses = metrics.batch_losses.tolist()
        for planned, count, loss in zip(item.plans, item.counts, losses, strict=True):
            label = self._data.label(planned.dataset)
            if label:
                self._losses[f"{label}/loss"].append(loss)
            if seconds is not None:
                share = seconds * count.slots / slots
                self._throughput[""].add(share, count)
                if label:
                    self._throughput[f"{label}/"].add(share, count)

    def _write(self, step: int, grad_norm: float) -> None:
        values = {name: float(np.mean(losses)) for name, losses in self._losses.items()}
        values["grad_norm"] = grad_norm
        values["learning_rate"] = float(self._learning_rate(step - 1))
        values["epoch"] = round(step / self._steps_per_epoch, 4)
        for name, losses in self._losses.items():
            if name.endswith("/loss"):
                values[name.removesuffix("loss") + "batches"] = len(losses)
        for label, throughput in self._throughput.items():
            values |= {f"{label}{name}": value for name, value in throughput.report().items()}
        self._log.write(step, values)
        self._losses.clear()
        self._throughput.clear()
