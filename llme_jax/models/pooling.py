"""From token vectors to one vector a text."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.hugging_face.layers import EPSILON, Layer
from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.packing import Packing

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    **{name: ACTIVATIONS[name] for name in ("gelu", "relu", "silu")},
}


def pool(how: str, hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """One vector of each text's tokens, or, where it has two parts, of those of the second.

    Args:
        how: "cls", "mean" or "last_token".
    """
    return {"cls": first_token, "mean": mean, "last_token": last_token}[how](hidden, packing)


def mean(hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """The mean of each text's tokens."""
    means = []
    seconds = None if packing.in_second is None else packing.in_blocks(packing.in_second)
    for i, (x, lengths) in enumerate(zip(packing.in_blocks(hidden), packing.lengths, strict=True)):
        inside, count = jnp.arange(x.shape[1]) < lengths[:, None], lengths
        if seconds is not None:
            inside &= seconds[i]
            count = inside.sum(1)
        total = jnp.where(inside[..., None], x, 0.0).sum(1)
        means.append(total / jnp.maximum(count, 1)[:, None])
    return jnp.concatenate(means)


def first_token(hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """Of every text the first token; the very first where its second part has none."""
    if packing.in_second is None:
        return packing.first(hidden)
    count = _in_second(packing)
    before = jnp.concatenate(packing.lengths) - count
    return hidden[packing.starts + jnp.where(count > 0, before, 0)]


def last_token(hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """Of every text the last token; zeros where its second part has none."""
    last = hidden[packing.starts + jnp.concatenate(packing.lengths) - 1]
    return last if packing.in_second is None else last * (_in_second(packing) > 0)[:, None]


def _in_second(packing: Packing) -> Int[Array, "R"]:
    """Tokens of each text's second part."""
    counts = []
    for second, lengths in zip(packing.in_blocks(packing.in_second), packing.lengths, strict=True):
        inside = jnp.arange(second.shape[1]) < lengths[:, None]
        counts.append((inside & second).sum(1))
    return jnp.concatenate(counts)


def through(layer: Layer, params: dict, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
    """A layer behind pooling, in float32."""
    if layer.kind == "LayerNorm":
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x * params["scale"] + params["bias"]
    x = jnp.matmul(x, params["kernel"], precision="highest")
    return _ACTIVATIONS[layer.activation](x + params["bias"] if "bias" in params else x)


def normalize(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / max(|x|, 1e-12) along the last axis, as `torch.nn.functional.normalize`."""
    # The maximum is taken inside the root: the gradient of a root at 0 is not finite.
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def truncate(x: Float[Array, "*B D"], dim: int, metric: str) -> Float[Array, "*B d"]:
    """The first `dim` numbers of each embedding, of length 1 again when the metric is cos.

    So they are searched with. MatryoshkaLoss of sentence-transformers normalises them always.
    """
    return normalize(x[..., :dim]) if metric == "cos" else x[..., :dim]
