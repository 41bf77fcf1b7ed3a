#!/usr/bin/env bash
# LLM-Embedder: trains one model for six tasks, then evaluates it on those that retrieval can measure.
#
#     DATA_ROOT=/data/llm-embedder bash scripts/llm-embedder.sh [flags of llme_jax.train]
#
# The same command again continues the training where it was stopped.
set -euo pipefail
data_root=${DATA_ROOT:-/data/llm-embedder}
output=${OUTPUT:-data/outputs/llm-embedder}
python=${PYTHON:-python}

"$python" -m llme_jax.train --config llm_embedder.py --data_root "$data_root" --output_dir "$output" "$@"

evaluate() {
    "$python" -m llme_jax.retrieve --query_encoder "$encoder" --version llm-embedder \
        --data_root "$data_root" "$@"
}
encoder=$(ls -d "$output"/checkpoint-*/encoder | sort -V | tail -1)
evaluate --output_dir data/results/tool --log_path data/results/tool/toolbench.log \
    --eval_data llm-embedder:tool/toolbench/test.json \
    --corpus llm-embedder:tool/toolbench/corpus.json --key_template '{text}' \
    --metrics mrr recall ndcg --cutoffs 1 3 5
evaluate --output_dir data/results/qrecc --log_path data/results/qrecc/qrecc.log \
    --eval_data llm-embedder:convsearch/qrecc/test.concat.json \
    --corpus llm-embedder:convsearch/qrecc/corpus.json --key_template '{text}' \
    --metrics ndcg recall --cutoffs 3 10 100 --hits 100
evaluate --output_dir data/results/nq --log_path data/results/nq/nq.log \
    --eval_data llm-embedder:qa/nq/test.json --corpus llm-embedder:qa/nq/corpus.json \
    --metrics nq --key_max_length 128 --query_max_length 32
