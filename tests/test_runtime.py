"""Which processes a command joins."""

import jax
import pytest

from llme_jax import runtime
from llme_jax.config import ProcessConfig
from llme_jax.errors import InputError, RunError

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with; no variable of this machine counts."""
    more = ("SLURM_GPUS_ON_NODE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
    for name in [*STEP, *more, *(f"JAX_{n.upper()}" for n in vars(ProcessConfig()))]:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    return calls


def test_one_process_by_default(joined):
    runtime.join(ProcessConfig())
    assert joined == []


def test_flags_go_before_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    runtime.join(ProcessConfig())
    runtime.join(ProcessConfig("second:2", 2, 0))
    said = [[call[name] for name in vars(ProcessConfig())] for call in joined]
    assert said == [["first:1", 4, 3], ["second:2", 2, 0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "--process_id is missing"),
        ((None, None, 0), "--coordinator_address is missing"),
        (("host", 2, 0), "--coordinator_address host: give HOST:PORT of process 0"),
        (("host:1", 2, 2), "--process_id 2: give 0 to 1"),
    ],
)
def test_what_is_incomplete_is_refused(joined, given, message):
    with pytest.raises(InputError, match=message):
        runtime.join(ProcessConfig(*given))
    assert joined == []


def test_a_variable_that_is_no_number(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES=two"):
        runtime.join(ProcessConfig("host:1", None, 0))


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, [0, 1, 2, 3, 4, 5, 6, 7]),  # the node's only task has all
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16"}, None),  # one GPU a task, as JAX does
        ({}, None),
    ],
)
def test_a_slurm_step_joins_by_itself(joined, monkeypatch, more, devices):
    for name, value in {**STEP, **more}.items():
        monkeypatch.setenv(name, value)
    runtime.join(ProcessConfig())
    (call,) = joined
    assert call["local_device_ids"] == devices and "coordinator_address" not in call


def test_a_single_task_of_slurm_joins_nobody(joined, monkeypatch):
    for name, value in {**STEP, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    runtime.join(ProcessConfig())
    assert joined == []


def test_a_tpu_host_joins_by_itself(joined, monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name == "libtpu")
    runtime.join(ProcessConfig())
    assert len(joined) == 1

    def no_tpu(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_tpu)
    runtime.join(ProcessConfig())  # libtpu without a TPU: one process

    def no_network(**_):
        raise OSError("metadata.google.internal: no answer")

    monkeypatch.setattr(jax.distributed, "initialize", no_network)
    with pytest.raises(RunError, match="set TPU_WORKER_HOSTNAMES=localhost if there is only"):
        runtime.join(ProcessConfig())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    runtime.join(ProcessConfig())
