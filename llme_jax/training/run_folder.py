"""What a run writes down about itself, and whether a later command continues that run."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from llme_jax.config import Config
from llme_jax.config.data import OF_FOLDER
from llme_jax.data.train_data import TrainData
from llme_jax.devices.runtime import versions
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write
from llme_jax.files.lock import locked
from llme_jax.files.storage import check_writable, in_bucket, open_folder

logger = logging.getLogger(__name__)


class RunFolder:
    """`run.json` in the output folder: settings, data sizes, batch, versions."""

    def __init__(self, output_dir: str):
        """
        Raises:
            InputError: the folder cannot be written to, or what is in it is not to be continued.
        """
        self.path = open_folder(output_dir)
        check_writable("--output_dir", self.path)
        self._file = self.path / "run.json"
        self.previous = self._read()

    def _read(self) -> dict | None:
        """What the run that is being continued wrote; None for a new one."""
        if not self._file.exists():
            if there := [path.name for path in self.path.glob("checkpoint-*")]:
                raise InputError(
                    f"{self.path} holds {max(there)} and no run.json, which says how it was "
                    "trained: put the file back, or give another --output_dir"
                )
            return None
        try:
            previous = json.loads(self._file.read_text(encoding="utf-8"))
            if {"settings", "mesh", "global_batch", "rows"} <= {*previous}:
                return previous
        except (ValueError, TypeError):
            pass
        raise InputError(
            f"{self._file}: is not what a run writes: put the right file back, or give another "
            "--output_dir"
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out of the folder.

        Raises:
            InputError: another run is at work there, or was since this one looked.
        """
        if jax.process_index() != 0 or in_bucket(self.path):
            yield
            return
        with locked(self.path):
            if self._read() != self.previous:
                raise InputError(
                    f"{self.path}: another run was at work there: give the same command again"
                )
            yield

    def global_batch(self, config: Config, devices: int) -> int:
        """Queries in one batch over all devices: that of the run being continued, if any.

        Raises:
            InputError: when it cannot be divided among the devices there are now.
        """
        if self.previous is None:
            return config.training.per_device_train_batch_size * devices
        before, size = math.prod(self.previous["mesh"].values()), self.previous["global_batch"]
        if devices != before and not config.loss.negative_cross_device:
            raise InputError(
                f"{self.path} was begun on {before} devices, and with --negative_cross_device "
                f"false {devices} would train something else: use {before}, or another "
                "--output_dir"
            )
        if size % devices:
            raise InputError(
                f"{self.path} was begun with batches of {size} queries, which {devices} devices "
                "cannot share evenly: use a number of devices that divides it, or another "
                "--output_dir"
            )
        asked = config.training.per_device_train_batch_size * devices
        if asked != size:
            logger.warning(
                "%s goes on with the batches of %d queries that it was begun with, instead of %d; "
                "to use less memory give --sub_batch_size",
                *(self.path, size, asked),
            )
        return size

    def check_settings(self, config: Config) -> None:
        """Refuses to continue a run with settings that train something else.

        Raises:
            InputError: names the first setting that changed, with both values.
        """
        now, may_change = json.loads(json.dumps(config.flat())), config.names("may_change")
        for name, before in (self.previous or {}).get("settings", {}).items():
            if name in OF_FOLDER and now.get(name) is None:
                continue  # is compared once the model's folder has said what it is
            if name not in may_change and now.get(name) != before:
                raise InputError(
                    f"{self.path} holds a run with --{name} {before}, now it is {now.get(name)}: "
                    "give another --output_dir, or the old value to continue"
                )

    def check_data(self, data: TrainData) -> None:
        """Refuses to continue a run on other rows, or on files that were changed.

        Raises:
            InputError: names what is different.
        """
        if self.previous is None:
            return
        before, now = self.previous["rows"], data.sizes
        if before != now:
            raise InputError(
                f"{self.path} holds a run on {sum(before)} training rows, now there are "
                f"{sum(now)}: the data changed, give another --output_dir"
            )
        for path, was, content in zip(
            data.paths, self.previous["contents"], data.contents, strict=True
        ):
            if content != was:
                raise InputError(
                    f"{path}: was changed since the run in {self.path} began: give another "
                    "--output_dir, or the old file to continue"
                )

    def write(self, config: Config, data: TrainData, global_batch: int, mesh) -> None:
        """Records the run, on process 0."""
        if jax.process_index() != 0:
            return
        record = {
            "settings": config.flat(),
            "rows": data.sizes,
            "contents": data.contents,
            "global_batch": global_batch,
            "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "mesh": dict(mesh.shape),
            "versions": versions(),
        }
        with atomic_write(self._file) as beside:
            beside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
