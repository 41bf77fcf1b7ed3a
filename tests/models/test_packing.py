"""Texts that are packed give what they give when each is padded, and see nothing of each other."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import load_encoder

from llme_jax.devices.sharding import path_name
from llme_jax.models import static_embedding
from llme_jax.models.families import ENCODERS
from llme_jax.models.packing import pack, padded
from llme_jax.models.pooling import mean

LENGTHS = [np.array([16, 13, 9], np.int32), np.array([7, 1], np.int32)]
WIDTHS, SIZE = (16, 8), 56  # 46 tokens, 10 of padding
NUMBERS = [np.array([3, 0, 4], np.int32), np.array([1, 2], np.int32)]
SECOND = np.array([5, 4, 8, 2, 1], np.int32)
FAMILIES = {
    "bert": {},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4,
        "max_relative_positions": -1, "share_att_key": True, "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {
        "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"],
        "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
WORDS = re.compile("word_embeddings|tok_embeddings|embed_tokens")


@pytest.fixture
def packing():
    lengths, numbers = ([jnp.asarray(x) for x in blocks] for blocks in (LENGTHS, NUMBERS))
    return pack(lengths, WIDTHS, SIZE, numbers, jnp.asarray(SECOND))


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(5, 100, SIZE).astype(np.int32)


def padded_rows(x):
    """The texts as one padded matrix [5, 16, ...]."""
    out, start = np.zeros((5, 16, *x.shape[1:]), x.dtype), 0
    for row, length in zip(out, np.concatenate(LENGTHS), strict=True):
        row[:length], start = x[start : start + length], start + length
    return out


def test_blocks_and_back(packing):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((SIZE, 3)), jnp.float32)
    blocks = packing.in_blocks(x)
    assert [b.shape for b in blocks] == [(3, 16, 3), (2, 8, 3)]
    rows = padded_rows(np.asarray(x))
    for block, want, lengths in zip(blocks, (rows[:3], rows[3:, :8]), LENGTHS, strict=True):
        inside = np.arange(block.shape[1]) < lengths[:, None]
        np.testing.assert_array_equal(np.asarray(block)[inside], want[inside])
    np.testing.assert_array_equal(packing.from_blocks(blocks)[:46], x[:46])
    np.testing.assert_array_equal(packing.first(x), rows[:, 0])
    lengths = np.concatenate(LENGTHS)[:, None]
    whole = replace(packing, in_second=None)
    np.testing.assert_allclose(mean(x, whole), rows.sum(1) / lengths, atol=1e-6)
    np.testing.assert_array_equal(packing.tokens.places[:46], np.concatenate(
        [np.arange(n) for n in np.concatenate(LENGTHS)]))  # fmt: skip
    at = np.repeat(np.concatenate(NUMBERS), np.concatenate(LENGTHS))
    np.testing.assert_array_equal(packing.tokens.texts[:46], at)


def test_gradients_go_back_to_the_tokens_they_come_from(packing):
    """Against plain indexing, whose derived backward pass scatters."""
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal((SIZE, 3)), jnp.float32) for _ in range(2))
    inside = jnp.arange(SIZE) < 46

    def there_and_back(x, into, out_of):
        # Padding of a block is multiplied by the same as its tokens, and has to be lost again.
        return ((out_of([jnp.sin(b) for b in into(x)]) * g)[:46] ** 2).sum()

    def plainly(x):
        return [x[s].reshape(-1, w, 3) for s, w in zip(packing.source, WIDTHS, strict=True)]

    def back(blocks):
        return jnp.concatenate([b.reshape(-1, 3) for b in blocks])[packing.slot]

    ours = jax.grad(there_and_back)(x, packing.in_blocks, packing.from_blocks)
    want = jax.grad(there_and_back)(x, plainly, back)
    np.testing.assert_allclose(ours, want, atol=1e-6)
    assert not ours[~inside].any()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_hidden_states_and_gradients_are_those_of_padded_texts(
    tiny, ids, packing, model_type, dropped, first
):
    folder, _ = tiny(model_type, **FAMILIES[model_type])
    config, params = load_encoder(folder)
    family = ENCODERS[model_type]
    key = jax.random.key(0) if dropped else None
    run = partial(family.hidden_states, config, "float32", False, "plain")
    lengths = np.concatenate(LENGTHS)
    together = padded(jnp.asarray(lengths), 16, jnp.asarray(SECOND), jnp.concatenate(NUMBERS))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def packed_texts(params):
        hidden = run(params, jnp.asarray(ids), packing, key, first)
        return (jnp.sin(hidden[: 5 if first else 46])).sum(), hidden

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def padded_texts(params):
        hidden = run(params, jnp.asarray(padded_rows(ids).reshape(-1)), together, key, first)
        if not first:
            inside = jnp.arange(16) < lengths[:, None]
            return (jnp.sin(hidden) * inside.reshape(-1, 1)).sum(), hidden.reshape(5, 16, -1)
        return jnp.sin(hidden).sum(), hidden

    (_, ours), gradient = packed_texts(params)
    (_, theirs), other = padded_texts(params)
    if not first:
        ours = padded_rows(np.asarray(ours))
        inside = np.arange(16) < lengths[:, None]
        ours, theirs = ours[inside], np.asarray(theirs)[inside]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # the same sums, in other products
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_texts_see_nothing_of_each_other_nor_of_padding(tiny, packing, model_type):
    """The gradient of one text's vectors with respect to every token's word vector."""
    folder, _ = tiny(model_type, **FAMILIES[model_type])
    config, params = load_encoder(folder)
    family = ENCODERS[model_type]
    ids = jnp.arange(SIZE) + 5  # every token has a word vector of its own
    ends = np.cumsum(np.concatenate(LENGTHS))

    @jax.jit
    @jax.grad
    def gradient(params, start, end):
        hidden = family.hidden_states(config, "float32", False, "plain", params, ids, packing)
        of_text = (jnp.arange(SIZE) >= start) & (jnp.arange(SIZE) < end)
        return (jnp.sin(hidden) * of_text[:, None]).sum()

    for start, end in zip(ends - np.concatenate(LENGTHS), ends, strict=True):
        leaves = jax.tree_util.tree_leaves_with_path(gradient(params, start, end))
        words = next(leaf for path, leaf in leaves if WORDS.search(path_name(path)))
        moved = np.flatnonzero(np.abs(words).max(1) > 0)
        np.testing.assert_array_equal(moved, np.asarray(ids[start:end]))


def test_families_are_tested():
    # The tokens of static embeddings do not even see those of their own text.
    assert {*map(ENCODERS.get, FAMILIES)} == {*ENCODERS.values()} - {static_embedding}
