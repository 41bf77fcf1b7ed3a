"""The training losses: pure functions of scores, in fp32, on the global batch.

B queries, N keys a query, M = B*N keys in all; key 0 of each group is the positive. Definitions are
those of LLM-Embedder (arXiv:2310.07554, section 3) with the corrections in docs/differences.md.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from llme_jax.config import DistillConfig, LossConfig
from llme_jax.models.pooling import normalize, truncate

NEGATIVE_INFINITY = -1e30  # a masked score: its softmax is exactly 0 and no gradient is NaN


def similarity(query: Float[Array, "B D"], key: Float[Array, "M D"]) -> Float[Array, "B M"]:
    """Inner products of all queries with all keys."""
    return jnp.matmul(query, key.T, precision=jax.lax.Precision.HIGHEST)


def own_group(scores: Float[Array, "B M"]) -> Float[Array, "B N"]:
    """The scores of each query's own keys: block b of row b."""
    return jnp.take_along_axis(scores, _own_columns(scores), axis=1)


def _own_columns(like: Shaped[Array, "B M"]) -> Int[Array, "B N"]:
    num_queries, num_keys = like.shape
    group = num_keys // num_queries
    return jnp.arange(num_queries)[:, None] * group + jnp.arange(group)


def _is_own(like: Shaped[Array, "B M"]) -> Bool[Array, "B M"]:
    num_queries, num_keys = like.shape
    return jnp.arange(num_keys) // (num_keys // num_queries) == jnp.arange(num_queries)[:, None]


def _is_target(like: Shaped[Array, "B M"]) -> Bool[Array, "B M"]:
    return jnp.arange(like.shape[1]) == _own_columns(like)[:, :1]


def same_key(
    key_hash: UInt32[Array, "M 2"], wanted: UInt32[Array, "*rows 2"]
) -> Bool[Array, "*rows M"]:
    """Where column m holds the text that a row names."""
    return (key_hash[:, 0] == wanted[..., :1]) & (key_hash[:, 1] == wanted[..., 1:])


def false_negatives(
    key_hash: UInt32[Array, "M 2"], positive_hash: UInt32[Array, "B P 2"]
) -> Bool[Array, "B M"]:
    """Where column m holds a known positive of query b other than the key it is trained on.

    Reference: none, it counts them as negatives.
    """
    known = same_key(key_hash, positive_hash).any(axis=1)
    return known & ~_is_target(known)


def too_close(products: Float[Array, "B M"], margin: float) -> Bool[Array, "B M"]:
    """Where column m scores above (key 0 of query b - margin), as GISTEmbed guided by itself."""
    return (products > own_group(products)[:, :1] - margin) & ~_is_target(products)


def hardness(products: Float[Array, "B M"], loss: LossConfig) -> Float[Array, "B M"]:
    """What is added to the logits of negatives: the more, the higher they score.

    Without a gradient (arXiv:2503.04812, eq. 5).
    """
    own, target = _is_own(products), _is_target(products)
    harder = {
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~target,
        "all_negatives": ~target,
    }[loss.hardness_mode]
    return jnp.where(harder, loss.hardness_strength * jax.lax.stop_gradient(products), 0.0)


def contrastive(
    scores: Float[Array, "B M"], *others: Float[Array, "B _"], partition_mode: str = "joint"
) -> Float[Array, ""]:
    """Mean cross-entropy over all keys; the target is the query's own key 0 (InfoNCE).

    Args:
        others: scores in further directions. In one softmax with those of the keys (joint), or
            each in one of its own, the losses averaged (per_direction).
    """
    log_sums = [jax.nn.logsumexp(x, axis=1) for x in (scores, *others)]
    joint = partition_mode == "joint"
    log_sum = reduce(jnp.logaddexp, log_sums) if joint else sum(log_sums) / len(log_sums)
    return jnp.mean(log_sum - own_group(scores)[:, 0])


def directions(
    query: Float[Array, "B D"],
    key: Float[Array, "M D"],
    scores: Float[Array, "B M"],
    known: Bool[Array, "B M"] | None,
    wanted: list[str],
    temperature: float,
) -> list[Float[Array, "B _"]]:
    """The scores in each wanted direction, those of the keys first; masked where they do not count.

    Definitions are those of sentence-transformers' MultipleNegativesRankingLoss. Queries that have
    a known positive in common are no negatives of each other, nor of these positives.

    Args:
        scores: of query and key.
        known: see `false_negatives`; None: it is not looked at.
    """
    found = {"query_to_doc": scores}
    if known is None:
        known = jnp.zeros_like(scores, bool)
    else:
        found["query_to_doc"] = jnp.where(known, NEGATIVE_INFINITY, scores)
    own = _own_columns(scores)[:, 0]
    positive, shared = key[own], known[:, own]
    related = shared | shared.T | jnp.eye(len(query), dtype=bool)

    def masked(one, other, hidden):
        return jnp.where(hidden, NEGATIVE_INFINITY, similarity(one, other) / temperature)

    found |= {
        "query_to_query": masked(query, query, related),
        "doc_to_query": masked(positive, query, shared.T),
        "doc_to_doc": masked(positive, key, known | _is_own(scores)),
    }
    return [found[name] for name in found if name in wanted]


def kl_distill(
    own_scores: Float[Array, "B N"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    loss: DistillConfig,
) -> Float[Array, ""]:
    """KL(softmax(teacher / tau_t) || softmax(own / tau_s)), mean over the rows that have scores."""
    log_teacher = jax.nn.log_softmax(teacher_logits(teacher_scores, loss), axis=1)
    teacher = jnp.exp(log_teacher)
    log_student = jax.nn.log_softmax(own_scores / loss.student_temperature, axis=1)
    terms = jnp.where(teacher > 0, teacher * (log_teacher - log_student), 0.0)
    return mean_where(terms.sum(axis=1), has_scores)


def teacher_logits(teacher_scores: Float[Array, "B N"], loss: DistillConfig) -> Float[Array, "B N"]:
    """What the teacher's softmax is taken of, 0 for its best key.

    A score may be as low as float32 allows (people fill masked keys so); divided by the
    temperature it is -inf, which gives a weight of 0.
    """
    best = teacher_scores.max(axis=1, keepdims=True)
    return (teacher_scores - best) / loss.teacher_temperature


def margin_mse(
    own_scores: Float[Array, "B N"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    loss: DistillConfig,
) -> Float[Array, ""]:
    """By how much the positive scores above a negative, squared difference of model and teacher.

    Mean over the negatives of the rows that have scores (arXiv:2010.02666). A teacher's margin
    whose square float32 does not hold, as that of a masked key, is left out.
    """
    own, teacher = own_scores / loss.student_temperature, teacher_scores / loss.teacher_temperature
    wanted = teacher[:, :1] - teacher[:, 1:]
    counted = has_scores[:, None] & jnp.isfinite(wanted**2)
    difference = own[:, :1] - own[:, 1:] - jnp.where(counted, wanted, 0.0)
    return mean_where(difference**2, counted)


def stable_distill(
    scores: Float[Array, "B M"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    loss: DistillConfig,
    key_hash: UInt32[Array, "M 2"] | None = None,
) -> Float[Array, ""]:
    """A contrastive term for each own key, weighted by the teacher's softmax.

    Term i contrasts own key i with all keys but the row's own keys 0..i-1, which outrank it
    (LLM-Embedder, eq. 5). With `key_hash`, copies of key i elsewhere in the batch are left out too.
    """
    scores = scores / loss.student_temperature
    weights = jax.nn.softmax(teacher_logits(teacher_scores, loss), axis=1)
    columns = jnp.arange(scores.shape[1])
    own_columns = _own_columns(scores)

    # Recomputed in the backward pass: N masked copies of [B, M] need not be kept.
    @jax.checkpoint
    def term(i):
        own = own_columns[:, i, None]
        hidden = (columns >= own_columns[:, :1]) & (columns < own)
        if key_hash is not None:
            hidden |= same_key(key_hash, key_hash[own_columns[:, i]]) & (columns != own)
        logits = jnp.where(hidden, NEGATIVE_INFINITY, scores)
        target = jnp.take_along_axis(scores, own, axis=1)[:, 0]
        return weights[:, i] * (jax.nn.logsumexp(logits, axis=1) - target)

    per_row = jax.lax.map(term, jnp.arange(own_columns.shape[1])).sum(axis=0)
    return mean_where(per_row, has_scores)


def spread_out(query: Float[Array, "B D"], key: Float[Array, "M D"]) -> Float[Array, ""]:
    """How far cosines within a batch are from those of random directions.

    Their mean squared, and by how much their second moment is above 1/D (arXiv:1708.06320): of the
    queries with each other, of the positives, of all first negatives and so on; the mean of these.
    """

    def of_column(vectors):
        unit = normalize(vectors)
        cosines = jnp.where(jnp.eye(len(unit), dtype=bool), 0.0, similarity(unit, unit))
        pairs = max(len(unit) * (len(unit) - 1), 1)
        excess = (cosines**2).sum() / pairs - 1 / unit.shape[1]
        return (cosines.sum() / pairs) ** 2 + jax.nn.relu(excess)

    columns = key.reshape(len(query), -1, key.shape[1]).swapaxes(0, 1)
    return jax.vmap(of_column)(jnp.concatenate([query[None], columns])).mean()


def embedding_mse(
    query: Float[Array, "B D"], key: Float[Array, "M D"], teacher: Float[Array, "B T D"]
) -> Float[Array, ""]:
    """Mean squared difference from a teacher's vectors of each query and its keys, T texts.

    arXiv:2004.09813, and MSELoss of sentence-transformers.
    """
    keys = key.reshape(len(query), -1, key.shape[1])
    return jnp.mean((jnp.concatenate([query[:, None], keys], axis=1) - teacher) ** 2)


def total(
    query: Float[Array, "B D"],
    key: Float[Array, "M D"],
    teacher_scores: Float[Array, "B N"],
    has_scores: Bool[Array, "B"],
    key_hash: UInt32[Array, "M 2"],
    positive_hash: UInt32[Array, "B P 2"],
    teacher_vectors: Float[Array, "B T E"] | None,
    loss: LossConfig,
    dense_metric: str,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one batch and its parts by name.

    Both losses on: their weighted sum. One on: that loss, unweighted, as in the reference. The
    weights of `spread_out` and `embedding_mse` always count. With `matryoshka_dims` all are sums
    over the truncated vectors (arXiv:2205.13147), the teacher's too.
    """

    def cut(vectors):
        vectors, dims = vectors.astype(jnp.float32), loss.matryoshka_dims
        return [truncate(vectors, dim, dense_metric) for dim in dims] if dims else [vectors]

    vectors = [*zip(cut(query), cut(key), strict=True)]
    rest = teacher_scores, has_scores, key_hash, positive_hash, loss, dense_metric
    each = [_parts(*of_dim, *rest) for of_dim in vectors]
    weights = loss.matryoshka_weights or [1.0] * len(each)

    def summed(values):
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    parts = {name: summed(of_dim[name] for of_dim in each) for name in each[0]}
    value = weighted_sum(parts, loss) if parts else 0.0  # a teacher's vectors may be all there is
    if loss.spread_weight > 0:
        parts["spread"] = summed(spread_out(*of_dim) for of_dim in vectors)
        value += loss.spread_weight * parts["spread"]
    if loss.embedding_weight > 0:
        taught = zip(vectors, cut(teacher_vectors), strict=True)
        parts["embedding"] = summed(embedding_mse(*of_dim, teacher) for of_dim, teacher in taught)
        value += loss.embedding_weight * parts["embedding"]
    return value, parts


def _parts(
    query, key, teacher_scores, has_scores, key_hash, positive_hash, loss: LossConfig, dense_metric
) -> dict[str, Float[Array, ""]]:
    products = similarity(query, key)
    temperature = loss.cos_temperature if dense_metric == "cos" else 1.0
    scores = products / temperature
    masking = loss.mask_false_negatives
    parts = {}
    if loss.contrastive_weight > 0:
        masks = [false_negatives(key_hash, positive_hash)] if masking else []
        if loss.false_negative_margin is not None:
            masks.append(too_close(products, loss.false_negative_margin))
        known = reduce(jnp.logical_or, masks) if masks else None
        of_keys = scores if loss.hardness_mode is None else scores + hardness(products, loss)
        sides = directions(query, key, of_keys, known, loss.contrastive_directions, temperature)
        parts["contrastive"] = contrastive(*sides, partition_mode=loss.partition_mode)
    if loss.distill_weight > 0:
        if loss.stable_distill:
            parts["distill"] = stable_distill(
                scores, teacher_scores, has_scores, loss, key_hash if masking else None
            )
        elif loss.distill_loss == "margin_mse":  # of cosines themselves, as elsewhere
            parts["distill"] = margin_mse(own_group(products), teacher_scores, has_scores, loss)
        else:
            parts["distill"] = kl_distill(own_group(scores), teacher_scores, has_scores, loss)
    return parts


def weighted_sum(parts: dict[str, Float[Array, ""]], loss: DistillConfig) -> Float[Array, ""]:
    """Of the parts `contrastive` and `distill`; a single one is not weighted."""
    weights = {"contrastive": loss.contrastive_weight, "distill": loss.distill_weight}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return sum(weights[name] * part for name, part in parts.items())


def mean_where(values: Float[Array, "*n"], where: Bool[Array, "*n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)
