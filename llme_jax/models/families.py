"""Which module computes which `model_type` of a config.json.

Each has `read`, `abstract_params`, `hidden_states` and SHARDING, the rules that place its
parameters; that of a language model `logits` besides.
"""

import json
from pathlib import Path
from types import ModuleType

from llme_jax.errors import InputError
from llme_jax.models import bert, llama

ENCODERS = {"bert": bert, "roberta": bert, "xlm-roberta": bert}
LANGUAGE_MODELS = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama}


def read_config(path: Path, families: dict[str, ModuleType]):
    """Reads a config.json with the module of its model_type.

    Raises:
        InputError: there is none, or it does not compute such a model.
    """
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in families:
        raise InputError(
            f"{path}: model_type {model_type} is not served; give one of {', '.join(families)}"
        )
    return families[model_type].read(path)
