"""Classification heads of the families: which layers make one score, and their weights."""

import json
import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import ModelFolder
from llme_jax.models.encoder import Architecture

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """The head of a family: out(drop(norm(activation(dense(drop(pooled))))))."""

    prefix: str  # what the encoder's parameters are under
    name: str  # how the name of transformers' class begins
    out: tuple[str, ...]
    dense: tuple[str, ...] | None = None  # what stands before it, where there is something
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    activation_key: str | None = None  # where config.json may say another one
    norm: tuple[str, ...] | None = None  # a LayerNorm, where there is one
    out_bias: bool = True
    drops_first: str | None = None  # the rate's name in config.json, None for no dropout there
    drops_last: str | None = "classifier_dropout"  # as this; hidden_dropout_prob where not set


_OWN = {"dense": ("classifier", "dense"), "out": ("classifier", "out_proj")}
_DROPS = {"drops_first": "classifier_dropout"}
HEADS = {
    **{
        family: Head(family, name, ("classifier",), (family, "pooler", "dense"))
        for family, name in (("bert", "Bert"), ("nomic_bert", "NomicBert"), ("gte", "Gte"))
    },
    **{
        family: Head("roberta", name, **_OWN, **_DROPS)
        for family, name in (
            ("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"),
        )
    },
    "electra": Head("electra", "Electra", **_OWN, activation="gelu", **_DROPS),
    "mpnet": Head(
        "mpnet", "MPNet", **_OWN,
        drops_first="hidden_dropout_prob", drops_last="hidden_dropout_prob",
    ),
    "distilbert": Head(
        "distilbert", "DistilBert", ("classifier",), ("pre_classifier",), activation="relu",
        drops_last="seq_classif_dropout",
    ),
    "modernbert": Head(
        "model", "ModernBert", ("classifier",), ("head", "dense"), activation="gelu",
        activation_key="classifier_activation", norm=("head", "norm"),
    ),
    "deberta-v2": Head(
        "deberta", "DebertaV2", ("classifier",), ("pooler", "dense"), activation="gelu",
        activation_key="pooler_hidden_act", drops_first="pooler_dropout", drops_last="cls_dropout",
    ),
    # Language models that have become classifiers: of the last token that is no padding.
    **{
        family: Head("model", name, ("score",), out_bias=False, drops_last=None)
        for family, name in (
            ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
            ("gemma2", "Gemma2"), ("gemma3_text", "Gemma3Text"),
        )
    },
}  # fmt: skip


def add_head(
    params: dict,
    tensors: dict,
    folder: ModelFolder,
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
    layers = {}
    if head.dense:
        layers[head.dense] = linear(width, not head.norm or given.get("classifier_bias", False))
    layers[head.out] = linear(1, head.out_bias)
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


def _read_layer(folder: ModelFolder, tensors: dict, name: str, like: dict) -> dict:
    layer = {}
    for leaf, wanted in like.items():
        tensor = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
        if tensor not in tensors:
            raise InputError(
                f"{folder}: the weights have no {tensor}, which config.json asks for; copy the "
                "model again"
            )
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


def classifier_config(text: str, head: Head) -> str:
    """A config.json of transformers' sequence classifier of one label."""
    config = json.loads(text) | {
        "architectures": [f"{head.name}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # CrossEncoder would put a sigmoid on the scores of a single label.
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    }
    config.pop("num_labels", None)
    return json.dumps(config, indent=2) + "\n"
