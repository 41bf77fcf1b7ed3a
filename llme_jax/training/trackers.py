"""Where else the metrics of a run go: TensorBoard, Weights & Biases, Trackio.

Their packages are optional, and imported by the runs that report to them. A run that is continued
goes on in the same run there: `trackers.json` in its folder has the run's id of each, and the last
line it was sent before.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write
from llme_jax.files.storage import in_bucket

logger = logging.getLogger(__name__)

PROJECT = "llme_jax"
WAIT = "60"  # seconds in which Weights & Biases may upload what is left at the end


class Run(NamedTuple):
    """What a tracker is opened with."""

    folder: Path
    name: str
    id: str
    settings: dict
    start: int  # the step that it goes on from


class Tracker(Protocol):
    """Made of a `Run`.

    Attributes:
        needs: its package, and what is used of that.
    """

    needs: tuple[str, str]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a step; names of those of an evaluation begin with `eval_`."""

    def close(self, failed: bool) -> None:
        """Sends what is left."""


class TensorBoard:
    needs = ("tensorboardX", "SummaryWriter")

    def __init__(self, run: Run):
        from tensorboardX import SummaryWriter

        # What an earlier run wrote past the checkpoint is written again, and shown once.
        purged = run.start + 1 if run.start else 0
        self._writer = SummaryWriter(str(run.folder), purge_step=purged)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    needs = ("wandb", "init")

    def __init__(self, run: Run):
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", WAIT)  # without it an outage has no end
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.id,
            resume="allow",
            dir=None if in_bucket(run.folder) else str(run.folder),
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off"),  # what is printed stays with us
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    needs = ("trackio", "init")

    def __init__(self, run: Run):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id}",  # by which it is found again
            resume="allow",
            config=run.settings,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: list[str]) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        InputError: names the package.
    """
    for name in filter(TRACKERS.get, names):
        package, wanted = TRACKERS[name].needs
        try:
            # A folder called wandb, as it leaves behind, can be imported and has nothing in it.
            getattr(import_module(package), wanted)
        except (ImportError, AttributeError):
            raise InputError(f"--report_to {name}: run `pip install {package}` first") from None


class Trackers:
    """Those that a run reports to; what goes wrong with one is said once and never ends the run."""

    def __init__(
        self, names: list[str], folder: Path, settings: dict, start: int, lines: list[dict]
    ):
        """
        Args:
            start: the step that the run goes on from.
            lines: of metrics.jsonl, also those past `start`, whose steps are done again.
        """
        self._open: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        file = folder / "trackers.json"
        known = _known(file)
        before = max((_place(line["step"], line) for line in lines), default=(-1, False))
        self._sent: dict[str, tuple[int, bool]] = {}
        called = folder.name if in_bucket(folder) else folder.resolve().name  # it may be "."
        for name in dict.fromkeys(filter(TRACKERS.get, names)):
            earlier = known.get(name, {"id": uuid.uuid4().hex[:8], "sent": None})
            with self._forgiving(name):
                run = Run(folder, called, earlier["id"], settings, start)
                self._open[name] = TRACKERS[name](run)
                if name == "tensorboard":
                    continue  # has no runs, and drops what is written again
                if name in known:
                    self._sent[name] = max(before, tuple(earlier["sent"] or before))
                known[name] = {"id": earlier["id"], "sent": self._sent.get(name)}
        if known:
            with atomic_write(file) as beside:
                beside.write_text(json.dumps(known) + "\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends metrics of a step to all that have not had them from an earlier run."""
        for name, tracker in self._open.items():
            if name not in self._sent or _place(step, values) > self._sent[name]:
                with self._forgiving(name):
                    tracker.write(step, values)

    def close(self, failed: bool) -> None:
        for name, tracker in self._open.items():
            with self._forgiving(name):
                tracker.close(failed)

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library has types of its own
            if name not in self._failed:
                said = str(error).strip().partition("\n")[0]
                logger.warning(
                    "--report_to %s: %s: %s; the run goes on, and metrics.jsonl has everything",
                    *(name, type(error).__name__, said),
                )
            self._failed.add(name)


def _known(file: Path) -> dict[str, dict]:
    """What an earlier run left; nothing where that is damaged."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        logger.warning("%s is damaged: the run begins anew in its trackers", file)
        return {}


def _place(step: int, values: dict) -> tuple[int, bool]:
    """Where metrics come in the order in which they are written: evaluations behind their step."""
    return step, any(name.startswith("eval_") for name in values)
