"""Fine-tune the retrievers that feed language models, in JAX on TPUs and GPUs."""

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llme_jax.api import Encoder, Reranker, Scorer, search

# transformers would say at every start that models need torch; here they do not.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The modules of a command are read for seconds: Ctrl-C ends that without a traceback, config/cli.py
# takes it from there.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"
__all__ = ["Encoder", "Reranker", "Scorer", "search"]


def __getattr__(name: str):
    """What api.py has, whose libraries take seconds to load: only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llme_jax import api

    return getattr(api, name)
