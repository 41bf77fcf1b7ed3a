"""DeBERTa-v2 and -v3 in Flax NNX: attention that sees contents and relative positions apart.

Source: arXiv:2006.03654 and arXiv:2111.09543. Attributes carry the names of the Hugging Face
weights, as in bert.py, from which everything comes that is the same. Unlike there, the table of
relative positions is not dropped from in training: all texts of a batch share it.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.models.attention import biased_attention, skewed
from llme_jax.models.bert import Layer, type_vectors
from llme_jax.models.dropout import dropout, fold_in
from llme_jax.models.encoder import Architecture, check_width, checked
from llme_jax.models.layers import cast_kernels, layer_norm, linear, precision
from llme_jax.models.packing import Packing
from llme_jax.models.platform import attention_kernel

SHARDING = FSDP_RULES


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Architecture):
    """The fields of config.json that decide what is computed."""

    embedding_size: int  # of the tables; another than hidden_size is projected to it
    absolute: bool  # are absolute positions added to the words?
    terms: frozenset[str]  # of c2p (contents see positions) and p2c
    buckets: int  # of relative positions, in which far ones share; 0 for none
    farthest: int  # relative position that is told from others
    shared: bool  # are positions projected as contents are?
    normed: bool  # is the table of relative positions normalised?

    @classmethod
    def read(cls, path: Path, given: dict) -> "DebertaConfig":
        """Read config.json.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        values = checked(path, given, layer_norm_eps=1e-7, type_vocab_size=0)
        if not given.get("relative_attention"):
            raise InputError(
                f"{path}: relative_attention false is not served; give a model with relative "
                "positions"
            )
        for name, usual in (
            ("attention_head_size", values["hidden_size"] // values["num_attention_heads"]),
            ("pooler_hidden_size", values["hidden_size"]),
        ):
            if given.get(name) not in (None, usual):
                raise InputError(
                    f"{path}: {name} {given[name]} is not served; give a model with {usual}"
                )
        terms = given.get("pos_att_type") or []
        terms = terms.lower().split("|") if isinstance(terms, str) else terms
        farthest = given.get("max_relative_positions", -1)
        return cls(
            **values,
            embedding_size=given.get("embedding_size", values["hidden_size"]),
            absolute=given.get("position_biased_input", True),
            terms=frozenset(term.strip() for term in terms),
            buckets=max(given.get("position_buckets", -1), 0),
            farthest=farthest if farthest > 0 else values["max_position_embeddings"],
            shared=given.get("share_att_key", False),
            normed="layer_norm" in given.get("norm_rel_ebd", "none").lower(),
        )

    @property
    def span(self) -> int:
        """Half of the table of relative positions."""
        return self.buckets or self.farthest

    def rows(self, length: int) -> np.ndarray:
        """Rows of that table for the distances -(length - 1) ... length - 1."""
        distance = np.arange(1 - length, length)
        if self.buckets:
            # Near ones have a bucket each, the others share in equal steps of the logarithm.
            middle = self.buckets // 2
            far = np.maximum(np.abs(distance), middle).astype(np.float32)
            steps = np.log(far / np.float32(middle)) / np.log(
                np.float32((self.farthest - 1) / middle)
            )
            bucket = np.ceil(steps * np.float32(middle - 1)).astype(int) + middle
            distance = np.where(np.abs(distance) <= middle, distance, bucket * np.sign(distance))
        return np.clip(distance + self.span, 0, 2 * self.span - 1)


read = DebertaConfig.read


def hidden_states(
    config: DebertaConfig,
    dtype: str,
    remat: bool,
    attention: str,
    params: dict,
    ids: Int[Array, "T"],
    packing: Packing,
    dropout_key: Array | None = None,
    first: bool = False,
) -> Float[Array, "_ D"]:
    """As `bert.hidden_states`, but `first` saves nothing."""
    check_width(config, max(packing.widths))
    attention_kernel(attention, jnp.dtype(dtype), biased=True)
    model = nnx.merge(_abstract(config, dtype, remat)[0], cast_kernels(params, dtype))
    hidden = model(ids, packing, dropout_key)
    return packing.first(hidden) if first else hidden


def abstract_params(config: DebertaConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every parameter of the model, float32."""
    return _abstract(config, "float32", False)[1].to_pure_dict()


@cache
def _abstract(config: DebertaConfig, dtype: str, remat: bool) -> tuple[nnx.GraphDef, nnx.State]:
    # Rngs(0) is never drawn from: no weight is computed under eval_shape.
    return nnx.split(nnx.eval_shape(lambda: Deberta(config, jnp.dtype(dtype), remat, nnx.Rngs(0))))


class Deberta(nnx.Module):
    """Embeddings and a stack of post-LayerNorm transformer layers, without the pooler."""

    def __init__(self, c: DebertaConfig, dtype: jnp.dtype, remat: bool, rngs: nnx.Rngs):
        self.embeddings = Embeddings(c, rngs)
        self.encoder = Encoder(c, dtype, rngs)
        self.dtype = dtype
        self.remat = remat

    def __call__(self, ids, packing, key):
        x = self.embeddings(ids, packing, fold_in(key, 0)).astype(self.dtype)
        positions = self.encoder.positions(max(packing.widths)).astype(self.dtype)
        for i in range(len(self.encoder.layer)):  # as strings, "10" comes before "2"
            layer = self.encoder.layer[str(i)]
            layer = jax.checkpoint(layer) if self.remat else layer
            x = layer(x, packing, fold_in(key, i + 1), positions)
        return x.astype(jnp.float32)


class Encoder(nnx.Module):
    def __init__(self, c: DebertaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        layers = (Layer(c, dtype, rngs, SelfAttention) for _ in range(c.num_hidden_layers))
        self.layer = nnx.Dict({str(i): layer for i, layer in enumerate(layers)})
        self.rel_embeddings = nnx.Embed(2 * c.span, c.hidden_size, rngs=rngs)
        if c.normed:
            self.LayerNorm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs)
        self.config = c

    def positions(self, length: int) -> Float[Array, "P D"]:
        """Vectors of the distances -(length - 1) ... length - 1; P is 2 length - 1."""
        table = self.rel_embeddings.embedding
        table = self.LayerNorm(table) if self.config.normed else table
        return table[self.config.rows(length)]


class Embeddings(nnx.Module):
    """Word vectors, those of positions and token types where there are any, normalised."""

    def __init__(self, c: DebertaConfig, rngs: nnx.Rngs):
        width = c.embedding_size
        self.word_embeddings = nnx.Embed(c.vocab_size, width, rngs=rngs)
        if c.absolute:
            self.position_embeddings = nnx.Embed(c.max_position_embeddings, width, rngs=rngs)
        if c.type_vocab_size:
            self.token_type_embeddings = nnx.Embed(c.type_vocab_size, width, rngs=rngs)
        if width != c.hidden_size:
            self.embed_proj = linear(width, c.hidden_size, jnp.dtype("float32"), rngs, bias=False)
        self.LayerNorm = layer_norm(c.hidden_size, c.layer_norm_eps, rngs)
        self.config = c

    def __call__(self, ids, packing, key):
        c = self.config
        x = self.word_embeddings(ids)
        if c.absolute:
            x += self.position_embeddings(packing.tokens.places)
        if c.type_vocab_size:
            x += type_vectors(self.token_type_embeddings, packing)
        if c.embedding_size != c.hidden_size:
            x = self.embed_proj(x)
        return dropout(self.LayerNorm(x), key, c.hidden_dropout_prob, packing.tokens)


class SelfAttention(nnx.Module):
    """Scores of contents with contents, of contents with positions, of positions with contents."""

    def __init__(self, c: DebertaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        names = ["query_proj", "key_proj", "value_proj"]
        if not c.shared:
            names += [
                f"pos_{n}_proj" for n, t in (("key", "c2p"), ("query", "p2c")) if t in c.terms
            ]
        for name in names:
            setattr(self, name, linear(c.hidden_size, c.hidden_size, dtype, rngs))
        self.config = c

    def __call__(self, x, packing, key, positions):
        c = self.config
        contents = (getattr(self, f"{n}_proj")(x) for n in ("query", "key", "value"))
        of_positions = self._of_positions(positions)
        # The sum of so many terms is divided by the root of their number.
        terms = 1 + len(c.terms & {"c2p", "p2c"})
        attended = []
        for *parts, lengths, numbers in zip(
            *map(packing.in_blocks, contents), packing.lengths, packing.numbers, strict=True
        ):
            q, k, v = map(self._heads, parts)
            bias = self._bias(q, k, of_positions) / math.sqrt(q.shape[-1] * terms)
            out = biased_attention(
                (q / math.sqrt(terms)).astype(q.dtype), k, v, bias, lengths,
                key=key, numbers=numbers, rate=c.attention_probs_dropout_prob,
            )  # fmt: skip
            attended.append(out.reshape(parts[0].shape))
        return packing.from_blocks(attended)

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.config.num_attention_heads, -1)

    def _of_positions(self, positions) -> dict[str, Float[Array, "P H Dh"]]:
        """What contents are multiplied with, by the name of the term."""
        c, prefix = self.config, "" if self.config.shared else "pos_"
        names = {"c2p": f"{prefix}key_proj", "p2c": f"{prefix}query_proj"}
        return {
            term: self._heads(getattr(self, name)(positions))
            for term, name in names.items()
            if term in c.terms
        }

    def _bias(self, q, k, of_positions) -> Float[Array, "B H L L"]:
        """What depends on a position: on i - j alone, so there is no gather for each pair i, j."""
        batch, length, heads, _ = q.shape
        bias = jnp.zeros((batch, heads, length, length), jnp.float32)
        # The vectors are of the distances in the widest block; those in this one lie in the middle.
        near = {
            term: x[len(x) // 2 + 1 - length : len(x) // 2 + length]
            for term, x in of_positions.items()
        }
        if "c2p" in near:  # of query i and the distance i - j, which falls with j
            bias += skewed(_products(q, near["c2p"][::-1]))
        if "p2c" in near:  # of key j and the same distance, which grows with i
            bias += skewed(_products(k, near["p2c"])).swapaxes(2, 3)
        return bias


def _products(x: Float[Array, "B L H Dh"], positions: Float[Array, "P H Dh"]):
    return jnp.einsum(
        "blhd,phd->bhlp", x, positions,
        precision=precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
