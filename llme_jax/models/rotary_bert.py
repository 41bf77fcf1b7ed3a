"""BERTs with rotary positions and a gated feed-forward, in Flax NNX: ModernBERT (arXiv:2412.13663)
and its windows of attention, nomic-bert (arXiv:2402.01613) and GTE (arXiv:2407.19669).

Attributes carry the names of ModernBERT's weights; the others' files have names of their own.
"""

import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import check_type
from llme_jax.models.bert import type_vectors
from llme_jax.models.dropout import dropout, fold_in
from llme_jax.models.encoder import Architecture, attend, checked, how_to_attend
from llme_jax.models.layers import ACTIVATIONS, cast_kernels, layer_norm, linear
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel
from llme_jax.models.rope import (
    KINDS,
    Rope,
    layer_kinds,
    read_rope,
    ropes_by_kind,
    rotary,
    rotate,
)

SHARDING = FSDP_RULES
_NAMES = {
    "nomic_bert": (
        ("embeddings.tok_embeddings", "embeddings.word_embeddings"),
        ("embeddings.norm", "emb_ln"),
        ("layers.", "encoder.layers."),
        ("attn.Wo", "attn.out_proj"),
        ("attn_norm", "norm1"),
        ("mlp.up", "mlp.fc11"),
        ("mlp.gate", "mlp.fc12"),
        ("mlp.Wo", "mlp.fc2"),
        ("mlp_norm", "norm2"),
    ),
    "gte": (
        ("embeddings.tok_embeddings", "embeddings.word_embeddings"),
        ("embeddings.norm", "embeddings.LayerNorm"),
        ("layers.", "encoder.layer."),
        ("attn.Wqkv", "attention.qkv_proj"),
        ("attn.Wo", "attention.o_proj"),
        ("attn_norm", "attn_ln"),
        ("mlp.Wi", "mlp.up_gate_proj"),
        ("mlp.Wo", "mlp.down_proj"),
        ("mlp_norm", "mlp_ln"),
    ),
}


class Rates(NamedTuple):
    """Of dropout: of the embeddings, of what attention puts out, of what enters and of what leaves
    the last product of a feed-forward."""

    embedded: float
    attended: float
    gated: float
    fed: float


@dataclass(frozen=True, kw_only=True)
class RotaryBertConfig(Architecture):
    """The fields of config.json that decide what is computed."""

    rates: Rates
    ropes: tuple[Rope, ...]  # of each layer
    windows: tuple[int | None, ...] = ()
    norm_bias: bool
    attention_bias: bool
    mlp_bias: tuple[bool, bool]  # of the products that open and that close a feed-forward

    @classmethod
    def read(cls, path: Path, given: dict) -> "RotaryBertConfig":
        """Read config.json.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        return _READERS[given["model_type"]](path, given)

    @property
    def names(self):
        return _NAMES.get(self.model_type, ())

    @property
    def splits(self) -> bool:
        return self.model_type != "modernbert"

    @property
    def pre_norm(self) -> bool:
        """Whether the norms stand before attention and feed-forward, else behind the sums."""
        return self.model_type == "modernbert"


def _modernbert(path: Path, given: dict) -> RotaryBertConfig:
    renamed = {
        "hidden_act": given.get("hidden_activation", "gelu"),
        "layer_norm_eps": given.get("norm_eps", 1e-5),
        "attention_probs_dropout_prob": given.get("attention_dropout"),
        "type_vocab_size": 0,
    }
    values = checked(
        path, given, renamed=renamed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    _check_head(path, given, values)
    layers, every = values["num_hidden_layers"], given.get("global_attn_every_n_layers", 3)
    check_type(path, "global_attn_every_n_layers", every, int)
    usual = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    kinds = layer_kinds(path, given, usual)
    width = given.get("local_attention", 128)  # of a window
    check_type(path, "local_attention", width, int)
    ropes = ropes_by_kind(
        path, given,
        full_attention=given.get("global_rope_theta", 160_000.0),
        sliding_attention=given.get("local_rope_theta", 10_000.0),
        scaled=KINDS,
    )  # fmt: skip
    attended = values["attention_probs_dropout_prob"]
    rates = Rates(
        given.get("embedding_dropout", 0.0), attended, given.get("mlp_dropout", 0.0), fed=0.0
    )
    mlp_bias = given.get("mlp_bias", False)
    return RotaryBertConfig(
        **values,
        rates=rates,
        ropes=tuple(ropes[kind] for kind in kinds),
        windows=tuple(width // 2 if kind == "sliding_attention" else None for kind in kinds),
        norm_bias=given.get("norm_bias", False),
        attention_bias=given.get("attention_bias", False),
        mlp_bias=(mlp_bias, mlp_bias),
    )


# How nomic-ai's own code, which transformers 5 replaces, names and fills what config.json has.
_OF_NOMIC = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "max_trained_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
}


def _nomic(path: Path, given: dict) -> RotaryBertConfig:
    if "n_embd" in given:
        renamed = {name: given.get(theirs) for name, theirs in _OF_NOMIC.items()}
        activations = {"swiglu": "silu", "geglu": "gelu"}
        act = given.get("activation_function")
        theta = given.get("rotary_emb_base", 1000.0)
        given = _native(given, "NomicBertModel") | renamed
        given["hidden_act"] = activations.get(act, act)
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    unsaid = {"hidden_act": "silu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = checked(path, given, **unsaid)
    rate = values["hidden_dropout_prob"]
    return _post_norm(path, given, values, Rates(rate, rate, 0.0, rate), theta=1000.0, bias=False)


def _gte(path: Path, given: dict) -> RotaryBertConfig:
    if given["model_type"] == "new":  # as Alibaba-NLP's own code, which transformers 5 replaces
        theta, stretch = given.get("rope_theta", 10_000.0), given.get("rope_scaling") or {}
        rope = {"rope_type": "default", "rope_theta": theta}
        factor = stretch.get("factor")
        if stretch and (stretch.get("type") != "ntk" or type(factor) not in (int, float)):
            raise InputError(
                f"{path}: rope_scaling {json.dumps(stretch)} is not served; give a model with "
                'null, or {"type": "ntk", "factor": ...}'
            )
        if stretch:  # https://kexue.fm/archives/9706
            head = given["hidden_size"] // given["num_attention_heads"]
            rope = {
                "rope_type": "linear",
                "rope_theta": theta * factor,
                "factor": factor ** (2 / head),
            }
        given = _native(given, "GteModel") | {"model_type": "gte", "rope_parameters": rope}
    values = checked(
        path, given, hidden_act="gelu", type_vocab_size=1, attention_probs_dropout_prob=0.0
    )
    rate = values["hidden_dropout_prob"]
    return _post_norm(
        path, given, values, Rates(rate, rate, rate, rate), theta=160_000.0, bias=True
    )


def _native(given: dict, name: str) -> dict:
    """A config.json without what points to code of the model's own."""
    left = {k: v for k, v in given.items() if k not in ("auto_map", "rope_scaling", "rope_theta")}
    return left | {"architectures": [name]}


def _check_head(path: Path, given: dict, values: dict) -> None:
    usual = values["hidden_size"] // values["num_attention_heads"]
    if given.get("head_dim") not in (None, usual):
        raise InputError(
            f"{path}: head_dim {given['head_dim']} is not served; give a model with {usual}, which "
            "is hidden_size / num_attention_heads"
        )


def _post_norm(path, given, values, rates, *, theta: float, bias: bool) -> RotaryBertConfig:
    layers = values["num_hidden_layers"]
    _check_head(path, given, values)
    return RotaryBertConfig(
        **values,
        rates=rates,
        ropes=(read_rope({"rope_theta": theta} | given, path),) * layers,
        windows=(None,) * layers,
        norm_bias=True,
        attention_bias=bias,
        mlp_bias=(False, bias),
    )


_READERS = {"modernbert": _modernbert, "nomic_bert": _nomic, "gte": _gte, "new": _gte}
read = RotaryBertConfig.read


def hidden_states(
    config: RotaryBertConfig,
    dtype: str,
    remat: bool,
    attention: AttentionKernel,
    params: dict,
    ids: Int[Array, "T"],
    packing: Packing,
    dropout_key: Array | None = None,
    first: bool = False,
) -> Float[Array, "_ D"]:
    """As `bert.hidden_states`, but `first` saves nothing."""
    drops = dropout_key is not None
    how = how_to_attend(config, attention, jnp.dtype(dtype), packing, drops=drops)
    model = nnx.merge(_abstract(config, dtype, remat)[0], cast_kernels(params, dtype))
    hidden = model(ids, packing, dropout_key, how)
    return packing.first(hidden) if first else hidden


def abstract_params(config: RotaryBertConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every parameter of the model, float32."""
    return _abstract(config, "float32", False)[1].to_pure_dict()


@cache
def _abstract(config: RotaryBertConfig, dtype: str, remat: bool):
    # Rngs(0) is never drawn from: no weight is computed under eval_shape.
    return nnx.split(nnx.eval_shape(lambda: RotaryBert(config, jnp.dtype(dtype), remat)))


class RotaryBert(nnx.Module):
    """Embeddings and a stack of layers, without the pooler."""

    def __init__(self, c: RotaryBertConfig, dtype: jnp.dtype, remat: bool):
        rngs = nnx.Rngs(0)
        self.embeddings = Embeddings(c, rngs)
        self.layers = nnx.Dict(
            {str(i): Layer(c, i, dtype, rngs) for i in range(c.num_hidden_layers)}
        )
        if c.pre_norm:
            self.final_norm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs, bias=c.norm_bias)
        self.config, self.dtype, self.remat = c, dtype, remat

    def __call__(self, ids, packing, key, how):
        c = self.config
        x = self.embeddings(ids, packing, fold_in(key, 0))
        # Sums over the layers of what is not normalised stay in fp32, as in llama.py.
        x = x if c.pre_norm else x.astype(self.dtype)
        head = c.hidden_size // c.num_attention_heads
        turns = {rope: rotary(rope, head, packing.tokens.places) for rope in set(c.ropes)}
        for i, (of_layer, rope) in enumerate(zip(how, c.ropes, strict=True)):
            layer = partial(self.layers[str(i)], how=of_layer)
            layer = jax.checkpoint(layer) if self.remat else layer
            x = layer(x, packing, turns[rope], fold_in(key, i + 1))
        return self.final_norm(x) if c.pre_norm else x.astype(jnp.float32)


class Embeddings(nnx.Module):
    """Word vectors, and those of token types where there are any, normalised, in float32."""

    def __init__(self, c: RotaryBertConfig, rngs: nnx.Rngs):
        self.tok_embeddings = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        if c.type_vocab_size:
            self.token_type_embeddings = nnx.Embed(c.type_vocab_size, c.hidden_size, rngs=rngs)
        self.norm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs, bias=c.norm_bias)
        self.config = c

    def __call__(self, ids, packing, key):
        x = self.tok_embeddings(ids)
        if self.config.type_vocab_size:
            x += type_vectors(self.token_type_embeddings, packing)
        return dropout(self.norm(x), key, self.config.rates.embedded, packing.tokens)


class Layer(nnx.Module):
    def __init__(self, c: RotaryBertConfig, number: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn = Attention(c, dtype, rngs)
        self.mlp = GatedMLP(c, dtype, rngs)
        norm = partial(layer_norm, c.hidden_size, c.layer_norm_eps, rngs, bias=c.norm_bias)
        self.normed = not (c.pre_norm and number == 0)  # ModernBERT's embeddings are, already
        if self.normed:
            self.attn_norm = norm()
        self.mlp_norm = norm()
        self.config, self.dtype = c, dtype

    def __call__(self, x, packing, turns, key, how):
        rates, rows = self.config.rates, packing.tokens

        def dropped(out, site, rate):
            return dropout(out, fold_in(key, site), rate, rows).astype(jnp.float32)

        def attn(x):
            out = self.attn(x.astype(self.dtype), packing, turns, fold_in(key, 0), how)
            return dropped(out, 1, rates.attended)

        def mlp(x):
            out = self.mlp(x.astype(self.dtype), fold_in(key, 2), rows)
            return dropped(out, 3, rates.fed)

        if self.config.pre_norm:
            x = x + attn(self.attn_norm(x) if self.normed else x)
            return x + mlp(self.mlp_norm(x))
        x = self.attn_norm(x + attn(x)).astype(self.dtype)
        return self.mlp_norm(x + mlp(x)).astype(self.dtype)


class Attention(nnx.Module):
    def __init__(self, c: RotaryBertConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = c.hidden_size
        self.Wqkv = linear(width, 3 * width, dtype, rngs, bias=c.attention_bias)
        self.Wo = linear(width, width, dtype, rngs, bias=c.attention_bias)
        self.heads, self.rate = c.num_attention_heads, c.attention_probs_dropout_prob

    def __call__(self, x, packing, turns, key, how):
        q, k, v = jnp.split(self.Wqkv(x), 3, axis=-1)

        def turned(x):
            heads = x.reshape(len(x), self.heads, -1)
            return rotate(heads, turns).astype(x.dtype).reshape(x.shape)

        q, k = turned(q), turned(k)
        return self.Wo(attend(q, k, v, packing, how, self.heads, key=key, rate=self.rate))


class GatedMLP(nnx.Module):
    """Wo(dropout(activation(gate(x)) up(x)))."""

    def __init__(self, c: RotaryBertConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        opens, closes = c.mlp_bias
        into = partial(linear, c.hidden_size, dtype=dtype, rngs=rngs, bias=opens)
        self.fused = c.model_type != "nomic_bert"
        if self.fused:
            self.Wi = into(2 * c.intermediate_size)
        else:
            self.up, self.gate = into(c.intermediate_size), into(c.intermediate_size)
        self.Wo = linear(c.intermediate_size, c.hidden_size, dtype, rngs, bias=closes)
        self.config = c

    def __call__(self, x, key, rows):
        c = self.config
        up, gate = jnp.split(self.Wi(x), 2, axis=-1) if self.fused else (self.up(x), self.gate(x))
        if c.model_type == "modernbert":
            up, gate = gate, up
        return self.Wo(dropout(ACTIVATIONS[c.hidden_act](gate) * up, key, c.rates.gated, rows))
