"""Rotary positions (arXiv:2104.09864) and what stretches them to longer texts."""

import math
from dataclasses import dataclass, fields
from inspect import get_annotations
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the frequencies are theta^(-2i/Dh), scaled by a factor, as Llama 3's, or
    as YaRN's (arXiv:2309.00071), which also scales cosine and sine by `attention_factor`."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(values: dict, path: Path) -> Rope:
    """Of the fields of a config.json, in the spelling of transformers 4 or 5.

    Raises:
        InputError: they are of a kind that is not served.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = given.get("rope_theta", values.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float) or theta <= 0:
        raise InputError(f"{path}: rope_theta is {theta}; give a number above 0")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "dynamic":  # scales beyond max_position_embeddings only, which is not read here
        kind = "default"
    if kind not in get_args(get_annotations(Rope)["kind"]):
        raise InputError(
            f"{path}: rotary positions of type {kind} are not served; give a model with default, "
            "linear, dynamic, llama3 or yarn"
        )
    names = {f.name for f in fields(Rope)} - {"theta", "kind"}
    more = {name: given[name] for name in names if given.get(name) is not None}
    if kind == "yarn":
        more.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        more.setdefault("attention_factor", _yarn_attention(given))
    return Rope(float(theta), kind, **more)


def _yarn_attention(given: dict) -> float:
    """What cosine and sine are scaled by where config.json does not say."""

    def scale(weight: float) -> float:
        factor = given["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = given.get("mscale"), given.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1.0)


def rotary(rope: Rope, width: int, positions: Int[Array, "..."]) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32[..., 1, Dh / 2].

    Source of the scalings: `modeling_rope_utils.py` of transformers. Long wavelengths are stretched
    by the factor, short ones are kept, those between are blended: by how often a wave turns within
    the original length (llama3), or by its place among all (yarn).
    """
    frequencies = rope.theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope.factor
    if rope.kind == "yarn":
        kept = 1 - jnp.clip(jnp.asarray(_ramp(rope, width), jnp.float32), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope.factor
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def _ramp(rope: Rope, width: int) -> list[float]:
    """Of each frequency: 0 at `beta_fast` turns within the original length, 1 at `beta_slow`."""

    def place(turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    return [(i - low) / (high - low) for i in range(width // 2)]


def rotate(x: Float[Array, "*n H Dh"], rotation: tuple[Array, Array]) -> Array:
    """Turns the pairs (i, i + Dh / 2) of every head, in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
