"""The BERT family (bert, roberta, xlm-roberta, electra) in Flax NNX.

Attributes carry the names of the Hugging Face weights (`encoder.layer.3.attention.self.query`).
NNX serves to write the modules down; the parameters live in a plain nested dict.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.models.attention import attention
from llme_jax.models.dropout import Rows, dropout, fold_in
from llme_jax.models.flash_attention import Reach, flash_attention, reach
from llme_jax.models.foreign import check_type, read_json
from llme_jax.models.layers import ACTIVATIONS, cast_kernels, layer_norm, linear
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel, attention_kernel

SHARDING = FSDP_RULES


@dataclass(frozen=True)
class BertConfig:
    """The fields of config.json that decide what is computed."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    first_position: int  # row of the first token in the position table
    embedding_size: int  # of the tables; another than hidden_size is projected to it
    source: str = field(compare=False, repr=False)  # all of config.json, for saving
    terms: ClassVar[frozenset[str]] = frozenset()  # positions that attention scores by themselves

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Read config.json.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        given = read_json(path)
        model_type = given["model_type"]
        if given.get("position_embedding_type", "absolute") != "absolute":
            raise InputError(
                f"{path}: position_embedding_type {given['position_embedding_type']} is not "
                "served; give a model with absolute positions"
            )
        counted = "roberta" in model_type  # positions go on from the pad token's
        values = checked(path, given, [*NEEDED, *(["pad_token_id"] if counted else [])])
        first = values.pop("pad_token_id") + 1 if counted else 0
        width = given.get("embedding_size", 128) if model_type == "electra" else None
        return cls(
            **values,
            first_position=first,
            embedding_size=width or values["hidden_size"],
            source=json.dumps(given),
        )

    def saved(self) -> str:
        """config.json for the float32 weights that this package saves."""
        content = json.loads(self.source)
        # transformers would otherwise load them in the type that the source was stored in.
        content |= {name: "float32" for name in ("dtype", "torch_dtype") if name in content}
        return json.dumps(content, indent=2) + "\n"

    @property
    def max_length(self) -> int:
        """Tokens the longest text may have."""
        return self.max_position_embeddings - self.first_position


read = BertConfig.read
_DERIVED = ("first_position", "embedding_size", "source")
# Fields that every config.json has to have, DeBERTa's too.
NEEDED = tuple(f.name for f in fields(BertConfig) if f.name not in _DERIVED)
# What transformers takes where old files are silent.
UNSAID = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_TYPES = {f.name: f.type for f in fields(BertConfig)}


def checked(path: Path, given: dict, names: Sequence[str], unsaid: dict = UNSAID) -> dict:
    """The fields of a config.json that are needed.

    Args:
        unsaid: what fields are that the file leaves out.

    Raises:
        InputError: one is missing, or has a value that is not served.
    """
    given = unsaid | {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in names if name not in given]:
        raise InputError(f"{path}: {', '.join(missing)} missing; add what the model has")
    for name in names:
        check_type(path, name, given[name], _TYPES.get(name, int))
    if given["hidden_act"] not in ACTIVATIONS:
        raise InputError(
            f"{path}: hidden_act {given['hidden_act']} is not served; give one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if given["hidden_size"] % given["num_attention_heads"]:
        raise InputError(
            f"{path}: hidden_size {given['hidden_size']} is not a multiple of "
            f"num_attention_heads {given['num_attention_heads']}; correct one of them"
        )
    return {name: given[name] for name in names}


def hidden_states(
    config: BertConfig,
    dtype: str,
    remat: bool,
    attention: AttentionKernel,
    params: dict,
    ids: Int[Array, "T"],
    packing: Packing,
    dropout_key: Array | None = None,
    first: bool = False,
) -> Float[Array, "_ D"]:
    """Hidden states [T, D] of the last layer in float32; rows of padding are without meaning.

    Args:
        dtype: what the layers compute in ("float32" or "bfloat16"); LayerNorm, softmax and sums
            over the residual stream stay in float32.
        remat: recompute the activations inside each layer in the backward pass.
        attention: the setting --attention.
        params: nested dict in the shape of `abstract_params(config)`.
        packing: where the texts' tokens lie. The second text of a pair has tokens of type 1; all
            others have type 0.
        dropout_key: drops as config.json says; None for no dropout.
        first: only those of the texts' first tokens are wanted, [R, D]: the last layer leaves out
            the others, which is 10 in 12 of its products.

    Raises:
        InputError: the texts are longer than the model's position table.
    """
    check_width(config, max(packing.widths))
    model = nnx.merge(_abstract(config, dtype, remat)[0], cast_kernels(params, dtype))
    kernel = attention_kernel(
        attention, model.dtype, heads=config.num_attention_heads,
        width=config.hidden_size // config.num_attention_heads, longest=max(packing.widths),
        drops=dropout_key is not None and config.attention_probs_dropout_prob > 0,
    )  # fmt: skip
    return model(ids, packing, dropout_key, kernel, first)


def check_width(config, width: int) -> None:
    """Refuses texts that are padded beyond a model's positions.

    Raises:
        InputError: they are.
    """
    if width > config.max_length:
        raise InputError(
            f"texts are padded to {width} tokens, the encoder has {config.max_length} "
            "positions: lower --query_max_length and --key_max_length"
        )


def abstract_params(config: BertConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every parameter of the model, float32."""
    return _abstract(config, "float32", False)[1].to_pure_dict()


@cache
def _abstract(config: BertConfig, dtype: str, remat: bool) -> tuple[nnx.GraphDef, nnx.State]:
    # Rngs(0) is never drawn from: no weight is computed under eval_shape.
    return nnx.split(nnx.eval_shape(lambda: Bert(config, jnp.dtype(dtype), remat, nnx.Rngs(0))))


class Bert(nnx.Module):
    """Embeddings and a stack of post-LayerNorm transformer layers, without the pooler."""

    def __init__(self, c: BertConfig, dtype: jnp.dtype, remat: bool, rngs: nnx.Rngs):
        self.embeddings = Embeddings(c, rngs)
        self.encoder = Encoder(c, dtype, rngs)
        self.projects = c.embedding_size != c.hidden_size
        if self.projects:
            self.embeddings_project = linear(c.embedding_size, c.hidden_size, dtype, rngs)
        self.dtype = dtype
        self.remat = remat

    def __call__(self, ids, packing, key, kernel, first):
        x = self.embeddings(ids, packing, fold_in(key, 0)).astype(self.dtype)
        if self.projects:
            x = self.embeddings_project(x)
        # Not .values(): the order of a merged nnx.Dict is that of strings, "10" before "2".
        last = len(self.encoder.layer) - 1
        seen = reach(*packing.spans, max(packing.widths)) if kernel == "flash" else None
        for i in range(last + 1):
            how = How(kernel, seen, first and i == last)
            layer = partial(self.encoder.layer[str(i)], how=how)
            layer = jax.checkpoint(layer) if self.remat else layer
            x = layer(x, packing, fold_in(key, i + 1))
        return x.astype(jnp.float32)


class Encoder(nnx.Module):
    def __init__(self, c: BertConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.layer = nnx.Dict({str(i): Layer(c, dtype, rngs) for i in range(c.num_hidden_layers)})


class Embeddings(nnx.Module):
    """Word, position and token-type vectors summed and normalised, in float32."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        width = c.embedding_size
        self.word_embeddings = nnx.Embed(c.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(c.max_position_embeddings, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(c.type_vocab_size, width, rngs=rngs)
        self.LayerNorm = layer_norm(width, c.layer_norm_eps, rngs)
        self.first_position = c.first_position
        self.rate = c.hidden_dropout_prob

    def __call__(self, ids, packing, key):
        x = self.word_embeddings(ids)
        x += self.position_embeddings(self.first_position + packing.tokens.places)
        x += type_vectors(self.token_type_embeddings, packing)
        return dropout(self.LayerNorm(x), key, self.rate, packing.tokens)


def type_vectors(types: nnx.Embed, packing: Packing):
    """Vectors of the tokens' types, [T, D]; [D] where all are the same."""
    table = types.embedding
    if packing.in_second is None or types.num_embeddings == 1:
        return table[0]
    return jnp.where(packing.in_second[:, None], table[1], table[0])


class How(NamedTuple):
    """How attention is computed: by which kernel, for flash who sees whom, and whether for the
    texts' first tokens alone."""

    kernel: str
    reach: Reach | None
    first: bool


class Layer(nnx.Module):
    """Attention and feed-forward; `how` is for the attention, which may give first tokens alone."""

    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs, attention: type | None = None):
        self.attention = Attention(c, dtype, rngs, attention or SelfAttention)
        self.intermediate = Intermediate(c, dtype, rngs)
        self.output = Residual(c.intermediate_size, c, dtype, rngs)

    def __call__(self, x, packing, key, how):
        x, rows = self.attention(x, packing, fold_in(key, 0), how)
        return self.output(self.intermediate(x), x, fold_in(key, 1), rows)


class Attention(nnx.Module):
    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs, attention: type):
        self.self = attention(c, dtype, rngs)
        self.output = Residual(c.hidden_size, c, dtype, rngs)

    def __call__(self, x, packing, key, how) -> tuple[Array, Rows]:
        """What comes out, and which rows it has."""
        attended, rows = self.self(x, packing, fold_in(key, 0), how), packing.tokens
        if len(attended) < len(x):
            x, rows = packing.first(x), packing.firsts
        return self.output(attended, x, fold_in(key, 1), rows), rows


class SelfAttention(nnx.Module):
    def __init__(self, c: BertConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.query = linear(c.hidden_size, c.hidden_size, dtype, rngs)
        self.key = linear(c.hidden_size, c.hidden_size, dtype, rngs)
        self.value = linear(c.hidden_size, c.hidden_size, dtype, rngs)
        self.heads = c.num_attention_heads
        self.rate = c.attention_probs_dropout_prob

    def __call__(self, x, packing, key, how):
        if how.reach:
            attended = flash_attention(
                *(self.query(x), self.key(x), self.value(x), how.reach, self.heads),
                key=key, numbers=packing.tokens.texts, rate=self.rate,
            )  # fmt: skip
            return packing.first(attended) if how.first else attended
        if how.first:
            q = [part[:, None] for part in packing.split(self.query(packing.first(x)))]
        else:
            q = packing.in_blocks(self.query(x))
        k, v = packing.in_blocks(self.key(x)), packing.in_blocks(self.value(x))
        attended = []
        for *parts, lengths, numbers in zip(q, k, v, packing.lengths, packing.numbers, strict=True):
            heads = (part.reshape(*part.shape[:2], self.heads, -1) for part in parts)
            out = attention(
                *(*heads, lengths), kernel=how.kernel,
                key=key, numbers=numbers, rate=self.rate,
            )  # fmt: skip
            attended.append(out.reshape(parts[0].shape))
        if how.first:
            return jnp.concatenate(attended)[:, 0]
        return packing.from_blocks(attended)


class Intermediate(nnx.Module):
    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.activation = c.hidden_act

    def __call__(self, x):
        return ACTIVATIONS[self.activation](self.dense(x))


class Residual(nnx.Module):
    """LayerNorm(residual + dropout(dense(x))): how attention and feed-forward both end."""

    def __init__(self, width: int, c, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = linear(width, c.hidden_size, dtype, rngs)
        self.LayerNorm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs)
        self.rate = c.hidden_dropout_prob

    def __call__(self, x, residual, key, rows):
        x = dropout(self.dense(x), key, self.rate, rows).astype(jnp.float32)
        return self.LayerNorm(x + residual).astype(residual.dtype)
