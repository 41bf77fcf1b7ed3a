"""The space of an encoder's vectors: pooling, the layers behind it, similarity.

What the settings say counts, else what the folder says, else cls and cosine as in LLM-Embedder.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.layers import (
    Layer,
    Layers,
    load_layers,
    load_reference_dense,
    reference_dense,
)
from llme_jax.hugging_face.sentence_transformers import Modules, read_modules
from llme_jax.hugging_face.texts import TextDefaults, text_defaults

_logger = logging.getLogger(__name__)


def encoder_texts(config: EncoderConfig, tokenizer, longest: int) -> TextDefaults:
    """What the folders of the encoders say of queries and of keys.

    Args:
        tokenizer: as `load_dual_encoder` gives it.
        longest: tokens that they read at most.

    Raises:
        InputError: a model cannot be found, or one of its files cannot be used.
    """
    models = [find_model(name, config.model_cache_dir, weights=False) for name in config.names]
    query, key = (text_defaults(model, tokenizer, longest) for model in (models[0], models[-1]))
    prompts = query.prompts and key.prompts and (query.prompts[0], key.prompts[1])
    return TextDefaults(prompts, query.query_length, key.key_length, query.side)


class Space(NamedTuple):
    pooling: str
    layers: Layers
    metric: str
    normalized: bool
    truncate_dim: int | None


def open_space(
    config: EncoderConfig,
    folders: dict[str, Path],
    width: int,
    *,
    served: tuple[str, ...],
    new_dense: bool,
) -> Space:
    """
    Args:
        folders: of the encoder, or of the two that share a space, by their names.
        width: of the token vectors.
        served: the ways of pooling that the encoders have, the usual one first.
        new_dense: a dense pooler that is asked for, and that the folder does not have, is drawn.

    Raises:
        InputError: what a folder asks for cannot be served, or two folders differ.
    """
    modules = {name: read_modules(folder) for name, folder in folders.items()}
    named = next(iter({*(config.pooling_method or [])} - {"dense"}), None)
    if named not in (None, *served):
        token = "first" if named == "cls" else "last"
        raise InputError(
            f"--pooling_method {named}: the {token} token of {' and '.join(folders)} sees no "
            f"other, give {' or '.join(served)}"
        )
    pooling = _chosen("--pooling_method", named, {n: m.pooling for n, m in modules.items()}, served)
    metric = _chosen(
        *("--dense_metric", config.dense_metric),
        {n: m.similarity for n, m in modules.items()},
        ("cos", "ip", "l2"),
    )
    normalized = metric == "cos"
    if config.dense_metric is None:
        normalized |= any(module.normalized for module in modules.values())
    all_layers = [load_layers(module.layers, width) for module in modules.values()]
    if not _equal(all_layers[0], all_layers[-1]):
        raise InputError(
            f"{' and '.join(folders)} have different layers behind pooling; give two encoders that "
            "share them"
        )
    layers, (name, folder) = all_layers[0], next(iter(folders.items()))
    if not layers and "dense" in (config.pooling_method or []):
        kernel = _dense_pooler(name, folder, width, new_dense)
        layers = [(Layer("Dense", width), {"kernel": kernel})]
    elif not layers and reference_dense(folder).is_file():
        _logger.warning("%s: --pooling_method without dense leaves it out", reference_dense(folder))
    dim = _truncate_dim(config.truncate_dim, modules)
    return Space(pooling, layers, metric, normalized, dim)


def _chosen(
    flag: str, given: str | None, stored: dict[str, str | None], served: tuple[str, ...]
) -> str:
    """What the flag says, else what the folders say, else the first of those served."""
    if given is None:
        for name, own in stored.items():
            if own not in (None, *served):
                raise InputError(
                    f"{name}: its folder asks for {own}, which is not served; {flag} "
                    f"{' or '.join(served)} makes other vectors than it was trained for"
                )
        wanted = {own or served[0] for own in stored.values()}
        if len(wanted) > 1:
            raise InputError(f"{' and '.join(stored)} ask for {' and '.join(wanted)}: give {flag}")
        return wanted.pop()
    for name, own in stored.items():
        if own not in (None, given):
            _logger.warning("%s: its folder says %s, %s %s is used", name, own, flag, given)
    return given


def _truncate_dim(given: int | None, modules: dict[str, Modules]) -> int | None:
    stored = {module.truncate_dim for module in modules.values()}
    if given is None and len(stored) > 1:
        raise InputError(
            f"{' and '.join(modules)} keep different parts of their vectors: give --truncate_dim"
        )
    return given or stored.pop()


def _equal(one: Layers, other: Layers) -> bool:
    """Whether these are the same layers with the same parameters."""
    if [(layer, {*params}) for layer, params in one] != [(layer, {*p}) for layer, p in other]:
        return False
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(a[name], b[name]) for (_, a), (_, b) in pairs for name in a)


def _dense_pooler(name: str, folder: Path, width: int, new: bool) -> np.ndarray:
    """LLM-Embedder's square layer without a bias: the one beside the encoder, or a new one."""
    kernel = load_reference_dense(folder)
    if kernel is None:
        if not new:
            raise InputError(
                f"{name}: has no dense pooler, which --pooling_method asks for; leave dense out, "
                "or give the encoder that was trained with one"
            )
        _logger.warning("%s: no dense pooler in this folder, it starts from random", name)
        bound = width**-0.5  # as torch.nn.Linear starts
        return np.random.default_rng(0).uniform(-bound, bound, (width, width)).astype(np.float32)
    if kernel.shape != (width, width):
        raise InputError(
            f"{folder}: the dense pooler is {kernel.shape}, the encoder {width} wide; give the "
            "one that was trained with this encoder"
        )
    if not np.isfinite(kernel).all():
        raise InputError(
            f"{reference_dense(folder)}: holds values that are not finite; give another one"
        )
    return kernel
