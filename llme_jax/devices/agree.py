"""What the processes of a command have to have in common, found out before any work.

Each reads files and loads weights by itself, so that nothing else would stop two of them from
computing parts of different results, or from writing to different folders.
"""

import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)

from llme_jax.config.setting import Groups
from llme_jax.devices.runtime import versions
from llme_jax.errors import InputError
from llme_jax.files.atomic import digest

PATIENCE = 10  # seconds until a file that another host wrote is seen on a shared disk
LONGEST = 4000  # bytes of what one process tells the others

T = TypeVar("T")


@contextmanager
def together() -> Iterator[None]:
    """What one process refuses all refuse, in its words; processes do not meet in the block.

    Raises:
        InputError: in all processes, when it is raised in one.
    """
    error = None
    try:
        yield
    except InputError as refused:
        error = refused
    if jax.process_count() > 1:
        said = str(error).encode()[:LONGEST] if error else b""
        of_all = process_allgather(np.frombuffer(said.ljust(LONGEST, b"\0"), np.uint8))
        for process, of_one in enumerate(of_all):
            other = of_one.tobytes().rstrip(b"\0").decode(errors="replace")
            error = error or (InputError(f"process {process}: {other}") if other else None)
    if error:
        raise error from None


def agree(config: Groups, facts: dict[str, object]) -> None:
    """Makes sure that all processes are about to do the same, with the same files and models.

    Args:
        facts: what they have to have in common beside settings, by what names it in a message.

    Raises:
        InputError: in all processes; names the first thing that differs.
    """
    if jax.process_count() == 1:
        return
    per_host = config.names("per_host")
    check_same({"the installed versions": versions()})
    check_same({f"--{k}": v for k, v in config.flat().items() if k not in per_host} | facts)


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


def from_first(read: Callable[[], T]) -> T:
    """What process 0 reads, in all processes: what an earlier run wrote lies on its disk alone.

    Raises:
        InputError: in all processes, when it is raised there.
    """
    if jax.process_count() == 1:
        return read()
    packed = b""
    with together():
        if jax.process_index() == 0:
            packed = pickle.dumps(read())
    size = int(broadcast_one_to_all(np.int32(len(packed))))
    mine = np.frombuffer(packed or bytes(size), np.uint8)
    return pickle.loads(broadcast_one_to_all(mine).tobytes())


def everywhere(conditions: list[bool]) -> np.ndarray:
    """Which of the conditions hold on all processes."""
    return each_has(conditions).all(axis=0)


def each_has(conditions: list[bool]) -> np.ndarray:
    """Which of the conditions hold on each process, bool[processes, conditions]."""
    if jax.process_count() == 1:
        return np.array([conditions])
    return process_allgather(np.array(conditions))


def from_process(process: int, array: np.ndarray) -> np.ndarray:
    """What one process has, in all; the others give an array of the same shape and type."""
    return np.asarray(broadcast_one_to_all(array, is_source=jax.process_index() == process))
