"""From token vectors to one vector a text."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.packing import Packing

# By the name of the class in torch.nn, in lower case.
AFTER_DENSE = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    **{name: ACTIVATIONS[name] for name in ("gelu", "relu", "silu")},
}


@dataclass(frozen=True)
class Dense:
    """A layer behind pooling, as sentence-transformers' Dense; it has a bias if the file has one.

    Attributes:
        width: numbers that come out.
        activation: a name in AFTER_DENSE.
    """

    width: int
    activation: str = "identity"

    def __call__(self, params: dict, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        x = jnp.matmul(x, params["kernel"], precision="highest")
        return AFTER_DENSE[self.activation](x + params["bias"] if "bias" in params else x)


def mean(hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """The mean of each text's tokens."""
    means = []
    for x, lengths in zip(packing.in_blocks(hidden), packing.lengths, strict=True):
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        total = jnp.where(inside[..., None], x, 0.0).sum(1)
        means.append(total / jnp.maximum(lengths, 1)[:, None])
    return jnp.concatenate(means)


def last_token(hidden: Float[Array, "T D"], packing: Packing) -> Float[Array, "R D"]:
    """Of every text the last token."""
    return hidden[packing.starts + jnp.concatenate(packing.lengths) - 1]


def normalize(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / max(|x|, 1e-12) along the last axis, as `torch.nn.functional.normalize`."""
    # The maximum is taken inside the root: the gradient of a root at 0 is not finite.
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def truncate(x: Float[Array, "*B D"], dim: int, metric: str) -> Float[Array, "*B d"]:
    """The first `dim` numbers of each embedding, of length 1 again when the metric is cos.

    So they are searched with. MatryoshkaLoss of sentence-transformers normalises them always.
    """
    return normalize(x[..., :dim]) if metric == "cos" else x[..., :dim]
