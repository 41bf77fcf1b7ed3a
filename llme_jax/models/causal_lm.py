"""Language models from a Hugging Face folder or the Hub to the devices."""

from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from llme_jax.devices.sharding import LM_RULES, state_sharding
from llme_jax.models.llama import CausalLM, LlamaConfig
from llme_jax.models.platform import compute_dtype
from llme_jax.models.tokenizer import load_tokenizer
from llme_jax.models.weights import find_model, load_params_to


def open_causal_lm(
    name: str, *, dtype: Literal["auto", "fp32", "bf16"], cache_dir: str | None
) -> tuple[CausalLM, Path, object]:
    """A model without its weights, the folder that has them, and its tokenizer.

    Raises:
        InputError: the model cannot be found or served.
    """
    folder = find_model(name, cache_dir)
    lm = CausalLM(LlamaConfig.read(folder / "config.json"), compute_dtype(dtype))
    return lm, folder, load_tokenizer(folder)


def load_causal_lm(lm: CausalLM, folder: Path, mesh: Mesh) -> dict:
    """Its parameters on the mesh, in the type that is computed in.

    Raises:
        InputError: the weights do not fit config.json.
    """
    shapes = lm.abstract_params()
    return load_params_to(folder, shapes, state_sharding(mesh, shapes, LM_RULES))


def sharded_shapes(lm: CausalLM, mesh: Mesh) -> dict:
    """Every parameter as a ShapeDtypeStruct with its sharding: enough to compile with."""
    shapes = lm.abstract_params()
    shardings = state_sharding(mesh, shapes, LM_RULES)

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)
