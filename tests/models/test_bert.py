"""The encoder against transformers' torch models: values, gradients, precision, dropout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import load_encoder, on_padded, random_ids, rewrite

from llme_jax.errors import InputError
from llme_jax.models.bert import hidden_states
from llme_jax.models.families import ENCODERS, read_config

LENGTHS = np.array([24, 1, 7, 16], np.int32)
SECOND = np.array([11, 1, 3, 15], np.int32)


def _encode(
    config, params, ids, lengths=LENGTHS, *, dtype="float32", remat=False, key=None, second=None
):
    ids, lengths = jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return _jitted(config, dtype, remat, params, ids, lengths, key, second)


_on_padded = partial(on_padded, hidden_states)
_jitted = jax.jit(_on_padded, static_argnums=(0, 1, 2))


def _ids(model_type, vocab=101):
    return random_ids(LENGTHS, 24, pad=0 if model_type == "bert" else 1, vocab=vocab)


def _torch_hidden(model, ids, inside, types=None):
    return model(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(inside, dtype=torch.long),
        token_type_ids=None if types is None else torch.tensor(types, dtype=torch.long),
    ).last_hidden_state


def _assert_same_gradient(ours, model):
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    leaves = jax.tree_util.tree_leaves_with_path(ours)
    assert len(leaves) == len(theirs)
    for path, leaf in leaves:
        *steps, last = (step.key for step in path)
        name = ".".join([*steps, "bias" if last == "bias" else "weight"])
        want = theirs[name].numpy()
        want = want.T if last == "kernel" else want
        # the key's bias shifts all scores of a row alike: its true gradient is 0
        scale = 1.0 if name.endswith("key.bias") else np.abs(want).max()
        assert np.abs(leaf - want).max() < 1e-4 * scale, name


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("bert", {"num_hidden_layers": 11}),  # "10" sorts before "2"
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
        ("bert", {"hidden_act": "gelu_fast"}),
        ("bert", {"hidden_act": "relu", "type_vocab_size": 1}),
        ("roberta", {"type_vocab_size": 1}),
        ("xlm-roberta", {"pad_token_id": 3, "type_vocab_size": 1}),
        ("electra", {"embedding_size": 48}),
        ("electra", {"embedding_size": 24}),
    ],
)
def test_hidden_states_are_those_of_transformers(tiny, model_type, changes):
    folder, model = tiny(model_type, **changes)
    config, params = load_encoder(folder)
    ids, inside = _ids(model_type)
    ids = np.where(inside, ids, changes.get("pad_token_id", ids))
    ours = _encode(config, params, ids)
    with torch.no_grad():
        theirs = _torch_hidden(model, ids, inside).numpy()
    # fp32 rounding over 2 to 11 layers of values around 1
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-5, rtol=0)
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()


def test_real_encoder_and_its_gradient(minilm):
    from transformers import AutoModel

    config, params = load_encoder(minilm)
    ids, inside = _ids("bert", vocab=config.vocab_size)
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    weight = np.random.default_rng(1).standard_normal((4, 24, 384)).astype(np.float32)
    weight[~inside] = 0

    hidden = _torch_hidden(model, ids, inside)
    (hidden * torch.tensor(weight)).sum().backward()

    def loss(params):
        hidden = _encode(config, params, ids)
        return (hidden * weight).sum(), hidden

    ours, values = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(values[inside], hidden.detach().numpy()[inside], atol=1e-5, rtol=0)
    _assert_same_gradient(ours, model)


@pytest.mark.parametrize(
    "model_type, changes",
    [("bert", {}), ("electra", {"embedding_size": 48}), ("electra", {"embedding_size": 24})],
)
def test_pairs_and_their_gradient(tiny, model_type, changes):
    folder, model = tiny(model_type, **changes)
    config, params = load_encoder(folder)
    ids, inside = _ids(model_type)
    weight = np.random.default_rng(1).standard_normal((4, 24, 48)).astype(np.float32)
    weight[~inside] = 0

    hidden = _torch_hidden(model, ids, inside, np.arange(24) >= SECOND[:, None])
    (hidden * torch.tensor(weight)).sum().backward()

    @jax.jit
    def loss(params):
        hidden = _encode(config, params, ids, second=jnp.asarray(SECOND))
        return (hidden * weight).sum(), hidden

    ours, values = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(values[inside], hidden.detach().numpy()[inside], atol=1e-5, rtol=0)
    _assert_same_gradient(ours, model)
    single = _encode(config, params, ids)
    differs = np.abs(values - single).max(-1, where=inside[..., None], initial=0).max(1)
    # The text of one token has no second part, the others have.
    np.testing.assert_array_equal(differs > 1e-2, [True, False, True, True])


def test_one_token_type_is_that_of_both_texts(tiny):
    config, params = load_encoder(tiny("roberta", type_vocab_size=1)[0])
    ids, _ = _ids("roberta")
    pairs = _encode(config, params, ids, second=jnp.asarray(SECOND))
    np.testing.assert_array_equal(pairs, _encode(config, params, ids))


@pytest.mark.parametrize("kind", ["ElectraForPreTraining", "ElectraForMaskedLM"])
def test_electra_as_it_is_published(tiny, tmp_path, kind):
    folder, model = tiny("electra", embedding_size=24)
    whole = getattr(transformers, kind)(model.config)
    whole.electra.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal, load_encoder(tmp_path / "whole")[1], load_encoder(folder)[1]
    )


def test_recomputed_layers_give_the_same_gradient(tiny):
    config, params = load_encoder(tiny()[0])
    ids, inside = _ids("bert")
    key = jax.random.key(0)

    def loss(params, remat):
        hidden = _encode(config, params, ids, remat=remat, key=key)
        return (jnp.sin(hidden) * inside[..., None]).sum()

    kept, recomputed = (jax.grad(loss)(params, remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        # the same sums, fused differently: rounding only
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()), rtol=0)


def test_bfloat16_stays_close(minilm):
    config, params = load_encoder(minilm)
    ids, inside = _ids("bert", vocab=config.vocab_size)
    exact = _encode(config, params, ids)[inside]
    rough = _encode(config, params, ids, dtype="bfloat16")[inside]
    assert rough.dtype == jnp.float32
    cosine = (exact * rough).sum(-1) / jnp.linalg.norm(exact, axis=-1)
    cosine /= jnp.linalg.norm(rough, axis=-1)
    assert cosine.min() > 0.999  # 8 bits of mantissa in the products
    assert jnp.abs(exact - rough).max() > 1e-4  # and it did compute in bfloat16


def test_padding_changes_nothing(tiny):
    config, params = load_encoder(tiny()[0])
    ids, inside = _ids("bert")
    base = _encode(config, params, ids)
    wider = np.pad(np.where(inside, ids, 99), ((0, 0), (0, 8)), constant_values=98)
    other = _encode(config, params, wider)[:, :24]
    np.testing.assert_allclose(base[inside], other[inside], atol=1e-6, rtol=0)  # rounding


def test_dropout_follows_config_and_key(tiny):
    folder, _ = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config, params = load_encoder(folder)
    ids, inside = _ids("bert")
    key, other = (jax.random.key(seed) for seed in (0, 1))

    def hidden(config, key, remat=False):
        return _encode(config, params, ids, remat=remat, key=key)[inside]

    base = hidden(config, None)
    np.testing.assert_array_equal(hidden(config, key), base)
    for change in ({"hidden_dropout_prob": 0.1}, {"attention_probs_dropout_prob": 0.1}):
        rewrite(folder / "config.json", **change)
        dropping = read_config(folder, ENCODERS)
        np.testing.assert_array_equal(hidden(dropping, None), base)
        first, again = hidden(dropping, key), hidden(dropping, key)
        np.testing.assert_array_equal(first, again)
        assert jnp.abs(first - base).max() > 1e-2
        assert jnp.abs(first - hidden(dropping, other)).max() > 1e-2
        # recomputed layers draw the masks they drew before
        np.testing.assert_allclose(first, hidden(dropping, key, remat=True), atol=1e-5)
        rewrite(folder / "config.json", **dict.fromkeys(change, 0.0))


def test_texts_longer_than_the_position_table_are_refused(tiny):
    folder, _ = tiny("roberta", type_vocab_size=1)
    config, params = load_encoder(folder)
    assert config.max_length == 38  # 40 rows, the first token at row 2
    full = np.full((1, 38), 7, np.int32)
    _encode(config, params, full, [38])
    with pytest.raises(InputError, match="39 tokens, the encoder has 38 positions: lower"):
        _encode(config, params, np.pad(full, ((0, 0), (0, 1))), [38])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type gpt2 is not served"),
        (
            {"position_embedding_type": "relative_key"},
            'position_embedding_type "relative_key" is not served',
        ),
        ({"hidden_act": "swish"}, "hidden_act swish is not served; give one of gelu, gelu_new"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"hidden_act": None, "vocab_size": None}, "vocab_size, hidden_act missing"),
    ],
)
def test_config_that_cannot_be_served_is_refused(tiny, change, message):
    folder, _ = tiny()
    rewrite(folder / "config.json", **change)
    with pytest.raises(InputError, match=message) as error:
        read_config(folder, ENCODERS)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")


def test_parameters_are_a_plain_nested_dict(tiny):
    _, params = load_encoder(tiny()[0])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    assert "encoder/layer/0/attention/self/query/kernel" in names
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for _, leaf in leaves)
    assert all(type(step.key) is str for path, _ in leaves for step in path)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_first_token_alone_is_the_first_of_all(tiny, dropped, remat):
    """Values and gradients, with the same dropout."""
    config, params = load_encoder(tiny("bert")[0])
    ids, _ = _ids("bert")
    ids, lengths = jnp.asarray(ids, jnp.int32), jnp.asarray(LENGTHS)
    key = jax.random.key(0) if dropped else None

    @partial(jax.jit, static_argnames="first")
    def loss(params, first):
        how = {"key": key, "second": jnp.asarray(SECOND), "first": first}
        hidden = _on_padded(config, "float32", remat, params, ids, lengths, **how)
        return (hidden[:, 0] ** 2).sum(), hidden[:, 0]

    (_, want), gradient = jax.value_and_grad(loss, has_aux=True)(params, False)
    (_, found), other = jax.value_and_grad(loss, has_aux=True)(params, True)
    np.testing.assert_allclose(found, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))
