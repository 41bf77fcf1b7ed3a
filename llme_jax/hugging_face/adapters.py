"""LoRA adapters as peft saves them (arXiv:2106.09685), read together with the weights of a base."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llme_jax.errors import InputError

_LORA = re.compile(r"\.lora_(A|B)(\.default)?\.weight$")


class Adapted:
    """W + scale B A of a tensor W [out, in], to be read as a tensor is, in float32."""

    def __init__(self, whole, a: np.ndarray, b: np.ndarray, scale: float):
        self._whole, self._a, self._b = whole, a.astype(np.float32), scale * b.astype(np.float32)
        self.shape, self.dtype = whole.shape, whole.dtype

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = (*(() if index is ... else index), *[slice(None)] * 2)[:2]
        whole = np.asarray(self._whole[index], np.float32)
        return whole + self._b[rows] @ self._a[:, columns]


def adapted(
    tensors: Mapping[str, object],
    given: dict,
    own: Mapping[str, object],
    folder: Path,
    unread: re.Pattern,
) -> dict:
    """The tensors of a base with those of an adapter in them.

    Args:
        given: adapter_config.json.
        own: the adapter's tensors, by peft's names; modules that were trained whole are among them.
        folder: of the adapter, for messages.
        unread: finds names of what is not read, and may have adapters that the base has no weight
            for: `all-linear` takes in BERT's pooler.

    Raises:
        InputError: they do not belong together.
    """
    out, halves = dict(tensors), {}
    for name, tensor in own.items():
        name = name.removeprefix("base_model.model.")
        if found := _LORA.search(name):
            halves.setdefault(name[: found.start()], {})[found[1]] = tensor
        elif "lora_" in name:
            raise InputError(
                f"{folder}: {name} is of an adapter that is not served; merge it into its base"
            )
        else:
            out[_named(out, name) or name] = tensor
    for module, half in halves.items():
        name = _named(out, f"{module}.weight")
        if name is None and unread.search(module):
            continue
        if name is None:
            raise InputError(
                f"{folder}: the adapter has {module}, its base has no such weight; give the base "
                "that it was trained for"
            )
        a, b = (np.asarray(half[part][...]) if part in half else None for part in "AB")
        if a is None or b is None or (b.shape[0], a.shape[1]) != tuple(out[name].shape):
            raise InputError(
                f"{folder}: the adapter of {module} does not fit its base's {name}, which is "
                f"{out[name].shape}; give the base that it was trained for"
            )
        out[name] = Adapted(out[name], a, b, _scale(given, module, len(a)))
    return out


def _scale(given: dict, module: str, rank: int) -> float:
    alpha = given.get("lora_alpha", 8)
    for pattern, value in (given.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)


def _named(tensors: Mapping[str, object], name: str) -> str | None:
    """What a file calls a tensor: with or without the prefix of the model's class."""
    ends: list[Callable[[str], bool]] = [
        lambda other: other == name,
        lambda other: other.endswith(f".{name}"),
        lambda other: name.endswith(f".{other}"),
    ]
    return next((other for fits in ends for other in tensors if fits(other)), None)
