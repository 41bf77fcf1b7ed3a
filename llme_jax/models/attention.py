"""Softmax attention over right-padded texts, in the form that is fastest on the platform.

Full attention for encoders, also with a bias for every pair of tokens, with dropout and a backward
pass of its own; causal and windowed attention for language models, which only read.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from llme_jax.models.dropout import Rows, dropout
from llme_jax.models.platform import cudnn_can

# Of causal attention:
CHUNKS = 4  # parts of the queries, each of which sees only the keys up to its end
LEAST = 64  # queries in a part
NOT_SEEN = -1  # how far behind a key lies that a query does not see
_FAR = -1e30  # the mask of a key outside a window


@jax.named_scope("attention")
def attention(
    q: Float[Array, "B M H Dh"],
    k: Float[Array, "B L H Dh"],
    v: Float[Array, "B L H Dh"],
    lengths: Int[Array, "B"],
    *,
    kernel: Literal["plain", "cudnn"] = "plain",
    window: int | None = None,
    key: Array | None = None,
    numbers: Int[Array, "B"] | None = None,
    rate: float = 0.0,
) -> Float[Array, "B M H Dh"]:
    """softmax(q k^T / sqrt(Dh)) v over the first `lengths` keys; the softmax is in fp32.

    The queries are of all L tokens or of the first M.
    Rows of padding hold finite numbers without meaning. Attention weights are dropped at `rate`
    when `key` is given, and with it the texts' `numbers`; then the path is the plain one.

    Args:
        window: how far from a query the keys may be that it sees; None for all.
    """
    lengths = jnp.maximum(lengths, 1)  # a text without tokens would be 0 / 0
    if rate == 0.0:
        key = None
    if window is not None and window >= k.shape[1] - 1:
        window = None
    whole = q.shape == k.shape and q.shape[1] % 2 == 0 and window is None
    if key is None and kernel == "cudnn" and whole:
        return jax.nn.dot_product_attention(
            q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
            implementation="cudnn",
        )  # fmt: skip
    return _folded(q, k, v, None, lengths, key, numbers, rate, window)


@jax.named_scope("attention")
def biased_attention(
    q: Float[Array, "B M H Dh"],
    k: Float[Array, "B L H Dh"],
    v: Float[Array, "B L H Dh"],
    bias: Float[Array, "B H M L"],
    lengths: Int[Array, "B"],
    *,
    key: Array | None = None,
    numbers: Int[Array, "B"] | None = None,
    rate: float = 0.0,
) -> Float[Array, "B M H Dh"]:
    """`attention` with something added to q k^T / sqrt(Dh), float32."""
    lengths = jnp.maximum(lengths, 1)
    return _folded(q, k, v, bias, lengths, None if rate == 0.0 else key, numbers, rate)


def _folded(q, k, v, bias, lengths, key, numbers, rate, window=None):
    # With the heads folded into the batch every product is one batched matrix product; on CPU this
    # takes a fifth of the time of einsum over [B, L, H, Dh].
    n, _, heads, width = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(n * heads, -1, width) for x in (q, k, v))
    rows = None
    if key is not None:  # one number a text and head
        rows = Rows((numbers[:, None] * heads + jnp.arange(heads)).reshape(-1))
    mask = jnp.where(jnp.arange(k.shape[1]) < lengths[:, None], 0.0, -jnp.inf)
    added = jnp.repeat(mask, heads, axis=0)[:, None]
    if window is not None:
        apart = jnp.abs(jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1]))
        # A row of padding may see no token of its text: finite, so that it is no 0 / 0.
        added = jnp.where(apart <= window, added, _FAR)
    if bias is not None:
        added += bias.reshape(n * heads, *bias.shape[2:])
    out = _attend(q, k, v, added, key, rows, rate, bias is not None)
    return out.reshape(n, heads, -1, width).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, bias, key, rows, rate, learned):
    """Attention of [B*H, L, Dh]. The backward pass is written out because the derived one makes
    two more passes over the [B*H, L, L] weights, which is what costs time here.

    `learned`: the bias is [B*H, L, L] and has a gradient; else it is a mask.
    """
    return _attend_forward(q, k, v, bias, key, rows, rate, learned)[0]


def _attend_forward(q, k, v, bias, key, rows, rate, learned):
    scores = dot(q, k, 2, 2) * q.shape[-1] ** -0.5 + bias
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    # Dividing after the product touches Dh numbers a row instead of L.
    out = (dot(dropout(weights, key, rate, rows), v, 2, 1) / total).astype(v.dtype)
    return out, (q, k, v, key, rows, weights, total, out)


def _attend_backward(rate, learned, saved, g):
    q, k, v, key, rows, weights, total, out = saved
    g = g.astype(jnp.float32) / total
    mean = (g * out).sum(-1, keepdims=True)  # sum_j weights_j dweights_j, dropout included
    g = g.astype(v.dtype)
    d_weights = dropout(dot(g, v, 2, 2), key, rate, rows)
    d_bias = weights * (d_weights - mean)
    d_scores = (d_bias * q.shape[-1] ** -0.5).astype(v.dtype)
    d_q, d_k = dot(d_scores, k, 2, 1), dot(d_scores, q, 1, 1)
    d_v = dot(dropout(weights, key, rate, rows), g, 1, 1)
    d_q, d_k, d_v = d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return d_q, d_k, d_v, d_bias if learned else None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.named_scope("attention")
def causal_attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    kernel: Literal["plain", "cudnn"] | None = None,
) -> Float[Array, "B L H Dh"]:
    """softmax(q k^T / sqrt(Dh)) v over the keys up to each query; the softmax is in fp32.

    Args:
        k, v: head k serves the H / K query heads from k * H / K on.
        window: of those keys, the last ones that a query sees, its own included; None for all.
        softcap: of the scores, see `softcapped`; cudnn has none.
        kernel: None for cudnn where it can.
    """
    length = q.shape[1]
    if window is not None and window >= length:
        window = None
    if kernel != "plain" and softcap is None and cudnn_can(q):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip
    heads = q.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    q = _by_keys(q, k.shape[1])
    step = max(-(-length // CHUNKS), LEAST)
    starts = range(0, length, step)
    out = [_part(q[..., a : a + step, :], k, v, a, window, softcap) for a in starts]
    out = jnp.concatenate(out, axis=3)
    return out.reshape(len(q), heads, length, -1).transpose(0, 2, 1, 3)


def _by_keys(q: Float[Array, "B H n Dh"], groups: int) -> Float[Array, "B K G n Dh"]:
    """The heads that share keys together: they are rows of one product.

    Batch and keys' heads stay apart, as devices may share either of them.
    """
    return q.reshape(len(q), groups, -1, *q.shape[2:])


def _part(q, k, v, start: int, window: int | None, softcap: float | None):
    """The queries [B, K, G, n, Dh] from `start` on; later keys are not looked at."""
    shape, end = q.shape, start + q.shape[3]
    rows = *shape[:2], -1, shape[4]
    scores = softcapped(dot(q.reshape(rows), k[:, :, :end], 3, 3) * shape[4] ** -0.5, softcap)
    behind = jnp.arange(start, end)[:, None] - jnp.arange(end)  # how far a key lies behind
    scores = jnp.where(_seen(behind, window), scores.reshape(*shape[:4], end), -jnp.inf)
    return _average(scores.reshape(*shape[:2], -1, end), v[:, :, :end]).reshape(shape)


def _seen(behind, window: int | None):
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _average(scores, *values):
    """softmax(scores) v, of [B, K, n, S] and parts of v, together [B, K, S, Dh]."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total, dtype = weights.sum(-1, keepdims=True), values[0].dtype
    ends = np.cumsum([v.shape[2] for v in values])[:-1]
    parts = jnp.split(weights.astype(dtype), ends, axis=3)
    # Dividing after the product touches Dh numbers a row instead of S.
    out = sum(dot(part, v, 3, 2) for part, v in zip(parts, values, strict=True))
    return (out / total).astype(dtype)


@jax.named_scope("attention")
def cached_attention(
    q: Float[Array, "B M H Dh"],
    keys: Sequence[Float[Array, "B K _ Dh"]],
    values: Sequence[Float[Array, "B K _ Dh"]],
    behind: Int[Array, "B M S"],
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B M H Dh"]:
    """`causal_attention` of the tokens that go on a text, over the keys that are kept of it.

    Args:
        keys, values: in parts, of S slots together.
        behind: how many tokens each key lies behind each query, 0 for its own; negative
            ones, as NOT_SEEN, it does not see.
    """
    batch, queries, heads, width = q.shape
    q = _by_keys(q.transpose(0, 2, 1, 3), keys[0].shape[1])
    shape, rows = q.shape, (*q.shape[:2], -1, width)
    scores = jnp.concatenate([dot(q.reshape(rows), k, 3, 3) for k in keys], 3) * width**-0.5
    scores = softcapped(scores, softcap).reshape(*shape[:4], -1)
    scores = jnp.where(_seen(behind, window)[:, None, None], scores, -jnp.inf)
    out = _average(scores.reshape(*shape[:2], -1, scores.shape[-1]), *values)
    return out.reshape(batch, heads, queries, width).transpose(0, 2, 1, 3)


def softcapped(scores: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Kept between -cap and cap, as Gemma 2 does (arXiv:2408.00118); as they are without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def skewed(x: Float[Array, "*n L P"]) -> Float[Array, "*n L L"]:
    """y[i, j] = x[i, L - 1 + j - i], by cutting the same numbers into rows that are one shorter."""
    *rest, length, columns = x.shape
    if length == 1:
        return x
    flat = x.reshape(*rest, length * columns)[..., length - 1 :]
    rows = flat[..., : length * (columns - 1)].reshape(*rest, length, columns - 1)
    return rows[..., :length]


def dot(a, b, axis_a: int, axis_b: int):
    """Product over one axis of each, the last two being a matrix', the others batches; summed in
    fp32 (also on hardware that rounds)."""
    precision = "highest" if a.dtype == jnp.float32 else None
    batch = tuple(range(a.ndim - 2))
    dims = (((axis_a,), (axis_b,)), (batch, batch))
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
