"""Attention over texts where their tokens lie, as one TPU kernel forward and one backward.

FlashAttention (arXiv:2205.14135) over T tokens, one text after another: a block of tokens meets the
blocks that its texts reach into, and no others. Nothing is moved into padded blocks of texts, and
no attention weights are written to memory. Everything is transposed: the heads of [D, T] are cut
where registers end, and what there is one of for a query lies along the lanes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llme_jax.models.attention import dot
from llme_jax.models.dropout import AXIS, is_kept, mix, seeds
from llme_jax.models.platform import platform

BLOCK = 128  # tokens: the lanes of a register
# Heads whose steps alternate, so that one's products run while others wait for theirs. By the
# compiler's schedule for v5e: 975 cycles a pair of blocks forward, 1539 backward (12 heads of 64);
# one at a time 1600 and 2500.
TOGETHER = 6
_UNSEEN = -1e30  # finite, as its difference to itself has to be a number
_LOG2_E = 1.4426950408889634


class Reach(NamedTuple):
    """Which tokens see each other.

    Attributes:
        tokens: of each token the first of its text, and its place in it, int32[2, T].
        pairs: int32[4, P]: pairs of blocks that have a text in common, each (i, j) once and in
            order; how far the blocks are done at that point (see `_backward`); whether it is the
            first pair with this j.
        count: of those, how many are meant.
        most: j of one i at most.
    """

    tokens: Int[Array, "2 T"]
    pairs: Int[Array, "4 P"]
    count: Int[Array, ""]
    most: int


def reach(
    begin: Int[Array, "T"], end: Int[Array, "T"], longest: int, window: int | None = None
) -> Reach:
    """The reach of tokens whose texts go from `begin` to `end`; both ascend.

    Args:
        begin, end: of padding, the token itself.
        longest: tokens of a text at most.
        window: how far to either side a token sees; None for all of its text.
    """
    size = len(begin)
    at = jnp.arange(-(-size // BLOCK) * BLOCK)
    begin = at.at[:size].set(begin)
    end = (at + 1).at[:size].set(end)
    tokens = jnp.stack([begin, at - begin])
    farthest = longest - 1
    if window is not None:
        farthest = min(farthest, window)
        begin, end = jnp.maximum(begin, at - window), jnp.minimum(end, at + window + 1)
    blocks = len(at) // BLOCK
    most = min(1 + 2 * -(-farthest // BLOCK), blocks)
    first, last = begin[::BLOCK] // BLOCK, (end[BLOCK - 1 :: BLOCK] - 1) // BLOCK
    counts = last - first + 1
    i = jnp.repeat(jnp.arange(blocks), counts, total_repeat_length=blocks * most)
    before = jnp.cumsum(counts) - counts
    j = jnp.minimum(first[i] + jnp.arange(len(i)) - before[i], blocks - 1)
    # A j below the first one of i + 1 will not come again.
    done = jnp.minimum(j, jnp.append(first[1:], blocks)[i])
    pairs = jnp.stack([i, j, done, i == first[j]]).astype(jnp.int32)
    return Reach(tokens, pairs, counts.sum(), most)


class _How(NamedTuple):
    """What is known before anything is computed."""

    heads: int
    width: int  # of a head
    rate: float
    most: int
    window: int | None

    @property
    def groups(self) -> list[list[tuple[slice, slice]]]:
        """Of each head the row of what there is one of, and its rows of [D, T]."""
        rows = [
            (slice(h, h + 1), slice(h * self.width, (h + 1) * self.width))
            for h in range(self.heads)
        ]
        return [rows[i : i + TOGETHER] for i in range(0, self.heads, TOGETHER)]

    @property
    def scale(self) -> float:
        return self.width**-0.5


@jax.named_scope("attention")
def flash_attention(
    q: Float[Array, "T D"],
    k: Float[Array, "T D"],
    v: Float[Array, "T D"],
    reach: Reach,
    heads: int,
    *,
    window: int | None = None,
    key: Array | None = None,
    numbers: Int[Array, "T"] | None = None,
    rate: float = 0.0,
) -> Float[Array, "T D"]:
    """softmax(q k^T / sqrt(Dh)) v of every head, within each text; the softmax is in fp32.

    The same as `attention`, dropout included. Rows of padding hold finite numbers without meaning.
    Where there is no TPU it is interpreted, which is slow and meant for tests.

    Args:
        window: that of `reach`.
        key: attention weights are dropped at `rate` where it is given.
        numbers: what dropout knows each token's text by.
    """
    size, width = q.shape
    padding = reach.tokens.shape[1] - size
    q, k, v = (jnp.pad(x.T, ((0, 0), (0, padding))) for x in (q, k, v))
    drawn = None
    if key is not None and rate:
        rows = jnp.pad(numbers, (0, padding)) * heads + jnp.arange(heads)[:, None]
        of_rows, second = seeds(key, rows)
        drawn = of_rows, second[None]
    how = _How(heads, width // heads, rate if drawn else 0.0, reach.most, window)
    return _flash(q, k, v, reach[:-1], drawn, how)[:, :size].T


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, reach, drawn, how):
    return _forward(q, k, v, reach, drawn, how)[0]


def _forward(q, k, v, reach, drawn, how):
    tokens, pairs, count = reach
    outer, inner = _block(0), _block(1)
    inputs = [
        *((q, outer), (k, inner), (v, inner)),
        *((tokens, outer), (tokens.T, _block(1, upright=True))),
        *([(drawn[0], outer)] if drawn else []),
    ]
    one = jax.ShapeDtypeStruct((how.heads, q.shape[1]), jnp.float32)
    of_all, of_heads = (pltpu.VMEM((rows, BLOCK), jnp.float32) for rows in (q.shape[0], how.heads))
    out, normaliser = _call(
        _forward_kernel, how, pairs, count, drawn, inputs,
        out=[(q, outer), (one, outer)],
        scratch=[of_all, of_heads, of_heads], products=2,
    )  # fmt: skip
    return out, (q, k, v, out, normaliser, reach, drawn)


def _backward(how, saved, g):
    q, k, v, out, normaliser, reach, drawn = saved
    tokens, pairs, count = reach
    # Here the outer block has the keys, and the sums of d_q go on over several of them. Queries
    # meet their last keys in order, which makes `done` the block to write.
    outer, inner, done = _block(0), _block(1), _block(2)
    inputs = [
        *((q, inner), (k, outer), (v, outer), (g, inner), (out, inner), (normaliser, inner)),
        *((tokens, inner), (tokens.T, _block(0, upright=True))),
        *([(drawn[0], inner)] if drawn else []),
    ]
    rows = q.shape[0], BLOCK
    d_q, d_k, d_v = _call(
        _backward_kernel, how, pairs, count, drawn, inputs,
        out=[(q, done), (k, outer), (v, outer)],
        scratch=[pltpu.VMEM(s, jnp.float32) for s in ((how.most, *rows), rows, rows)], products=5,
    )  # fmt: skip
    return d_q, d_k, d_v, None, None


_flash.defvjp(_forward, _backward)


def _block(which: int, *, upright: bool = False):
    """The part of an array [rows, T], or [T, rows], that belongs to a row of `Reach.pairs`."""

    def of(array):
        if upright:
            return pl.BlockSpec((BLOCK, array.shape[1]), lambda p, *pairs: (pairs[which][p], 0))
        return pl.BlockSpec((array.shape[0], BLOCK), lambda p, *pairs: (0, pairs[which][p]))

    return of


def _call(kernel, how, pairs, count, drawn, inputs, out, scratch, products):
    # The number of pairs is not known yet; half of the most is one more than texts of full length
    # have that begin where blocks do.
    expected = pairs.shape[1] // how.most * (how.most + 1) // 2
    operations = products * 2 * BLOCK**2 * how.heads * how.width * expected
    scalars = [*pairs, *([drawn[1]] if drawn else [])]
    return pl.pallas_call(
        partial(kernel, how=how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(count,),
            in_specs=[block(x) for x, block in inputs],
            out_specs=[block(x) for x, block in out],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in out],
        cost_estimate=pl.CostEstimate(
            flops=operations,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x, _ in (*inputs, *out)),
            transcendentals=BLOCK**2 * how.heads * expected,
        ),
        interpret=platform() != "tpu",
        name=kernel.__name__.strip("_"),
    )(*scalars, *(x for x, _ in inputs))


def _forward_kernel(i, j, done, fresh, *refs, how):
    del j, done, fresh
    second, of_rows, refs = _drawn(refs, how, inputs=5)
    q, k, v, of_query, of_key, out, normaliser, sums, highest, total = refs
    first, last = _ends(i)

    @pl.when(first)
    def _():
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, _UNSEEN)
        total[...] = jnp.zeros_like(total)

    unseen, of_place = _places(of_query, of_key, second, how.window)
    tops, totals = [], []
    for group in how.groups:
        scores = [_scores(q, k, at, unseen, how) for _, at in group]
        top = [
            jnp.maximum(highest[one], x.max(0, keepdims=True))
            for (one, _), x in zip(group, scores, strict=True)
        ]
        fade = [jnp.exp2(highest[one] - x) for (one, _), x in zip(group, top, strict=True)]
        weights = [jnp.exp2(x - y) for x, y in zip(scores, top, strict=True)]
        tops += top
        totals += [
            total[one] * x + y.sum(0, keepdims=True)
            for (one, _), x, y in zip(group, fade, weights, strict=True)
        ]
        if how.rate:
            weights = [
                jnp.where(is_kept(of_place, of_rows[one], how.rate), x, 0.0)
                for (one, _), x in zip(group, weights, strict=True)
            ]
        for (_, at), x, y in zip(group, fade, weights, strict=True):
            sums[at] = sums[at] * x + dot(v[at], y.astype(v.dtype), 1, 0)
    highest[...], total[...] = jnp.concatenate(tops), jnp.concatenate(totals)

    @pl.when(last)
    def _():
        normaliser[...] = highest[...] + jnp.log2(total[...])
        for one, at in (head for group in how.groups for head in group):
            out[at] = (sums[at] / (total[one] * (1 - how.rate))).astype(out.dtype)


def _backward_kernel(i, j, done, fresh, *refs, how):
    second, of_rows, refs = _drawn(refs, how, inputs=8)
    q, k, v, g, out, normaliser, of_query, of_key, d_q, d_k, d_v, sums_q, sums_k, sums_v = refs
    first, last = _ends(i)
    pair = pl.program_id(0)
    slot = j[pair] % how.most  # no more blocks than that are open at a time

    @pl.when(first)
    def _():
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    @pl.when(fresh[pair] == 1)
    def _():
        sums_q[slot] = jnp.zeros_like(sums_k)

    unseen, of_place = _places(of_query, of_key, second, how.window)
    for group in how.groups:
        weights = [jnp.exp2(_scores(q, k, at, unseen, how) - normaliser[one]) for one, at in group]
        d_weights = [dot(v[at], g[at], 0, 0) for _, at in group]
        # sum_j weights_j d_weights_j, dropout included
        mean = [
            (g[at].astype(jnp.float32) * out[at].astype(jnp.float32)).sum(0, keepdims=True)
            for _, at in group
        ]
        kept = weights
        if how.rate:
            stays = [is_kept(of_place, of_rows[one], how.rate) for one, _ in group]
            kept = [jnp.where(x, y, 0.0) for x, y in zip(stays, weights, strict=True)]
            d_weights = [
                jnp.where(x, y * (1 / (1 - how.rate)), 0.0)
                for x, y in zip(stays, d_weights, strict=True)
            ]
        d_scores = [
            (x * (y - z)).astype(q.dtype) for x, y, z in zip(weights, d_weights, mean, strict=True)
        ]
        for (_, at), x, y in zip(group, kept, d_scores, strict=True):
            sums_v[at] += dot(g[at], x.astype(g.dtype), 1, 1)
            sums_k[at] += dot(q[at], y, 1, 1)
            sums_q[slot, at] += dot(k[at], y, 1, 0)

    @pl.when(last)
    def _():
        d_k[...] = (sums_k[...] * how.scale).astype(d_k.dtype)
        d_v[...] = (sums_v[...] * (1 / (1 - how.rate))).astype(d_v.dtype)

    @pl.when(done[pair] == j[pair])
    def _():
        d_q[...] = (sums_q[slot] * how.scale).astype(d_q.dtype)


def _drawn(refs, how, inputs: int):
    """What dropout is drawn from, and the other refs."""
    if not how.rate:
        return None, None, refs
    second, *refs = refs
    return second[0], refs[inputs], [*refs[:inputs], *refs[inputs + 1 :]]


def _ends(i):
    """Whether a pair is the first and whether it is the last of its outer block."""
    pair, pairs = pl.program_id(0), pl.num_programs(0)
    first = (pair == 0) | (i[jnp.maximum(pair, 1) - 1] != i[pair])
    last = (pair == pairs - 1) | (i[jnp.minimum(pair, pairs - 2) + 1] != i[pair])
    return first, last


def _places(of_query, of_key, second, window):
    """[keys, queries]: what is added to a score, so that no text sees another and none beyond the
    window; of its place, what dropout makes."""
    seen = of_key[:, :1] == of_query[:1]
    if window is not None:
        seen &= jnp.abs(of_key[:, 1:] - of_query[1:]) <= window
    unseen = jnp.where(seen, 0.0, _UNSEEN)
    if second is None:
        return unseen, None
    place = of_query[1:] * AXIS + of_key[:, 1:]
    return unseen, mix(place.astype(jnp.uint32) ^ second)


def _scores(q, k, at, unseen, how):
    """[keys, queries] of a head, as powers of two."""
    return dot(k[at], q[at], 0, 0) * (how.scale * _LOG2_E) + unseen
