"""The BERT family (bert, roberta, xlm-roberta, camembert, electra, distilbert, mpnet) in Flax NNX.

Attributes carry the names of the Hugging Face weights (`encoder.layer.3.attention.self.query`).
NNX serves to write the modules down; the parameters live in a plain nested dict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import check_type
from llme_jax.models.attention import skewed
from llme_jax.models.dropout import Rows, dropout, fold_in
from llme_jax.models.encoder import Architecture, attend, checked, how_to_attend
from llme_jax.models.layers import ACTIVATIONS, cast_kernels, layer_norm, linear
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel

SHARDING = FSDP_RULES


_NAMES = {  # what stands in the files of families that have BERT's layers under other names
    "distilbert": (
        ("encoder.layer", "transformer.layer"),
        ("attention.self.query", "attention.q_lin"),
        ("attention.self.key", "attention.k_lin"),
        ("attention.self.value", "attention.v_lin"),
        ("attention.output.dense", "attention.out_lin"),
        ("attention.output.LayerNorm", "sa_layer_norm"),
        ("intermediate.dense", "ffn.lin1"),
        ("output.dense", "ffn.lin2"),
        ("output.LayerNorm", "output_layer_norm"),
    ),
    "mpnet": (
        ("attention.self.query", "attention.attn.q"),
        ("attention.self.key", "attention.attn.k"),
        ("attention.self.value", "attention.attn.v"),
        ("attention.output.dense", "attention.attn.o"),
        ("attention.output.LayerNorm", "attention.LayerNorm"),
    ),
}
_FIELDS = {  # the same of config.json
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }
}
FARTHEST = 128  # distance from which MPNet's relative positions are all the same
BUCKETS = 32  # which they share; transformers reads no other number


@dataclass(frozen=True, kw_only=True)
class BertConfig(Architecture):
    """The fields of config.json that decide what is computed."""

    first_position: int  # row of the first token in the position table
    embedding_size: int  # of the tables; another than hidden_size is projected to it
    buckets: int = 0  # rows of MPNet's table of relative positions; 0 for none

    @classmethod
    def read(cls, path: Path, given: dict) -> "BertConfig":
        """Read config.json.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        family = given["model_type"]
        own = {name: given.get(theirs) for name, theirs in _FIELDS.get(family, {}).items()}
        if family in ("distilbert", "mpnet"):
            own["type_vocab_size"] = 0
        counted = family in ("roberta", "xlm-roberta", "camembert")  # goes on from the pad token
        pad = {"pad_token_id": 1} if counted else {}
        values = checked(path, given, [*pad], own, **pad)
        first = values.pop("pad_token_id") + 1 if counted else 2 if family == "mpnet" else 0
        width = given.get("embedding_size", 128) if family == "electra" else None
        return cls(
            **values,
            first_position=first,
            embedding_size=width or values["hidden_size"],
            buckets=_buckets(path, given) if family == "mpnet" else 0,
        )

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings - self.first_position

    @property
    def names(self):
        return _NAMES.get(self.model_type, ())

    @property
    def attended_dropout_prob(self) -> float:  # DistilBERT drops nothing there
        return 0.0 if self.model_type == "distilbert" else self.hidden_dropout_prob

    def rows(self, length: int) -> np.ndarray:
        """Rows of the table of relative positions for j - i = -(length - 1) ... length - 1.

        Keys behind a query have the second half of the table. Of each half, near distances have a
        row each, the others share in equal steps of the logarithm.
        """
        half = BUCKETS // 2
        near = half // 2
        distance = np.arange(1 - length, length)
        apart = np.abs(distance).astype(np.float32)
        steps = np.log(np.maximum(apart, near) / np.float32(near)) / np.float32(
            math.log(FARTHEST / near)
        )
        far = np.minimum(near + (steps * (half - near)).astype(int), half - 1)
        return np.where(apart < near, apart.astype(int), far) + half * (distance > 0)


read = BertConfig.read


def _buckets(path: Path, given: dict) -> int:
    found = given.get("relative_attention_num_buckets", BUCKETS)
    check_type(path, "relative_attention_num_buckets", found, int)
    if found < BUCKETS:
        raise InputError(
            f"{path}: relative_attention_num_buckets is {found}; give one with {BUCKETS}, which "
            "MPNet's positions share"
        )
    return found


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
    how = how_to_attend(
        config, attention, jnp.dtype(dtype), packing,
        drops=dropout_key is not None, biased=config.buckets > 0,
    )  # fmt: skip
    model = nnx.merge(_abstract(config, dtype, remat)[0], cast_kernels(params, dtype))
    how[-1] = how[-1]._replace(first=first)
    return model(ids, packing, dropout_key, how)


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

    def __call__(self, ids, packing, key, how):
        x = self.embeddings(ids, packing, fold_in(key, 0)).astype(self.dtype)
        if self.projects:
            x = self.embeddings_project(x)
        bias = self.encoder.bias(packing.widths)
        # Not .values(): the order of a merged nnx.Dict is that of strings, "10" before "2".
        for i, how_of_layer in enumerate(how):
            layer = partial(self.encoder.layer[str(i)], how=how_of_layer._replace(bias=bias))
            layer = jax.checkpoint(layer) if self.remat else layer
            x = layer(x, packing, fold_in(key, i + 1))
        return x.astype(jnp.float32)


class Encoder(nnx.Module):
    def __init__(self, c: BertConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.layer = nnx.Dict({str(i): Layer(c, dtype, rngs) for i in range(c.num_hidden_layers)})
        if c.buckets:
            self.relative_attention_bias = nnx.Embed(c.buckets, c.num_attention_heads, rngs=rngs)
        self.config = c

    def bias(self, widths: Sequence[int]) -> list[Float[Array, "H L L"]] | None:
        """What MPNet adds to the scores of tokens, by how far they are apart, for each width."""
        if not self.config.buckets:
            return None
        table = self.relative_attention_bias.embedding
        return [
            skewed(jnp.repeat(table[self.config.rows(width)].T[:, None], width, axis=1))
            for width in widths
        ]


class Embeddings(nnx.Module):
    """Word, position and token-type vectors summed and normalised, in float32."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        width = c.embedding_size
        self.word_embeddings = nnx.Embed(c.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(c.max_position_embeddings, width, rngs=rngs)
        if c.type_vocab_size:
            self.token_type_embeddings = nnx.Embed(c.type_vocab_size, width, rngs=rngs)
        self.LayerNorm = layer_norm(width, c.layer_norm_eps, rngs)
        self.config = c

    def __call__(self, ids, packing, key):
        c = self.config
        x = self.word_embeddings(ids)
        x += self.position_embeddings(self._positions(ids, packing))
        if c.type_vocab_size:
            x += type_vectors(self.token_type_embeddings, packing)
        return dropout(self.LayerNorm(x), key, c.hidden_dropout_prob, packing.tokens)

    def _positions(self, ids, packing):
        """Rows of the table of positions. RoBERTa counts the tokens that are no padding; a text may
        hold the padding token's own name, which then has the row before the first."""
        pad = self.config.first_position - 1
        if pad < 0:
            return packing.tokens.places
        real = ids != pad
        count = jnp.cumsum(real)
        before = (count - real)[packing.starts][packing.texts]
        # The room at the end of a batch belongs to no text.
        return pad + jnp.where(real, jnp.minimum(count - before, packing.tokens.places + 1), 0)


def type_vectors(types: nnx.Embed, packing: Packing):
    """Vectors of the tokens' types, [T, D]; [D] where all are the same."""
    table = types.embedding
    if packing.in_second is None or types.num_embeddings == 1:
        return table[0]
    return jnp.where(packing.in_second[:, None], table[1], table[0])


class Layer(nnx.Module):
    """Attention and feed-forward; the attention may give first tokens alone."""

    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs, attention: type | None = None):
        self.attention = Attention(c, dtype, rngs, attention or SelfAttention)
        self.intermediate = Intermediate(c, dtype, rngs)
        self.output = Residual(c.intermediate_size, c, c.hidden_dropout_prob, dtype, rngs)

    def __call__(self, x, packing, key, how):
        x, rows = self.attention(x, packing, fold_in(key, 0), how)
        return self.output(self.intermediate(x), x, fold_in(key, 1), rows)


class Attention(nnx.Module):
    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs, attention: type):
        self.self = attention(c, dtype, rngs)
        self.output = Residual(c.hidden_size, c, c.attended_dropout_prob, dtype, rngs)

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
        query = self.query(packing.first(x) if how.queries else x)
        return attend(
            *(query, self.key(x), self.value(x), packing, how, self.heads),
            key=key, rate=self.rate,
        )  # fmt: skip


class Intermediate(nnx.Module):
    def __init__(self, c, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.activation = c.hidden_act

    def __call__(self, x):
        return ACTIVATIONS[self.activation](self.dense(x))


class Residual(nnx.Module):
    """LayerNorm(residual + dropout(dense(x))): how attention and feed-forward both end."""

    def __init__(self, width: int, c, rate: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = linear(width, c.hidden_size, dtype, rngs)
        self.LayerNorm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs)
        self.rate = rate

    def __call__(self, x, residual, key, rows):
        x = dropout(self.dense(x), key, self.rate, rows).astype(jnp.float32)
        return self.LayerNorm(x + residual).astype(residual.dtype)
