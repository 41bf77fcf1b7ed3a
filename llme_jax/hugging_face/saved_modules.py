"""The files by which sentence-transformers opens what is saved here; see sentence_transformers.py.

Class paths and keys are those of its versions 2 to 5, where these have them; version 6 reads them
too.
"""

import json
from pathlib import Path

from llme_jax.hugging_face.layers import TORCH, Layer, Layers
from llme_jax.hugging_face.reading import Reading
from llme_jax.hugging_face.sentence_transformers import LAYERS, POOLING_KEYS, SIMILARITY
from llme_jax.hugging_face.weights import save_params

_IDENTITY = TORCH["identity"]


def save_modules(
    folder: Path,
    *,
    module: str,
    pooling: str,
    layers: Layers,
    metric: str,
    normalized: bool,
    width: int,
    max_length: int,
    reading: Reading,
    prompts: dict[str, str],
    truncate_dim: int | None,
) -> None:
    """Write modules.json and what it names into the Hugging Face folder of an encoder.

    Args:
        module: the first one; StaticEmbedding pools by itself.
        layers: those behind pooling, as `load_layers` gives them.
        metric, normalized: of the vectors.
        width: D, of the token vectors.
        max_length: tokens a text keeps.
        reading: how texts are read.
        prompts: the texts that go in front, by name.
        truncate_dim: numbers of a vector that are kept; None for all.
    """
    modules = [("", module)]
    if module == "Transformer":
        modules.append(("1_Pooling", "Pooling"))
        _save_pooling(folder, pooling, width, reading)
        _save_transformer(folder, max_length, reading)
    modules += _save_layers(folder, len(modules), layers)
    if normalized:
        modules.append(("normalize", "Normalize"))
        (folder / "normalize").mkdir()
    _save_list(folder, modules)
    settings = {
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": SIMILARITY[metric],
    }
    settings |= {} if truncate_dim is None else {"truncate_dim": truncate_dim}
    _write(folder / "config_sentence_transformers.json", settings)


def save_reranker_modules(
    folder: Path,
    *,
    layers: Layers | None,
    pooling: str,
    width: int,
    max_length: int,
    reading: Reading,
    prompt: str,
) -> None:
    """The same for a reranker; version 6 of sentence-transformers reads it, older ones do not.

    Args:
        layers: behind pooling, the last of them gives the score; None for one with the head of its
            family.
        prompt: the text before every query.
    """
    modules, task = [("", "Transformer")], "sequence-classification"
    if layers is not None:
        task = "feature-extraction"
        modules.append(("1_Pooling", "Pooling"))
        _save_pooling(folder, pooling, width, reading)
        modules += _save_layers(folder, len(modules), layers, last="scores")
    _save_transformer(folder, max_length, reading, task)
    _save_list(folder, modules)
    prompts = {"prompts": {"query": prompt}, "default_prompt_name": "query"} if prompt else {}
    settings = {"model_type": "CrossEncoder", "activation_fn": _IDENTITY} | prompts
    _write(folder / "config_sentence_transformers.json", settings)


def _save_pooling(folder: Path, pooling: str, width: int, reading: Reading) -> None:
    modes = {key: pooling == name for name, key in POOLING_KEYS.items()}
    settings = {"word_embedding_dimension": width, **modes}
    if reading.prompt_apart:
        settings["include_prompt"] = False
    _write(folder / "1_Pooling" / "config.json", settings)


def _save_transformer(
    folder: Path, max_length: int, reading: Reading, task: str | None = None
) -> None:
    settings = {"max_seq_length": max_length, "do_lower_case": reading.lower}
    if task or reading.messages:
        task = task or "feature-extraction"
        what, out = "last_hidden_state", "token_embeddings"
        if task == "sequence-classification":
            what, out = "logits", "scores"
        how = {"method": "forward", "method_output_name": what}
        modalities = {"text": how}
        if reading.messages:
            modalities["message"] = how | {"format": reading.messages}
        settings |= {
            "transformer_task": task,
            "modality_config": modalities,
            "module_output_name": out,
        }
    if reading.messages:
        template = dict(reading.template)
        if not reading.keeps_end:
            template["restore_suffix"] = False
        settings |= {"processing_kwargs": {"chat_template": template}} if template else {}
    _write(folder / "sentence_bert_config.json", settings)


def _save_layers(
    folder: Path, first: int, layers: Layers, last: str | None = None
) -> list[tuple[str, str]]:
    """Path and kind of each, as modules.json lists them.

    Args:
        first: the number of the first of them.
        last: what the last one's result is called, where that is not usual.
    """
    found = []
    for i, (layer, params) in enumerate(layers):
        place = f"{first + i}_{layer.kind}"
        of_last = i == len(layers) - 1 and last
        _save_layer(folder / place, layer, params, last if of_last else None)
        found.append((place, layer.kind))
    return found


def _save_layer(place: Path, layer: Layer, params: dict, output: str | None) -> None:
    settings = {"dimension": layer.width}
    if layer.kind == "Dense":
        settings = {
            "in_features": len(params["kernel"]),
            "out_features": layer.width,
            "bias": "bias" in params,
            "activation_function": TORCH[layer.activation],
        }
        settings |= {"module_output_name": output} if output else {}
    _write(place / "config.json", settings)
    save_params(place / "model.safetensors", {LAYERS[layer.kind]: params})


def _save_list(folder: Path, modules: list[tuple[str, str]]) -> None:
    described = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", described)


def _write(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
