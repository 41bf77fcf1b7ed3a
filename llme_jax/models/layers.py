"""Layers that the families share: linear maps with their precision, norms."""

from dataclasses import dataclass
from functools import partial

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
) -> "Linear":
    return Linear(
        into, out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, precision=precision(dtype),
        rngs=rngs,
    )  # fmt: skip


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "lora_a", "lora_b"],
    meta_fields=["scale"],
)
@dataclass(frozen=True)
class LowRank:
    """A kernel [in, out] and its adapter [in, r], [r, out]: kernel + scale A B, see lora.py."""

    kernel: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float


class Linear(nnx.Linear):
    """A linear map whose kernel may have an adapter beside it."""

    def __call__(self, x):
        kernel = self.kernel.get_value()
        if not isinstance(kernel, LowRank):
            return super().__call__(x)
        x = x.astype(self.dtype)
        out = self._product(x, kernel.kernel)
        out += kernel.scale * self._product(self._product(x, kernel.lora_a), kernel.lora_b)
        return out if self.bias is None else out + self.bias.get_value().astype(self.dtype)

    def _product(self, x, kernel):
        return jnp.matmul(x, kernel.astype(self.dtype), precision=self.precision)


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


class RMSNorm(nnx.RMSNorm):
    """Whose weights count from 1."""

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * (1 + self.scale.get_value().astype(jnp.float32))


def rms_norm(
    width: int,
    epsilon: float,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
    *,
    from_one: bool = False,
) -> nnx.RMSNorm:
    """In float32, whatever its parameters are kept in."""
    kind = RMSNorm if from_one else nnx.RMSNorm
    return kind(width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)


def precision(dtype) -> str | None:
    """GPUs and TPUs round fp32 products to tf32 or bf16 unless told otherwise."""
    return "highest" if dtype == jnp.float32 else None
