"""What the processes of a run have to have in common, found out before they start together.

Each plans every batch and holds every parameter by itself, so that nothing else would stop two of
them from training on different files, or from writing to different folders.
"""

import time
import uuid
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)

from llme_jax.config import Config
from llme_jax.data.train_data import TrainData
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest

PATIENCE = 10  # seconds until a file that another host wrote is seen on a shared disk


def check_hosts(config: Config, data: TrainData, folder: Path, facts: dict[str, object]) -> None:
    """Makes sure that all processes are about to do the same, and share the output folder.

    Args:
        facts: what else they have to have in common, by what names it in a message.

    Raises:
        InputError: in all processes; names the first thing that differs.
    """
    per_host = config.names("per_host")
    settings = {f"--{k}": v for k, v in config.flat().items() if k not in per_host}
    check_same(settings | {"the number of files of --train_data": len(data.paths)})
    check_shared(folder)
    files = dict(zip(data.names, zip(data.sizes, data.contents, strict=True), strict=True))
    check_same({f"--train_data, file {name}": what for name, what in files.items()} | facts)


def check_same(facts: dict[str, object]) -> None:
    """Compares what each process knows, as many facts in the same order in all of them.

    Raises:
        InputError: in all processes; names the first fact that differs.
    """
    mine = np.array([int(digest(value)[:7], 16) for value in facts.values()], np.int32)
    for (name, value), numbers in zip(facts.items(), process_allgather(mine).T, strict=True):
        others = np.flatnonzero(numbers != numbers[0])
        if len(others):
            raise InputError(
                f"{name}: differs between process 0 and process {others[0]}, in this one, "
                f"{jax.process_index()}, it is {value}: give all hosts the same command and files"
            )


def check_shared(folder: Path) -> None:
    """Makes sure that all processes see what process 0 writes to a folder.

    Raises:
        InputError: in all processes, when one does not.
    """
    token = broadcast_one_to_all(np.int32(uuid.uuid4().int % 2**31))
    probe = folder / f".shared-{token}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    sync_global_devices("probe written")
    seen = process_allgather(np.array([_appears(probe)]))
    if jax.process_index() == 0:
        probe.unlink()
    if not seen.all():
        raise InputError(
            f"--output_dir {folder}: process {int(np.argmin(seen))} does not see what process 0 "
            "writes there: give a folder that all hosts share, or gs://bucket/folder"
        )


def _appears(path: Path) -> bool:
    for _ in range(10 * PATIENCE):
        if path.exists():
            return True
        time.sleep(0.1)
    return False
