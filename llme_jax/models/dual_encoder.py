"""The encoder pair that is trained: queries and keys to vectors of one space."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from jaxtyping import Array, Float, Int

from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.layers import Layer
from llme_jax.hugging_face.reading import reading_of
from llme_jax.hugging_face.saved_modules import save_modules
from llme_jax.hugging_face.sentence_transformers import read_modules
from llme_jax.hugging_face.texts import NO_LIMIT, open_tokenizer
from llme_jax.hugging_face.tokenizer import check_vocabulary, save_tokenizer
from llme_jax.hugging_face.weights import load_params, save_params, shapes_of_params
from llme_jax.models.encoder import Architecture
from llme_jax.models.families import ENCODERS, forward_flops, read_config
from llme_jax.models.lora import Lora, adapted, merged, save_adapters
from llme_jax.models.packing import Packing, padded
from llme_jax.models.platform import AttentionKernel, compute_dtype
from llme_jax.models.pooling import normalize, pool, through, truncate
from llme_jax.models.space import open_space


@dataclass(frozen=True)
class DualEncoder:
    """What is computed, without the parameters.

    Two instances of the same architecture are equal and hash alike, so a jitted function that
    closes over either, or takes it as a static argument, is compiled once.
    """

    query_config: Architecture
    key_config: Architecture
    tied: bool
    pooling: Literal["cls", "mean", "last_token"]
    dense: tuple[Layer, ...]  # the layers behind it, the same for queries and keys
    metric: Literal["cos", "ip", "l2"]
    normalizes: bool  # do vectors have length 1, before they are truncated?
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    attention: AttentionKernel = "auto"
    lora: Lora | None = None  # where params has adapters, of `lora`
    # Numbers of a vector that are kept for search, None for all.
    truncate_dim: int | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """D, the width of the embeddings before they are truncated."""
        return self.dense[-1].width if self.dense else self.query_config.hidden_size

    @property
    def folders(self) -> tuple[str, ...]:
        """What each encoder's parameters, and the folder that it is saved in, are called."""
        return _folders(self.tied)

    @property
    def adapter_folders(self) -> tuple[str, ...]:
        """Folders of adapters alone, in the order of `folders`; none of families whose files have
        several of transformers' modules in one tensor, for which peft has no names."""
        if not self.lora or self.query_config.splits:
            return ()
        return tuple(name.replace("encoder", "adapter") for name in self.folders)

    @property
    def sharding_rules(self) -> tuple:
        """The rules that place the parameters."""
        families = (ENCODERS[c.model_type] for c in (self.query_config, self.key_config))
        return tuple(dict.fromkeys(rule for family in families for rule in family.SHARDING))

    def layers(self, params: dict) -> list[tuple[Layer, dict]]:
        """Each layer behind pooling with its parameters, in order."""
        return [(layer, params["dense_pooler"][str(i)]) for i, layer in enumerate(self.dense)]

    @property
    def max_length(self) -> int:
        """Tokens that both encoders can read."""
        return min(self.query_config.max_length, self.key_config.max_length)

    def check_lengths(self, query_max_length: int, key_max_length: int) -> None:
        """Refuses limits beyond the encoders' position tables.

        Raises:
            InputError: names the flag and the largest value it can have.
        """
        for flag, wanted, config in (
            ("--query_max_length", query_max_length, self.query_config),
            ("--key_max_length", key_max_length, self.key_config),
        ):
            if wanted > config.max_length:
                raise InputError(
                    f"{flag} {wanted}: the encoder has {config.max_length} positions, give "
                    f"{config.max_length} or less"
                )

    def check_dims(self, flag: str, dims: list[int] | None) -> None:
        """Refuses to truncate embeddings to more numbers than they have.

        Raises:
            InputError: names the flag and the largest value it can have.
        """
        if dims and max(dims) > self.width:
            raise InputError(
                f"{flag} {max(dims)}: the encoder's vectors have {self.width} numbers, give "
                f"{self.width} or less"
            )

    def encode(
        self,
        params: dict,
        ids: Int[Array, "B L"],
        lengths: Int[Array, "B"],
        second: Int[Array, "B"] | None = None,
        *,
        field: Literal["query", "key"],
    ) -> Float[Array, "B D"]:
        """Embeddings of right-padded texts for search, see `encode_packed`; truncated.

        Args:
            lengths: tokens of each text, special tokens included.
            second: where the part begins that is pooled; None: it is the whole text.
        """
        packing = padded(lengths, ids.shape[1], second)
        embeddings = self.encode_packed(params, ids.reshape(-1), packing, field=field)
        if self.truncate_dim is None:
            return embeddings
        return truncate(embeddings, self.truncate_dim, self.metric)

    def flops(
        self, params: dict, field: Literal["query", "key"], tokens: float | int, pairs: float | int
    ) -> float:
        """Operations of `encode_packed`, see `forward_flops`."""
        config = self.query_config if field == "query" else self.key_config
        return forward_flops(config, params[self._part(field)], tokens, pairs)

    def _part(self, field: Literal["query", "key"]) -> str:
        """The name of the encoder of queries or keys among the parameters."""
        return "encoder" if self.tied else f"{field}_encoder"

    def encode_packed(
        self,
        params: dict,
        ids: Int[Array, "T"],
        packing: Packing,
        *,
        field: Literal["query", "key"],
        dropout_key: Array | None = None,
    ) -> Float[Array, "R D"]:
        """Embeddings of texts in float32, of length 1 when the metric is cos.

        Args:
            params: as `load_dual_encoder` gives them.
            packing: of texts in two parts the second is pooled, and the first, its prompt, is not.
            dropout_key: drops as config.json says; None for no dropout.
        """
        config = self.query_config if field == "query" else self.key_config
        name, whole = self._part(field), packing.in_second is None
        weights = params[name]
        if self.lora:
            weights = adapted(weights, params["lora"][name], self.lora)
        first = self.pooling == "cls" and whole
        embeddings = ENCODERS[config.model_type].hidden_states(
            *(config, self.dtype, self.remat, self.attention, weights, ids),
            replace(packing, in_second=None),
            dropout_key=dropout_key,
            first=first,
        )
        if not first:
            embeddings = pool(self.pooling, embeddings, packing)
        for layer, of_layer in self.layers(params):
            embeddings = through(layer, of_layer, embeddings)
        return normalize(embeddings) if self.normalizes else embeddings


def load_dual_encoder(
    config: EncoderConfig, *, remat: bool = False, new_dense: bool = True, weights: bool = True
) -> tuple[DualEncoder, dict, object]:
    """Read the encoder or encoders that `config` names.

    Pooling, similarity and the layers behind pooling are those of the folder, as
    sentence-transformers reads it, unless `config` says otherwise.

    Args:
        new_dense: a dense pooler that is asked for, and that the folder does not have, is drawn.
        weights: False for the shapes of the encoders' parameters, whose weights need not be there.

    Returns:
        The encoder; its parameters, a nested dict of float32 numpy arrays: `encoder` (tied) or
        `query_encoder` and `key_encoder`, and `dense_pooler` where there are layers behind
        pooling, by their number; the tokenizer, a fast one of transformers, which neither cuts
        nor pads by itself.

    Raises:
        InputError: a model cannot be found, read or served, or the two do not fit together.
    """
    names = config.names
    folders = [find_model(name, config.model_cache_dir, weights=weights) for name in names]
    for folder in folders:
        read_modules(folder.path)  # are they served?
    configs = [read_config(folder, ENCODERS) for folder in folders]
    if configs[0].module != configs[-1].module:  # one of them reads no special tokens
        raise InputError(
            f"{names[0]} and {names[-1]}: static embeddings and an encoder of another kind cannot "
            "be trained together; give two of one kind"
        )
    tokenizers = [open_tokenizer(folder) for folder in folders]
    if configs[0].hidden_size != configs[-1].hidden_size:
        raise InputError(
            f"{names[-1]}: vectors of {configs[-1].hidden_size} numbers, those of {names[0]} have "
            f"{configs[0].hidden_size}; give two encoders of one width"
        )
    if tokenizers[0].get_vocab() != tokenizers[-1].get_vocab():
        raise InputError(
            f"{names[-1]}: another vocabulary than {names[0]}; give two encoders of one tokenizer"
        )
    if reading_of(tokenizers[0]) != reading_of(tokenizers[-1]):
        raise InputError(
            f"{names[0]} and {names[-1]} read texts in different ways: chat template, lower case, "
            "or whether the prompt is pooled; give two encoders that read them alike"
        )
    check_vocabulary(tokenizers[0], configs[0].vocab_size, names[0])
    if tokenizers[0].pad_token is None:  # without one, others refuse to read several texts at once
        tokenizers[0].pad_token = tokenizers[0].eos_token
    load = load_params if weights else shapes_of_params
    trees = [
        load(folder, ENCODERS[c.model_type].abstract_params(c), c.names)
        for folder, c in zip(folders, configs, strict=True)
    ]
    params = dict(zip(_folders(config.tie_encoders), trees, strict=True))
    if weights and (dropped := reading_of(tokenizers[0]).dropped) is not None:
        for tree in trees:  # nothing reads it here; elsewhere it is not left out, and adds nothing
            tree["embedding"]["embedding"][dropped] = 0.0
    space = open_space(
        config, dict(zip(names, (f.path for f in folders), strict=True)), configs[0].hidden_size,
        served=min((c.poolings for c in configs), key=len), new_dense=new_dense,
    )  # fmt: skip
    if space.layers:
        params["dense_pooler"] = {str(i): of_layer for i, (_, of_layer) in enumerate(space.layers)}
    encoder = DualEncoder(
        query_config=configs[0],
        key_config=configs[-1],
        tied=config.tie_encoders,
        pooling=space.pooling,
        dense=tuple(layer for layer, _ in space.layers),
        metric=space.metric,
        normalizes=space.normalized,
        dtype=compute_dtype(config.dtype),
        remat=remat,
        attention=config.attention,
        truncate_dim=space.truncate_dim,
    )
    encoder.check_dims("--truncate_dim", space.truncate_dim and [space.truncate_dim])
    return encoder, params, tokenizers[0]


def save_dual_encoder(
    folder: str | os.PathLike,
    encoder: DualEncoder,
    params: dict,
    tokenizer,
    *,
    query_max_length: int,
    key_max_length: int,
    truncation_side: str | None = None,
    prompts: dict[str, str],
    bases: Sequence[str] = (),
) -> None:
    """Write `{folder}/encoder`, or `query_encoder` and `key_encoder` when they are not tied.

    Each is a folder that transformers and sentence-transformers open as it is. It is written
    beside and renamed, so that it is there completely or not at all. Adapters are merged into
    the encoder, and are in `{folder}/adapter`, or `query_adapter` and `key_adapter`, as peft has
    them.

    Args:
        params: as `load_dual_encoder` gives them, of numpy or of fully addressable jax arrays.
        truncation_side: where texts are cut, "right" or "left"; None: as the tokenizer says.
        prompts: the texts put in front, by the names that sentence-transformers gives them:
            `query`, `document`, and others of your own.
        bases: the models that adapters are for, in the order of `encoder.folders`.
    """
    for name in encoder.folders:
        config = encoder.key_config if name == "key_encoder" else encoder.query_config
        if encoder.lora:
            weights = merged(params[name], params["lora"][name], encoder.lora)
            params = params | {name: weights}
        with atomic_dir(Path(folder) / name, replace=True) as beside:
            (beside / "config.json").write_text(config.saved(), encoding="utf-8")
            save_params(beside / "model.safetensors", params[name], config.names)
            # One folder has one limit; the larger one cuts neither queries nor keys short.
            limit = max(query_max_length, key_max_length)
            # Static embeddings have no other place for it than tokenizer.json.
            static = config.module == "StaticEmbedding"
            cut_to = limit if static and limit < NO_LIMIT else None
            save_tokenizer(tokenizer, beside, max_length=limit, side=truncation_side, cut_to=cut_to)
            save_modules(
                beside,
                module=config.module,
                pooling=encoder.pooling,
                layers=encoder.layers(params),
                metric=encoder.metric,
                normalized=encoder.normalizes,
                width=config.hidden_size,
                max_length=limit,
                reading=reading_of(tokenizer),
                prompts=prompts,
                truncate_dim=encoder.truncate_dim,
            )

    for name, source, base in zip(encoder.adapter_folders, encoder.folders, bases, strict=False):
        config = encoder.key_config if source == "key_encoder" else encoder.query_config
        adapters = params["lora"][source]
        save_adapters(Path(folder) / name, adapters, config.names, encoder.lora, base)


def _folders(tied: bool) -> tuple[str, ...]:
    return ("encoder",) if tied else ("query_encoder", "key_encoder")
