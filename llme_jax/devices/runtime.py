"""How every command starts and stops: its processes, its log, its memory of compiled programs."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from llme_jax import __version__
from llme_jax.config import ProcessConfig
from llme_jax.devices.memory import exhausted
from llme_jax.errors import InputError, RunError
from llme_jax.files.cache import cache_dir

logger = logging.getLogger("llme_jax")

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
WAIT = 300  # seconds in which the processes have to find each other
LAST_WORDS = 5  # seconds in which the other processes can say what went wrong with them


@contextmanager
def started(
    processes: ProcessConfig, dataset_cache_dir: str | None, when_full: str
) -> Iterator[None]:
    """What has to be in place around a command's work.

    Joins the processes of the run, and shows what the package logs (on process 0; warnings on all)
    between progress bars. An error in one of several processes ends it at once, so that the others
    notice and nobody waits for ever.

    Args:
        when_full: what to do when the memory of a device is.

    Raises:
        InputError: only some of the settings of `processes` are there.
        RunError: the memory of a device is full.
    """
    # Our own logger only: jax, orbax and transformers have much to say.
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    join(processes)
    if jax.process_index() != 0:
        logger.setLevel(logging.WARNING)
    # On CPU a program is tied to the instructions of one processor, which JAX does not check when
    # several machines share a home folder; accelerators are told apart.
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        folder = cache_dir(dataset_cache_dir) / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    with logging_redirect_tqdm([logger]):
        try:
            yield
        except BaseException as error:
            if exhausted(error):
                said = str(error).splitlines()[0][:200]
                error = RunError(f"the memory of a device is full: {when_full} ({said})")
            if jax.process_count() > 1:
                _leave(error)
            raise error


def versions() -> dict[str, str]:
    """Of what a result may depend on, for the records of runs."""
    packages = ("jax", "flax", "optax", "transformers")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"llme_jax": __version__, "python": platform.python_version(), **found}


def join(processes: ProcessConfig) -> None:
    """Makes one run of the processes on several hosts (`jax.distributed`).

    They are named by flags or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    the steps of SLURM and the hosts of a TPU pod find each other by themselves.

    Raises:
        InputError: a flag is missing or wrong.
        RunError: the processes cannot find each other.
    """
    named = {
        "coordinator_address": processes.coordinator_address,
        "num_processes": processes.num_processes,
        "process_id": processes.process_id,
    }
    for name, value in named.items():
        if value is None:
            named[name] = os.environ.get(f"JAX_{name.upper()}")
    if any(value is not None for value in named.values()):
        named = _checked(named)
        address, count, number = named.values()
        logger.info("process %d of %d, waiting for the others at %s", number, count, address)
        if number == 0:
            _check_port(address)
        else:
            _reach(address)
        _initialize(
            f"--coordinator_address {address}: the {count} processes cannot meet at process 0",
            "give another port of its host",
            cluster_detection_method="deactivate",
            **named,
        )
    elif all(name in os.environ for name in SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        logger.info("joining the %s tasks of this SLURM step", os.environ["SLURM_NTASKS"])
        _initialize(
            "the tasks of this SLURM step cannot find each other",
            "set JAX_COORDINATOR_PORT to a port that is free on its first node",
            **_slurm_devices(),
        )
    elif importlib.util.find_spec("libtpu") is not None and not _lonely_tpu():
        _initialize(
            "the other hosts of this TPU cannot be found",
            "name the processes with --coordinator_address, --num_processes and --process_id, or "
            "set TPU_WORKER_HOSTNAMES=localhost if there is only this host",
        )


def _check_port(address: str) -> None:
    """Whether process 0 can listen: where it cannot, jax raises an error or crashes, by chance."""
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()  # like jax: all addresses of this host
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise RunError(
            f"--coordinator_address {address}: process 0 cannot listen there "
            f"({os.strerror(error.errno)}): give another port"
        ) from None


def _reach(address: str) -> None:
    """Waits until process 0 listens: jax would wait in silence, and abort in the end.

    A name that is not known is tried again as well: where hosts start together, the name service
    may hear of process 0 after the others ask for it.
    """
    host, _, port = address.rpartition(":")
    end, said = time.monotonic() + WAIT, None
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:  # the second one of a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > end:
            raise RunError(
                f"--coordinator_address {address}: nobody listens there ({reason}): give HOST:PORT "
                f"of process 0, which has to start within {WAIT} seconds of the others"
            )
        if reason != said:
            logger.info("waiting for process 0 at %s (%s)", address, reason)
            said = reason
        time.sleep(1)


def _initialize(failure: str, remedy: str, **options) -> None:
    """`jax.distributed.initialize`, whose errors become one sentence out of these two parts."""
    # At its own time limit jax aborts with the stack of its C++: ours comes first.
    watch = threading.Timer(WAIT, _give_up, [failure])
    watch.daemon = True
    watch.start()
    # It would take SIGTERM for itself from here on; only the training loop asks whether one came.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=WAIT + 60,
            # The others wait at the end while process 0 measures and writes files.
            shutdown_timeout_seconds=24 * 3600,
        )
    except Exception as error:
        if isinstance(error, ValueError) and not options:
            return  # libtpu is installed, but this is no TPU host: a single process
        reason = str(error).partition("\n")[0]
        raise RunError(f"{failure} ({reason}): {remedy}") from error
    finally:
        watch.cancel()


def _give_up(failure: str) -> None:
    print(
        f"error: {failure} (not all of them came within {WAIT} seconds): start all of them with "
        "the same settings; the log of one that is missing says why",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _checked(named: dict) -> dict:
    for name, value in named.items():
        if value is None:
            raise InputError(
                f"--{name} is missing: several processes need --coordinator_address, "
                "--num_processes and --process_id"
            )
    try:
        count, number = int(named["num_processes"]), int(named["process_id"])
    except ValueError:
        raise InputError(
            f"JAX_NUM_PROCESSES={named['num_processes']} JAX_PROCESS_ID={named['process_id']}: "
            "give whole numbers"
        ) from None
    if count < 1:
        raise InputError(f"--num_processes {count}: give 1 or more")
    if not 0 <= number < count:
        raise InputError(f"--process_id {number}: give 0 to {count - 1}, as --num_processes says")
    match = re.fullmatch(r".+:(\d{1,5})", named["coordinator_address"])
    if not match or not 1 <= int(match[1]) <= 65535:
        raise InputError(
            f"--coordinator_address {named['coordinator_address']}: give HOST:PORT of process 0"
        )
    return {**named, "num_processes": count, "process_id": number}


def _slurm_devices() -> dict:
    """jax gives a task of SLURM one GPU; the only task of a node has all that it sees.

    They are not counted: SLURM does not always say how many there are, and no numbers, unlike no
    list, let jax see all.
    """
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES")
    return {"local_device_ids": [] if alone else None}


def _lonely_tpu() -> bool:
    """Whether the environment says that the TPU has this host only."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return bool(hosts) and "," not in hosts and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ


def start_preemption_service() -> None:
    """Lets jax take SIGTERM from here on, as `multihost_utils.reached_preemption_sync_point` needs.

    jax has no public name for starting it later than `jax.distributed.initialize`, which would be
    before there is anything to save. If this fails with another version of jax, look for what its
    `initialize` does when `jax_enable_preemption_service` is on.
    """
    from jax._src import distributed

    jax.config.update("jax_enable_preemption_service", True)
    distributed.global_state.initialize_preemption_sync_manager()


def lost_process(error: BaseException | None) -> bool:
    """Whether an error says that another process of the run is gone."""
    words = r"gloo|nccl|unavailable|heartbeat|connection|barrier|coordination|deadline"
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and jax.process_count() > 1
        and re.search(words, str(error), re.IGNORECASE) is not None
    )


def _leave(error: BaseException) -> None:
    """Ends one of several processes without waiting for the others at jax's shutdown."""
    code = 1
    if lost_process(error):
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {jax.process_index()} lost another process of this run, whose own log "
            "says why it stopped; start the same command on all hosts again, it goes on from what "
            f"is saved ({reason})",
            file=sys.stderr,
        )
    elif isinstance(error, (InputError, RunError)):
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # it holds the others together
        time.sleep(LAST_WORDS)
    os._exit(code)
