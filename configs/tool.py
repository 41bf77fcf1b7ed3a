"""Tool retrieval: descriptions of tools that a request needs (ToolBench).

    python -m llme_jax.train --config tool.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `tool.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = ["llm-embedder:tool/toolbench/train.hardneg.json"]
    config.data.eval_data = "llm-embedder:tool/toolbench/test.json"
    config.data.corpus = "llm-embedder:tool/toolbench/corpus.json"
    config.data.key_template = "{text}"
    config.evaluation.metrics = ["ndcg"]
    config.training.output_dir = "data/outputs/tool/contrastive"
    config.training.max_steps = 2000
    config.training.save_steps = 2000
    return shrunk(config, arg)
