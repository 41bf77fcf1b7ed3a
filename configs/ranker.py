"""A reranker for Natural Questions, from DeBERTa-v3-large.

    python -m llme_jax.rank --config ranker.py --data_root /data/llm-embedder

The one recipe for rerankers that the reference ever published (the first edition of its guide,
commit d585364), for 8 devices. It trains on negatives that bge mined and reranks bge's hits of the
test queries, which `llme_jax.retrieve` writes (`train.neg.bge.json`, `test.key.bge.json`). There an
evaluation and a checkpoint come after every epoch, which is about 920 steps here.
`ranker.py:runlocal` shrinks it to seconds.
"""

from llme_jax.config import RankConfig, shrunk


def get_config(arg: str | None = None) -> RankConfig:
    config = RankConfig()
    config.data.train_data = ["llm-embedder:qa/nq/train.neg.bge.json"]
    config.data.eval_data = "llm-embedder:qa/nq/test.key.bge.json"
    config.data.key_max_length = 128
    config.data.query_max_length = 32
    config.ranker.ranker = "microsoft/deberta-v3-large"
    config.evaluation.metrics = ["nq"]
    config.training.metric_for_best_model = "answer_recall@10"
    config.training.learning_rate = 5e-6
    config.training.num_train_epochs = 5.0
    config.training.per_device_train_batch_size = 8
    config.training.save_steps = 920
    config.training.save_total_limit = 2
    config.training.output_dir = "data/outputs/nq/ranker"
    return shrunk(config, arg)
