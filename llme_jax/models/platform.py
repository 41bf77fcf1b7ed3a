"""What is chosen by platform: the type that is computed in, the kernel of attention."""

from typing import Literal

import jax
import jax.numpy as jnp

from llme_jax.devices.topology import chip, compiles_for
from llme_jax.errors import InputError

AttentionKernel = Literal["auto", "plain", "cudnn", "flash"]  # --attention


def compute_dtype(setting: Literal["auto", "fp32", "bf16"]) -> Literal["float32", "bfloat16"]:
    """auto is bf16 on TPU and GPU, fp32 on CPU."""
    if setting == "auto":
        setting = "fp32" if platform() == "cpu" else "bf16"
    return {"fp32": "float32", "bf16": "bfloat16"}[setting]


def platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"."""
    elsewhere = compiles_for()
    return chip(elsewhere).platform if elsewhere else jax.default_backend()


def attention_kernel(
    setting: AttentionKernel,
    dtype: jnp.dtype,
    *,
    heads: int = 1,
    width: int = 64,
    longest: int = 1,
    drops: bool = False,
    biased: bool = False,
    causal: bool = False,
    softcapped: bool = False,
) -> Literal["plain", "cudnn", "flash"]:
    """What computes an encoder's attention; decided while tracing.

    Args:
        setting: --attention; auto is the first of flash and cudnn that can.
        width: of a head.
        longest: tokens of a text at most.
        drops: whether attention weights are dropped.
        biased: whether something is added to the scores of every pair of tokens.
        causal: whether tokens see those before them alone.
        softcapped: whether the scores are kept small.

    Raises:
        InputError: the setting names one that cannot.
    """
    here = platform()
    # Sums of the backward pass, of every block that a block of 128 tokens can reach; the chip's
    # fast memory holds 16 MiB.
    sums = (1 + 2 * -(-longest // 128)) * heads * width * 128 * 4
    scores = {
        "it does not score by position, as this model does": biased,
        "it does not cap scores, as this model does": softcapped,
    }
    hindrances = {
        "flash": scores
        | {
            "it needs a TPU": here == "gpu" or (here == "cpu" and setting == "auto"),
            f"its heads are multiples of 16 wide, these {width}": width % 16,
            f"texts of {longest} tokens are too long for it": sums > 6 << 20,
            "it looks both ways, and this model's tokens see those before them alone": causal,
        },
        "cudnn": scores
        | {
            "it needs a GPU": here != "gpu",
            "it computes in bf16": dtype != jnp.bfloat16,
            f"its heads are multiples of 8 wide, up to 128, these {width}": width % 8
            or width > 128,
            "it does not drop attention weights, as this model does in training": drops,
        },
    }
    for kernel, reasons in hindrances.items():
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if setting == kernel and why:
            raise InputError(f"--attention {kernel}: {why}; give auto")
        if setting in (kernel, "auto") and not why:
            return kernel
    return "plain"


def cudnn_can(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes queries [B, L, H, Dh]; decided while tracing."""
    return attention_kernel("auto", q.dtype, width=q.shape[3]) == "cudnn" and q.shape[1] % 2 == 0
