#!/usr/bin/env bash
# Runs a command of llme_jax on all hosts of a TPU pod (or on a single TPU host).
#
#     NAME=pod ZONE=us-central2-b bash scripts/tpu_pod.sh install
#     NAME=pod ZONE=us-central2-b bash scripts/tpu_pod.sh train --config qa.py \
#         --data_root gs://bucket/llm-embedder --output_dir gs://bucket/qa
#
# `install` copies this checkout to every host and installs it into ~/llme_jax-env there; anything else
# is a command (train, retrieve, score) and its flags. Paths are those of the hosts, relative ones
# start in their home folder. PROJECT is gcloud's [its default], PYTHON the interpreter on the hosts,
# 3.11 or newer [python3]; TFDS_DATA_DIR and LLME_JAX_CACHE are handed on. The same command again
# continues the training where it was stopped.
set -euo pipefail
name=${NAME:?set it to the name of the TPU}
zone=${ZONE:?set it to the zone of the TPU}
where=(--zone "$zone" --worker=all ${PROJECT:+--project "$PROJECT"})
[ $# -gt 0 ] || { echo "error: give install, or a command and its flags" >&2; exit 2; }

on_all() {
    gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "$1"
}

if [ "$1" = install ]; then
    package=$(mktemp -d)
    trap 'rm -rf "$package"' EXIT
    tar -czf "$package/llme_jax.tar.gz" -C "$(dirname "$0")/.." --exclude __pycache__ \
        llme_jax configs setup.py pyproject.toml README.md LICENSE
    gcloud compute tpus tpu-vm scp "$package/llme_jax.tar.gz" "$name:" "${where[@]}"
    on_all "rm -rf llme_jax-source && mkdir llme_jax-source && tar -xzf llme_jax.tar.gz -C llme_jax-source &&
        ${PYTHON:-python3} -m venv llme_jax-env &&
        llme_jax-env/bin/pip install --quiet './llme_jax-source[tpu,gcs,tfds]'"
    exit
fi

environment=(env)
for variable in TFDS_DATA_DIR LLME_JAX_CACHE; do
    [ -z "${!variable:-}" ] || environment+=("$variable=${!variable}")
done
command=$1
shift
on_all "$(printf '%q ' "${environment[@]}" llme_jax-env/bin/python -m "llme_jax.$command" "$@")"
