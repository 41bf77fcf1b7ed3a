"""SimLM's three iterations on Natural Questions, for open-domain question answering.

    python -m llme_jax.pipeline --config nq.py --data_root /data/llm-embedder
    bash scripts/3iter-nq.sh

The values are those of SimLM's own scripts for DPR's data (arXiv:2207.02578), for 8 devices; the
script of that name was never published by the reference. What its scripts have and this has not:
R-Drop, the reranker's backward pass over the best-scored passages alone, and hits with an answer as
further positives; here they are left out of the negatives (--filter_answers).
`nq.py:runlocal` trains for a few steps.
"""

from llme_jax.config import PipelineConfig, shrunk
from llme_jax.stages.iterations import Iterations, Recipe

DATA = "llm-embedder:qa/nq"


class NaturalQuestions(Iterations):
    recipe = Recipe(
        train_data=f"{DATA}/train.json",
        eval_data=f"{DATA}/test.json",
        corpus=f"{DATA}/corpus.json",
        texts="--query_max_length 32 --key_max_length 192 --add_instruction false",
        encoder="--pooling_method cls --dense_metric cos",
        metrics="--metrics nq",
        mined="nq",
        bm25="--hits 100 --max_neg_num 100 --filter_answers",
        mine="--hits 100 --max_neg_num 100 --filter_answers",
        retriever=f"--eval_data {DATA}/test.json --corpus {DATA}/corpus.json --metrics nq "
        "--metric_for_best_model answer_recall@20 --save_steps 5000 --save_total_limit 2 "
        "--cos_temperature 0.02 --train_group_size 16 --per_device_train_batch_size 8 "
        "--learning_rate 1e-5 --max_steps 20000 --warmup_ratio 0.05 "
        "--contrastive_weight 1 --distill_weight 0",
        distil="--learning_rate 3e-5 --max_steps -1 --num_train_epochs 15 --contrastive_weight 1 "
        "--distill_weight 1 --teacher_temperature 1 --select_positive first",
        ranker="--train_group_size 32 --per_device_train_batch_size 4 --learning_rate 3e-5 "
        "--max_steps 20000 --warmup_ratio 0.05 --contrastive_weight 1 --distill_weight 0 "
        "--save_steps 5000 --save_total_limit 2",
    )


def get_config(arg: str | None = None) -> PipelineConfig:
    config = NaturalQuestions()
    config.pipeline.query_encoder = "intfloat/simlm-base-wiki100w"
    config.pipeline.ranker = "google/electra-base-discriminator"
    config.pipeline.metric = "answer_recall@20"
    config.pipeline.output_dir = "data/outputs/nq/3iter"
    return shrunk(config, arg)
