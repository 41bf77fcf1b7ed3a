"""The losses of a reranker: pure functions of the scores of each query's own keys, in fp32.

B queries, N keys a query; key 0 is the positive. There are no in-batch negatives: a query's keys
are a batch of their own to the losses of the dual encoder.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llme_jax.config import RankLossConfig
from llme_jax.training.losses import (
    contrastive,
    kl_distill,
    margin_mse,
    mean_where,
    stable_distill,
    teacher_logits,
    weighted_sum,
)

MU = 10.0  # share of NDCG-Loss2 in LambdaLoss' weights, as in the paper


def total(
    scores: Float[Array, "B N"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    loss: RankLossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one batch and its parts by name; weights as `losses.total` has them.

    Rows without teacher scores count for the cross-entropy only.
    """
    parts = {}
    if loss.contrastive_weight > 0:
        parts["contrastive"] = jax.vmap(lambda row: contrastive(row[None]))(scores).mean()
    if loss.distill_weight > 0:
        parts["distill"] = _distill(scores, teacher_scores, has_scores, loss)
    return weighted_sum(parts, loss), parts


def _distill(scores, teacher_scores, has_scores, loss: RankLossConfig) -> Float[Array, ""]:
    if loss.stable_distill:
        of_row = partial(stable_distill, loss=loss)
        rows = (x[:, None] for x in (scores, teacher_scores, has_scores))
        return mean_where(jax.vmap(of_row)(*rows), has_scores)
    if loss.distill_loss == "kl":
        return kl_distill(scores, teacher_scores, has_scores, loss)
    if loss.distill_loss == "margin_mse":
        return margin_mse(scores, teacher_scores, has_scores, loss)
    return pairwise(scores, teacher_scores, has_scores, loss)


def pairwise(
    scores: Float[Array, "B N"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    loss: RankLossConfig,
) -> Float[Array, ""]:
    """RankNet or LambdaLoss: -log2 sigmoid(s_i - s_j), mean over pairs that the teacher orders.

    The teacher's scores say which key is better: grades, their softmax, are all 0 far below the
    best. LambdaLoss weighs a pair by the grades' NDCG-Loss2++ (Wang et al. 2018, eq. 14 to 16): its
    difference in gain, times what its two ranks and their distance are worth.
    """
    logits = teacher_logits(teacher_scores, loss)
    order = jnp.argsort(-scores, axis=1)
    ranked = jnp.take_along_axis(scores / loss.student_temperature, order, axis=1)
    wanted = jnp.take_along_axis(logits, order, axis=1)
    better = (wanted[:, :, None] > wanted[:, None]) & has_scores[:, None, None]
    losses = jax.nn.softplus(ranked[:, None] - ranked[:, :, None]) / jnp.log(2.0)
    if loss.distill_loss == "lambdaloss":
        losses *= _lambda_weights(jax.nn.softmax(wanted, axis=1))
    return mean_where(losses, better)


def _lambda_weights(grades: Float[Array, "B N"]) -> Float[Array, "B N N"]:
    """Of each pair of keys, which are in the order of their scores."""
    ranks = jnp.arange(grades.shape[1])
    worth = 1 / jnp.log2(2.0 + jnp.arange(grades.shape[1] + 1))  # of a rank
    best = ((2 ** jnp.sort(grades, axis=1, descending=True) - 1) * worth[:-1]).sum(1, keepdims=True)
    gains = (2**grades - 1) / jnp.maximum(best, 1e-10)
    apart = jnp.abs(ranks[:, None] - ranks)
    distance = jnp.where(apart > 0, jnp.abs(worth[apart - 1] - worth[apart]), 0)
    swap = jnp.abs(worth[ranks][:, None] - worth[ranks])
    return (MU * distance + swap) * jnp.abs(gains[:, :, None] - gains[:, None])
