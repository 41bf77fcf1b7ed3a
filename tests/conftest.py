"""Tests run on 8 virtual CPU devices; shapes in annotations are checked while they run."""

import atexit
import os
import shutil
import tempfile

# Tiny models spend all their time in the compiler: level 0 halves it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test starts the same command several times: what one has compiled the next one loads.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxtyping import install_import_hook

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
install_import_hook(
    ["llme_jax.models", "llme_jax.losses", "llme_jax.retrieval.metrics"], "beartype.beartype"
)
