"""Fine-tune the retrievers that feed language models, in JAX on TPUs and GPUs."""

import os
import signal
import sys

# transformers would say at every start that models need torch; here they do not.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The modules of a command are read for seconds: Ctrl-C ends that without a traceback, config/cli.py
# takes it from there.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"
