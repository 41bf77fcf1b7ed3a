"""Long chats: earlier turns that help to answer (Multi-Session Chat).

    python -m llme_jax.train --config chat.py --data_root /data/llm-embedder

Reproduces the reference's command for 8 devices; `chat.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import Config, shrunk


def get_config(arg: str | None = None) -> Config:
    config = Config()
    config.data.train_data = ["llm-embedder:chat/msc/train.scored.llama2-7b-chat.json"]
    config.data.select_positive = "teacher"
    config.data.select_negative = "random"
    config.loss.contrastive_weight = 0.0
    config.loss.teacher_temperature = 0.1
    config.training.output_dir = "data/outputs/msc/distill"
    config.training.max_steps = 4000
    config.training.save_steps = 4000
    config.training.learning_rate = 5e-6
    return shrunk(config, arg)
