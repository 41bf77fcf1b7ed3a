"""The cache: where tokenised data, downloads and compiled programs are kept between runs."""

import os
from pathlib import Path

from llme_jax.files.storage import check_writable


def cache_dir(config_value: str | None) -> Path:
    """--dataset_cache_dir, else $LLME_JAX_CACHE, else ~/.cache/llme_jax."""
    value = config_value or os.environ.get("LLME_JAX_CACHE") or "~/.cache/llme_jax"
    return Path(value).expanduser()


def check_cache(config_value: str | None) -> None:
    """Refuses a cache that cannot be made; one that is there may be complete, and read-only.

    Raises:
        InputError: names the flag or the variable that it comes from.
    """
    folder = cache_dir(config_value)
    if not os.path.isdir(folder):
        by_variable = not config_value and os.environ.get("LLME_JAX_CACHE")
        check_writable("LLME_JAX_CACHE" if by_variable else "--dataset_cache_dir", folder)
