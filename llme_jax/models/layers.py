"""Layers that the families share: linear maps with their precision, norms, rotary positions."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_new": jax.nn.gelu,  # the tanh approximation
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def linear(
    into: int,
    out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    *,
    bias: bool = True,
    param_dtype: jnp.dtype = jnp.float32,
) -> nnx.Linear:
    return nnx.Linear(
        into, out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, precision=precision(dtype),
        rngs=rngs,
    )  # fmt: skip


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """In float32."""
    # E[x^2] - E[x]^2, the fast variance, loses digits where the mean is large.
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def rms_norm(width: int, epsilon: float, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """In float32, whatever its parameters are kept in."""
    return nnx.RMSNorm(
        width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


def precision(dtype) -> str | None:
    """GPUs and TPUs round fp32 products to tf32 or bf16 unless told otherwise."""
    return "highest" if dtype == jnp.float32 else None


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the frequencies are theta^(-2i/Dh), scaled as Llama 3 or by a factor."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rotary(rope: Rope, width: int, positions: Int[Array, "..."]) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32[..., 1, Dh / 2].

    Source of the llama3 scaling: `_compute_llama3_parameters` of transformers: long wavelengths
    are stretched by the factor, short ones are kept, those between are blended.
    """
    frequencies = rope.theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope.factor
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L H Dh"], rotation: tuple[Array, Array]) -> Array:
    """Turns the pairs (i, i + Dh / 2) of every head, in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
