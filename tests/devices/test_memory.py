"""What a program needs, and what is said when the memory of a device is full."""

import math

import jax
import jax.numpy as jnp
import pytest

from llme_jax.config import ProcessConfig
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.runtime import started
from llme_jax.errors import RunError

FULL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:"
)
FULL_TPU = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(1.50T) exceeds available HBM (15.75G)."
)


class Refused:
    """What a compiler refuses to compile, in these words."""

    def __init__(self, message: str):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_needs_of_a_program():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    found = needs(jax.jit(lambda a, b: (a @ b) @ b).lower(x, x))
    assert found.arguments == 3 * 4 * 1024**2  # the result besides
    assert 4 * 1024**2 <= found.temporary < 2 * 4 * 1024**2
    assert found.total == found.arguments + found.temporary


def test_what_a_compiler_refuses_is_known_to_need_more():
    assert needs(Refused(FULL)) == Needs(0, 21.95 * 2**30)
    assert needs(Refused(FULL_TPU)) == Needs(0, 1.5 * 2**40)
    assert needs(Refused("RESOURCE_EXHAUSTED: too much")).total == math.inf
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        needs(Refused("INTERNAL: no memory of what happened"))


def test_full_memory_is_one_sentence():
    message = "^the memory of a device is full: give less .RESOURCE_EXHAUSTED: Out of memory"
    with (
        pytest.raises(RunError, match=message),
        started(ProcessConfig(), None, when_full="give less"),
    ):
        jax.jit(lambda: jnp.zeros(1 << 44) + 1)()
