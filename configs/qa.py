"""Question answering on Natural Questions, with mined negatives (LLM-Embedder's QA fine-tuning).

    python -m llme_jax.train --config qa.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `qa.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = ["llm-embedder:qa/nq/train.json"]
    config.data.eval_data = "llm-embedder:qa/nq/test.json"
    config.data.corpus = "llm-embedder:qa/nq/corpus.json"
    config.data.key_max_length = 128
    config.data.query_max_length = 32
    config.evaluation.metrics = ["nq"]
    config.training.output_dir = "data/outputs/nq/contrastive"
    config.training.max_steps = 2000
    return shrunk(config, arg)
