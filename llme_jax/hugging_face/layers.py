"""Layers behind pooling in folders of sentence-transformers: what each computes, its weights."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llme_jax.errors import InputError
from llme_jax.hugging_face import keys
from llme_jax.hugging_face.foreign import check_type, read_json
from llme_jax.hugging_face.weights import load_params, read_torch

TORCH = {
    "identity": "torch.nn.modules.linear.Identity",
    **{
        name.lower(): f"torch.nn.modules.activation.{name}"
        for name in ("Tanh", "Sigmoid", "GELU", "ReLU", "SiLU")
    },
}
EPSILON = 1e-5  # of LayerNorm
VECTOR = "sentence_embedding"  # what goes from module to module


class Layer(NamedTuple):
    """A layer behind pooling; a Dense has a bias if its file has one.

    Attributes:
        kind: Dense or LayerNorm.
        width: numbers that come out.
        activation: of a Dense, the name of its class in torch.nn, in lower case.
    """

    kind: str
    width: int
    activation: str = "identity"


Layers = list[tuple[Layer, dict]]  # each with its parameters, in order


def load_layers(places: tuple[tuple[str, Path], ...], width: int, last: str = VECTOR) -> Layers:
    """The modules behind pooling; vectors of `width` numbers go into the first.

    Args:
        last: what the last one's result is called.

    Raises:
        InputError: one is damaged, does not fit, or computes something that is not served.
    """
    layers = []
    for i, (kind, place) in enumerate(places, 1):
        if kind == "Dense":
            layers.append(_load_dense(place, width, VECTOR if i < len(places) else last))
        else:
            layers.append(_load_norm(place, width))
        width = layers[-1][0].width
    return layers


def _load_norm(place: Path, width: int) -> tuple[Layer, dict]:
    """A LayerNorm and its parameters: scale [D] and bias [D]."""
    path = place / "config.json"
    settings = read_json(path)
    keys.LAYER_NORM.check(path, settings)
    check_type(path, "dimension", settings.get("dimension"), int)
    if settings["dimension"] != width:
        raise InputError(
            f"{path}: takes vectors of {settings['dimension']} numbers, those before it have "
            f"{width}; give the layer that was trained with this model"
        )
    shape = jax.ShapeDtypeStruct((width,), np.float32)
    params = load_params(place, {"norm": {"scale": shape, "bias": shape}})["norm"]
    return Layer("LayerNorm", width), params


def _load_dense(place: Path, width: int, output: str) -> tuple[Layer, dict]:
    """A Dense and its parameters: a kernel [D, E] and, where it has one, a bias [E]."""
    path = place / "config.json"
    settings = read_json(path)
    keys.DENSE.check(path, settings)
    if (named := settings.get("module_output_name") or VECTOR) != output:
        raise InputError(
            f"{path}: module_output_name is {named}, and is not served here; give a model with "
            f"{output}"
        )
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
    activation = str(settings.get("activation_function", TORCH["tanh"]))
    package, _, name = activation.lower().rpartition(".")
    if not package.startswith("torch.") or name not in TORCH:
        raise InputError(
            f"{path}: activation_function {activation} is not served; known are "
            f"{', '.join(TORCH)}, of torch"
        )
    shapes = {"kernel": (into, out)} | ({"bias": (out,)} if bias else {})
    shapes = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    return Layer("Dense", out, name), load_params(place, {"linear": shapes})["linear"]


def load_reference_dense(folder: Path) -> np.ndarray | None:
    """The kernel in LLM-Embedder's own file, which lies beside the encoder; None without one."""
    path = reference_dense(folder)
    return np.ascontiguousarray(read_torch(path)["weight"].T) if path.is_file() else None


def reference_dense(folder: Path) -> Path:
    return folder / "dense_pooler.bin"
