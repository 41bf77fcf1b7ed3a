"""Long-range language modelling: chunks of books, papers and code that help to go on.

    python -m llme_jax.train --config lrlm.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `lrlm.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = [
        f"llm-embedder:lrlm/{name}/train.128tok.scored.llama2-7b-chat.json"
        for name in ("books3", "arxiv", "codeparrot")
    ]
    config.data.select_positive = "teacher"
    config.data.select_negative = "random"
    config.data.teacher_scores_margin = 0.1
    config.loss.contrastive_weight = 0.0
    config.loss.teacher_temperature = 0.1
    config.training.output_dir = "data/outputs/lrlm/distill"
    config.training.max_steps = 4000
    config.training.save_steps = 4000
    config.training.learning_rate = 5e-6
    return shrunk(config, arg)
