"""Settings: declared once, read from an experiment file and flags, checked before any work."""

from llme_jax.config.commands import *  # noqa: F403
