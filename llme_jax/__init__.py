"""Fine-tune the retrievers that feed language models, in JAX on TPUs and GPUs."""

import os

# transformers would say at every start that models need torch; here they do not.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
