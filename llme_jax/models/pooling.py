"""From token vectors to one vector a text."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def pool(
    hidden: Float[Array, "B L D"],
    lengths: Int[Array, "B"],
    method: str,
    dense: Float[Array, "D D"] | None = None,
) -> Float[Array, "B D"]:
    """The first token's vector (`cls`) or the mean over the text (`mean`), times `dense`."""
    if method == "cls":
        pooled = hidden[:, 0]
    else:
        inside = jnp.arange(hidden.shape[1]) < lengths[:, None]
        total = jnp.where(inside[..., None], hidden, 0.0).sum(1)
        pooled = total / jnp.maximum(lengths, 1)[:, None]
    return pooled if dense is None else jnp.matmul(pooled, dense, precision="highest")


def normalize(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """x / max(|x|, 1e-12) along the last axis, as `torch.nn.functional.normalize`."""
    # The maximum is taken inside the root: the gradient of a root at 0 is not finite.
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
