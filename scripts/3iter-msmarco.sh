#!/usr/bin/env bash
# SimLM's three iterations on MS MARCO: mine, train, mine, train, mine, score, distil.
#
#     DATA_ROOT=/data/llm-embedder bash scripts/3iter-msmarco.sh [flags of llme_jax.pipeline]
#
# The same command again does what is not done yet; --dry_run prints the commands.
set -euo pipefail
exec "${PYTHON:-python}" -m llme_jax.pipeline --config msmarco.py \
    --data_root "${DATA_ROOT:-/data/llm-embedder}" "$@"
