"""Whether a program fits into a device, how long it may take there, and what would make it fit."""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from llme_jax.config import PlanConfig
from llme_jax.devices import topology
from llme_jax.devices.memory import Needs

logger = logging.getLogger(__name__)

GIB = 2**30

# Flags, and the bytes of a device that a program takes with them.
Change = tuple[str, Callable[[], float]]


def memory_limit(settings: PlanConfig, mesh: Mesh) -> float | None:
    """Bytes that a program may use of a device, where that is known."""
    if settings.device_memory is not None:
        return settings.device_memory * GIB
    if settings.topology:
        return topology.chip(settings.topology).memory * GIB
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit")


def describe_time(
    say: Callable[[str], None], settings: PlanConfig, needed: Needs, flops: float, of: str
) -> float | None:
    """Says what the compiler of devices that are not here thinks of a program.

    Args:
        flops: of a device.
        of: what the program does, as in "the step".

    Returns:
        Seconds, without those of collectives, gathers and sorts; None for devices that are here,
        and where loops are counted once.
    """
    if not settings.topology or needed.compiled is None:
        return None
    chip = topology.chip(settings.topology)
    found = topology.estimate(needed.compiled.as_text(), chip)
    seconds = sum(found.seconds.values())
    kinds = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in found.seconds.items())
    exchanged = ", ".join(f"{n / 2**20:.1f} MiB {kind}" for kind, n in found.exchanged.items())
    say(f"{f'time of {of}':18} {1e3 * seconds:.1f} ms {found.how}: {kinds}")
    say(f"exchanged          {exchanged or 'nothing'}; the time of {found.missing} is not in it")
    if found.loops:
        say("                   there are loops, whose bodies are counted once")
        return None
    share = flops / chip.flops / seconds
    say(f"MFU                at most {share:.0%} of {chip.flops / 1e12:.0f} TFLOP/s")
    return seconds


class Remedies:
    """Looks for changes with which a program fits, and says each as soon as it is found.

    Args:
        limit: bytes of a device.

    Attributes:
        tried: bytes by flags.
        found: does any fit?
    """

    def __init__(self, limit: float, say: Callable[[str], None]):
        self._limit, self._say = limit, say
        self.tried, self.found = {}, False

    def seek(self, changes: list[Change]) -> None:
        """Says the first that fits, by bisection: compiling takes long.

        Args:
            changes: each takes less memory than the one before.
        """
        if not changes or not self._fits(*changes[-1]):
            return
        at = bisect_left(changes[:-1], True, key=lambda change: self._fits(*change))
        flags, self.found = changes[at][0], True
        self._say(f"  {flags}: {self.tried[flags] / GIB:.2f} GiB")

    def _fits(self, flags: str, memory: Callable[[], float]) -> bool:
        logger.info("trying %s", flags)
        self.tried[flags] = memory()
        return self.tried[flags] <= self._limit


def verdict(
    say: Callable[[str], None],
    memory: float,
    limit: float | None,
    seek: Callable[[Remedies], None],
) -> int:
    """Says whether it fits, and if not with which settings it would.

    Args:
        memory: bytes of a device that are needed.
        limit: those that there are, see `memory_limit`.
        seek: looks for the settings.

    Returns:
        The exit code: 1 when it does not fit.
    """
    if limit is None:
        say("no limit is known here: --device_memory GIB compares with that of a device")
        return 0
    if memory <= limit:
        say(f"it fits: a device has {limit / GIB:.2f} GiB")
        return 0
    say(f"it does not fit: a device has {limit / GIB:.2f} GiB; it would with")
    remedies = Remedies(limit, say)
    seek(remedies)
    if not remedies.found:
        least = min(remedies.tried.items(), key=lambda one: one[1], default=None)
        said = f", {least[0]} takes {least[1] / GIB:.2f} GiB" if least else ""
        say(f"  none of the settings that were tried{said}")
    return 1


def halves(number: int) -> Iterator[int]:
    """Half of a number, half of that, ... down to 1."""
    while number > 1:
        number //= 2
        yield number


def numbers(tree) -> int:
    """How many there are in all arrays of a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def device_bytes(tree) -> int:
    """Bytes of a device that arrays, or shapes with shardings, take."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
