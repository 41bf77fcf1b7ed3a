"""A reranker for the quickstart's retriever, in three commands after the quickstart itself.

    python -m llme_jax.retrieve --config quickstart.py:mine --metrics collate_neg --save_to_output
    python -m llme_jax.rank --config quickstart_ranker.py
    python -m llme_jax.rank --config quickstart_ranker.py:rerank

The first mines hard negatives with the quickstart's retriever, the second trains MiniLM on them as
a reranker in ten minutes of 2 CPU cores, the third orders the retriever's hits of the test queries
by both. No test query asks for a function that training has seen. `quickstart_ranker.py:runlocal`
shrinks the training.

So few requests do not make a reranker that beats the trained retriever alone; together they are a
little better (benchmarks/README.md).
"""

from llme_jax.config import RankConfig, shrunk
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart

STEPS = 400


def get_config(arg: str | None = None) -> RankConfig:
    files = quickstart.prepare(cache_dir(None))
    config = RankConfig()
    config.data.query_max_length = 64
    config.data.key_max_length = 64
    config.training.output_dir = "data/outputs/quickstart-ranker"
    if arg == "rerank":
        config.ranker.ranker = f"data/outputs/quickstart-ranker/checkpoint-{STEPS}/ranker"
        config.data.eval_data = str(files.test)
        config.data.corpus = str(files.corpus)
        config.evaluation.load_result = "data/outputs/quickstart/test.result.json"
        config.evaluation.rerank_depth = 20
        config.evaluation.retriever_weight = 0.7
        return config
    config.ranker.ranker = str(files.model)
    config.data.train_data = ["data/outputs/quickstart-mine/train.neg.json"]
    config.loss.contrastive_weight = 1.0
    config.training.per_device_train_batch_size = 8
    config.training.max_steps = STEPS
    config.training.learning_rate = 1e-4
    config.training.save_steps = 100
    config.training.logging_steps = 10
    return shrunk(config, arg)
