"""Rotary positions (arXiv:2104.09864) and what stretches them to longer texts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.errors import InputError
from llme_jax.hugging_face.config_keys import ROPE


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
_PART = "partial_rotary_factor"
_NEEDED = {  # what transformers has no value of its own for
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_MORE = {  # what it reads besides
    "llama3": ("original_max_position_embeddings",),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("original_max_position_embeddings", "factor", "attention_factor"),
}
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
KINDS = ("full_attention", "sliding_attention")  # of layers


def read_rope(values: dict, path: Path, longrope: int | None = None) -> Rope:
    """Of the fields of a config.json, in the spelling of transformers 4 or 5.

    Args:
        longrope: where LongRoPE alone is served, how many wavelengths there are.

    Raises:
        InputError: they are of a kind that is not served, or something is missing.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    ROPE.check(path, {k: v for k, v in given.items() if longrope is None or k != _PART})
    theta = given.get("rope_theta", values.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float) or theta <= 0:
        raise InputError(f"{path}: rope_theta is {theta}; give a number above 0")
    kind = given.get("rope_type", given.get("type", "default"))
    served = _KINDS if longrope is None else ("default", "longrope")
    if kind not in served:
        raise InputError(
            f"{path}: rotary positions of type {kind} are not served; give a model with one of "
            f"{', '.join(served)}"
        )
    if kind == "dynamic":  # scales beyond max_position_embeddings only, which is not read here
        kind = "default"
    needed, more = _NEEDED.get(kind, ()), {}
    for name in (*needed, *_MORE.get(kind, ())):
        value = given.get(name)
        if value is None and name not in needed:
            continue
        least = 0 if name == "attention_factor" else 1e-9
        if type(value) not in (int, float) or value < least:
            raise InputError(
                f"{path}: {name} of rotary positions of type {kind} is {value}; give a number "
                "above 0"
            )
        more[name] = value if name == "original_max_position_embeddings" else float(value)
    if kind in ("llama3", "yarn"):
        more.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if kind == "yarn":
        more.setdefault("attention_factor", _yarn_attention(given))
        more["truncate"] = bool(given.get("truncate", True))
    if kind == "longrope":
        more |= {name: _factors(given, path, name, longrope) for name in _FACTORS}
        more.setdefault("attention_factor", _longrope_attention(more, values))
    return Rope(float(theta), kind, **more)


def ropes_by_kind(path: Path, given: dict, *, scaled: tuple[str, ...], **thetas) -> dict[str, Rope]:
    """Those of layers that see all of a text, and of those that see a window.

    Args:
        given: config.json, with `rope_parameters` by kind, or as transformers 4 has it.
        scaled: kinds that `rope_scaling` is for.
        thetas: of each of KINDS, where nothing says another one.

    Raises:
        InputError: as `read_rope`.
    """
    by_kind, scaling = given.get("rope_parameters") or {}, given.get("rope_scaling")
    if not all(kind in KINDS and isinstance(of, dict) for kind, of in by_kind.items()):
        raise InputError(
            f"{path}: rope_parameters has {', '.join(by_kind)}; give an object for each of "
            f"{' and '.join(KINDS)}"
        )
    if scaling and (by_kind or "rope_type" not in scaling):
        what = "rope_parameters too" if by_kind else "no rope_type, without which it is not read"
        raise InputError(f"{path}: has rope_scaling and {what}; give rope_parameters by kind alone")
    ropes = {}
    for kind, theta in thetas.items():
        of = by_kind.get(kind, {}) | ((scaling or {}) if kind in scaled else {})
        if "truncate" in of and not of["truncate"]:
            raise InputError(f"{path}: truncate false of rope_parameters is not served by kind")
        shared = {"max_position_embeddings": given["max_position_embeddings"]}
        ropes[kind] = read_rope(shared | {"rope_theta": theta, "rope_parameters": of}, path)
    return ropes


def layer_kinds(path: Path, given: dict, usual: list[str]) -> list[str]:
    """Which layers see a window: `layer_types`, or the usual kinds.

    Raises:
        InputError: there are others, or not one for each layer.
    """
    kinds = given.get("layer_types") or usual
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(usual)
        or not all(kind in KINDS for kind in kinds)
    ):
        raise InputError(
            f"{path}: layer_types {kinds} is not served; give {' or '.join(KINDS)} for each of the "
            f"{len(usual)} layers"
        )
    return kinds


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
