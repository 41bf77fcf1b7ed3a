"""LLM-Embedder: one model for six tasks, each with its instruction and recipe.

    bash scripts/llm-embedder.sh

Reproduces the reference's `scripts/llm-embedder.sh` for 8 devices, 100 queries each; every batch is
of one file, the tool data counts twice. `llm_embedder.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk

FILES = [
    "chat/msc/train.json",
    "convsearch/qrecc/train.concat.json",
    "lrlm/arxiv/train.json",
    "lrlm/books3/train.json",
    "lrlm/codeparrot/train.json",
    "qa/msmarco/train.json",
    "qa/nq/train.json",
    "tool/toolbench/train.json",
    "tool/toolbench/train.json",
    "icl/icl/train.json",
]


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = [f"llm-embedder:{file}" for file in FILES]
    config.data.version = "llm-embedder"
    config.data.inbatch_same_dataset = "epoch"
    config.data.use_train_config = True
    config.training.output_dir = "data/outputs/llm-embedder"
    config.training.max_steps = 10_000
    config.training.save_steps = 10_000
    config.training.logging_steps = 100
    config.training.gradient_checkpointing = True
    config.training.per_device_train_batch_size = 100
    config.training.learning_rate = 5e-6
    return shrunk(config, arg)
