"""How every command starts: its processes, its log, its memory of compiled programs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from llme_jax.data.tokens import cache_dir


@contextmanager
def started(dataset_cache_dir: str | None) -> Iterator[None]:
    """What has to be in place around a command's work.

    Joins the processes that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name,
    and shows what the package logs (on process 0; warnings on all) between progress bars.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
            # The others wait at the end while process 0 measures and writes files.
            shutdown_timeout_seconds=24 * 3600,
        )
    # On CPU a program is tied to the instructions of one processor, which JAX does not check when
    # several machines share a home folder; accelerators are told apart.
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        folder = cache_dir(dataset_cache_dir) / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Our own logger only: jax, orbax and transformers have much to say.
    logger = logging.getLogger("llme_jax")
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    with logging_redirect_tqdm([logger]):
        yield
