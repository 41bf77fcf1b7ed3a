"""Rerankers that read query and key together: an encoder with its classification head of one score.

Their parameters have the names of Hugging Face's sequence classifiers (`bert.pooler.dense`,
`classifier`), so that folders of either kind are the same folders.
"""

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.hugging_face.tokenizer import (
    CLASSES,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
)
from llme_jax.hugging_face.weights import (
    find_model,
    has_weights,
    load_params,
    open_tensors,
    save_params,
    shapes_of_params,
)
from llme_jax.models.dropout import dropout, fold_in
from llme_jax.models.encoder import Architecture
from llme_jax.models.families import ENCODERS, forward_flops, read_config
from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.lora import Lora, adapted, merged, save_adapters
from llme_jax.models.packing import Packing, padded
from llme_jax.models.platform import AttentionKernel, compute_dtype
from llme_jax.models.pooling import mean

_logger = logging.getLogger(__name__)

FOLDER = "ranker"  # of a checkpoint


@dataclass(frozen=True)
class Head:
    """The head of a family: out(drop(norm(activation(dense(drop(first token))))))."""

    prefix: str  # what the encoder's parameters are under
    dense: tuple[str, ...]
    out: tuple[str, ...]
    activation: Literal["tanh", "gelu", "relu"]
    norm: tuple[str, ...] | None = None  # a LayerNorm, where there is one
    drops_first: str | None = None  # the rate's name in config.json, None for no dropout there
    drops_last: str = "classifier_dropout"  # the same; hidden_dropout_prob where it is not set


_OWN = {"dense": ("classifier", "dense"), "out": ("classifier", "out_proj")}
_ROBERTA = Head("roberta", **_OWN, activation="tanh", drops_first="classifier_dropout")
HEADS = {
    **{
        family: Head(family, (family, "pooler", "dense"), ("classifier",), activation="tanh")
        for family in ("bert", "nomic_bert", "gte")
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Head("electra", **_OWN, activation="gelu", drops_first="classifier_dropout"),
    "mpnet": Head(
        "mpnet", **_OWN, activation="tanh",
        drops_first="hidden_dropout_prob", drops_last="hidden_dropout_prob",
    ),
    "distilbert": Head(
        "distilbert", dense=("pre_classifier",), out=("classifier",), activation="relu",
        drops_last="seq_classif_dropout",
    ),
    "modernbert": Head(
        "model", dense=("head", "dense"), out=("classifier",), activation="gelu",
        norm=("head", "norm"),
    ),
    "deberta-v2": Head(
        "deberta", dense=("pooler", "dense"), out=("classifier",), activation="gelu",
        drops_first="pooler_dropout", drops_last="cls_dropout",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CrossEncoder:
    """What is computed, without the parameters; a static argument of jitted functions."""

    config: Architecture
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    rates: tuple[float, float]  # of the head's dropouts
    pooling: Literal["cls", "mean"]  # mean, which ModernBERT may ask for: of all tokens
    typed: bool  # do the two texts of a pair have types of their own?
    attention: AttentionKernel = "auto"
    lora: Lora | None = None  # where params has adapters, of `lora`, and the encoder, of `base`

    @property
    def head(self) -> Head:
        return HEADS[self.config.model_type]

    @property
    def sharding_rules(self) -> tuple:
        """The rules that place the parameters."""
        return ENCODERS[self.config.model_type].SHARDING

    @property
    def adapter_folders(self) -> tuple[str, ...]:
        """As of `DualEncoder`."""
        return ("adapter",) if self.lora and not self.config.splits else ()

    def base(self, params: dict) -> dict:
        """The encoder's parameters."""
        if self.lora:
            return adapted(params["base"], params["lora"]["base"], self.lora)
        return {k: v for k, v in params[self.head.prefix].items() if k != "pooler"}

    def flops(self, params: dict, tokens: float | int, pairs: float | int) -> float:
        """Operations of `score` without the head, see `forward_flops`."""
        base = params["base"] if self.lora else self.base(params)
        return forward_flops(self.config, base, tokens, pairs)

    def apart(self, params: dict) -> dict:
        """The encoder's parameters as `base`, and the head's, with the names that files have."""
        base, prefix = self.base(params), self.head.prefix
        inner = {k: v for k, v in params[prefix].items() if k not in base}
        head = {k: v for k, v in params.items() if k != prefix}
        return {"base": base} | head | ({prefix: inner} if inner else {})

    def score(
        self,
        params: dict,
        ids: Int[Array, "B L"],
        lengths: Int[Array, "B"],
        second: Int[Array, "B"],
    ) -> Float[Array, "B"]:
        """Scores of right-padded pairs, see `score_packed`.

        Args:
            lengths: tokens of each pair, special tokens included.
            second: where the key begins.
        """
        packing = padded(lengths, ids.shape[1], second)
        return self.score_packed(params, ids.reshape(-1), packing)

    def score_packed(
        self,
        params: dict,
        ids: Int[Array, "T"],
        packing: Packing,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "R"]:
        """Raw scores (logits) of pairs in float32; the higher, the more relevant.

        Args:
            params: as `load_cross_encoder` gives them.
            dropout_key: drops as config.json says; None for no dropout.
        """
        head, family = self.head, ENCODERS[self.config.model_type]
        keys = [fold_in(dropout_key, site) for site in range(3)]
        if not self.typed:
            packing = replace(packing, in_second=None)
        x = family.hidden_states(
            *(self.config, self.dtype, self.remat, self.attention),
            *(self.base(params), ids, packing),
            dropout_key=keys[0],
            first=self.pooling == "cls",
        )
        x = mean(x, packing) if self.pooling == "mean" else x
        x = dropout(x, keys[1], self.rates[0], packing.firsts)
        x = _ACTIVATIONS[head.activation](_linear(x, _at(params, head.dense)))
        if head.norm:
            x = _normed(x, _at(params, head.norm), self.config.layer_norm_eps)
        x = dropout(x, keys[2], self.rates[1], packing.firsts)
        return _linear(x, _at(params, head.out))[:, 0]


_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}


def _linear(x: Float[Array, "B D"], layer: dict) -> Float[Array, "B F"]:
    return jnp.matmul(x, layer["kernel"], precision="highest") + layer.get("bias", 0.0)


def _normed(x: Float[Array, "B D"], layer: dict, epsilon: float) -> Float[Array, "B D"]:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * layer["scale"] + layer.get("bias", 0.0)


def load_cross_encoder(
    name: str,
    *,
    dtype: Literal["auto", "fp32", "bf16"],
    cache_dir: str | None,
    max_length: int,
    remat: bool = False,
    attention: AttentionKernel = "auto",
    seed: int = 0,
    weights: bool = True,
) -> tuple[CrossEncoder, dict, object]:
    """Reads a reranker, or an encoder that is to become one.

    Args:
        name: a folder or a name of the Hub.
        max_length: tokens of the longest pair.
        seed: of the parts of the head that the folder does not have.
        weights: False for the shapes of the parameters, whose weights need not be there.

    Returns:
        The encoder; its parameters, a nested dict of float32 numpy arrays; the tokenizer, a fast
        one of transformers, which neither cuts nor pads by itself.

    Raises:
        InputError: the model cannot be found, read or served, gives more than one score, or reads
            shorter texts than `max_length`.
    """
    folder = find_model(name, cache_dir, weights=weights)
    config = read_config(folder / "config.json", ENCODERS)
    if config.model_type not in HEADS:
        raise InputError(
            f"{name}: model_type {config.model_type} is not served as a cross-encoder; give one of "
            f"{', '.join(HEADS)}, or a language model with --ranker_method yes-no"
        )
    if max_length > config.max_length:
        raise InputError(
            f"--query_max_length and --key_max_length are {max_length} tokens together: {name} has "
            f"{config.max_length} positions, give {config.max_length} or less"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, name)
    head, given = HEADS[config.model_type], json.loads(config.source)
    shapes = ENCODERS[config.model_type].abstract_params(config)
    load = load_params if weights else shapes_of_params
    params = {head.prefix: load(folder, shapes, config.names)}
    tensors = open_tensors(folder) if has_weights(folder) else {}
    _add_head(params, tensors, folder, head, config, given, seed)
    rates = [given.get(rate) if rate else 0.0 for rate in (head.drops_first, head.drops_last)]
    rates = [config.hidden_dropout_prob if rate is None else rate for rate in rates]
    typed = "token_type_ids" in tokenizer.model_input_names  # what others give to the model
    pooling = given.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise InputError(
            f"{folder / 'config.json'}: classifier_pooling {pooling} is not served; give cls or "
            "mean"
        )
    encoder = CrossEncoder(
        config, compute_dtype(dtype), remat, tuple(rates), pooling, typed, attention
    )
    return encoder, params, tokenizer


def _add_head(
    params: dict,
    tensors: dict,
    folder: Path,
    head: Head,
    config: Architecture,
    given: dict,
    seed: int,
) -> None:
    """Puts the head's parameters beside the encoder's: those of the folder, else new ones.

    Args:
        tensors: of the folder; empty where it has no weights.
        given: config.json.

    Raises:
        InputError: they are of another shape, or hold values that are not finite.
    """
    width, spread = config.hidden_size, given.get("initializer_range", 0.02)
    rng = np.random.default_rng(seed % 2**63)

    def linear(out: int, bias: bool = True) -> dict:
        drawn = {"kernel": rng.normal(0, spread, (width, out)).astype(np.float32)}
        return drawn | ({"bias": np.zeros(out, np.float32)} if bias else {})

    # What ModernBERT's head has besides is that of its layers.
    layers = {head.dense: linear(width, not head.norm or given.get("classifier_bias", False))}
    layers[head.out] = linear(1)
    if head.norm:
        layers[head.norm] = {"scale": np.ones(width, np.float32)}
        if given.get("norm_bias", False):
            layers[head.norm]["bias"] = np.zeros(width, np.float32)
    new = []
    for path, drawn in layers.items():
        name = ".".join(path)
        found = [
            n for n in (name, name.removeprefix(f"{head.prefix}.")) if f"{n}.weight" in tensors
        ]
        if not found:
            new.append(name)
        layer = _read_layer(folder, tensors, found[0], drawn) if found else drawn
        place = params
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = layer
    if new and tensors:
        _logger.warning(
            "%s: has no %s, which starts from random (seed %d): train it before you rank with it",
            *(folder, " and no ".join(new), seed),
        )


def _read_layer(folder: Path, tensors: dict, name: str, like: dict) -> dict:
    layer = {}
    for leaf, wanted in like.items():
        tensor = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
        value = np.asarray(tensors[tensor][...], np.float32)
        shape = wanted.shape[::-1]  # a kernel is stored transposed
        if value.shape != shape:
            raise InputError(
                f"{folder}: {tensor} is {value.shape}, a reranker has {shape}; give a model with "
                "one label, or an encoder without a head"
            )
        if not np.isfinite(value).all():
            raise InputError(
                f"{folder}: there are values in {name} that are not finite (NaN, infinity); give "
                "other weights"
            )
        layer[leaf] = np.ascontiguousarray(value.T)
    return layer


def save_cross_encoder(
    folder: str | os.PathLike,
    encoder: CrossEncoder,
    params: dict,
    tokenizer,
    *,
    max_length: int,
    base: str | None = None,
) -> None:
    """Writes `{folder}/ranker`, which transformers and sentence-transformers open as it is.

    It is written beside and renamed, so that it is there completely or not at all. Adapters are
    merged into it, and are in `{folder}/adapter`, with the head, as peft has them.

    Args:
        params: as `load_cross_encoder` gives them, of numpy or of fully addressable jax arrays.
        max_length: tokens of the longest pair.
        base: the model that adapters are for.
    """
    if encoder.lora:
        adapters, prefix, names = params["lora"]["base"], encoder.head.prefix, encoder.config.names
        head = {k: v for k, v in params.items() if k not in ("base", "lora")}
        for name in encoder.adapter_folders:
            under = {prefix: adapters}
            save_adapters(Path(folder) / name, under, names, encoder.lora, base, head)
        weights = merged(params["base"], adapters, encoder.lora)
        params = head | {prefix: weights | head.get(prefix, {})}
    with atomic_dir(Path(folder) / FOLDER, replace=True) as beside:
        config = json.loads(encoder.config.saved())
        config |= {
            "architectures": [f"{CLASSES[encoder.config.model_type]}ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            # CrossEncoder would put a sigmoid on the scores of a single label.
            "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
        }
        config.pop("num_labels", None)
        text = json.dumps(config, indent=2) + "\n"
        (beside / "config.json").write_text(text, encoding="utf-8")
        save_params(beside / "model.safetensors", params, encoder.config.names)
        save_tokenizer(tokenizer, beside, max_length=max_length)


def _at(params: dict, path: tuple[str, ...]) -> dict:
    for step in path:
        params = params[step]
    return params
