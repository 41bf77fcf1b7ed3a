"""Layers that the families share: linear maps with their precision, norms, rotary positions."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import path_name

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


def cast_kernels(params: dict, dtype) -> dict:
    """Parameters whose linear maps are in the type that they compute in; embeddings do in float32.

    The barrier keeps the cast in a pass of its own: XLA would put it into the products, of which
    some then take 1.5 times as long by the estimate of the compiler for v5e.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return params

    def cast(path, x):
        name = path_name(path)
        if not name.endswith("kernel") or name.startswith("embeddings/"):
            return x
        return jax.lax.optimization_barrier(x.astype(dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


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
    """Rotary positions: the frequencies are theta^(-2i/Dh), scaled by a factor, as Llama 3's, or
    as YaRN's (arXiv:2309.00071), which also scales cosine and sine by `attention_factor`."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def rotary(rope: Rope, width: int, positions: Int[Array, "..."]) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32[..., 1, Dh / 2].

    Source of the scalings: `modeling_rope_utils.py` of transformers. Long wavelengths are stretched
    by the factor, short ones are kept, those between are blended: by how often a wave turns within
    the original length (llama3), or by its place among all (yarn).
    """
    frequencies = rope.theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope.factor
    if rope.kind == "yarn":
        kept = 1 - jnp.clip(jnp.asarray(_ramp(rope, width), jnp.float32), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope.factor
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def _ramp(rope: Rope, width: int) -> list[float]:
    """Of each frequency: 0 at `beta_fast` turns within the original length, 1 at `beta_slow`."""

    def place(turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    return [(i - low) / (high - low) for i in range(width // 2)]


def rotate(x: Float[Array, "B L H Dh"], rotation: tuple[Array, Array]) -> Array:
    """Turns the pairs (i, i + Dh / 2) of every head, in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
