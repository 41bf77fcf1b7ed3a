"""config.json of every family, key by key, against transformers: the same numbers, or a refusal."""

import dataclasses
import inspect
import json
import re
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from folder_edits import tally
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.hugging_face.config_keys import FAMILIES
from llme_jax.models.causal_lm import load_causal_lm, open_causal_lm
from llme_jax.models.families import ENCODERS, LANGUAGE_MODELS

SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
GEMMA = {
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
    "num_hidden_layers": 3,
}  # fmt: skip
# What each family is made with, besides the sizes of `tiny.save_encoder`.
MADE = {
    "bert": {}, "roberta": {"pad_token_id": 1}, "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1}, "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "mpnet": {"pad_token_id": 1},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
    },
    "modernbert": SPECIAL | {"local_attention": 4, "num_hidden_layers": 4},
    "nomic_bert": {}, "gte": {},
    "llama": {"num_key_value_heads": 2, "is_causal": False},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 4}, "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": GEMMA, "gemma3_text": GEMMA | {"use_bidirectional_attention": True},
    "eurobert": {"num_key_value_heads": 2},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SCALED = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5},
    {"rope_type": "dynamic", "factor": 2.0},
    YARN | {"truncate": False},
    YARN | {"attention_factor": 0.7},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
    {k: v for k, v in YARN.items() if k[0] != "o"},
    LLAMA3,
    {k: v for k, v in LLAMA3.items() if k[0] != "o"},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 2.0, "alpha": 3.0},
    {"rope_type": "longrope", "factor": 2.0},
]
KINDS = ["full_attention", "sliding_attention"]
BY_KIND = [
    {kind: {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3} for kind in KINDS},
    {"sliding_attention": YARN},
    {"full_attention": YARN, "sliding_attention": None},
    {"full_attention": YARN | {"truncate": False}},
    {"rope_type": "linear", "factor": 2.0},
]
ACTIVATIONS = "gelu_new relu silu gelu_pytorch_tanh gelu_fast quick_gelu swish".split()
SWITCHES = """
    is_decoder add_cross_attention torchscript attention_bias mlp_bias norm_bias share_att_key
    position_biased_input relative_attention use_bidirectional_attention is_causal
    tie_word_embeddings use_cache sinusoidal_pos_embds
""".split()
VALUES = {
    **{key: ACTIVATIONS for key in ("hidden_act", "hidden_activation", "activation")},
    **{key: [0.1] for key in ("layer_norm_eps", "norm_eps", "rms_norm_eps", "layer_norm_epsilon")},
    **{key: [True, False] for key in SWITCHES},
    "position_embedding_type": ["absolute", "relative_key", "rope", "alibi"],
    "pad_token_id": [0, 1, 5],
    "pos_att_type": ["c2p", ["p2c"], "p2c|c2p", None],
    "relative_attention_num_buckets": [16, 64],
    "position_buckets": [4, -1],
    "max_relative_positions": [8, 20],
    "norm_rel_ebd": ["none"],
    "conv_kernel_size": [3, 0],
    "attention_head_size": [8, 16],
    "embedding_size": [32],
    "type_vocab_size": [0, 3],
    "local_attention": [2, 8],
    "global_attn_every_n_layers": [1, 2, 0],
    "layer_types": [
        ["full_attention"] * 2, ["full_attention"] * 3, ["sliding_attention"] * 4,
        ["sliding_attention", "full_attention"], ["linear_attention"] * 2, "full_attention",
    ],
    "global_rope_theta": [1e3],
    "local_rope_theta": [50.0],
    "rope_theta": [500.0, 0, "big"],
    "rope_local_base_freq": [50.0],
    "rope_scaling": SCALED,
    "rope_parameters": [*({"rope_theta": 7e3} | scaled for scaled in SCALED), *BY_KIND],
    "partial_rotary_factor": [0.5, 1.0],
    "sliding_window": [3, None, "wide"],
    "sliding_window_pattern": [2, 6],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1],
    "query_pre_attn_scalar": [8],
    "attn_logit_softcapping": [2.0, None, 0],
    "final_logit_softcapping": [2.0, None],
    "head_dim": [8, 16],
    "num_key_value_heads": [None, 1, 3, 4],
    "chunk_size_feed_forward": [1],  # 4 is for texts of so many tokens, or a multiple
    "hidden_dropout_prob": [0.3],
    "classifier_pooling": ["mean"],
    "pruned_heads": [{}, {"0": [1]}],
    "quantization_config": [{"quant_method": "bitsandbytes"}],
    "num_labels": [5],
    "id2label": [{"0": "no", "1": "yes"}],
    "output_hidden_states": [True],
    "auto_map": [{"AutoModel": "code.Model"}],
    "max_length": [20],
    "initializer_range": [0.5],
    "rotary_emb_interleaved": [True],
    "use_mrope": [True, False],
    "vocab_size": ["many"],
    "hidden_size": [33],
    "num_attention_heads": [3],
}  # fmt: skip
DROPPED = "left out"
UNKNOWN = {"attn_logit_cap": 30.0, "residual_multiplier": 0.2, "use_alibi": True}
TEXTS = [
    [2, *range(7, 40), 3],
    [2, 1, 9, 1, 30, 12, 0, 17, 3],  # with the names of padding tokens in it
    [2, 3],
]
LENGTHS = np.array([len(text) for text in TEXTS])
# Most changes leave a configuration as it was, and its program.
ON_PADDED = jax.jit(tiny.on_padded, static_argnums=(0, 1, 2, 3))
ROUNDING = 1e-5  # of float32 over 2 to 4 layers of values around 1


@cache
def made(family: str, root: Path) -> Path:
    """A folder as transformers writes it, with weights so large that every part has a say."""
    folder = tiny.save_encoder(root / family, family, **MADE[family])
    return folder


def changes(family: str) -> list[tuple[str, object]]:
    table = FAMILIES[family]
    keys = sorted({*table.served, *table.only, *table.harmless})
    cases = [(key, value) for key in keys for value in VALUES.get(key, [])]
    # The usual id of padding is beyond these small tables, and transformers then stops.
    kept = {"pad_token_id"} if family in ("modernbert", "eurobert", "phi3") else set()
    cases += [(key, DROPPED) for key in keys if key not in kept]
    return [*cases, *UNKNOWN.items()]


CASES = [(family, *change) for family in MADE for change in changes(family)]
SAMPLE = CASES[::61]
# All of a family take half a minute: `slow` has every twelfth of them, `large` all.
SHARES = [pytest.param(12, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.large)]


def changed(folder: Path, out: Path, key: str, value) -> Path | None:
    """A copy with another value; None where that changes nothing."""
    config = json.loads((folder / "config.json").read_text())
    if value == DROPPED and key not in config:
        return None
    shutil.copytree(folder, out, copy_function=lambda a, b: Path(b).symlink_to(a))
    (out / "config.json").unlink()
    if value == DROPPED:
        del config[key]
    else:
        config[key] = value
    (out / "config.json").write_text(json.dumps(config))
    return out


def theirs(folder: Path) -> list[np.ndarray] | None:
    """Hidden states; None where transformers cannot open the folder with all of its weights."""
    try:
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        if any("pooler" not in str(name) for kind in info.values() for name in kind):
            return None
        with torch.no_grad():
            inputs = [{"input_ids": torch.tensor([ids])} for ids in TEXTS]
            return [model.eval()(**i, return_dict=True)[0][0].numpy() for i in inputs]
    except Exception:
        return None


def ours(folder: Path) -> list[np.ndarray]:
    config, params = tiny.load_encoder(folder)
    ids = np.zeros((len(TEXTS), max(LENGTHS)), np.int32)
    for row, text in zip(ids, TEXTS, strict=True):
        row[: len(text)] = text
    states = ENCODERS[config.model_type].hidden_states
    hidden = ON_PADDED(states, config, "float32", False, params, ids, LENGTHS)
    return [np.asarray(row[:length]) for row, length in zip(hidden, LENGTHS, strict=True)]


def check(family: str, root: Path, out: Path, key: str, value) -> str:
    """`same` or `refused`; fails where something else is computed."""
    folder = changed(made(family, root), out, key, value)
    if folder is None:
        return "same"
    try:
        found = ours(folder)
    except InputError as error:
        said = str(error)
        assert "\n" not in said and str(folder) in said
        return "refused"
    finally:
        wanted = theirs(folder)
        shutil.rmtree(folder)
    assert wanted is not None, "transformers refuses it, or lacks weights"
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=ROUNDING * max(1, np.abs(other).max()))
    return "same"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.mark.parametrize("family, key, value", SAMPLE)
def test_a_key_is_served_or_refused(family, key, value, root, tmp_path):
    check(family, root, tmp_path / "changed", key, value)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", MADE)
def test_every_key_is_served_or_refused(family, share, root, tmp_path):
    assert check(family, root, tmp_path / "as made", "architectures", ["Model"]) == "same"
    cases = enumerate(changes(family)[::share])
    seen = tally(check, ((family, root, tmp_path / str(i), *change) for i, change in cases))
    assert seen["same"] > 20 / share and seen["refused"] > 5 / share


@pytest.mark.parametrize("family", MADE)
@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_refused_by_name(family, key, root, tmp_path):
    folder = changed(made(family, root), tmp_path / "changed", key, UNKNOWN[key])
    with pytest.raises(InputError, match=rf"config.json: {key} .* is not known here; if nothing"):
        tiny.load_encoder(folder)


# Fields that are no keys of the file, or that transformers takes from elsewhere.
NO_KEYS = {"get_text_config", "text_config", "vision_config", "image_token_id"}
NO_KEYS |= {"mm_tokens_per_image", "to_dict", "attribute_map"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_the_table_has_all_that_transformers_reads(family):
    config = CONFIG_MAPPING[family]
    read = {f.name for f in dataclasses.fields(config)}
    package = config.__module__.rpartition(".configuration_")[0]
    source = Path(inspect.getfile(config)).parent.glob("modeling_*.py")
    for path in source:
        text = path.read_text(encoding="utf-8")
        read |= {*re.findall(r"\bconfig\.([a-z]\w*)\b", text)}
        read |= {*re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", text)}
    assert package and len(read) > 20
    table = FAMILIES[family]
    known = table.served | table.harmless | {*table.only} | NO_KEYS | config.attribute_map.keys()
    known |= {name for name in read if isinstance(getattr(config, name, None), property)}
    assert sorted(read - known) == []


LANGUAGE = {
    family: {k: v for k, v in MADE.get(family, {}).items() if k not in ("is_causal",)}
    | ({"use_bidirectional_attention": False} if family == "gemma3_text" else {})
    for family in LANGUAGE_MODELS
} | {"phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}}


def logits_of_both(folder: Path) -> tuple[list, list | None]:
    lm, place, _ = open_causal_lm(str(folder), dtype="fp32", cache_dir=None)
    params = load_causal_lm(lm, place, make_mesh(devices=jax.devices()[:1]))
    found = []
    for ids in TEXTS:
        hidden = lm.hidden(params, jnp.asarray([ids]), jnp.asarray([len(ids)]))
        found.append(np.asarray(lm.logits(params, hidden)[0]))
    try:
        kind = transformers.AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        if any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return found, None
        with torch.no_grad():
            texts = [torch.tensor([ids]) for ids in TEXTS]
            return found, [model.eval()(input_ids=ids).logits[0].numpy() for ids in texts]
    except Exception:
        return found, None


def check_logits(folder: Path, out: Path, key: str, value) -> str:
    place = changed(folder, out, key, value)
    if place is None:
        return "unchanged"
    try:
        found, wanted = logits_of_both(place)
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    assert wanted is not None, "transformers refuses it, or lacks weights"
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=ROUNDING * max(1, np.abs(other).max()))
    return "same"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", LANGUAGE)
def test_every_key_of_a_language_model(family, share, tmp_path):
    folder = tiny.save_llama(tmp_path / "lm", model_type=family, **LANGUAGE[family])
    tiny.keep_own_fields(folder)
    cases = enumerate(changes(family)[::share])
    seen = tally(check_logits, ((folder, tmp_path / str(i), *change) for i, change in cases))
    assert seen["same"] > 20 / share and seen["refused"] > 5 / share
