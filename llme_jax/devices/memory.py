"""How much of a device's memory a program needs, and how it looks when there is too little."""

import math
import re
from typing import NamedTuple

import jax

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Needs(NamedTuple):
    """Bytes of a device that a program needs, as XLA plans them."""

    arguments: float  # and what it returns
    temporary: float  # beside these, while it runs
    compiled: jax.stages.Compiled | None = None  # None: the compiler refused it

    @property
    def total(self) -> float:
        return self.arguments + self.temporary


def needs(lowered) -> Needs:
    """Compiles a program, `jax.jit(f).lower(...)`, to find out what it needs.

    A TPU's compiler refuses what does not fit; what it says that it needs then counts as temporary.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        said = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", str(error))
        return Needs(0, float(said[1]) * UNITS[said[2]] if said else math.inf)
    analysis = compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments = analysis.argument_size_in_bytes + results
    return Needs(arguments, analysis.temp_size_in_bytes, compiled)


def exhausted(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of this machine, is full."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
