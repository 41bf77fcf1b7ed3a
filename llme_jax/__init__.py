"""Fine-tune the retrievers that feed language models, in JAX on TPUs and GPUs."""

__version__ = "0.1.0"
