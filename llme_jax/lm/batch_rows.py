"""How many prompts a language model gets at a time."""

from collections.abc import Callable

from jax.sharding import Mesh

from llme_jax.devices.memory import Needs
from llme_jax.errors import InputError
from llme_jax.inference.over_store import sharing, tokens_a_device

TOKENS = 1 << 15  # on a device at a time at most: a language model takes more memory for each


class BatchRows:
    """Rows of a batch by its width.

    Args:
        widest: width of the widest batches.
        rows: prompts a device gets at a time; as many as TOKENS and its memory allow when None.
        analyse: (prompts a device, width) -> what a device needs for such a batch.
        times: more tokens than elsewhere, up to TOKENS.
        left: bytes of a device beside the weights; what it says itself when None.

    Attributes:
        devices: that share the rows of a batch.

    Raises:
        InputError: not even one prompt fits into the memory.
    """

    def __init__(
        self,
        mesh: Mesh,
        widest: int,
        rows: int | None,
        analyse: Callable[[int, int], Needs],
        times: int = 1,
        left: float | None = None,
    ):
        self.devices = sharing(mesh)
        self._rows = rows
        if rows is None:
            tokens = max(min(tokens_a_device(mesh) * times, TOKENS), widest)
            left = _memory_left(mesh) if left is None else left
            self._tokens = tokens if left is None else _that_fit(tokens, left, widest, analyse)

    def __call__(self, width: int) -> int:
        return (self._rows or max(self._tokens // width, 1)) * self.devices


def _memory_left(mesh: Mesh) -> float | None:
    """Bytes of a device that nothing takes yet; None where it does not say, as CPUs."""
    memory = mesh.local_devices[0].memory_stats() or {}
    if "bytes_limit" not in memory:
        return None
    return memory["bytes_limit"] - memory["bytes_in_use"]


def _that_fit(tokens: int, left: float, widest: int, analyse: Callable[[int, int], Needs]) -> int:
    """`tokens` a device, halved until the widest batch fits into the memory that is left."""
    while True:
        rows = max(tokens // widest, 1)
        needed = analyse(rows, widest).temporary
        if needed < 0.9 * left:  # the rest is for what the allocator cannot join
            return tokens
        if rows == 1:
            raise InputError(
                f"a prompt of {widest} tokens takes {needed / 2**20:.0f} MiB on a device, "
                f"{left / 2**20:.0f} are left beside the weights: give --tensor N to spread the "
                "model over N devices, or a lower --context_max_length"
            )
        tokens //= 2
