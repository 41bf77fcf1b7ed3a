"""Static embeddings: a text's vector is the mean of its tokens' vectors, which stand in a table.

sentence-transformers calls the module StaticEmbedding; model2vec (potion) makes such tables. No
special tokens are added, and no token sees another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.errors import InputError
from llme_jax.hugging_face.weights import model_tensors
from llme_jax.models.encoder import Architecture
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel

SHARDING = FSDP_RULES


@dataclass(frozen=True, kw_only=True)
class StaticConfig(Architecture):
    """The size of the table."""

    module: ClassVar[str] = "StaticEmbedding"

    @classmethod
    def read(cls, path: Path, given: dict) -> "StaticConfig":
        """Of the folder of a config.json, which need not be there: the table has all there is.

        Raises:
            InputError: there is no table.
        """
        table = model_tensors(path.parent).get("embedding.weight")
        if table is None or len(table.shape) != 2:
            raise InputError(
                f"{path.parent}: no table embedding.weight or embeddings in model.safetensors; "
                "copy the file again"
            )
        return cls(
            model_type="static_embedding",
            vocab_size=table.shape[0],
            hidden_size=table.shape[1],
            num_hidden_layers=0,
            num_attention_heads=1,
            intermediate_size=0,
            hidden_act="",
            max_position_embeddings=2**31 - 1,
            type_vocab_size=0,
            layer_norm_eps=0.0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            source='{"model_type": "static_embedding"}',
        )

    @property
    def poolings(self) -> tuple[str, ...]:
        return ("mean",)


read = StaticConfig.read


def hidden_states(
    config: StaticConfig,
    dtype: str,
    remat: bool,
    attention: AttentionKernel,
    params: dict,
    ids: Int[Array, "T"],
    packing: Packing,
    dropout_key: Array | None = None,
    first: bool = False,
) -> Float[Array, "_ D"]:
    """As `bert.hidden_states`: the tokens' rows, in float32; nothing is dropped."""
    x = jnp.asarray(params["embedding"]["embedding"])[ids]
    return packing.first(x) if first else x


def abstract_params(config: StaticConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: the table, float32."""
    shape = config.vocab_size, config.hidden_size
    return {"embedding": {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}}
