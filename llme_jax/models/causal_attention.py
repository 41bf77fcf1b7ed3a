"""Causal softmax attention over right-padded texts, in the form that is fastest on the platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llme_jax.models.attention import dot
from llme_jax.models.platform import cudnn_can

CHUNKS = 4  # parts of the queries, each of which sees only the keys up to its end
LEAST = 64  # queries in a part


def causal_attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    *,
    window: int | None = None,
) -> Float[Array, "B L H Dh"]:
    """softmax(q k^T / sqrt(Dh)) v over the keys up to each query; the softmax is in fp32.

    Args:
        k, v: head k serves the H / K query heads from k * H / K on.
        window: of those keys, the last ones that a query sees, its own included; None for all.
    """
    length = q.shape[1]
    if window is not None and window >= length:
        window = None
    if cudnn_can(q):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip
    batch, _, heads, width = q.shape
    groups = k.shape[2]
    # [B*K, H/K, L, Dh]: the heads that share keys are rows of one product.
    q = q.transpose(0, 2, 1, 3).reshape(batch * groups, heads // groups, length, width)
    k, v = (x.transpose(0, 2, 1, 3).reshape(batch * groups, length, width) for x in (k, v))
    step = max(-(-length // CHUNKS), LEAST)
    out = [_part(q[:, :, a : a + step], k, v, a, window) for a in range(0, length, step)]
    out = jnp.concatenate(out, axis=2)
    return out.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def _part(q, k, v, start: int, window: int | None):
    """The queries [B*K, G, n, Dh] from `start` on; later keys are not looked at."""
    shape, end = q.shape, start + q.shape[2]
    scores = dot(q.reshape(shape[0], -1, shape[3]), k[:, :end], 2, 2) * shape[3] ** -0.5
    behind = jnp.arange(start, end)[:, None] - jnp.arange(end)  # how far a key lies behind
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    scores = jnp.where(seen, scores.reshape(*shape[:3], end), -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    # Dividing after the product touches Dh numbers a row instead of L.
    weights = weights.astype(v.dtype).reshape(shape[0], -1, end)
    return (dot(weights, v[:, :end], 2, 1).reshape(shape) / total).astype(v.dtype)
