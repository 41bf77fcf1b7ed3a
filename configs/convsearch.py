"""Conversational search: passages for a question and the turns before it (QReCC).

    python -m llme_jax.train --config convsearch.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `convsearch.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = [
        "llm-embedder:conversation/qrecc/train.concat.neg.bm25-from-human.json"
    ]
    config.data.key_template = "{text}"
    config.evaluation.metrics = ["mrr", "ndcg"]
    config.evaluation.cutoffs = [3, 10, 100]
    config.training.output_dir = "data/outputs/qrecc/contrastive-concat-from-bm25-human"
    config.training.max_steps = 2000
    return shrunk(config, arg)
