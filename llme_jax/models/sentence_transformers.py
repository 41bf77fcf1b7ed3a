"""The files beside an encoder that make sentence-transformers open it as it was trained.

Class paths and keys are those of sentence-transformers 2 to 5; version 6 reads them too.
"""

import json
from pathlib import Path

import numpy as np

from llme_jax.errors import InputError
from llme_jax.models.foreign import listed_modules, read_json
from llme_jax.models.weights import open_tensors, read_torch, save_params

_SIMILARITY = {"cos": "cosine", "ip": "dot", "l2": "euclidean"}
DENSE = "dense_pooler"  # the folder of our own Dense module
_POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


def save_modules(
    folder: Path,
    *,
    pooling: str,
    dense: np.ndarray | None,
    metric: str,
    width: int,
    max_length: int,
    prompts: dict[str, str],
) -> None:
    """Write modules.json and what it names into the Hugging Face folder `folder`.

    Args:
        dense: the kernel [D, D] of the dense pooler.
        width: D, the width of the embeddings.
        max_length: tokens a text keeps.
        prompts: the texts that go in front, by name.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modes = {key: pooling == name for name, key in _POOLING.items()}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    if dense is not None:
        modules.append((DENSE, "Dense"))
        save_dense(folder / DENSE, dense)
    if metric == "cos":
        modules.append(("normalize", "Normalize"))
        (folder / "normalize").mkdir()
    described = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", described)
    limits = {"max_seq_length": max_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", limits)
    settings = {
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": _SIMILARITY[metric],
    }
    _write(folder / "config_sentence_transformers.json", settings)


def load_dense(folder: Path) -> np.ndarray | None:
    """Kernel [D, D] of the dense pooler in `folder`: as saved here, or LLM-Embedder's file."""
    if (folder / DENSE / "config.json").is_file():
        weight = open_tensors(folder / DENSE)["linear.weight"][...]
    elif (folder / f"{DENSE}.bin").is_file():
        weight = read_torch(folder / f"{DENSE}.bin")["weight"]
    else:
        return None
    return np.ascontiguousarray(weight.T, np.float32)


def has_dense(folder: Path) -> bool:
    """Whether `load_dense` would find a dense pooler; reads nothing."""
    files = (f"{DENSE}/config.json", f"{DENSE}.bin")
    return any((folder / file).is_file() for file in files)


def stored_pooling(folder: Path) -> str | None:
    """The pooling that the folder's own config.json of Pooling asks for; None without the file."""
    of_kind = dict(listed_modules(folder))
    path = of_kind.get("Pooling", folder / "1_Pooling") / "config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    if "pooling_mode" in settings:  # sentence-transformers 6
        return settings["pooling_mode"]
    names = {key: name for name, key in _POOLING.items()}
    chosen = [names.get(key, key) for key, value in settings.items() if value is True]
    return "+".join(name for name in chosen if name != "include_prompt")


def check_modules(folder: Path) -> None:
    """Refuses a model of which only a part would be computed.

    Raises:
        InputError: modules.json lists a module that is not served.
    """
    served = {"Transformer", "Pooling", "Normalize"}
    for kind, place in listed_modules(folder):
        if kind not in served and place.name != DENSE:
            raise InputError(
                f"{folder}: modules.json lists {place.name} ({kind}), which is not served, and "
                "without which the vectors are others; give a model of Transformer, Pooling and "
                "Normalize"
            )


def save_dense(folder: Path, kernel: np.ndarray) -> None:
    """Write a dense pooler of kernel [D, D] as sentence-transformers' Dense."""
    width_in, width_out = kernel.shape
    settings = {
        "in_features": width_in,
        "out_features": width_out,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    _write(folder / "config.json", settings)
    save_params(folder / "model.safetensors", {"linear": {"kernel": kernel}})


def _write(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
