"""The Llama family (also Mistral, Qwen, Phi-3 and Gemma) in Flax NNX, which reads and writes.

As in bert.py, attributes carry the names of the Hugging Face weights and the parameters live in a
plain nested dict. What is written goes on from the keys and values that the layers keep of a text.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import gather_fsdp, pin_rows
from llme_jax.models.attention import cached_attention, causal_attention, softcapped
from llme_jax.models.layers import ACTIVATIONS, linear, precision, rms_norm
from llme_jax.models.llama_config import LlamaConfig
from llme_jax.models.rope import rotary, rotate

# Of each layer keys and values [B, K, S, Dh]; a slot is a token's.
Kept = list[tuple[Float[Array, "B K _ Dh"], Float[Array, "B K _ Dh"]]]


class Cache(NamedTuple):
    """What is kept of texts, and apart from it, so that no loop copies it, of tokens behind them.

    Attributes:
        text: S slots.
        more: N slots.
        lengths: how long each text is, with all that is known to go on.
    """

    text: Kept
    more: Kept
    lengths: Int[Array, "B"]


class Past(NamedTuple):
    """What tokens that go on a text see of it; see `extend`."""

    cache: Cache
    at: int | Int[Array, ""]
    behind: Int[Array, "B M S"]

    def of_layer(self, i: int) -> "Past":
        text, more, lengths = self.cache
        return self._replace(cache=Cache(text[i : i + 1], more[i : i + 1], lengths))


# The other form of the same function, which bf16 rounds less where x is far below 0.
_ACTIVATIONS = ACTIVATIONS | {"gelu": lambda x: jax.nn.gelu(x, approximate=False)}
# Columns of the products that open a block, rows of those that close it, so
# that a block needs one sum over `tensor` (Megatron-LM, arXiv:1909.08053). `fsdp` takes the rest.
SHARDING = (
    (r"(q|k|v|gate|up)_proj/kernel$", ("fsdp", "tensor")),
    (r"(o|down)_proj/kernel$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"embedding$", ("tensor", "fsdp")),
    (r"(bias|scale)$", (None,)),
)


read = LlamaConfig.read


def abstract_params(config: LlamaConfig, dtype: str) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, in the type that is computed in."""
    return _abstract(config, dtype)[1].to_pure_dict()


def hidden_states(
    config: LlamaConfig,
    dtype: str,
    params: dict,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    mesh: Mesh | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states behind the last norm of right-padded texts.

    Attention is causal, so padding changes nothing before it; its own rows have no meaning.

    Args:
        dtype: what is computed in, "float32" or "bfloat16".
        lengths: of the texts, on which LongRoPE depends.
        mesh: where parameters are spread over `fsdp` and are gathered, a layer at a time.
    """
    places = jnp.arange(ids.shape[1])
    return merged(config, dtype, params)(ids, places, lengths, mesh=mesh)[0]


def prefill(
    config: LlamaConfig,
    dtype: str,
    params: dict,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    more: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B L D"], Cache]:
    """`hidden_states`, and the keys and values of the texts, with room for `more` tokens.

    Args:
        lengths: of the texts, with what is known to go on them.
    """
    places = jnp.arange(ids.shape[1])
    hidden, kept = merged(config, dtype, params)(ids, places, lengths, mesh=mesh)
    text = [tuple(x.swapaxes(1, 2) for x in layer) for layer in kept]
    room = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], more, x.shape[3]), x.dtype), text)
    return hidden, Cache(text, room, lengths)


def extend(
    config: LlamaConfig,
    dtype: str,
    params: dict,
    cache: Cache,
    ids: Int[Array, "B M"],
    at: int | Int[Array, ""],
    positions: Int[Array, "B M"],
    behind: Int[Array, "B M _"],
) -> tuple[Float[Array, "B M D"], Cache]:
    """Hidden states of more tokens of each text, and the cache with these in it.

    Args:
        cache: see `prefill`.
        at: the first of the M slots of `cache.more` that they get.
        positions: where in its text each of them is.
        behind: how many tokens each slot's, of text and of more, lies behind each of them, see
            `cached_attention`.
    """
    past = Past(cache, at, behind)
    hidden, more = merged(config, dtype, params)(ids, positions, cache.lengths, past)
    return hidden, cache._replace(more=more)


def logits(
    config: LlamaConfig, params: dict, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Scores of the next token in float32."""
    if config.tie_word_embeddings:
        table, axis = params["model"]["embed_tokens"]["embedding"], 1
    else:
        table, axis = params["lm_head"]["kernel"], 0
    dims = (((hidden.ndim - 1,), (axis,)), ((), ()))
    scores = jax.lax.dot_general(
        hidden, table, dims, precision(hidden.dtype), preferred_element_type=jnp.float32
    )
    return softcapped(scores, config.logits_softcap)


@cache
def _abstract(config: LlamaConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    # Rngs(0) is never drawn from: no weight is computed under eval_shape.
    return nnx.split(nnx.eval_shape(lambda: Model(config, jnp.dtype(dtype), nnx.Rngs(0))))


def merged(config: LlamaConfig, dtype: str, params: dict) -> "Decoder":
    """The model with its parameters in place."""
    return nnx.merge(_abstract(config, dtype)[0], params).model


class Model(nnx.Module):
    def __init__(self, c: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.model = Decoder(c, dtype, rngs)
        if not c.tie_word_embeddings:
            self.lm_head = _linear(c.hidden_size, c.vocab_size, False, dtype, rngs)


class Decoder(nnx.Module):
    """Embeddings and a stack of pre-norm layers."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(
            c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.Dict(
            {str(i): Layer(c, window, dtype, rngs) for i, window in enumerate(c.windows)}
        )
        self.norm = _norm(c, c.hidden_size, dtype, rngs)
        self.config, self.dtype = c, dtype

    def __call__(self, ids, positions, lengths, past: Past | None = None, mesh: Mesh | None = None):
        pin = partial(pin_rows, mesh=mesh) if mesh else lambda x: x
        # Summed over the layers in fp32: with SmolLM2 in bf16, the log-probability of a token is
        # then off by 0.025 (root mean square, 203 tokens), else by 0.037.
        x = before = pin(scaled(self.config, self.embed_tokens(ids)))
        kept = []
        for i, rotation in enumerate(rotations(self.config, positions, lengths)):
            layer = self.layers[str(i)]  # as strings, "10" comes before "2"
            if mesh:  # while the layer before it computes, no earlier
                graph, params = nnx.split(layer)
                params = gather_fsdp(params.to_pure_dict(), mesh, SHARDING, after=before)
                layer, before = nnx.merge(graph, params), x
            x, of_layer = layer(x, rotation, past and past.of_layer(i))
            x = pin(x)
            kept.append(of_layer)
        return self.norm(x).astype(self.dtype), kept


def scaled(c: LlamaConfig, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """What enters the first layer of words' vectors, in float32."""
    x = x.astype(jnp.float32)
    return x * c.hidden_size**0.5 if c.gemma else x


def rotations(
    c: LlamaConfig, positions: Int[Array, "..."], lengths: Int[Array, "B"] | None = None
) -> list[tuple[Array, Array]]:
    """Of every layer, see `rotary`."""
    full = rotary(c.rope, c.rotary_width, positions, lengths)
    local = rotary(c.local_rope, c.head_dim, positions) if c.local_rope else full
    return [full if window is None else local for window in c.windows]


class Layer(nnx.Module):
    def __init__(self, c: LlamaConfig, window: int | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attn = Attention(c, window, dtype, rngs)
        self.mlp = MLP(c, dtype, rngs)
        names = ["input_layernorm", "post_attention_layernorm"]
        if c.gemma:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            setattr(self, name, _norm(c, c.hidden_size, dtype, rngs))
        self.gemma = c.gemma

    def __call__(self, x, rotation, past):
        out, kept = self.self_attn(self.input_layernorm(x), rotation, past)
        return self.feed_forward(x, out), kept

    def feed_forward(self, x, attended):
        """What leaves the layer, of what entered it and what attention made of that."""
        if not self.gemma:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Attention(nnx.Module):
    """Grouped queries: `num_attention_heads / num_key_value_heads` heads share keys and values."""

    def __init__(self, c: LlamaConfig, window: int | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = _linear(c.hidden_size, queries, c.qkv_bias, dtype, rngs)
        self.k_proj = _linear(c.hidden_size, keys, c.qkv_bias, dtype, rngs)
        self.v_proj = _linear(c.hidden_size, keys, c.qkv_bias, dtype, rngs)
        self.o_proj = _linear(queries, c.hidden_size, c.output_bias, dtype, rngs)
        if c.qk_norm:
            self.q_norm, self.k_norm = (_norm(c, c.head_dim, dtype, rngs) for _ in range(2))
        # Attention divides by the root of the heads' width.
        self.query_scale = (c.head_dim / c.query_width) ** 0.5 if c.query_width else 1.0
        self.head_dim, self.qk_norm, self.dtype = c.head_dim, c.qk_norm, dtype
        self.window, self.softcap = window, c.attention_softcap

    def project(self, x, rotation):
        """Queries, keys and values by heads, of tokens in any arrangement."""
        q, k, v = (
            part(x).reshape(*x.shape[:-1], -1, self.head_dim)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.query_scale * rotate(q, rotation), rotate(k, rotation)
        return q.astype(self.dtype), k.astype(self.dtype), v

    def __call__(self, x, rotation, past):
        batch, length, _ = x.shape
        q, k, v = self.project(x, rotation)
        how = {"window": self.window, "softcap": self.softcap}
        if past is None:
            out = causal_attention(q, k, v, **how)
        else:
            ((text,), (more,), _), at, behind = past
            k, v = (
                lax.dynamic_update_slice_in_dim(kept, new.swapaxes(1, 2), at, axis=2)
                for kept, new in zip(more, (k, v), strict=True)
            )
            keys, values = zip(text, (k, v), strict=True)
            out = cached_attention(q, keys, values, behind, **how)
        return self.o_proj(out.reshape(batch, length, -1)), (k, v)


class MLP(nnx.Module):
    def __init__(self, c: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_proj = _linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dtype, rngs)
        self.up_proj = _linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dtype, rngs)
        self.down_proj = _linear(c.intermediate_size, c.hidden_size, c.mlp_bias, dtype, rngs)
        self.activation = c.hidden_act

    def __call__(self, x):
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


def _norm(c: LlamaConfig, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return rms_norm(width, c.rms_norm_eps, dtype, rngs, from_one=c.gemma)


def _linear(into: int, out: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Its parameters are kept in what it computes in."""
    return linear(into, out, dtype, rngs, bias=bias, param_dtype=dtype)
