"""Language models from a Hugging Face folder or the Hub to the devices."""

import logging
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.devices.sharding import abstract, path_name, state_sharding
from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import ModelFolder, find_model
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.tokenizer import check_vocabulary, load_tokenizer
from llme_jax.hugging_face.weights import Folder, has_weights, load_params_to, same_tensors
from llme_jax.models.families import LANGUAGE_MODELS, read_config
from llme_jax.models.llama import Cache, LlamaConfig
from llme_jax.models.platform import compute_dtype

logger = logging.getLogger(__name__)
_WORDS, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class CausalLM:
    """What is computed, without the parameters; a static argument of jitted functions."""

    config: LlamaConfig
    dtype: Literal["float32", "bfloat16"]
    mesh: Mesh | None = None  # on which texts stay and the parameters spread over `fsdp` travel

    def on(self, mesh: Mesh) -> "CausalLM":
        """As it is best computed on these devices."""
        return replace(self, mesh=mesh if mesh.shape["fsdp"] > 1 else None)

    @property
    def _family(self) -> ModuleType:
        return LANGUAGE_MODELS[self.config.model_type]

    @property
    def max_length(self) -> int:
        """Tokens the longest text may have."""
        return self.config.max_position_embeddings

    def abstract_params(self) -> dict:
        """Nested dict of `jax.ShapeDtypeStruct`, in the type that is computed in."""
        return self._family.abstract_params(self.config, self.dtype)

    def shardings(self, mesh: Mesh) -> dict:
        """Where each parameter lives."""
        return state_sharding(mesh, self.abstract_params(), self._family.SHARDING)

    def hidden(
        self, params: dict, ids: Int[Array, "B L"], lengths: Int[Array, "B"]
    ) -> Float[Array, "B L D"]:
        """Hidden states behind the last norm of right-padded texts."""
        return self._family.hidden_states(self.config, self.dtype, params, ids, lengths, self.mesh)

    def prefill(
        self, params: dict, ids: Int[Array, "B L"], lengths: Int[Array, "B"], more: int
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """`hidden`, and what is kept of the texts, with room for `more` tokens; see llama.py."""
        arguments = params, ids, lengths, more, self.mesh
        return self._family.prefill(self.config, self.dtype, *arguments)

    def extend(
        self,
        params: dict,
        cache: Cache,
        ids: Int[Array, "B M"],
        at: int | Int[Array, ""],
        positions: Int[Array, "B M"],
        behind: Int[Array, "B M _"],
    ) -> tuple[Float[Array, "B M D"], Cache]:
        """Hidden states of more tokens of each text; see `extend` of llama.py."""
        arguments = cache, ids, at, positions, behind
        return self._family.extend(self.config, self.dtype, params, *arguments)

    def logits(self, params: dict, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token in float32."""
        return self._family.logits(self.config, params, hidden)

    def flops(self, tokens: float | int, pairs: float | int) -> float:
        """Operations of the matrix products of `hidden`.

        2 for each weight of a linear layer and token, 4 D for each pair of tokens and layer of
        which one sees the other.

        Args:
            pairs: of tokens of a text, the squares of the texts' lengths.
        """
        config, leaves = self.config, jax.tree_util.tree_leaves_with_path(self.abstract_params())
        names = {path_name(path): x.size for path, x in leaves}
        linear = sum(n for name, n in names.items() if "kernel" in name and "lm_head" not in name)
        seen = (pairs + tokens) / 2
        attended = sum(seen if w is None else min(seen, tokens * w) for w in config.windows)
        return 2 * linear * tokens + 4 * config.num_attention_heads * config.head_dim * attended


def open_causal_lm(
    name: str,
    *,
    dtype: Literal["auto", "fp32", "bf16"],
    cache_dir: str | None,
    weights: bool = True,
) -> tuple[CausalLM, ModelFolder, object]:
    """A model without its weights, the folder that has them, and its tokenizer.

    Args:
        weights: False where these need not be there.

    Raises:
        InputError: the model cannot be found or served.
    """
    folder = find_model(name, cache_dir, weights=weights)
    config = read_config(folder, LANGUAGE_MODELS)
    architectures = read_json(folder.config).get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise InputError(
            f"{folder.config}: a {architectures[0]} scores pairs and has no head for words; give "
            "the language model that it was made of, or rerank with it, without --ranker_method "
            "yes-no"
        )
    if not config.is_causal:
        raise InputError(
            f"{folder.config}: is_causal false (use_bidirectional_attention true) is for encoders; "
            "give a language model whose tokens see those before them alone"
        )
    # As transformers 5: what config.json says is wrong where the file has another head.
    tied = config.tie_word_embeddings
    if tied and weights and has_weights(folder) and not same_tensors(folder, _WORDS, _HEAD):
        logger.warning(
            "%s: has a lm_head of its own, which counts, though tie_word_embeddings is true", folder
        )
        config = replace(config, tie_word_embeddings=False)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, name)
    return CausalLM(config, compute_dtype(dtype)), folder, tokenizer


def load_causal_lm(lm: CausalLM, folder: Folder, mesh: Mesh) -> dict:
    """Its parameters on the mesh, in the type that is computed in.

    Raises:
        InputError: the weights do not fit config.json.
    """
    return load_params_to(folder, lm.abstract_params(), lm.shardings(mesh))


def sharded_shapes(lm: CausalLM, mesh: Mesh) -> dict:
    """Every parameter as a ShapeDtypeStruct with its sharding: enough to compile with."""
    return abstract(lm.abstract_params(), lm.shardings(mesh))
