#!/usr/bin/env bash
# LLM-Embedder: trains one model for six tasks, then evaluates it: tool, qrecc and nq by retrieval,
# mmlu, popqa, msc, lrlm (four files) and icl by what a language model makes of the keys it finds.
#
#     DATA_ROOT=/data/llm-embedder bash scripts/llm-embedder.sh [flags of llme_jax.train]
#
# OUTPUT is the model's folder [data/outputs/llm-embedder]; results go to data/results/{task} under
# the name of that folder and its checkpoint. LM is the language model
# [meta-llama/Llama-2-7b-chat-hf], LM_FLAGS are further flags for it, as "--tensor 8"; SKIP_LM=1
# leaves it out. The same command again goes on where it was stopped.
set -euo pipefail
data_root=${DATA_ROOT:-/data/llm-embedder}
output=${OUTPUT:-data/outputs/llm-embedder}
lm=${LM:-meta-llama/Llama-2-7b-chat-hf}
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
encoder=$(ls -d "$output"/checkpoint-*/encoder | sort -V | tail -1)
common=(--query_encoder "$encoder" --version llm-embedder --data_root "$data_root")
evaluate() {
    task=$1
    shift
    "$python" -m llme_jax.evaluate --task "$task" "${common[@]}" --model_name_or_path "$lm" \
        ${LM_FLAGS:-} "$@"
}
evaluate tool
evaluate qrecc
"$python" -m llme_jax.retrieve "${common[@]}" --output_dir "data/results/nq/$name" \
    --log_path data/results/nq/nq.log --metrics nq --key_max_length 128 --query_max_length 32 \
    --eval_data llm-embedder:qa/nq/test.json --corpus llm-embedder:qa/nq/corpus.json
[ -z "${SKIP_LM:-}" ] || exit 0

evaluate mmlu
evaluate popqa
evaluate msc
for texts in books3 arxiv codeparrot pg19; do
    evaluate lrlm --eval_data "llm-embedder:lrlm/$texts/test.json" \
        --output_dir "data/results/lrlm/$texts" --log_path "data/results/lrlm/$texts.log"
done
evaluate icl
