"""Which processes a command joins, and what it says when they do not come."""

import logging
import socket
import threading

import jax
import pytest
from commands import finish, free_port, start

from llme_jax.config import ProcessConfig
from llme_jax.devices import runtime
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
    monkeypatch.setattr(runtime, "_reach", lambda address: None)
    monkeypatch.setattr(runtime, "_check_port", lambda address: None)
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
        (("host:0", 2, 0), "--coordinator_address host:0: give HOST:PORT of process 0"),
        (("host:65536", 2, 0), "--coordinator_address host:65536: give HOST:PORT of process 0"),
        (("host:1", 2, 2), "--process_id 2: give 0 to 1"),
        (("host:1", 0, 0), "--num_processes 0: give 1 or more"),
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
        ({}, []),  # the node's only task has all that it sees, however many
        ({"SLURM_GPUS_ON_NODE": "8"}, []),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16"}, None),  # one GPU a task, as jax does
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


def test_any_error_of_jax_is_one_sentence(joined, monkeypatch):
    def fails(**_):
        raise ValueError("something new\nat length")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(RunError, match=r"host:1: .* \(something new\): give another port") as error:
        runtime.join(ProcessConfig("host:1", 2, 1))
    assert "\n" not in str(error.value)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RunError, match=r"SLURM step .* \(something new\): set JAX_COORDINATOR_PORT"
    ):
        runtime.join(ProcessConfig())


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Connection refused"), ("no..name", "label empty")]
)
def test_process_0_that_never_listens(monkeypatch, caplog, host, reason):
    monkeypatch.setattr(runtime, "WAIT", 0.1)
    caplog.set_level(logging.INFO)
    address = f"{host}:{free_port()}"
    with pytest.raises(RunError, match=f"{address}: nobody listens there .*{reason}"):
        runtime._reach(address)
    assert f"waiting for process 0 at {address} (" in caplog.text and reason in caplog.text


def test_process_0_and_its_name_may_come_later(monkeypatch, caplog):
    """The name is known at the second try, and process 0 listens before the third one."""
    caplog.set_level(logging.INFO)
    address = "127.0.0.1", free_port()
    connect, tried = socket.create_connection, []

    def by_name(to, timeout):
        assert to == ("host0", address[1])
        tried.append(to)
        if len(tried) == 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", by_name)
    timer = threading.Timer(1.5, lambda: servers.append(socket.create_server(address)))
    servers = []
    timer.start()
    runtime._reach(f"host0:{address[1]}")
    servers[0].close()
    assert "host0" in caplog.text and "(Name or service not known)" in caplog.text
    assert len(tried) == 3 and "(Connection refused)" in caplog.text


def test_what_jax_has_no_public_name_for():
    """If this fails, another version of jax starts its preemption service by another name: see
    `runtime.start_preemption_service`, and what `jax.distributed.initialize` calls now."""
    from jax._src import distributed

    assert callable(distributed.global_state.initialize_preemption_sync_manager)
    assert "jax_enable_preemption_service" in jax.config.values


# A command that joins the others and does nothing; it waits for as many seconds as it is told.
JOIN = """
import jax
from jax._src import xla_bridge
from llme_jax.config import cli
from llme_jax.devices import runtime
from llme_jax.config import ProcessConfig

def main(argv):
    runtime.WAIT = int(argv[0])
    with runtime.started(ProcessConfig(), None, "FULL"):
        visible = xla_bridge.CUDA_VISIBLE_DEVICES.value
        print(jax.process_count(), "processes,", visible, "GPUs visible", flush=True)

cli.run(main)
"""


def join(port: int, number: int, wait: int):
    named = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": number}
    return start(
        [str(wait)], 1, code=JOIN, **{f"JAX_{name}": str(value) for name, value in named.items()}
    )


def test_what_keeps_processes_apart_is_one_sentence():
    with socket.create_server(("", 0)) as server:
        taken, alone, nobody = server.getsockname()[1], free_port(), free_port()
        processes = [join(taken, 0, 2), join(alone, 0, 2), join(nobody, 1, 2)]
        said = [finish(process, code=1) for process in processes]
    assert f":{taken}: process 0 cannot listen there (Address already in use): give" in said[0]
    assert f"127.0.0.1:{alone}: the 2 processes cannot meet at process 0 (not all" in said[1]
    assert f"1 of 2, waiting for the others at 127.0.0.1:{nobody}" in said[2]
    assert f"error: --coordinator_address 127.0.0.1:{nobody}: nobody listens there" in said[2]
    for text in said:
        assert text.count("error: ") == 1 and "Traceback" not in text and "stack" not in text


def test_process_0_is_started_last():
    port = free_port()
    second = join(port, 1, 60)
    for line in second.stderr:
        if "waiting for process 0 at" in line:
            break
    first = join(port, 0, 60)
    assert "2 processes" in finish(second) and "2 processes" in finish(first)


@pytest.mark.parametrize(("nodes", "visible"), [(2, "all"), (1, "0")])
def test_the_gpus_of_a_slurm_task(nodes, visible):
    """Whatever they are: what jax asks CUDA for. Each task believes to be the first of its node."""
    more = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    more["SLURM_STEP_NUM_NODES"] = str(nodes)
    steps = [{**STEP, **more, "SLURM_PROCID": str(i)} for i in range(2)]
    for process in [start(["60"], 1, code=JOIN, **step) for step in steps]:
        assert f"2 processes, {visible} GPUs visible" in finish(process)
