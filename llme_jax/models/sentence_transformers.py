"""The files beside an encoder by which sentence-transformers opens it: read, and written.

Class paths and keys are those of sentence-transformers 2 to 5; version 6 reads them too.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import check_type, listed_modules, model_root, read_json
from llme_jax.hugging_face.weights import load_params, read_torch, save_params
from llme_jax.models.pooling import AFTER_DENSE, Dense

_SIMILARITY = {"cos": "cosine", "ip": "dot", "l2": "euclidean"}
_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last_token": "pooling_mode_lasttoken",
}
_TORCH = {
    "identity": "torch.nn.modules.linear.Identity",
    **{
        name.lower(): f"torch.nn.modules.activation.{name}"
        for name in ("Tanh", "Sigmoid", "GELU", "ReLU", "SiLU")
    },
}
_SERVED = "Transformer and Pooling, or StaticEmbedding, then Dense and Normalize"
_KEY_PROMPTS = ("document", "passage", "corpus")  # in the order that `encode_document` looks


class Modules(NamedTuple):
    """What a folder says of the way from token vectors to scores.

    Attributes:
        pooling: `cls`, `mean`, or the name of another that is not served; None: nothing is said.
        dense: the folders of its Dense modules, in order.
        similarity: `cos`, `ip`, `l2`, or the name of another; None: nothing is said.
        truncate_dim: how many numbers of a vector are kept; None: all.
    """

    pooling: str | None
    dense: tuple[Path, ...]
    similarity: str | None
    truncate_dim: int | None


def read_modules(folder: Path) -> Modules:
    """
    Args:
        folder: where config.json lies.

    Raises:
        InputError: modules.json lists one that is not served, or in an order that is not: a part
            of the model would be left out. Or truncate_dim is no whole number above 0.
    """
    listed = listed_modules(model_root(folder))
    kinds = [kind for kind, _ in listed]
    for kind, place in listed:
        if kind not in ("Transformer", "Pooling", "StaticEmbedding", "Dense", "Normalize"):
            raise InputError(
                f"{folder}: modules.json lists {place.name} ({kind}), which is not served, and "
                f"without which the vectors are others; give a model of {_SERVED}"
            )
    dense = tuple(place for kind, place in listed if kind == "Dense")
    start = ["StaticEmbedding"] if "StaticEmbedding" in kinds else ["Transformer", "Pooling"]
    served = [*start, *["Dense"] * len(dense), "Normalize"]
    if listed and kinds not in (served, served[:-1], ["Transformer"]):
        raise InputError(
            f"{folder}: modules.json lists {', '.join(kinds)}, an order that is not served; give a "
            f"model of {_SERVED}, in this order"
        )
    similarity = _similarity(folder)
    if kinds[-1:] == ["Normalize"] and similarity in (None, "ip"):
        similarity = "cos"
    return Modules(_pooling(folder, dict(listed)), dense, similarity, _truncate_dim(folder))


def _pooling(folder: Path, of_kind: dict[str, Path]) -> str | None:
    path = of_kind.get("Pooling", folder / "1_Pooling") / "config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    if "pooling_mode" in settings:  # sentence-transformers 6
        mode = settings["pooling_mode"]
        modes = map(str, mode) if isinstance(mode, list) else [str(mode)]
        return "+".join("last_token" if name == "lasttoken" else name for name in modes)
    names = {key: name for name, key in _POOLING.items()}
    chosen = [names.get(key, key) for key, value in settings.items() if value is True]
    return "+".join(name for name in chosen if name != "include_prompt")


def _similarity(folder: Path) -> str | None:
    named = _settings(folder).get("similarity_fn_name")
    return {name: metric for metric, name in _SIMILARITY.items()}.get(named, named)


def _truncate_dim(folder: Path) -> int | None:
    dim = _settings(folder).get("truncate_dim")
    if dim is not None:
        path = model_root(folder) / "config_sentence_transformers.json"
        check_type(path, "truncate_dim", dim, int)
    return dim


def _settings(folder: Path) -> dict:
    """config_sentence_transformers.json; empty without one."""
    path = model_root(folder) / "config_sentence_transformers.json"
    return read_json(path) if path.is_file() else {}


def read_prompts(folder: Path) -> tuple[str, str] | None:
    """The folder's own texts before a query and before a key; None where it has none.

    Which of its prompts these are is decided as in sentence-transformers' `encode_query` and
    `encode_document`.

    Raises:
        InputError: they are no texts.
    """
    settings = _settings(folder)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise InputError(
            f"{folder}: prompts in config_sentence_transformers.json are not texts by name; copy "
            "the file again"
        )
    usual = prompts.get(settings.get("default_prompt_name"))
    key = next((prompts[name] for name in _KEY_PROMPTS if name in prompts), usual)
    query = prompts.get("query", usual)
    return None if query is None and key is None else (query or "", key or "")


def load_dense(place: Path, width: int) -> tuple[Dense, dict]:
    """A Dense module and its parameters: a kernel [D, E] and, where it has one, a bias [E].

    Args:
        place: its folder.
        width: D, of the vectors that go in.

    Raises:
        InputError: it is damaged, does not fit, or computes something that is not served.
    """
    path = place / "config.json"
    settings = read_json(path)
    into, out = settings.get("in_features"), settings.get("out_features")
    bias = settings.get("bias", True)
    for name, value, kind in (
        ("in_features", into, int),
        ("out_features", out, int),
        ("bias", bias, bool),
    ):
        check_type(path, name, value, kind)
    if into != width:
        raise InputError(
            f"{path}: takes vectors of {into} numbers, those before it have {width}; give the "
            "layer that was trained with this encoder"
        )
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if _TORCH.get(name := activation.split(".")[-1].lower()) is None:
        raise InputError(
            f"{path}: activation_function {activation} is not served; known are "
            f"{', '.join(AFTER_DENSE)}"
        )
    other = {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
        "use_residual": False,
    }
    for key, usual in other.items():
        if settings.get(key) not in (None, usual):
            raise InputError(
                f"{path}: {key} {json.dumps(settings[key])} is not served; give a model without"
            )
    shapes = {"kernel": (into, out)} | ({"bias": (out,)} if bias else {})
    shapes = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    return Dense(out, name), load_params(place, {"linear": shapes})["linear"]


def load_reference_dense(folder: Path) -> np.ndarray | None:
    """The kernel in LLM-Embedder's own file, which lies beside the encoder; None without one."""
    path = reference_dense(folder)
    return np.ascontiguousarray(read_torch(path)["weight"].T) if path.is_file() else None


def reference_dense(folder: Path) -> Path:
    return folder / "dense_pooler.bin"


def save_modules(
    folder: Path,
    *,
    module: str,
    pooling: str,
    dense: list[tuple[Dense, dict]],
    metric: str,
    width: int,
    max_length: int,
    prompts: dict[str, str],
    truncate_dim: int | None,
) -> None:
    """Write modules.json and what it names into the Hugging Face folder `folder`.

    Args:
        module: the first one; StaticEmbedding pools by itself.
        dense: the layers behind pooling, as `load_dense` gives them.
        width: D, of the token vectors.
        max_length: tokens a text keeps.
        prompts: the texts that go in front, by name.
        truncate_dim: numbers of a vector that are kept; None for all.
    """
    modules = [("", module)]
    if module == "Transformer":
        modules.append(("1_Pooling", "Pooling"))
        modes = {key: pooling == name for name, key in _POOLING.items()}
        _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
        limits = {"max_seq_length": max_length, "do_lower_case": False}
        _write(folder / "sentence_bert_config.json", limits)
    for layer, params in dense:
        modules.append((f"{len(modules)}_Dense", "Dense"))
        save_dense(folder / modules[-1][0], layer, params)
    if metric == "cos":
        modules.append(("normalize", "Normalize"))
        (folder / "normalize").mkdir()
    described = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", described)
    settings = {
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": _SIMILARITY[metric],
    }
    settings |= {} if truncate_dim is None else {"truncate_dim": truncate_dim}
    _write(folder / "config_sentence_transformers.json", settings)


def save_dense(place: Path, layer: Dense, params: dict) -> None:
    """Write a Dense module into the folder `place`."""
    settings = {
        "in_features": len(params["kernel"]),
        "out_features": layer.width,
        "bias": "bias" in params,
        "activation_function": _TORCH[layer.activation],
    }
    _write(place / "config.json", settings)
    save_params(place / "model.safetensors", {"linear": params})


def _write(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
