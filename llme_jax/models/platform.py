"""What is chosen by platform: the type that is computed in, the kernel of attention."""

from typing import Literal

import jax
import jax.numpy as jnp

from llme_jax.devices.topology import compiles_for


def compute_dtype(setting: Literal["auto", "fp32", "bf16"]) -> Literal["float32", "bfloat16"]:
    """auto is bf16 on TPU and GPU, fp32 on CPU."""
    if setting == "auto":
        setting = "fp32" if platform() == "cpu" else "bf16"
    return {"fp32": "float32", "bf16": "bfloat16"}[setting]


def platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"."""
    return "tpu" if compiles_for() else jax.default_backend()


def cudnn_can(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes queries [B, L, H, Dh]; decided while tracing."""
    length, width = q.shape[1], q.shape[3]
    shape_fits = length % 2 == 0 and width % 8 == 0 and width <= 128
    return platform() == "gpu" and q.dtype == jnp.bfloat16 and shape_fits
