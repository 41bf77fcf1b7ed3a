#!/usr/bin/env bash
# LLM-Embedder: trains one model for six tasks, then evaluates it on those that retrieval can measure.
#
#     DATA_ROOT=/data/llm-embedder bash scripts/llm-embedder.sh [flags of llme_jax.train]
#
# OUTPUT is the model's folder [data/outputs/llm-embedder]; its results go to data/results/{task}
# under the name of that folder. The same command again continues the training where it was stopped.
set -euo pipefail
data_root=${DATA_ROOT:-/data/llm-embedder}
output=${OUTPUT:-data/outputs/llm-embedder}
python=${PYTHON:-python}
[ "$output" = "${output#*://}" ] || { echo "error: OUTPUT=$output: give a local folder" >&2; exit 2; }
only_plan=
for word in "$@"; do
    case $word in
    --output_dir* | --data_root*) echo "error: $word: set OUTPUT or DATA_ROOT instead" >&2; exit 2 ;;
    --plan) only_plan=1 ;;
    esac
done

"$python" -m llme_jax.train --config llm_embedder.py --data_root "$data_root" --output_dir "$output" "$@"
[ -z "$only_plan" ] || exit 0

name=$(basename "$output")
evaluate() {
    task=$1 log=$2
    shift 2
    "$python" -m llme_jax.retrieve --query_encoder "$encoder" --version llm-embedder \
        --data_root "$data_root" --output_dir "data/results/$task/$name" \
        --log_path "data/results/$task/$log" "$@"
}
encoder=$(ls -d "$output"/checkpoint-*/encoder | sort -V | tail -1)
evaluate tool toolbench.log \
    --eval_data llm-embedder:tool/toolbench/test.json \
    --corpus llm-embedder:tool/toolbench/corpus.json --key_template '{text}' \
    --metrics mrr recall ndcg --cutoffs 1 3 5
evaluate qrecc qrecc.log \
    --eval_data llm-embedder:convsearch/qrecc/test.concat.json \
    --corpus llm-embedder:convsearch/qrecc/corpus.json --key_template '{text}' \
    --metrics ndcg recall --cutoffs 3 10 100 --hits 100
evaluate nq nq.log \
    --eval_data llm-embedder:qa/nq/test.json --corpus llm-embedder:qa/nq/corpus.json \
    --metrics nq --key_max_length 128 --query_max_length 32
