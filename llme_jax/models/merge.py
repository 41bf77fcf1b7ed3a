"""Encoders averaged weight by weight: one that was tuned keeps more of what its base could do.

As in LM-Cocktail (arXiv:2311.13534) and model soups (arXiv:2203.05482); the weights are given.
"""

import shutil
from pathlib import Path

import jax
import numpy as np

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.models import sentence_transformers
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.models.tokenizer import load_tokenizer
from llme_jax.models.weights import find_model, load_params, save_params

# Weights, and what was said of the first one alone.
LEFT_OUT = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json", "README.md")


def merge_encoders(
    names: list[str], weights: list[float] | None, out: Path, cache_dir: str | None = None
) -> Path:
    """Writes `{out}/encoder`: the first folder with the weighted sum of all encoders in it.

    Args:
        names: folders or names of the Hub, of one architecture and vocabulary. Pooling, prompts and
            limits are those of the first.
        weights: one for each; all the same when None.

    Raises:
        InputError: they cannot be averaged; names the one that differs.
    """
    weights = weights or [1 / len(names)] * len(names)
    folders = [find_model(name, cache_dir) for name in names]
    config = read_config(folders[0] / "config.json", ENCODERS)
    vocabulary = load_tokenizer(folders[0]).get_vocab()
    shapes = ENCODERS[config.model_type].abstract_params(config)
    merged = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), shapes)
    dense = None
    for name, folder, weight in zip(names, folders, weights, strict=True):
        if read_config(folder / "config.json", ENCODERS) != config:
            raise InputError(
                f"{name}: another architecture than {names[0]}; give encoders of one base"
            )
        if load_tokenizer(folder).get_vocab() != vocabulary:
            raise InputError(
                f"{name}: another vocabulary than {names[0]}; give encoders of one base"
            )
        kernel = sentence_transformers.load_dense(folder)
        if (kernel is None) != (sentence_transformers.load_dense(folders[0]) is None):
            raise InputError(
                f"{name}: one of it and {names[0]} has a dense pooler; give both one, or none"
            )
        params = load_params(folder, shapes)
        merged = jax.tree.map(lambda sum, own, w=weight: sum + w * own, merged, params)
        if kernel is not None:
            dense = weight * kernel + (0 if dense is None else dense)
    with atomic_dir(out / "encoder", replace=True) as beside:
        shutil.copytree(
            folders[0],
            beside,
            dirs_exist_ok=True,
            ignore=lambda _, files: [f for f in files if f.endswith(LEFT_OUT)],
        )
        merged = jax.tree.map(lambda leaf: leaf.astype(np.float32), merged)
        save_params(beside / "model.safetensors", merged)
        if dense is not None:
            sentence_transformers.save_dense(beside / "dense_pooler", dense.astype(np.float32))
    return out / "encoder"
