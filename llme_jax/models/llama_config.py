"""What config.json says of the Llama family, in the spelling of transformers 4 or 5."""

from dataclasses import dataclass, field
from pathlib import Path

from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import check_type
from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.rope import Rope, layer_kinds, read_rope, ropes_by_kind

# What transformers takes where config.json is silent, for the fields that old files leave out.
_OF_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}
_OF_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "eurobert": {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _OF_QWEN,
    "qwen3": _OF_QWEN | {"attention_bias": False, "head_dim": 128},
    "phi3": {
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
    },
    "gemma2": _OF_GEMMA
    | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": _OF_GEMMA | {"sliding_window_pattern": 6},
}
_GEMMA = ("gemma2", "gemma3_text")
_BIASED = ("llama", "qwen3", "eurobert", *_GEMMA)  # by attention_bias; others do not read it
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Where null says that there is none, and silence does not.
_OR_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_OR_NONE += ("num_key_value_heads",)  # as many as heads
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide what is computed."""

    model_type: str = field(repr=False)  # kept scores are named by the rest
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int
    head_dim: int
    rotary_width: int  # numbers of a head that are turned by its place
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # keys that each layer's queries see, themselves included
    # Of Gemma, whose weights of norms count from 1, and which has norms behind attention and
    # feed-forward too: the root of what queries' products are divided by, what keeps these and the
    # logits small, and Gemma 3's rotary positions of layers with windows.
    query_width: int | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    local_rope: Rope | None = None
    is_causal: bool = field(default=True, repr=False)  # do tokens see those before them alone?

    @property
    def gemma(self) -> bool:
        return self.query_width is not None

    @classmethod
    def read(cls, path: Path, given: dict) -> "LlamaConfig":
        """Read config.json, in the spelling of transformers 4 or 5.

        Raises:
            InputError: the file describes a model that this module does not compute.
        """
        family = given["model_type"]
        if missing := [name for name in _NEEDED if given.get(name) is None]:
            raise InputError(f"{path}: {', '.join(missing)} missing; add what the model has")
        for name in _NEEDED:
            check_type(path, name, given[name], int)
        values = _COMMON | _DEFAULTS[family] | {k: v for k, v in given.items() if v is not None}
        values |= {name: given[name] for name in _OR_NONE if name in given}
        own = _gemma(values, path) if family in _GEMMA else {}
        heads = values["num_attention_heads"]
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        values.setdefault("head_dim", max(values["hidden_size"] // heads, 1))
        optional = {"hidden_act": str, "rms_norm_eps": float}
        optional |= dict.fromkeys(("num_key_value_heads", "head_dim"), int)
        for name, kind in optional.items():
            check_type(path, name, values[name], kind)
        if heads % values["num_key_value_heads"]:
            raise InputError(
                f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{values['num_key_value_heads']}; correct one of them"
            )
        if values["hidden_act"] not in ACTIVATIONS:
            raise InputError(
                f"{path}: hidden_act {values['hidden_act']} is not served; give one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        head = values["head_dim"]
        turned = _phi(values, head, path) if family == "phi3" else head
        bias = family in _BIASED and values.get("attention_bias", False)
        names = (*_NEEDED, "hidden_act", "rms_norm_eps", "tie_word_embeddings")
        names += ("num_key_value_heads", "head_dim")
        rope = own.pop("rope", None) or read_rope(
            values, path, longrope=turned // 2 if family == "phi3" else None
        )
        return cls(
            model_type=family,
            **{name: values[name] for name in names},
            rotary_width=turned,
            rope=rope,
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=family in ("llama", "eurobert") and values["mlp_bias"],
            qk_norm=family in ("qwen3", "gemma3_text"),
            windows=_windows(path, values, family),
            is_causal=values.get("is_causal", True)
            and not (family in _GEMMA and values.get("use_bidirectional_attention", False)),
            **own,
        )


def _gemma(values: dict, path: Path) -> dict:
    """What Gemma has besides; what it calls by other names gets the usual ones in `values`."""
    caps = {}
    for ours, name in (("attention", "attn_logit"), ("logits", "final_logit")):
        caps[f"{ours}_softcap"] = cap = values.get(f"{name}_softcapping")
        if cap is not None and (type(cap) not in (int, float) or cap <= 0):
            raise InputError(f"{path}: {name}_softcapping is {cap}; give a number above 0 or null")
    values["hidden_act"] = values.get("hidden_activation", "gelu_pytorch_tanh")
    check_type(path, "query_pre_attn_scalar", values["query_pre_attn_scalar"], int)
    own = caps | {"query_width": values["query_pre_attn_scalar"]}
    if values["model_type"] == "gemma2":
        return own
    ropes = ropes_by_kind(
        path, values,
        full_attention=values.get("rope_theta", 1_000_000.0),
        sliding_attention=values.get("rope_local_base_freq", 10_000.0),
        scaled=("full_attention",),
    )  # fmt: skip
    return own | {"rope": ropes["full_attention"], "local_rope": ropes["sliding_attention"]}


def _phi(values: dict, head: int, path: Path) -> int:
    """How much of a head is turned; `values` gets the names of LongRoPE that are usual today."""
    rope = dict(values.pop("rope_scaling", None) or values.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn", "longrope"):
        length = values["original_max_position_embeddings"]
        check_type(path, "original_max_position_embeddings", length, int)
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": length}
    values["rope_parameters"] = rope
    part = rope.get("partial_rotary_factor", values["partial_rotary_factor"])
    width = int(head * part) if type(part) in (int, float) else 0
    if not 0 < width <= head or width % 2:
        raise InputError(
            f"{path}: partial_rotary_factor is {part}; give one that turns an even part of the "
            f"{head} numbers of a head"
        )
    return width


def _windows(path: Path, values: dict, family: str) -> tuple[int | None, ...]:
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    if family in ("mistral", "phi3"):
        return (window,) * layers
    if family in _GEMMA:
        every = values["sliding_window_pattern"]
        check_type(path, "sliding_window_pattern", every, int)
        windowed = [bool((i + 1) % every) for i in range(layers)]
    elif "use_sliding_window" in values:
        window = window if values["use_sliding_window"] else None
        last = values["max_window_layers"]
        windowed = [window is not None and i >= last for i in range(layers)]
    else:
        return (None,) * layers
    usual = ["sliding_attention" if has_one else "full_attention" for has_one in windowed]
    kinds = layer_kinds(path, values, usual)
    if window is None and "sliding_attention" in kinds:
        raise InputError(
            f"{path}: layer_types has sliding_attention, and there is no window: give "
            "sliding_window, or full_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
