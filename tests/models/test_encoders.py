"""Each family of encoders against transformers: values and gradients, files, windows, dropout."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import gradients_as_files, load_encoder, on_padded, random_ids, rewrite

from llme_jax.errors import InputError
from llme_jax.hugging_face.weights import save_params
from llme_jax.models.families import ENCODERS, forward_flops, read_config
from llme_jax.models.packing import pack

WIDTH = 40
LENGTHS = np.array([WIDTH, 1, 7, 16], np.int32)
SECOND = np.array([11, 1, 3, 8], np.int32)
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
OF_DISTILBERT = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}
GEMMA = {
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES = [
    ("camembert", {"max_position_embeddings": WIDTH + 2}),
    ("distilbert", OF_DISTILBERT),
    ("mpnet", {"max_position_embeddings": WIDTH + 2}),
    # Windows of 5 tokens, far fewer than the texts have; the first layer sees all.
    ("modernbert", SPECIAL | {"local_attention": 4, "num_hidden_layers": 4}),
    ("modernbert", SPECIAL | {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    ("nomic_bert", {}),
    ("gte", {}),
    ("gte", {"type_vocab_size": 0, "hidden_act": "gelu_new"}),
    ("llama", {"num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    ("qwen2", {"num_key_value_heads": 4, "is_causal": False}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    ("gemma3_text", GEMMA | {"use_bidirectional_attention": True}),
    ("gemma3_text", GEMMA),
    ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0}),
]
EUROBERT = ("eurobert", {"num_key_value_heads": 2})  # computes what such a qwen2 does
TYPED = ("nomic_bert", "gte")


@partial(jax.jit, static_argnums=(0, 1), static_argnames="remat")
def _encode(config, dtype, params, ids, key=None, second=None, remat=False):
    family = ENCODERS[config.model_type]
    lengths = jnp.asarray(LENGTHS)
    return on_padded(
        family.hidden_states, config, dtype, remat, params, jnp.asarray(ids), lengths, key, second
    )


def _of_torch(model, ids, inside, **more):
    given = {"input_ids": ids, "attention_mask": inside, **more}
    given = {name: torch.tensor(x, dtype=torch.long) for name, x in given.items()}
    return model(**given).last_hidden_state


@pytest.mark.parametrize("family, changes", [*FAMILIES, EUROBERT])
def test_values_and_gradients_are_those_of_transformers(tiny, tmp_path, family, changes):
    folder, model = tiny(family, **changes)
    config, params = load_encoder(folder)
    ids, inside = random_ids(LENGTHS, WIDTH)
    typed = {}
    if family in TYPED and config.type_vocab_size:
        typed = {"token_type_ids": np.arange(WIDTH) >= SECOND[:, None]}
    weight = np.random.default_rng(1).standard_normal((4, WIDTH, 48)).astype(np.float32)
    weight[~inside] = 0

    theirs = _of_torch(model, ids, inside, **typed)
    (theirs * torch.tensor(weight)).sum().backward()

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden = _encode(config, "float32", params, ids, second=SECOND if typed else None)
        return (hidden * weight).sum(), hidden

    (_, ours), gradient = loss(params)
    # fp32 rounding over 2 to 4 layers of values around 1
    np.testing.assert_allclose(ours[inside], theirs.detach().numpy()[inside], atol=1e-5, rtol=0)
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()

    found, wanted = gradients_as_files(gradient, config.names, model, tmp_path)
    for name in found:
        # The keys' bias shifts all scores of a row alike: its true gradient is 0.
        scale = max(np.abs(wanted[name]).max(), 1.0 if name.endswith("bias") else 0)
        assert np.abs(found[name] - wanted[name]).max() < 1e-5 * scale, name
    assert {n for n in wanted if not n.startswith("pooler")} == set(found)


@pytest.mark.parametrize("family, changes", [*FAMILIES, EUROBERT])
def test_a_saved_model_is_the_same_in_transformers(tiny, tmp_path, family, changes):
    folder, _ = tiny(family, **changes)
    config, params = load_encoder(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(config.saved())
    save_params(out / "model.safetensors", params, config.names)
    ids, inside = random_ids(LENGTHS, WIDTH)
    with torch.no_grad():
        theirs = _of_torch(transformers.AutoModel.from_pretrained(out).eval(), ids, inside)
    ours = _encode(config, "float32", params, ids)
    np.testing.assert_allclose(ours[inside], theirs.numpy()[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_packed_texts_are_as_padded_ones(tiny, family, changes):
    """With dropout: in blocks of two widths, and by the TPU's kernel where there is one for it."""
    rates = {name: 0.1 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    rates |= {"dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1}
    # Heads of 16, as the TPU's kernel wants them.
    folder, _ = tiny(family, **changes | rates | {"hidden_size": 64, "dim": 64})
    config, params = load_encoder(folder)
    ids, _ = random_ids(LENGTHS, WIDTH)
    key, numbers = jax.random.key(3), np.arange(4, dtype=np.int32)
    padded = _encode(config, "float32", params, ids, key)
    if config.attention_probs_dropout_prob:
        assert np.abs(padded - _encode(config, "float32", params, ids)).max() > 0.1
    np.testing.assert_allclose(
        _encode(config, "float32", params, ids, key, remat=True), padded, atol=1e-5
    )

    order = np.array([0, 3, 2, 1])  # the long ones in one block
    lengths, parts = LENGTHS[order], ([0, 1], [2, 3])
    packing = pack(
        [jnp.asarray(lengths[p]) for p in parts], [WIDTH, 8], 72,
        [jnp.asarray(numbers[order][p]) for p in parts],
    )  # fmt: skip
    tokens = np.concatenate([ids[i, : LENGTHS[i]] for i in order])
    tokens = jnp.asarray(np.pad(tokens, (0, 72 - len(tokens))))
    want = np.concatenate([padded[i, : LENGTHS[i]] for i in order])
    for attention in ("plain",) if family == "mpnet" or config.causal else ("plain", "flash"):
        found = ENCODERS[family].hidden_states(
            config, "float32", False, attention, params, tokens, packing, key
        )
        np.testing.assert_allclose(found[: len(want)], want, atol=2e-5)


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_bfloat16_stays_close(tiny, family, changes):
    config, params = load_encoder(tiny(family, **changes)[0])
    ids, inside = random_ids(LENGTHS, WIDTH)
    exact, rough = (
        _encode(config, dtype, params, ids)[inside] for dtype in ("float32", "bfloat16")
    )
    cosine = (exact * rough).sum(-1) / jnp.linalg.norm(exact, axis=-1)
    assert (cosine / jnp.linalg.norm(rough, axis=-1)).min() > 0.995
    assert jnp.abs(exact - rough).max() > 1e-4


def test_a_window_bounds_the_operations(tiny):
    folder, _ = tiny("modernbert", **SPECIAL, local_attention=4, num_hidden_layers=4)
    config, params = load_encoder(folder)
    assert config.windows == (None, 2, 2, None)
    whole, seen = 100 * 100, 100 * 5
    of_pairs = forward_flops(config, params, 100, whole) - forward_flops(config, params, 100, 0)
    assert of_pairs == 4 * 48 * (2 * whole + 2 * seen)


def test_nomic_and_gte_as_they_were_first_published(tiny, tmp_path):
    """Config files of their own code: what they say, and that transformers opens what is saved."""
    folder, _ = tiny("nomic_bert", layer_norm_eps=1e-5)
    native, _ = load_encoder(folder)
    old = {
        "activation_function": "swiglu",
        "auto_map": {
            "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"
        },
        "model_type": "nomic_bert",
        "n_embd": 48,
        "n_head": 4,
        "n_inner": 80,
        "n_layer": 2,
        "n_positions": 8192,
        "max_trained_positions": 40,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "type_vocab_size": 2,
        "vocab_size": 101,
    }
    (folder / "config.json").write_text(json.dumps(old))
    config, _ = load_encoder(folder)
    assert config == native
    (folder / "config.json").write_text(config.saved())
    again = transformers.AutoModel.from_pretrained(folder)
    assert type(again) is transformers.NomicBertModel and again.config.hidden_size == 48
    (folder / "config.json").write_text(json.dumps(old | {"num_experts": 8}))
    with pytest.raises(InputError, match="num_experts 8 is not served"):
        read_config(folder, ENCODERS)


def test_gte_whose_positions_are_stretched(tiny):
    """By factor s: 1 / ((theta s)^(2i/d) s^(2/d)), https://kexue.fm/archives/9706."""
    folder, model = tiny("gte")
    old = json.loads((folder / "config.json").read_text()) | {"model_type": "new"}
    del old["rope_parameters"]
    old |= {"rope_theta": 500.0, "rope_scaling": {"type": "ntk", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(old))
    config, params = load_encoder(folder)
    ids, inside = random_ids(LENGTHS, WIDTH)
    ours = _encode(config, "float32", params, ids)
    i = np.arange(6)
    frequencies = 1 / ((500.0 * 4.0) ** (2 * i / 12) * 4.0 ** (2 / 12))
    model.rotary_emb.inv_freq.data = torch.tensor(frequencies, dtype=torch.float32)
    with torch.no_grad():
        theirs = _of_torch(model, ids, inside).numpy()
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-5, rtol=0)
    (folder / "config.json").write_text(config.saved())
    again = transformers.AutoModel.from_pretrained(folder)
    np.testing.assert_allclose(again.rotary_emb.inv_freq, frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_types": ["full_attention", "linear"]}, "layer_types .* is not served"),
        ({"layer_types": ["full_attention"]}, "for each of the 2 layers"),
        ({"local_attention": "wide"}, 'local_attention is "wide"; give a whole number'),
        ({"rope_scaling": {"rope_type": "su"}, "rope_parameters": None}, "positions of type su"),
    ],
)
def test_modernbert_that_cannot_be_served_is_refused(tiny, change, message):
    folder, _ = tiny("modernbert", **SPECIAL)
    rewrite(folder / "config.json", **change)
    with pytest.raises(InputError, match=message):
        read_config(folder, ENCODERS)


def test_softcapped_scores_of_all_tokens_are_refused(tiny):
    folder, _ = tiny("gemma2", **GEMMA)
    rewrite(folder / "config.json", use_bidirectional_attention=True)
    with pytest.raises(InputError, match=r"softcapping 50\.0 is served where tokens see"):
        read_config(folder, ENCODERS)
