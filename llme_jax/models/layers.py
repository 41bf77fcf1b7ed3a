"""Layers that the families share: linear maps with their precision, norms."""

import jax
import jax.numpy as jnp
from flax import nnx

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


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.LayerNorm:
    """In float32."""
    # E[x^2] - E[x]^2, the fast variance, loses digits where the mean is large.
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, use_bias=bias,
        rngs=rngs,
    )  # fmt: skip


def rms_norm(width: int, epsilon: float, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """In float32, whatever its parameters are kept in."""
    return nnx.RMSNorm(
        width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


def precision(dtype) -> str | None:
    """GPUs and TPUs round fp32 products to tf32 or bf16 unless told otherwise."""
    return "highest" if dtype == jnp.float32 else None
