#!/usr/bin/env bash
# Trains on all GPUs of a host, once JAX is seen to see 8 of them.
#
#     bash scripts/gpu_8.sh --config qa.py --data_root /data/llm-embedder
#
# On several hosts under SLURM, one task a node; all of them have to see --output_dir:
#
#     srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 bash scripts/gpu_8.sh \
#         --config qa.py --data_root /data/llm-embedder --output_dir /shared/qa
#
# GPUS is how many GPUs a host must have [8], PYTHON the interpreter [python]. The same command again
# continues the training where it was stopped.
set -euo pipefail
gpus=${GPUS:-8}
python=${PYTHON:-python}

count='import jax; print(sum(device.platform == "gpu" for device in jax.local_devices()))'
found=$(XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -c "$count")
if [ "$found" != "$gpus" ]; then
    echo "error: JAX sees $found GPUs on $(hostname), not $gpus: GPUS=$found goes on with what is there;" \
        "else look at nvidia-smi, CUDA_VISIBLE_DEVICES and pip install 'llme_jax[cuda]'" >&2
    exit 2
fi

# Of a GPU's memory JAX takes three quarters unless told otherwise; nothing else runs on these.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
exec "$python" -m llme_jax.train "$@"
