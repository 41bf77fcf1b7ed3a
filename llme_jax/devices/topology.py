"""Devices that are not here: what a program would take on them, said by their compiler.

A TPU's compiler runs on any x86 Linux machine (the package `libtpu`); nothing is executed.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from llme_jax.errors import InputError


class Chip(NamedTuple):
    """A device as the compiler and the maker describe it."""

    memory: float  # GiB that programs may use, as the compiler says when they take more
    flops: float  # a second, of bf16 products: the maker's figure
    clock: float  # Hz: the figure above by the width and number of its matrix units
    host: str  # TPU_ACCELERATOR_TYPE


# https://cloud.google.com/tpu/docs/v5e, v5p and v6e
CHIPS = {
    "v5e": Chip(15.75, 197e12, 1.5e9, "v5litepod-8"),
    "v5p": Chip(95.74, 459e12, 1.75e9, "v5p-16"),
    "v6e": Chip(31.25, 918e12, 1.75e9, "v6e-8"),
}
_CHILD = "LLME_JAX_COMPILES_FOR"


def chip(topology: str) -> Chip:
    return CHIPS[topology.partition(":")[0]]


def compiles_for() -> str | None:
    """The devices that are not here for which this process compiles."""
    return os.environ.get(_CHILD)


def run_elsewhere(topology: str | None, module: str, argv: list[str]) -> int | None:
    """Runs a command again in a process that can compile for these devices; its exit code.

    Returns:
        None: this is that process, or there are none that are not here.

    Raises:
        InputError: their compiler is not installed.
    """
    if compiles_for() == topology:
        return None
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {topology}: the compiler for TPUs is not installed: "
            "pip install 'llme_jax[plan-tpu]'"
        )
    command = [sys.executable, "-m", module, *argv]
    return subprocess.run(command, env=os.environ | environment(topology), check=False).returncode


def environment(topology: str) -> dict[str, str]:
    """Of a process that compiles for these devices."""
    return {
        _CHILD: topology,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip(topology).host,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process stops at a lock file
    }


def devices(topology: str | None) -> list | None:
    """The devices, to make a mesh of; None where there are none that are not here."""
    if topology is None:
        return None
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


class Estimate(NamedTuple):
    """What a compiled program does on one device.

    Attributes:
        seconds: by kind, as the compiler estimates; collectives, gathers and sorts are not in it.
            It says nothing of kernels either: see KERNEL_FLOPS.
        exchanged: bytes that come out of each kind of collective.
        loops: whether it has loops, whose bodies are counted once.
    """

    seconds: dict[str, float]
    exchanged: dict[str, int]
    loops: bool


_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
# Operations a cycle of `models/flash_attention.py`. The compiler's schedule for v5e (bundles of a
# pair of blocks, 12 heads of 64, dropout) has 29,600 forward and 48,000 backward, and about as many
# for v5p and v6e: what limits it is not the matrix unit.
KERNEL_FLOPS = 37_000
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def estimate(program: str, of: Chip) -> Estimate:
    """Reads the text of an optimised TPU program."""
    cycles, exchanged, seen = Counter(), Counter(), set()
    for line in program.splitlines():
        # Where the compiler has no estimate it says so by a number beyond all reason.
        if (match := _CYCLES.search(line)) and int(match[1]) < 10**12:
            cycles[_kind(line)] += int(match[1])
        if match := _KERNEL.search(line):
            cycles["attention"] += int(match[1]) / KERNEL_FLOPS
        if match := _COLLECTIVE.search(line):
            # An asynchronous one stands there several times; parts of one share its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            name = match[2], match[1], channel and channel[1]
            if channel and name in seen:
                continue
            seen.add(name)
            sizes = [
                _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in re.findall(rf"({'|'.join(_BYTES)})\[([\d,]*)\]", match[1])
            ]
            # The start of one returns what goes in, too.
            exchanged[match[2]] += max(sizes, default=0) if match[3] else sum(sizes)
    seconds = {kind: n / of.clock for kind, n in cycles.most_common()}
    return Estimate(seconds, dict(exchanged), " while(" in program)


def _kind(line: str) -> str:
    name = _NAME.search(line)
    name = name[1] if name else ""
    if "attention" in name:
        return "attention"
    if name.endswith(("dot_general", "conv_general_dilated")):
        return "products"
    if re.search(r"= \S+ (copy|transpose|reshape|copy-start)\(", line):
        return "copies"
    if name.endswith(("reduce_sum", "reduce_max", "reduce")):
        return "reductions"
    return "the rest"
