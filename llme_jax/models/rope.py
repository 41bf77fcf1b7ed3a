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
    as those of YaRN (arXiv:2309.00071) or LongRoPE (arXiv:2402.13753), which also scale cosine and
    sine by `attention_factor`."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    # What each wavelength is stretched by, in texts up to the original length and in longer ones.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


_FACTORS = ("short_factor", "long_factor")


def read_rope(values: dict, path: Path, longrope: int | None = None) -> Rope:
    """Of the fields of a config.json, in the spelling of transformers 4 or 5.

    Args:
        longrope: where LongRoPE is served, how many wavelengths there are.

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
    served = get_args(get_annotations(Rope)["kind"])
    if kind not in served or (kind == "longrope" and not longrope):
        raise InputError(
            f"{path}: rotary positions of type {kind} are not served; give a model with default, "
            "linear, dynamic, llama3 or yarn"
        )
    names = {f.name for f in fields(Rope)} - {"theta", "kind", *_FACTORS}
    more = {name: given[name] for name in names if given.get(name) is not None}
    if kind == "yarn":
        more.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        more.setdefault("attention_factor", _yarn_attention(given))
    if kind == "longrope":
        more |= {name: _factors(given, path, name, longrope) for name in _FACTORS}
        more.setdefault("attention_factor", _longrope_attention(more, values))
    return Rope(float(theta), kind, **more)


def _factors(given: dict, path: Path, name: str, count: int) -> tuple[float, ...]:
    found = given.get(name)
    fits = isinstance(found, list) and len(found) == count
    if not fits or not all(type(x) in (int, float) and x > 0 for x in found):
        raise InputError(
            f"{path}: {name} has to be a list of {count} numbers above 0, one for each pair of "
            "numbers of a head that are turned; give the config.json that belongs to the model"
        )
    return tuple(found)


def _longrope_attention(given: dict, values: dict) -> float:
    original = given["original_max_position_embeddings"]
    factor = given.get("factor", values["max_position_embeddings"] / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _yarn_attention(given: dict) -> float:
    """What cosine and sine are scaled by where config.json does not say."""

    def scale(weight: float) -> float:
        factor = given["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = given.get("mscale"), given.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1.0)


def rotary(
    rope: Rope, width: int, positions: Int[Array, "..."], lengths: Int[Array, "B"] | None = None
) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32[..., 1, width / 2].

    Source of the scalings: `modeling_rope_utils.py` of transformers. Long wavelengths are stretched
    by the factor, short ones are kept, those between are blended: by how often a wave turns within
    the original length (llama3), or by its place among all (yarn). LongRoPE stretches each by a
    factor of its own, which depends on how long the text is.

    Args:
        width: of a head, or of the part of it that is turned.
        positions: for LongRoPE [B, L] or [L]; then the result is [B, L, 1, width / 2].
        lengths: of the texts, for LongRoPE.
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
    if rope.kind == "longrope":
        short, long = (jnp.float32(x) for x in (rope.short_factor, rope.long_factor))
        is_long = (lengths > rope.original_max_position_embeddings)[:, None, None, None]
        frequencies = frequencies / jnp.where(is_long, long, short)
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
    """Turns the pairs (i, i + width / 2) of every head's first `width` numbers, in float32."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
