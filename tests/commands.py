"""Starts the commands as a person does, on as many virtual devices and processes as wanted."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# On CPU, processes that come to a collective 30 seconds apart lose each other, as they do on a busy
# machine (https://github.com/jax-ml/jax/issues/40831): such a test, and no other, is tried again.
patient = pytest.mark.flaky(
    reruns=2, only_rerun="(?is)gloo.{0,200}(timeout|timed out|connectfullmesh)"
)
# Fails when torch was imported, as it is for tests only; tensorboardX does it by itself.
CODE = """
import atexit, os, runpy, sys
loaded = sys.modules
atexit.register(lambda: "torch" in loaded and "tensorboardX" not in loaded and os._exit(99))
runpy.run_module("llme_jax.COMMAND", run_name="__main__", alter_sys=True)
"""


def flags(settings: dict) -> list[str]:
    """Settings by name as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start(
    argv: list[str],
    devices: int = 8,
    command: str = "train",
    code: str = CODE,
    cwd: Path = ROOT,
    **environment: str,
) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("COMMAND", command), *argv],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start_together(
    argv: list[str], processes: int, devices: int, command: str = "train", code: str = CODE
) -> list[subprocess.Popen]:
    """`processes` of them that work as one, each with its own devices."""
    port = free_port()
    return [
        start(
            argv,
            devices,
            command,
            code,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(rank),
        )
        for rank in range(processes)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, errors = process.communicate(timeout=900)
    assert process.returncode == code, errors
    return out + errors
