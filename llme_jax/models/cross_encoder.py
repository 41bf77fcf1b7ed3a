"""Rerankers that read query and key together: an encoder, and what makes one score of its tokens.

That is the classification head of its family, or layers behind pooling, as sentence-transformers
has them. Parameters have the names of Hugging Face's sequence classifiers (`bert.pooler.dense`,
`classifier`), so that folders of either kind are the same folders.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.hugging_face.folders import ModelFolder, find_model
from llme_jax.hugging_face.layers import Layer, load_layers
from llme_jax.hugging_face.reading import Reading, reading_of
from llme_jax.hugging_face.saved_modules import save_reranker_modules
from llme_jax.hugging_face.sentence_transformers import read_reranker
from llme_jax.hugging_face.texts import open_tokenizer, read_pairs_as_messages
from llme_jax.hugging_face.tokenizer import check_vocabulary, save_tokenizer
from llme_jax.hugging_face.weights import (
    has_weights,
    load_params,
    model_tensors,
    save_params,
    shapes_of_params,
)
from llme_jax.models.dropout import dropout, fold_in
from llme_jax.models.encoder import Architecture
from llme_jax.models.families import ENCODERS, LANGUAGE_MODELS, forward_flops, read_config
from llme_jax.models.heads import HEADS, Head, add_head, classifier_config
from llme_jax.models.layers import ACTIVATIONS
from llme_jax.models.lora import Lora, adapted, merged, save_adapters
from llme_jax.models.packing import Packing, padded
from llme_jax.models.platform import AttentionKernel, compute_dtype
from llme_jax.models.pooling import pool, through

FOLDER = "ranker"  # of a checkpoint


LAYERS = "layers"  # the parameters of layers behind pooling, by their number


@dataclass(frozen=True)
class CrossEncoder:
    """What is computed, without the parameters; a static argument of jitted functions."""

    config: Architecture
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    rates: tuple[float, float]  # of the head's dropouts
    pooling: Literal["cls", "mean", "last_token"]
    typed: bool  # do the two texts of a pair have types of their own?
    activation: str = "tanh"  # of the head
    layers: tuple[Layer, ...] = ()  # behind pooling, instead of the head
    pad_id: int | None = None  # of a language model: a token that is never the last
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
        """As of `DualEncoder`; none where peft knows no name for the layers behind pooling."""
        return ("adapter",) if self.lora and not self.config.splits and not self.layers else ()

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
        alone = replace(packing, in_second=None)
        x = family.hidden_states(
            *(self.config, self.dtype, self.remat, self.attention),
            *(self.base(params), ids, packing if self.typed else alone),
            dropout_key=keys[0],
            first=self.pooling == "cls",
        )
        if self.pad_id is not None:
            x = x[_last_but(self.pad_id, ids, alone)]
        elif self.pooling != "cls":
            x = pool(self.pooling, x, alone)
        for i, layer in enumerate(self.layers):
            x = through(layer, params[LAYERS][str(i)], x)
        if self.layers:
            return x[:, 0]
        x = dropout(x, keys[1], self.rates[0], packing.firsts)
        if head.dense:
            x = _ACTIVATIONS[self.activation](_linear(x, _at(params, head.dense)))
        if head.norm:
            x = _normed(x, _at(params, head.norm), self.config.layer_norm_eps)
        x = dropout(x, keys[2], self.rates[1], packing.firsts)
        return _linear(x, _at(params, head.out))[:, 0]


def _last_but(pad: int, ids: Int[Array, "T"], packing: Packing) -> Int[Array, "R"]:
    """Where each text's last token is that is not `pad`; its first where there is no other."""
    found = []
    for block, lengths in zip(packing.in_blocks(ids), packing.lengths, strict=True):
        place = jnp.arange(block.shape[1])
        found.append((place * ((place < lengths[:, None]) & (block != pad))).max(1))
    return packing.starts + jnp.concatenate(found)


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
    remat: bool = False,
    attention: AttentionKernel = "auto",
    seed: int = 0,
    weights: bool = True,
) -> tuple[CrossEncoder, dict, object]:
    """Reads a reranker, or an encoder that is to become one.

    Args:
        name: a folder or a name of the Hub.
        seed: of the parts of the head that the folder does not have.
        weights: False for the shapes of the parameters, whose weights need not be there.

    Returns:
        The encoder; its parameters, a nested dict of float32 numpy arrays; the tokenizer, a fast
        one of transformers, which neither cuts nor pads by itself.

    Raises:
        InputError: the model cannot be found, read or served, or gives more than one score.
    """
    folder = find_model(name, cache_dir, weights=weights)
    modules = read_reranker(folder.path)
    config = read_config(folder, ENCODERS)
    if config.model_type not in HEADS:
        raise InputError(
            f"{name}: model_type {config.model_type} is not served as a cross-encoder; give one of "
            f"{', '.join(HEADS)}, or a language model with --ranker_method yes-no"
        )
    tokenizer = open_tokenizer(folder)
    classifier = config.model_type in LANGUAGE_MODELS
    read_pairs_as_messages(tokenizer, folder, classifier)
    check_vocabulary(tokenizer, config.vocab_size, name)
    head, given = HEADS[config.model_type], json.loads(config.source)
    shapes = ENCODERS[config.model_type].abstract_params(config)
    load = load_params if weights else shapes_of_params
    params = {head.prefix: load(folder, shapes, config.names)}
    pooling, layers = modules or (given.get("classifier_pooling", "cls"), ())
    if classifier and not modules:
        pooling = "last_token"
    if pooling not in ("cls", "mean", "last_token"):
        raise InputError(
            f"{folder}: asks for the pooling {pooling}, which is not served; give cls, mean or "
            "last_token"
        )
    behind = load_layers(layers, config.hidden_size, "scores")
    if modules:
        if behind[-1][0].width != 1:
            raise InputError(
                f"{folder}: gives {behind[-1][0].width} scores, a reranker gives one; give a model "
                "with one label"
            )
        params[LAYERS] = {str(i): of_layer for i, (_, of_layer) in enumerate(behind)}
    else:
        tensors = model_tensors(folder) if has_weights(folder) else {}
        add_head(params, tensors, folder, head, config, given, seed)
    rates = [given.get(rate) if rate else 0.0 for rate in (head.drops_first, head.drops_last)]
    rates = [config.hidden_dropout_prob if rate is None else rate for rate in rates]
    encoder = CrossEncoder(
        config,
        compute_dtype(dtype),
        remat,
        tuple(rates),
        pooling,
        typed="token_type_ids" in tokenizer.model_input_names,  # what others give to the model
        activation=_activation(folder, head, given),
        layers=tuple(layer for layer, _ in behind),
        pad_id=_pad_id(config, given) if classifier and not modules else None,
        attention=attention,
    )
    return encoder, params, tokenizer


def _activation(folder: ModelFolder, head: Head, given: dict) -> str:
    found = given.get(head.activation_key) or head.activation
    if found not in _ACTIVATIONS:
        raise InputError(
            f"{folder.config}: {head.activation_key} {found} is not served; give one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return found


def _pad_id(config: Architecture, given: dict) -> int | None:
    """The token that transformers takes for padding in a classifier."""
    return given.get("pad_token_id", 0 if config.model_type.startswith("gemma") else None)


def save_cross_encoder(
    folder: str | os.PathLike,
    encoder: CrossEncoder,
    params: dict,
    tokenizer,
    *,
    max_length: int,
    truncation_side: str | None = None,
    prompt: str = "",
    base: str | None = None,
) -> None:
    """Writes `{folder}/ranker`, which transformers and sentence-transformers open as it is.

    It is written beside and renamed, so that it is there completely or not at all. Adapters are
    merged into it, and are in `{folder}/adapter`, with the head, as peft has them.

    Args:
        params: as `load_cross_encoder` gives them, of numpy or of fully addressable jax arrays.
        max_length: tokens of the longest pair.
        truncation_side: where texts are cut, "right" or "left"; None: as the tokenizer says.
        prompt: the text before every query.
        base: the model that adapters are for.
    """
    prefix, names = encoder.head.prefix, encoder.config.names
    if encoder.lora:
        adapters = params["lora"]["base"]
        head = {k: v for k, v in params.items() if k not in ("base", "lora")}
        for name in encoder.adapter_folders:
            under = {prefix: adapters}
            save_adapters(Path(folder) / name, under, names, encoder.lora, base, head)
        weights = merged(params["base"], adapters, encoder.lora)
        params = head | {prefix: weights | head.get(prefix, {})}
    reading = reading_of(tokenizer)
    with atomic_dir(Path(folder) / FOLDER, replace=True) as beside:
        text, layers = encoder.config.saved(), None
        if encoder.layers:
            layers = [(of, params[LAYERS][str(i)]) for i, of in enumerate(encoder.layers)]
            params = {k: v for k, v in params[prefix].items() if k != "pooler"}
        else:
            text = classifier_config(text, encoder.head)
        (beside / "config.json").write_text(text, encoding="utf-8")
        save_params(beside / "model.safetensors", params, names)
        save_tokenizer(tokenizer, beside, max_length=max_length, side=truncation_side)
        if layers or prompt or reading != Reading() or tokenizer.chat_template:
            save_reranker_modules(
                beside,
                layers=layers,
                pooling=encoder.pooling,
                width=encoder.config.hidden_size,
                max_length=max_length,
                reading=reading,
                prompt=prompt,
            )


def _at(params: dict, path: tuple[str, ...]) -> dict:
    for step in path:
        params = params[step]
    return params
