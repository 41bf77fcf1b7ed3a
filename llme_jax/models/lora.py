"""LoRA (arXiv:2106.09685): frozen linear maps and the small ones that are trained beside them.

An adapter of a kernel W [in, out] is `lora_a` [in, r] and `lora_b` [r, out]: the map becomes
W + (alpha / r) A B. Adapters lie in a tree of their own, with the paths of their kernels.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llme_jax.config import TrainConfig
from llme_jax.devices.sharding import path_name
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.hugging_face.weights import Names, file_tensors, tensor_name
from llme_jax.models.layers import LowRank

# Tables of words, which are as large as a third of a small model.
_WORDS = ("word_embeddings/embedding", "tok_embeddings/embedding", "embed_tokens/embedding")


@dataclass(frozen=True)
class Lora:
    """
    Attributes:
        target: modules that get an adapter, as the ends of their names in the model's files; None
            for all linear maps.
    """

    rank: int
    alpha: float
    target: tuple[str, ...] | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> "Lora | None":
        """What the settings ask for."""
        target = config.lora_target and tuple(config.lora_target)
        return cls(config.lora_rank, config.lora_alpha, target) if config.lora_rank else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def with_adapters(
    params: dict, names: dict[str, Names], lora: Lora, dtype: str, seed: int
) -> tuple[dict, dict]:
    """What is trained of a model, and what is only read.

    Args:
        params: of its parts, by name.
        names: of the parts that get adapters, as in `load_params`.
        dtype: what products are computed in.

    Returns:
        The adapters of each part under `lora`, beside the parts that have none; those that have.

    Raises:
        InputError: as `new_adapters`.
    """
    adapters = {part: new_adapters(params[part], of, lora, seed) for part, of in names.items()}
    whole = {part: of for part, of in params.items() if part not in names}
    return {"lora": adapters} | whole, {part: frozen(params[part], dtype) for part in names}


def new_adapters(params: dict, names: Names, lora: Lora, seed: int) -> dict:
    """Adapters that change nothing yet: B is 0, A drawn as peft draws it.

    Args:
        params: of the encoder.
        names: as in `load_params`.

    Raises:
        InputError: a target is the name of no linear map.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = {
        tensor_name(path, names).removesuffix(".weight"): (path, leaf)
        for path, leaf in leaves
        if path[-1].key == "kernel"
    }
    if not kernels:
        raise InputError(
            "--lora_rank: static embeddings have no linear maps; leave it out, the table is trained"
        )
    ends = {name.rpartition(".")[2] for name in kernels}
    for target in lora.target or ():
        if not any(_ends(name, target) for name in kernels):
            raise InputError(
                f"--lora_target {target}: the model has no such linear map; give names as "
                f"{', '.join(sorted(ends))}, or leave the flag out for all of them"
            )
    rng = np.random.default_rng(seed % 2**63)
    adapters = {}
    for name, (path, kernel) in kernels.items():
        if lora.target is not None and not any(_ends(name, target) for target in lora.target):
            continue
        into, out = kernel.shape
        if lora.rank > min(into, out):
            raise InputError(
                f"--lora_rank {lora.rank}: {name} is {into} x {out}; give {min(into, out)} or less"
            )
        place = adapters
        for step in path:
            place = place.setdefault(step.key, {})
        bound = into**-0.5
        place["lora_a"] = rng.uniform(-bound, bound, (into, lora.rank)).astype(np.float32)
        place["lora_b"] = np.zeros((lora.rank, out), np.float32)
    return adapters


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def frozen(params: dict, dtype: str) -> dict:
    """Parameters that are only read, in the type that products are computed in; norms in fp32.

    Args:
        params: of arrays, or of their shapes.
    """

    def cast(path, leaf):
        if not path_name(path).endswith(("kernel", *_WORDS)):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=jnp.dtype(dtype))
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def adapted(params: dict, adapters: dict, lora: Lora) -> dict:
    """Parameters whose kernels have their adapters beside them."""
    return _with(params, adapters, partial(LowRank, scale=lora.scale))


def merged(params: dict, adapters: dict, lora: Lora) -> dict:
    """Parameters of numpy as if all had been trained, float32."""

    def kernel(kernel, lora_a, lora_b):
        return np.asarray(kernel, np.float32) + lora.scale * (lora_a @ lora_b)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return _with(params, adapters, kernel)


def _with(params: dict, adapters: dict, make: Callable) -> dict:
    params = dict(params)
    for step, below in adapters.items():
        if step == "kernel":
            params[step] = make(params[step], **below)
        else:
            params[step] = _with(params[step], below, make)
    return params


def save_adapters(
    folder: Path, adapters: dict, names: Names, lora: Lora, base: str, head: dict | None = None
) -> None:
    """Writes the adapters as peft does, for the model `base`, whole or not at all.

    Args:
        names: as in `load_params`.
        head: of a reranker, trained whole; `adapters` have the names of its encoder before them.
    """
    targets, of_head = [], file_tensors(head or {}, names)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in of_head.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        name = tensor_name(path[:-1], names).removesuffix(".weight")
        which = path[-1].key
        if which == "lora_a":
            targets.append(name)
        leaf = np.ascontiguousarray(np.asarray(leaf, np.float32).T)
        tensors[f"base_model.model.{name}.{which[:-1]}{which[-1].upper()}.weight"] = leaf
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": sorted(_outermost(head, {*adapters})) if head else None,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    with atomic_dir(folder, replace=True) as beside:
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(text, encoding="utf-8")


def _outermost(head: dict, encoders: set[str]) -> Iterator[str]:
    """The names of a head's modules; of one that lies in the encoder, from there on."""
    for name, below in head.items():
        yield from (f"{name}.{inner}" for inner in below) if name in encoders else (name,)
