"""DeBERTa against transformers' torch models: values, gradients, precision, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import load_encoder, on_padded, random_ids, rewrite

from llme_jax.errors import InputError
from llme_jax.models.attention import biased_attention
from llme_jax.models.deberta import hidden_states, skewed
from llme_jax.models.dropout import Rows, dropout
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.models.layers import cast_kernels

WIDTH = 40  # as many as the tiny models have positions
LENGTHS = np.array([WIDTH, 1, 7, 16], np.int32)
SECOND = np.array([11, 1, 3, 8], np.int32)
V3 = {
    "relative_attention": True,
    "position_buckets": 8,  # fewer than the distances of 40 tokens, so that far ones share
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
V2 = {
    "relative_attention": True,
    "position_buckets": -1,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "type_vocab_size": 2,
}


_on_padded = partial(on_padded, hidden_states)
_jitted = jax.jit(_on_padded, static_argnums=(0, 1, 2))


def _encode(config, params, ids, *, dtype="float32", remat=False, key=None, second=None):
    ids, lengths = jnp.asarray(ids), jnp.asarray(np.minimum(LENGTHS, ids.shape[1]))
    return _jitted(config, dtype, remat, params, ids, lengths, key, second)


def test_embeddings_are_projected_in_float32(tiny):
    folder, _ = tiny("deberta-v2", **V3, embedding_size=24)
    _, params = load_encoder(folder)
    cast = cast_kernels(params, "bfloat16")
    assert cast["embeddings"]["embed_proj"]["kernel"].dtype == jnp.float32
    layer = cast["encoder"]["layer"]["0"]
    assert layer["output"]["dense"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "settings, width",
    [
        (V3, WIDTH),
        (V3, 1),
        (V3 | {"position_buckets": 256, "max_position_embeddings": 512}, WIDTH),
        (V2, WIDTH),
        (V2 | {"max_relative_positions": 6}, WIDTH),  # farther ones are as far as the sixth
        (V2 | {"pos_att_type": "c2p", "position_buckets": 12}, WIDTH),
        (V3 | {"pos_att_type": ["p2c"], "embedding_size": 24}, WIDTH),
        (V2 | {"pos_att_type": ["p2c"], "norm_rel_ebd": "layer_norm"}, WIDTH),
    ],
    ids=["v3", "one-token", "v3-256", "v2", "clipped", "c2p", "p2c-projected", "p2c"],
)
def test_hidden_states_and_gradients_are_those_of_transformers(tiny, settings, width):
    folder, model = tiny("deberta-v2", **settings)
    config, params = load_encoder(folder)
    ids, inside = random_ids(LENGTHS, width)
    weight = np.random.default_rng(1).standard_normal((4, width, 48)).astype(np.float32)
    weight[~inside] = 0

    typed = settings["type_vocab_size"] == 2
    types = torch.tensor(np.arange(width) >= SECOND[:, None]).long() if typed else None
    hidden = model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(inside).long(),
        token_type_ids=types,
    ).last_hidden_state
    (hidden * torch.tensor(weight)).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    @jax.jit
    def loss(params):
        # Where there are no types, it changes nothing that a second text begins.
        hidden = _encode(config, params, ids, second=jnp.asarray(SECOND))
        return (hidden * weight).sum(), hidden

    ours, values = jax.grad(loss, has_aux=True)(params)
    assert values.dtype == jnp.float32 and np.isfinite(values).all()
    # fp32 rounding over 2 layers of values around 1
    np.testing.assert_allclose(values[inside], hidden.detach().numpy()[inside], atol=1e-5, rtol=0)
    leaves = jax.tree_util.tree_leaves_with_path(ours)
    assert len(leaves) == len(theirs)
    for path, leaf in leaves:
        *steps, last = (step.key for step in path)
        name = ".".join([*steps, "bias" if last == "bias" else "weight"])
        want = theirs[name].numpy()
        want = want.T if last == "kernel" else want
        # what shifts all scores of a row alike has a gradient of 0
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(leaf, want, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_bfloat16_stays_close(tiny):
    config, params = load_encoder(tiny("deberta-v2", **V3)[0])
    ids, inside = random_ids(LENGTHS, WIDTH)
    exact = _encode(config, params, ids)[inside]
    rough = _encode(config, params, ids, dtype="bfloat16")[inside]
    assert rough.dtype == jnp.float32
    cosine = (exact * rough).sum(-1) / jnp.linalg.norm(exact, axis=-1)
    cosine /= jnp.linalg.norm(rough, axis=-1)
    assert cosine.min() > 0.999  # 8 bits of mantissa in the products
    assert jnp.abs(exact - rough).max() > 1e-4  # and it did compute in bfloat16


def test_dropout_recomputed_layers_and_wider_padding(tiny):
    config, params = load_encoder(tiny("deberta-v2", **V3)[0])
    assert config.hidden_dropout_prob and config.attention_probs_dropout_prob
    lengths = jnp.asarray(LENGTHS[1:])
    ids, inside = (x[1:, :16] for x in random_ids(LENGTHS, WIDTH))
    wider = np.pad(ids, ((0, 0), (0, 8)), constant_values=98)
    key = jax.random.key(0)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.grad, has_aux=True)
    def gradient(params, ids, remat):
        hidden = _on_padded(config, "float32", remat, params, ids, lengths, key)[:, :16]
        return (jnp.sin(hidden) * inside[..., None]).sum(), hidden

    base, hidden = gradient(params, ids, False)
    for other, values in (gradient(params, ids, True), gradient(params, wider, False)):
        np.testing.assert_allclose(values[inside], hidden[inside], atol=1e-5, rtol=0)
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True):
            # the same sums in another order: rounding only
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()), rtol=0)
    kept = _jitted(config, "float32", False, params, jnp.asarray(ids), lengths, None)
    assert jnp.abs(kept - hidden)[inside].max() > 1e-2


def test_checkpoints_may_hold_heads_and_tables_that_are_not_read(tiny):
    folder, _ = tiny("deberta-v2", **V3)
    _, params = load_encoder(folder)
    path = folder / "model.safetensors"
    tensors = {f"deberta.{name}": tensor for name, tensor in load_file(path).items()}
    for name in (
        "deberta.embeddings.position_embeddings.weight",
        "lm_predictions.lm_head.dense.weight",
        "mask_predictions.LayerNorm.bias",
        "cls.predictions.bias",
        "pooler.dense.weight",
    ):
        tensors[name] = np.zeros(3, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_encoder(folder)[1], params)


def test_position_terms_may_be_a_list_or_a_string(tiny):
    folder, _ = tiny("deberta-v2", **V3)
    config = read_config(folder, ENCODERS)
    for terms in ("c2p|p2c", "P2C | C2P", ["c2p", "p2c"]):
        rewrite(folder / "config.json", pos_att_type=terms)
        assert read_config(folder, ENCODERS) == config
    rewrite(folder / "config.json", pos_att_type="c2p")
    assert read_config(folder, ENCODERS) != config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size 3 is not served; give a model with 0"),
        ({"relative_attention": False}, "relative_attention false is not served; give a model"),
        ({"hidden_act": "swish"}, "hidden_act swish is not served; give one of gelu, gelu_new"),
        ({"hidden_size": None}, "hidden_size missing; add what the model has"),
    ],
)
def test_config_that_cannot_be_served_is_refused(tiny, change, message):
    folder, _ = tiny("deberta-v2", **V3)
    rewrite(folder / "config.json", **change)
    with pytest.raises(InputError, match=message) as error:
        read_config(folder, ENCODERS)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")


def test_longer_texts_are_refused(tiny):
    config, params = load_encoder(tiny("deberta-v2", **V3)[0])
    assert config.max_length == WIDTH
    with pytest.raises(InputError, match="41 tokens, the encoder has 40 positions: lower"):
        _encode(config, params, random_ids(LENGTHS, WIDTH + 1)[0])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_skewed_rows(length):
    x = np.arange(2 * length * (2 * length - 1)).reshape(2, length, -1).astype(np.float32)
    i, j = np.indices((length, length))
    np.testing.assert_array_equal(skewed(jnp.asarray(x)), x[:, i, length - 1 + j - i])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_biased_attention_by_its_definition(rate):
    batch, length, heads, width = 3, 10, 2, 8
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((batch, length, heads, width)), jnp.float32)
        for _ in range(4)
    )
    bias = jnp.asarray(rng.standard_normal((batch, heads, length, length)), jnp.float32)
    lengths = jnp.array([10, 4, 1])
    key, by_head = jax.random.key(3), Rows(jnp.arange(batch * heads))
    mask = dropout(jnp.ones((batch * heads, length, length)), key, rate, by_head)

    def plain(q, k, v, bias):
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / width**0.5 + bias
        scores = jnp.where(jnp.arange(length) < lengths[:, None, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, -1) * mask.reshape(scores.shape)
        return jnp.einsum("nhqk,nkhd->nqhd", weights, v)

    def ours(q, k, v, bias):
        return biased_attention(
            q, k, v, bias, lengths, key=key, numbers=jnp.arange(batch), rate=rate
        )

    out, backward = jax.vjp(ours, q, k, v, bias)
    want, want_backward = jax.vjp(plain, q, k, v, bias)
    np.testing.assert_allclose(out, want, atol=2e-6)  # fp32 rounding of sums over 10 keys
    for ours, theirs in zip(backward(g), want_backward(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
