"""Which module computes which `model_type` of a config.json.

Each has `read`, `abstract_params`, `hidden_states` and SHARDING, the rules that place its
parameters; that of a language model `logits` besides.
"""

from pathlib import Path
from types import ModuleType

import jax

from llme_jax.devices.sharding import path_name
from llme_jax.errors import InputError
from llme_jax.hugging_face.config_keys import FAMILIES, TYPES
from llme_jax.hugging_face.folders import ModelFolder, is_static
from llme_jax.hugging_face.foreign import check_object, check_type, read_json
from llme_jax.hugging_face.sentence_transformers import read_transformer
from llme_jax.models import bert, deberta, llama, llama_encoder, rotary_bert, static_embedding
from llme_jax.models.encoder import Architecture

LANGUAGE_MODELS = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"), llama
)
ENCODERS = {
    "bert": bert,
    "roberta": bert,
    "xlm-roberta": bert,
    "camembert": bert,
    "electra": bert,
    "distilbert": bert,
    "mpnet": bert,
    "modernbert": rotary_bert,
    "nomic_bert": rotary_bert,
    "gte": rotary_bert,
    "new": rotary_bert,
    # Not phi3: its files hold several linear maps in one tensor, and encoders are saved again.
    **{family: llama_encoder for family in LANGUAGE_MODELS if family != "phi3"},
    "eurobert": llama_encoder,
    "deberta-v2": deberta,
    "static_embedding": static_embedding,
    "model2vec": static_embedding,
}


def read_config(place: Path | ModelFolder, families: dict[str, ModuleType]):
    """Reads a model's config.json with the module of its model_type; static embeddings may have
    none.

    Raises:
        InputError: there is none, it does not compute such a model, or it has a key that is not
            served.
    """
    model = ModelFolder.of(place)
    path, static = model.config, is_static(model.base)
    given = {} if static else _with_arguments(model)
    model_type = "static_embedding" if static else given.get("model_type")
    if model_type is None:
        raise InputError(f'{path}: model_type is missing; add it, as in "model_type": "bert"')
    if not isinstance(model_type, str) or model_type not in families:
        raise InputError(
            f"{path}: model_type {model_type} is not served; give one of {', '.join(families)}"
        )
    FAMILIES[model_type].check(path, given)
    for name, kind in TYPES.items():
        if given.get(name) is not None:
            check_type(path, name, given[name], kind)
    for name in ("rope_parameters", "rope_scaling"):
        check_object(path, name, given.get(name) or {})
    return families[model_type].read(path, given)


def _with_arguments(model: ModelFolder) -> dict:
    """config.json, with what sentence-transformers' files say instead."""
    given, said = read_json(model.config), dict(read_transformer(model.path).config)
    # transformers takes them for attributes of the configuration, and drops those it does not know.
    if unknown := sorted(said.keys() - given.keys()):
        raise InputError(
            f"{model}: config_args in sentence_bert_config.json sets {', '.join(unknown)}, which "
            f"config.json does not have; write it there, or take it out"
        )
    return given | said


def forward_flops(
    config: Architecture, params: dict, tokens: float | int, pairs: float | int
) -> float:
    """Operations of the matrix products of an encoder, additions and multiplications apart.

    2 for each weight of a linear layer and token, 4 D for each pair of tokens of a text and layer;
    where pairs are scored by position too, another 4 D for each of the two terms.

    Args:
        params: of the encoder, arrays or ShapeDtypeStructs.
        tokens: of all texts.
        pairs: of tokens of a text, the squares of the texts' lengths; in a layer with a window,
            as many of them as it lets see each other at most.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    linear = sum(x.size for path, x in leaves if "kernel" in path_name(path))
    # A term has 2 D for each of the 2 L - 1 distances.
    attention = 4 * config.num_attention_heads * config.head_width * (1 + len(config.terms))
    if config.causal:
        pairs = (pairs + tokens) / 2
    sides = 1 if config.causal else 2
    seen = (pairs if w is None else min(pairs, tokens * (sides * w + 1)) for w in config.windows)
    return float(2 * linear * tokens + attention * sum(seen))
