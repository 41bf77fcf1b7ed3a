"""Encoders averaged weight by weight: one that was tuned keeps more of what its base could do.

As in LM-Cocktail (arXiv:2311.13534) and model soups (arXiv:2203.05482); the weights are given.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir, atomic_text
from llme_jax.hugging_face.folders import find_model, model_root
from llme_jax.hugging_face.layers import load_layers
from llme_jax.hugging_face.sentence_transformers import LAYERS, read_modules
from llme_jax.hugging_face.texts import open_tokenizer
from llme_jax.hugging_face.weights import load_params, save_params
from llme_jax.models.families import ENCODERS, read_config

# Weights, and what was said of the first one alone.
RECORD = "merge.json"  # says that the folder encoder beside it was merged
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
        InputError: they cannot be averaged; names the one that differs. Or `out` is in the way of
            a model.
    """
    weights = weights or [1 / len(names)] * len(names)
    folders = [find_model(name, cache_dir) for name in names]
    _check_place(out, [path for folder in folders for path in (folder.path, folder.base)])
    config = read_config(folders[0], ENCODERS)
    vocabulary = open_tokenizer(folders[0]).get_vocab()
    if folders[0].path != folders[0].base:
        raise InputError(
            f"{names[0]}: is an adapter alone, and the first encoder gives the folder; put its "
            "base first"
        )
    merged, first = None, None
    for name, folder, weight in zip(names, folders, weights, strict=True):
        if read_config(folder, ENCODERS) != config:
            raise InputError(
                f"{name}: another architecture than {names[0]}; give encoders of one base"
            )
        if open_tokenizer(folder).get_vocab() != vocabulary:
            raise InputError(
                f"{name}: another vocabulary than {names[0]}; give encoders of one base"
            )
        own = load_layers(read_modules(folder.path).layers, config.hidden_size)
        shapes = ENCODERS[config.model_type].abstract_params(config)
        encoder = load_params(folder, shapes, config.names)
        tree = [encoder, *({LAYERS[layer.kind]: params} for layer, params in own)]
        tree = jax.tree.map(lambda leaf, w=weight: w * leaf.astype(np.float64), tree)
        kind = [layer for layer, _ in own], jax.tree.structure(tree)
        if merged is None:
            merged, first = tree, kind
        elif kind != first:
            raise InputError(
                f"{name}: other layers behind pooling than {names[0]}; give encoders of one base"
            )
        else:
            merged = jax.tree.map(np.add, merged, tree)
    layers = read_modules(folders[0].path).layers
    root = model_root(folders[0].path)
    places = [folders[0].path, *(place for _, place in layers)]
    with atomic_text(out / RECORD) as file:
        file.write(json.dumps({"models": names, "weights": weights}, indent=2) + "\n")
    with atomic_dir(out / "encoder", replace=True) as beside:
        shutil.copytree(
            root,
            beside,
            dirs_exist_ok=True,
            ignore=lambda _, files: [
                f for f in files if f.endswith(LEFT_OUT) or f.startswith("adapter_")
            ],
        )
        for i, (place, params) in enumerate(zip(places, merged, strict=True)):
            file = beside / place.relative_to(root) / "model.safetensors"
            save_params(file, params, () if i else config.names)
    return out / "encoder"


def _check_place(out: Path, inputs: list[Path]) -> None:
    """Refuses to write into a model or over one that no merge has written."""
    place = (out / "encoder").resolve()
    for path in (model_root(path).resolve() for path in inputs):
        if path in (place, *place.parents) or place in path.parents:
            raise InputError(
                f"--output_dir {out}: {out / 'encoder'} would be in {path}, which is merged, or "
                "the other way round: give another folder"
            )
    if (out / "config.json").exists() or (place.exists() and not (out / RECORD).is_file()):
        raise InputError(
            f"--output_dir {out}: is a model, or has an encoder that no merge has written: give "
            "another folder"
        )
