"""What the families of encoders share: the fields of config.json, attention over packed texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import check_type
from llme_jax.models.attention import attention, biased_attention, causal_attention
from llme_jax.models.flash_attention import Reach, flash_attention, reach
from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.packing import Packing
from llme_jax.models.platform import AttentionKernel, attention_kernel


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The fields of config.json that decide what is computed, by BERT's names; families add more.

    Attributes:
        names: pairs of parts of tensors' names, ours and those in the family's files, where they
            are not the same; replaced in this order.
        module: what sentence-transformers calls the module that the family's models begin with.
        terms: positions that attention scores by themselves.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    source: str = field(compare=False, repr=False)  # all of config.json, for saving

    names: ClassVar[Sequence[tuple[str, str]]] = ()
    module: ClassVar[str] = "Transformer"
    terms: ClassVar[frozenset[str]] = frozenset()

    def saved(self) -> str:
        """config.json for the float32 weights that this package saves."""
        content = json.loads(self.source)
        # transformers would otherwise load them in the type that the source was stored in.
        content |= {name: "float32" for name in ("dtype", "torch_dtype") if name in content}
        return json.dumps(content, indent=2) + "\n"

    @property
    def max_length(self) -> int:
        """Tokens the longest text may have."""
        return self.max_position_embeddings

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def causal(self) -> bool:
        """Whether tokens see those before them alone."""
        return False

    @property
    def poolings(self) -> tuple[str, ...]:
        """Those served, the first of them where nothing asks for one."""
        return ("last_token", "mean") if self.causal else ("cls", "mean", "last_token")

    @property
    def splits(self) -> bool:
        """Whether transformers makes several modules of a tensor in the family's files."""
        return False

    @property
    def attended_dropout_prob(self) -> float:
        """Of what attention puts out."""
        return self.hidden_dropout_prob

    @property
    def softcap(self) -> float | None:
        """What keeps the scores of attention small, see `softcapped`; of causal models alone."""
        return None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far from themselves each layer's tokens see; None for all of their text."""
        return (None,) * self.num_hidden_layers


_TYPES = {f.name: f.type for f in fields(Architecture) if f.name != "source"}
# What transformers takes where old files are silent.
UNSAID = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def checked(
    path: Path, given: dict, more: Sequence[str] = (), renamed: dict | None = None, **unsaid
) -> dict:
    """The fields of Architecture, and more whole numbers, as a config.json gives them.

    Args:
        renamed: values that the file has under other names, by ours.
        unsaid: what fields are that the file leaves out, besides UNSAID.

    Raises:
        InputError: one is missing, or has a value that is not served.
    """
    source = json.dumps(given)
    given = given | (renamed or {})
    given = UNSAID | unsaid | {name: value for name, value in given.items() if value is not None}
    names = [*_TYPES, *more]
    if missing := [name for name in names if name not in given]:
        raise InputError(f"{path}: {', '.join(missing)} missing; add what the model has")
    for name in names:
        check_type(path, name, given[name], _TYPES.get(name, int))
    if given["hidden_act"] not in ACTIVATIONS:
        raise InputError(
            f"{path}: hidden_act {given['hidden_act']} is not served; give one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if given["hidden_size"] % given["num_attention_heads"]:
        raise InputError(
            f"{path}: hidden_size {given['hidden_size']} is not a multiple of "
            f"num_attention_heads {given['num_attention_heads']}; correct one of them"
        )
    return {name: given[name] for name in names} | {"source": source}


def check_width(config: Architecture, width: int) -> None:
    """Refuses texts that are padded beyond a model's positions.

    Raises:
        InputError: they are.
    """
    if width > config.max_length:
        raise InputError(
            f"texts are padded to {width} tokens, the encoder has {config.max_length} "
            "positions: lower --query_max_length and --key_max_length"
        )


class How(NamedTuple):
    """How attention is computed.

    Attributes:
        kernel: by what.
        causal: whether tokens see those before them alone.
        reach: for flash, who sees whom.
        window: how far from itself a token sees; None for all of its text.
        softcap: of the scores; None for none.
        bias: what is added to the scores of a text's tokens, for each block of texts.
        first: whether for the texts' first tokens alone.
    """

    kernel: str
    causal: bool
    reach: Reach | None = None
    window: int | None = None
    softcap: float | None = None
    bias: Sequence[Float[Array, "H L L"]] | None = None
    first: bool = False

    @property
    def queries(self) -> bool:
        """Whether queries of first tokens are enough."""
        return self.first and self.reach is None


def how_to_attend(
    config: Architecture,
    setting: AttentionKernel,
    dtype: jnp.dtype,
    packing: Packing,
    *,
    drops: bool,
    biased: bool = False,
) -> list[How]:
    """Of every layer; decided while tracing.

    Args:
        setting: --attention.
        drops: whether there is dropout.
        biased: whether something will be added to the scores.

    Raises:
        InputError: the texts are longer than the model reads, or the setting names a kernel that
            cannot.
    """
    longest = max(packing.widths)
    check_width(config, longest)
    kernel = attention_kernel(
        setting, dtype, heads=config.num_attention_heads,
        width=config.head_width, longest=longest, biased=biased, causal=config.causal,
        softcapped=config.softcap is not None,
        drops=drops and config.attention_probs_dropout_prob > 0,
    )  # fmt: skip
    # A window that reaches over the longest text is none.
    windows = [w if w is not None and w < longest - 1 else None for w in config.windows]
    reaches = dict.fromkeys(windows)
    if kernel == "flash":
        reaches = {w: reach(*packing.spans, longest, w) for w in reaches}
    return [How(kernel, config.causal, reaches[w], w, config.softcap) for w in windows]


def attend(
    q: Float[Array, "_ D"],
    k: Float[Array, "T E"],
    v: Float[Array, "T E"],
    packing: Packing,
    how: How,
    heads: int,
    *,
    key: Array | None,
    rate: float,
) -> Float[Array, "_ D"]:
    """softmax(q k^T / sqrt(Dh)) v of every head, within each text; [R, D] for first tokens alone.

    Args:
        q: of all tokens; where `how.queries` says so, of the texts' first ones.
        k, v: of fewer heads, each of which serves several of the queries', where E is less than D.
        key: attention weights are dropped at `rate` where it is given.
    """
    width = q.shape[1] // heads
    if not how.causal and k.shape[1] < q.shape[1]:
        k, v = (_repeated(x, width, q.shape[1]) for x in (k, v))
    if how.reach:
        attended = flash_attention(
            *(q, k, v, how.reach, heads), window=how.window,
            key=key, numbers=packing.tokens.texts, rate=rate,
        )  # fmt: skip
        return packing.first(attended) if how.first else attended
    q = [x[:, None] for x in packing.split(q)] if how.first else packing.in_blocks(q)
    k, v = packing.in_blocks(k), packing.in_blocks(v)
    biases = how.bias or [None] * len(q)
    attended = []
    for *parts, bias, lengths, numbers in zip(
        q, k, v, biases, packing.lengths, packing.numbers, strict=True
    ):
        split = [part.reshape(*part.shape[:2], -1, width) for part in parts]
        drawn = {"key": key, "numbers": numbers, "rate": rate}
        if how.causal:
            window = None if how.window is None else how.window + 1  # its own key included
            out = causal_attention(*split, window=window, softcap=how.softcap, kernel=how.kernel)
        elif bias is None:
            out = attention(*split, lengths, kernel=how.kernel, window=how.window, **drawn)
        else:
            bias = bias[:, : parts[0].shape[1]]
            bias = jnp.broadcast_to(bias, (len(lengths), *bias.shape))
            out = biased_attention(*split, bias, lengths, **drawn)
        attended.append(out.reshape(parts[0].shape))
    return jnp.concatenate(attended)[:, 0] if how.first else packing.from_blocks(attended)


def _repeated(x: Float[Array, "T E"], width: int, whole: int) -> Float[Array, "T D"]:
    """Every head as often as queries' heads share it."""
    x = x.reshape(len(x), -1, width)
    return jnp.repeat(x, whole // (x.shape[1] * width), axis=1).reshape(len(x), whole)
