"""Language models of the Llama family that read texts for their vectors.

They compute what llama.py has, over packed texts, with weights in fp32 and a backward pass. Tokens
see those before them, or, in EuroBERT (arXiv:2503.05500), where config.json says
`"is_causal": false`, or for EmbeddingGemma `"use_bidirectional_attention": true`, as transformers
reads it, all of their text.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.models import llama
from llme_jax.models.encoder import Architecture, How, attend, how_to_attend
from llme_jax.models.layers import cast_kernels
from llme_jax.models.llama import LlamaConfig
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel

SHARDING = FSDP_RULES


@dataclass(frozen=True, kw_only=True)
class LlamaEncoderConfig(Architecture):
    """The fields of config.json that decide what is computed."""

    model: LlamaConfig
    causal: bool = True

    @classmethod
    def read(cls, path: Path, given: dict) -> "LlamaEncoderConfig":
        """Read config.json.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        model = LlamaConfig.read(path, given)
        causal = model.is_causal and model.model_type != "eurobert"
        if not causal and model.attention_softcap is not None:
            raise InputError(
                f"{path}: attn_logit_softcapping {model.attention_softcap} is served where tokens "
                "see those before them alone; take out is_causal and use_bidirectional_attention"
            )
        shared = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "hidden_act")
        shared += ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        return cls(
            **{name: getattr(model, name) for name in shared},
            type_vocab_size=0,
            layer_norm_eps=model.rms_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            source=json.dumps(given),
            # Whether there is a head for words decides nothing here.
            model=replace(model, tie_word_embeddings=True),
            causal=causal,
        )

    @property
    def head_width(self) -> int:
        return self.model.head_dim

    @property
    def softcap(self) -> float | None:
        return self.model.attention_softcap

    @property
    def windows(self) -> tuple[int | None, ...]:
        # How transformers counts: Gemma's is the width of the whole window where it is not causal.
        if self.causal:
            return tuple(None if w is None else w - 1 for w in self.model.windows)
        sides = 2 if self.model.gemma else 1
        return tuple(None if w is None else w // sides for w in self.model.windows)


read = LlamaEncoderConfig.read


def hidden_states(
    config: LlamaEncoderConfig,
    dtype: str,
    remat: bool,
    attention: AttentionKernel,
    params: dict,
    ids: Int[Array, "T"],
    packing: Packing,
    dropout_key: Array | None = None,
    first: bool = False,
) -> Float[Array, "_ D"]:
    """As `bert.hidden_states`, but nothing is dropped and `first` saves nothing."""
    how = how_to_attend(config, attention, jnp.dtype(dtype), packing, drops=False)
    model = llama.merged(config.model, dtype, {"model": cast_kernels(params, dtype)})
    # Not by the module, which would first round the whole table.
    x = llama.scaled(config.model, jnp.asarray(params["embed_tokens"]["embedding"])[ids])
    turns = llama.rotations(config.model, packing.tokens.places)
    for i, (of_layer, rotation) in enumerate(zip(how, turns, strict=True)):
        layer = partial(_layer, model.layers[str(i)], packing=packing, how=of_layer)
        x = (jax.checkpoint(layer) if remat else layer)(x, rotation)
    x = model.norm(x).astype(jnp.float32)
    return packing.first(x) if first else x


def _layer(layer: llama.Layer, x, rotation, *, packing: Packing, how: How):
    q, k, v = layer.self_attn.project(layer.input_layernorm(x), rotation)
    heads = q.shape[1]
    q, k, v = (part.reshape(len(x), -1) for part in (q, k, v))
    attended = attend(q, k, v, packing, how, heads, key=None, rate=0.0)
    return layer.feed_forward(x, layer.self_attn.o_proj(attended))


def abstract_params(config: LlamaEncoderConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every parameter of the model, float32."""
    return llama.abstract_params(config.model, "float32")["model"]
