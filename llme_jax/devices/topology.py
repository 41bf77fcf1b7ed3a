"""Devices that are not here: what a program would take on them, said by their compiler.

The compilers of TPUs and GPUs run on any x86 Linux machine (the packages `libtpu` and
`jax_cuda13_plugin`); nothing is executed.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Literal, NamedTuple

from llme_jax.devices import gpu_program
from llme_jax.errors import InputError


class Chip(NamedTuple):
    """A device as the compiler and the maker describe it."""

    platform: Literal["tpu", "gpu"]
    memory: float  # GiB that programs may use
    flops: float  # a second, of bf16 products: the maker's figure
    # Of TPUs, Hz: the figure above by the width and number of the matrix units.
    clock: float = 0.0
    host: str = ""  # of TPUs: TPU_ACCELERATOR_TYPE
    bandwidth: float = 0.0  # of GPUs: bytes of the memory a second


# https://cloud.google.com/tpu/docs/v5e, v5p and v6e; the memory is what their compiler allows.
# Of an H100 SXM it is what scripts/gpu_8.sh lets JAX take: 92% of 79.11 GiB.
CHIPS = {
    "v5e": Chip("tpu", 15.75, 197e12, 1.5e9, "v5litepod-8"),
    "v5p": Chip("tpu", 95.74, 459e12, 1.75e9, "v5p-16"),
    "v6e": Chip("tpu", 31.25, 918e12, 1.75e9, "v6e-8"),
    "h100": Chip("gpu", 72.78, 989.4e12, bandwidth=3.35232e12),
}
# What XLA asks a GPU for (its GpuTargetConfigProto), as an H100 SXM of 80 GB answers.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What compiles for a platform: its module, the extra that brings it.
_COMPILERS = {
    "tpu": ("libtpu", "plan-tpu"),
    "gpu": ("jax_cuda13_plugin", "plan-cuda"),
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
    platform = chip(topology).platform
    compiler, extra = _COMPILERS[platform]
    if importlib.util.find_spec(compiler) is None:
        raise InputError(
            f"--topology {topology}: the compiler for {platform.upper()}s is not installed: "
            f"pip install 'llme_jax[{extra}]'"
        )
    command = [sys.executable, "-m", module, *argv]
    return subprocess.run(command, env=os.environ | environment(topology), check=False).returncode


def environment(topology: str) -> dict[str, str]:
    """Of a process that compiles for these devices."""
    here = {_CHILD: topology, "JAX_PLATFORMS": "cpu"}
    if chip(topology).platform == "gpu":
        return here
    return here | {
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

    if chip(topology).platform == "gpu":
        # Hosts of a kind, hosts, and the GPUs of a host.
        how = {"target_config": _H100, "topology": f"1x1x{topology.partition(':')[2]}"}
        return list(topologies.get_topology_desc(platform="cuda", **how).devices)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


class Estimate(NamedTuple):
    """What a compiled program does on one device.

    Attributes:
        seconds: by kind, found as `how` says; what is `missing` is not in it.
        exchanged: bytes that come out of each kind of collective.
        loops: whether it has loops, whose bodies are counted once.
    """

    seconds: dict[str, float]
    exchanged: dict[str, int]
    loops: bool
    how: str
    missing: str


_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
    r"\(([^)]*)\)"
)
# Operations a cycle of `models/flash_attention.py`. The compiler's schedule for v5e (bundles of a
# pair of blocks, 12 heads of 64, dropout) has 29,600 forward and 48,000 backward, and about as many
# for v5p and v6e: what limits it is not the matrix unit.
KERNEL_FLOPS = 37_000
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def estimate(program: str, of: Chip) -> Estimate:
    """Reads the text of an optimised program."""
    if of.platform == "gpu":
        seconds = gpu_program.least_seconds(program, of.flops, of.bandwidth)
        how = f"at the peaks ({of.flops / 1e12:.0f} TFLOP/s, {of.bandwidth / 1e12:.2f} TB/s)"
        missing = "collectives"
    else:
        seconds = {kind: n / of.clock for kind, n in _cycles(program).items()}
        how, missing = "as the compiler estimates", "collectives, gathers and sorts"
    slowest_first = dict(Counter(seconds).most_common())
    exchanged = _exchanged(program, in_parts=of.platform == "tpu")
    return Estimate(slowest_first, exchanged, " while(" in program, how, missing)


def _cycles(program: str) -> Counter[str]:
    """Of each kind, as the compiler of TPUs estimates; of Pallas kernels see KERNEL_FLOPS."""
    cycles = Counter()
    for line in program.splitlines():
        # Where the compiler has no estimate it says so by a number beyond all reason.
        if (match := _CYCLES.search(line)) and int(match[1]) < 10**12:
            cycles[_kind(line)] += int(match[1])
        if match := _KERNEL.search(line):
            cycles["attention"] += int(match[1]) / KERNEL_FLOPS
    return cycles


def _exchanged(program: str, in_parts: bool) -> dict[str, int]:
    """Bytes that come out of each kind of collective.

    Args:
        in_parts: whether an asynchronous one stands there several times, as on TPU.
    """
    exchanged, seen = Counter(), set()
    for line in program.splitlines():
        if match := _COLLECTIVE.search(line):
            shape, kind, operands = match.groups()
            channel = re.search(r"channel_id=(\d+)", line)  # parts of one share it
            name = kind, shape, channel and channel[1]
            if in_parts and channel and name in seen:
                continue
            seen.add(name)
            results, count = gpu_program.arrays(shape), operands.count("%")
            if len(results) >= 2 * count:  # the start of one returns what goes in, too
                results = results[count : 2 * count]
            exchanged[kind] += sum(array.bytes for array in results)
    return dict(exchanged)


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
