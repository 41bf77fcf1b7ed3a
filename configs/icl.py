"""In-context learning: examples ranked as a language model ranks them (stable distillation).

    python -m llme_jax.train --config icl.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `icl.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = ["llm-embedder:icl/icl/train.scored.llama2-chat.top20.json"]
    config.data.add_instruction = False
    config.data.select_positive = "random"
    config.loss.contrastive_weight = 0.0
    config.loss.stable_distill = True
    config.training.output_dir = "data/outputs/icl/distill"
    config.training.max_steps = 6000
    config.training.save_steps = 6000
    return shrunk(config, arg)
