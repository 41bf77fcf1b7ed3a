"""What reading many texts will take, found without doing it (`--plan`): memory, operations, time.

Programs are compiled for the devices that are there, or for others (`--topology`), and XLA says
what they need.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import Mesh

from llme_jax.config import PlanConfig
from llme_jax.data.widths import batches_by_length
from llme_jax.devices.fitting import (
    GIB,
    Remedies,
    describe_time,
    device_bytes,
    halves,
    memory_limit,
    numbers,
    verdict,
)
from llme_jax.devices.memory import Needs
from llme_jax.inference.over_store import enough_rows

logger = logging.getLogger(__name__)

SAMPLE = 1 << 12  # texts that are tokenised to see how long they are
COUNTED = 1 << 18  # texts that are put into batches to count these


@dataclass
class Reading:
    """Texts, and the programs that read them.

    Args:
        name: of the texts, as in "keys".
        mesh: whose devices share a batch.
        count: how many there are.
        lengths: tokens of a sample of them.
        longest: tokens that a text may have.
        width, rows: see `batches_by_length`.
        analyse: (rows, width) -> what a device needs for such a batch.
        flops: (tokens, pairs of tokens of a text) -> operations of all devices.
    """

    name: str
    mesh: Mesh
    count: int
    lengths: np.ndarray
    longest: int
    width: Callable[[int], int]
    rows: Callable[[int], int]
    analyse: Callable[[int, int], Needs]
    flops: Callable[[float, float], float]

    @cached_property
    def batches(self) -> Counter[tuple[int, int]]:
        """(rows, width) of as many texts as are counted."""
        read = batches_by_length(self.counted, self.width, self._rows)
        return Counter((len(texts), columns) for _, texts, columns in read)

    @cached_property
    def counted(self) -> np.ndarray:
        return np.resize(self.lengths, min(self.count, COUNTED))

    @property
    def widest(self) -> tuple[int, int]:
        """Rows and width of the batch that takes most memory: all have about as many tokens."""
        return max(self.batches, key=lambda batch: batch[1])

    @property
    def possible(self) -> tuple[int, int]:
        """Rows and width of a batch with the longest text that there may be."""
        width = self.width(self.longest)
        return self._rows(width), width

    def _rows(self, width: int) -> int:
        return min(self.rows(width), enough_rows(self.mesh, self.count))

    def needs(self, batch: tuple[int, int]) -> Needs:
        logger.info("compiling %s of %d x %d tokens", self.name, *batch)
        return self.analyse(*batch)


def show(
    settings: PlanConfig,
    params,
    readings: Sequence[Reading],
    seek: Callable[[Remedies], None],
    others: Sequence[tuple[str, Callable[[], Needs]]] = (),
) -> int:
    """Prints it, on process 0.

    Args:
        params: arrays or shapes, with shardings.
        seek: looks for settings that fit, see `verdict`.
        others: programs that read no texts: what they do, and what they need.

    Returns:
        The exit code: 1 when it does not fit into the devices' memory.
    """
    say = print if jax.process_index() == 0 else lambda *_: None
    mesh, readings = readings[0].mesh, [reading for reading in readings if reading.count]
    if not readings:
        say("there is nothing to read")
        return 0
    say(
        f"parameters         {numbers(params):,}; {device_bytes(params) / GIB:.2f} GiB on each of "
        f"{mesh.size} devices"
    )
    memory = max(_show(say, settings, reading) for reading in readings)
    for name, find in others:
        logger.info("compiling the %s", name)
        needed = find().total
        say(f"{name:18} {needed / GIB:.2f} GiB of a device")
        memory = max(memory, needed)
    return verdict(say, memory, memory_limit(settings, mesh), seek)


def _show(say: Callable, settings: PlanConfig, reading: Reading) -> float:
    """Prints what some texts take; returns the bytes of a device."""
    lengths, batches = reading.counted.astype(float), reading.batches
    scale = reading.count / len(lengths)
    flops = scale * reading.flops(lengths.sum(), (lengths**2).sum())
    padded = scale * sum(n * _padded(reading, *batch) for batch, n in batches.items())
    largest = reading.widest
    needed = reading.needs(largest)
    memory = needed.total
    say(f"{reading.name:18} {reading.count:,}, {lengths.mean():.0f} tokens in the mean")
    say(f"operations         {_tera(flops)} TFLOP on all devices, {_tera(padded)} with padding")
    say(
        f"programs           {len(batches)}; the largest reads {largest[0]:,} x {largest[1]} tokens"
    )
    say(f"memory             {memory / GIB:.2f} GiB of a device in it")
    one = _padded(reading, *largest) / reading.mesh.size
    seconds = describe_time(say, settings, needed, one, "it")
    if seconds:
        say(f"in all             {_duration(seconds * padded / one / reading.mesh.size)} or more")
    if reading.count > len(reading.lengths) and reading.possible[1] > largest[1]:
        rows, width = reading.possible
        memory = reading.needs(reading.possible).total
        say(f"                   {memory / GIB:.2f} GiB if texts are longer: {rows:,} x {width}")
    return memory


def _padded(reading: Reading, rows: int, width: int) -> float:
    return reading.flops(float(rows * width), float(rows * width**2))


def _tera(flops: float) -> str:
    flops /= 1e12
    return f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1e3 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:.1f} seconds"


def smaller_batches(
    batch_size: int, readings: Callable[[int], Iterable[Reading]], remedies: Remedies
) -> None:
    """Looks for the largest --batch_size below this one that fits.

    Args:
        readings: what is read with a batch size.
    """

    def memory(size: int) -> float:
        return max(reading.needs(reading.possible).total for reading in readings(size))

    remedies.seek([(f"--batch_size {size}", partial(memory, size)) for size in halves(batch_size)])


def sampled(count: int, most: int = SAMPLE) -> list[int]:
    """Which of so many are looked at, at most so many, the same ones in every run."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
