"""Attention and dropout against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llme_jax.models.attention import attention
from llme_jax.models.dropout import Rows, dropout

N, L, H, WIDTH = 3, 10, 2, 8
LENGTHS = jnp.array([10, 4, 1])


def _inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((N, L, H, WIDTH)), jnp.float32) for _ in range(4)]


def _dropout(x, seed, rate):
    return dropout(x, jax.random.key(seed), rate, Rows(jnp.arange(len(x))))


def _by_definition(q, k, v, mask):
    """softmax(q k^T / sqrt(Dh)) * mask, times v; mask [N, H, L, L] is 0 or 1 / keep."""
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / WIDTH**0.5
    scores = jnp.where(jnp.arange(L) < LENGTHS[:, None, None, None], scores, -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, -1) * mask, v)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_values_and_gradients(rate):
    q, k, v, g = _inputs()
    how = {"key": jax.random.key(3), "numbers": jnp.arange(N)}
    mask = _dropout(jnp.ones((N * H, L, L)), 3, rate).reshape(N, H, L, L)

    def ours(q, k, v):
        return attention(q, k, v, LENGTHS, **how, rate=rate)

    out, backward = jax.vjp(ours, q, k, v)
    want, want_backward = jax.vjp(lambda *x: _by_definition(*x, mask), q, k, v)
    np.testing.assert_allclose(out, want, atol=2e-6)  # fp32 rounding of sums over 10 keys
    for ours, theirs in zip(backward(g), want_backward(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_no_key_or_no_rate_drops_nothing():
    q, k, v, _ = _inputs()
    base = attention(q, k, v, LENGTHS)
    np.testing.assert_array_equal(attention(q, k, v, LENGTHS, rate=0.5), base)
    how = {"key": jax.random.key(0), "numbers": jnp.arange(N)}
    np.testing.assert_array_equal(attention(q, k, v, LENGTHS, **how, rate=0.0), base)


def test_rows_without_tokens_and_large_scores_stay_finite():
    q, k, v, g = _inputs()
    lengths = jnp.array([10, 0, 1])
    out, backward = jax.vjp(lambda *x: attention(*x, lengths), 1e3 * q, k, v)
    assert np.isfinite(out).all() and all(np.isfinite(x).all() for x in backward(g))


def test_bfloat16_inputs_give_bfloat16():
    q, k, v, _ = _inputs()
    out = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), LENGTHS)
    assert out.dtype == jnp.bfloat16
    # 8 bits of mantissa: 2^-8 of values up to 3
    np.testing.assert_allclose(out.astype(np.float32), attention(q, k, v, LENGTHS), atol=3e-2)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_expectation(rate):
    n = 1_000_000
    dropped = np.asarray(_dropout(jnp.ones((1000, 1000)), 0, rate))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = (rate * (1 - rate) / n) ** 0.5
    assert abs((dropped == 0).mean() - rate) < 4 * deviation


def test_dropout_masks_are_independent():
    shape, rate = (64, 128, 128), 0.5
    ones = jnp.ones(shape)
    masks = [np.asarray(_dropout(ones, seed, rate)) - 1 for seed in (7, 8)]
    limit = 5 / masks[0].size ** 0.5  # five standard deviations of a correlation that is 0
    pairs = [masks] + [(masks[0], np.roll(masks[0], 1, axis)) for axis in range(3)]
    assert all(abs((a * b).mean()) < limit for a, b in pairs)
    # no row, column or text is dropped more than another beyond chance
    for axes in [(0, 1), (0, 2), (1, 2)]:
        means = masks[0].mean(axes)
        assert abs(means).max() < 5 * (shape[0] * shape[1] * shape[2] / means.size) ** -0.5


def test_dropout_gradient_has_the_same_mask():
    x = jnp.arange(1.0, 101.0).reshape(10, 10)
    out, backward = jax.vjp(lambda x: _dropout(x, 0, 0.25), x)
    np.testing.assert_allclose(backward(jnp.ones((10, 10)))[0] * x, out, rtol=1e-6)


def test_a_text_is_dropped_alike_in_any_order_and_at_any_width():
    whole = _dropout(jnp.ones((6, 4, 8)), 0, 0.5)
    order = jnp.array([4, 1, 5])
    part = dropout(jnp.ones((3, 9, 8)), jax.random.key(0), 0.5, Rows(order))
    np.testing.assert_array_equal(part[:, :4], whole[order])


def test_a_token_is_dropped_alike_wherever_it_lies():
    texts, places = jnp.repeat(jnp.arange(200), 50), jnp.tile(jnp.arange(50), 200)
    key, x = jax.random.key(0), jnp.ones((len(texts), 64))
    whole = dropout(x, key, 0.5, Rows(texts, places))
    order = jnp.asarray(np.random.default_rng(0).permutation(len(texts)))
    part = dropout(x, key, 0.5, Rows(texts[order], places[order]))
    np.testing.assert_array_equal(part, whole[order])
    # Neighbours in a text, the same places of two texts and neighbouring columns are independent.
    masks = np.asarray(whole).reshape(200, 50, 64) - 1
    limit = 5 / masks.size**0.5
    assert all(abs((masks * np.roll(masks, 1, axis)).mean()) < limit for axis in range(3))
