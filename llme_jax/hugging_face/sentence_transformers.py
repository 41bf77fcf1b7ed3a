"""The files beside a model by which sentence-transformers opens it: read, and written.

Class paths and keys that are written are those of sentence-transformers 2 to 5, where these have
them; version 6 reads them too.
"""

import json
from pathlib import Path
from typing import NamedTuple

from llme_jax.errors import InputError
from llme_jax.hugging_face import keys
from llme_jax.hugging_face.folders import listed_modules, model_root
from llme_jax.hugging_face.foreign import check_object, check_type, read_json

SIMILARITY = {"cos": "cosine", "ip": "dot", "l2": "euclidean"}
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last_token": "pooling_mode_lasttoken",
}
# Modules with parameters behind pooling, and what their files call the layer inside.
LAYERS = {"Dense": "linear", "LayerNorm": "norm"}
_SERVED = "Transformer and Pooling, or StaticEmbedding, then Dense, LayerNorm and Normalize"


class Modules(NamedTuple):
    """What a folder says of the way from token vectors to scores.

    Attributes:
        pooling: `cls`, `mean`, or the name of another that is not served; None: nothing is said.
        layers: the folders of its modules with parameters, in order.
        normalized: whether what comes out has length 1; None where nothing is said.
        similarity: `cos`, `ip`, `l2`, or the name of another; None: nothing is said.
        truncate_dim: how many numbers of a vector are kept; None: all.
    """

    pooling: str | None
    layers: tuple[tuple[str, Path], ...]
    normalized: bool | None
    similarity: str | None
    truncate_dim: int | None


def read_modules(folder: Path) -> Modules:
    """
    Args:
        folder: where the tokenizer lies.

    Raises:
        InputError: modules.json lists one that is not served, or in an order that is not: a part
            of the model would be left out. Or a file of a module says what is not served.
    """
    listed = [] if is_reranker(folder) else listed_modules(model_root(folder))
    kinds = [kind for kind, _ in listed]
    for kind, place in listed:
        if kind not in ("Transformer", "Pooling", "StaticEmbedding", *LAYERS, "Normalize"):
            raise InputError(
                f"{folder}: modules.json lists {place.name} ({kind}), which is not served, and "
                f"without which the vectors are others; give a model of {_SERVED}"
            )
    layers = tuple((kind, place) for kind, place in listed if kind in LAYERS)
    start = ["StaticEmbedding"] if "StaticEmbedding" in kinds else ["Transformer", "Pooling"]
    served = [*start, *(kind for kind, _ in layers), "Normalize"]
    if listed and kinds not in (served, served[:-1], ["Transformer"]):
        raise InputError(
            f"{folder}: modules.json lists {', '.join(kinds)}, an order that is not served; give a "
            f"model of {_SERVED}, in this order"
        )
    for kind, place in listed:
        if kind == "Normalize" and (path := place / "config.json").is_file():
            keys.NORMALIZE.check(path, read_json(path))
    task = read_transformer(folder).task
    if task not in (None, "feature-extraction"):
        raise InputError(
            f"{folder}: transformer_task in sentence_bert_config.json is {task}, whose vectors are "
            "not served; give a model of feature-extraction"
        )
    normalized = kinds[-1] == "Normalize" if len(kinds) > 1 else None
    pooling = _pooling(folder, dict(listed))
    return Modules(pooling, layers, normalized, _similarity(folder), _truncate_dim(folder))


def read_reranker(folder: Path) -> tuple[str, tuple[tuple[str, Path], ...]] | None:
    """Pooling and the folders of the modules behind it, of a reranker that is made of such; None
    for one whose head is its family's, or that is to become one.

    Raises:
        InputError: it is made of others.
    """
    listed = listed_modules(model_root(folder)) if is_reranker(folder) else []
    kinds, task = [kind for kind, _ in listed], read_transformer(folder).task
    if not kinds or (kinds == ["Transformer"] and task == "sequence-classification"):
        return None
    layers = tuple((kind, place) for kind, place in listed if kind in LAYERS)
    modular = ["Transformer", "Pooling", *(kind for kind, _ in layers)]
    if kinds == modular and kinds[-1] == "Dense" and task in (None, "feature-extraction"):
        if not pools_prompt(folder):
            raise InputError(
                f"{_pooling_file(folder)}: include_prompt false is not served for rerankers; give "
                "one that pools its prompt"
            )
        return _pooling(folder, dict(listed)), layers
    hint = "give one with the head of its family, or of Transformer, Pooling, Dense and LayerNorm"
    if kinds == ["Transformer", "LogitScore"]:
        hint = "ask it with --ranker_method yes-no, in the words of that method"
    raise InputError(
        f"{folder}: modules.json lists {', '.join(kinds)}, of the transformer_task {task}, which "
        f"is not served as a cross-encoder; {hint}"
    )


def _pooling_file(folder: Path) -> Path:
    of_kind = dict(listed_modules(model_root(folder)))
    return of_kind.get("Pooling", folder / "1_Pooling") / "config.json"


def _pooling(folder: Path, of_kind: dict[str, Path]) -> str | None:
    path = of_kind.get("Pooling", folder / "1_Pooling") / "config.json"
    if not path.is_file():
        return "mean" if "Pooling" in of_kind else None
    settings = read_json(path)
    keys.POOLING.check(path, settings)
    if "pooling_mode" in settings:  # sentence-transformers 6
        mode = settings["pooling_mode"]
        modes = map(str, mode) if isinstance(mode, list) else [str(mode)]
        return "+".join("last_token" if name == "lasttoken" else name for name in modes)
    names = {key: name for name, key in POOLING_KEYS.items()}
    chosen = [names.get(key, key) for key, value in settings.items() if value is True]
    return "+".join(name for name in chosen if name != "include_prompt") or "mean"


def pools_prompt(folder: Path) -> bool:
    """Whether the tokens of a text's prompt are pooled with its own."""
    path = _pooling_file(folder)
    included = read_json(path).get("include_prompt", True) if path.is_file() else True
    check_type(path, "include_prompt", included, bool)
    return included


def _similarity(folder: Path) -> str | None:
    named = _settings(folder).get("similarity_fn_name")
    return {name: metric for metric, name in SIMILARITY.items()}.get(named, named)


def _truncate_dim(folder: Path) -> int | None:
    dim = _settings(folder).get("truncate_dim")
    if dim is not None:
        path = model_root(folder) / "config_sentence_transformers.json"
        check_type(path, "truncate_dim", dim, int)
    return dim


def _settings(folder: Path) -> dict:
    """config_sentence_transformers.json; empty without one."""
    path = model_root(folder) / "config_sentence_transformers.json"
    if not path.is_file():
        return {}
    settings = read_json(path)
    keys.MODEL.check(path, settings)
    if (kind := settings.get("model_type")) not in (None, "SentenceTransformer", "CrossEncoder"):
        raise InputError(
            f"{path}: model_type {json.dumps(kind)} is not served; give a SentenceTransformer, or "
            "to llme_jax.rank a CrossEncoder"
        )
    return settings


def is_reranker(folder: Path) -> bool:
    """Whether sentence-transformers saved it as a CrossEncoder."""
    return _settings(folder).get("model_type") == "CrossEncoder"


def read_prompts(folder: Path) -> tuple[str, str] | None:
    """The folder's own texts before a query and before a key; None where it has none.

    Which of its prompts these are is decided as sentence-transformers 6 does: for an encoder by
    `encode_query` and `encode_document`, which take those called `query` and `document`; for a
    reranker by `predict`, which puts the default one before the query.

    Raises:
        InputError: they are no texts.
    """
    settings = _settings(folder)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(p, str | None) for p in prompts.values()
    ):
        raise InputError(
            f"{folder}: prompts in config_sentence_transformers.json are not texts by name; copy "
            "the file again"
        )
    usual = settings.get("default_prompt_name")
    if usual is not None and usual not in prompts:
        raise InputError(
            f"{folder}: default_prompt_name in config_sentence_transformers.json is "
            f"{json.dumps(usual)}, and there is no such prompt; add it, or leave the name out"
        )
    if is_reranker(folder):
        return None if usual is None else (prompts[usual] or "", "")
    return (prompts.get("query") or "", prompts.get("document") or "") if prompts else None


class TransformerSettings(NamedTuple):
    """What sentence_bert_config.json says.

    Attributes:
        task: what is computed of a text: `feature-extraction`, `sequence-classification`, ...
        messages: whether texts go through the chat template; `auto`, `flat` or `structured`.
        template: what that is filled in with besides.
        keeps_end: whether its end stays when texts are cut.
        lower: whether texts are lowered, whatever the tokenizer does.
        query_length, key_length: tokens that are kept of one; None: nothing is said.
        tokenizer, config: settings of the tokenizer and of config.json that count instead of those
            in their files.
    """

    task: str | None = None
    messages: str | None = None
    template: tuple[tuple[str, object], ...] = ()
    keeps_end: bool = True
    lower: bool = False
    query_length: int | None = None
    key_length: int | None = None
    tokenizer: tuple[tuple[str, object], ...] = ()
    config: tuple[tuple[str, object], ...] = ()


def read_transformer(folder: Path) -> TransformerSettings:
    """
    Args:
        folder: of the Transformer module.

    Raises:
        InputError: something is said that is not served.
    """
    # Old versions named the file by the family; as there the first one counts.
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = [folder / f"sentence_{kind}_config.json" for kind in kinds]
    path = next((path for path in paths if path.is_file()), None)
    if path is None or not listed_modules(model_root(folder)):
        return TransformerSettings()
    given = read_json(path)
    keys.TRANSFORMER.check(path, given)
    lengths = {}
    for name in ("max_seq_length", "query_length", "document_length"):
        if (value := given.get(name)) is not None:
            check_type(path, name, value, int)
            if value < 1:
                raise InputError(f"{path}: {name} is {value}; give what the model has, 1 or more")
            lengths[name] = value
    lower = given.get("do_lower_case") or False
    check_type(path, "do_lower_case", lower, bool)

    def arguments(old: str, new: str) -> dict:
        value = given.get(old, given.get(new)) or {}
        check_object(path, old if old in given else new, value)
        return value

    tokenizer = arguments("tokenizer_args", "processor_kwargs")
    keys.TOKENIZER_ARGUMENTS.check(path, tokenizer)
    keys.MODEL_ARGUMENTS.check(path, arguments("model_args", "model_kwargs"))
    config = arguments("config_args", "config_kwargs")
    usual = lengths.get("max_seq_length")
    template = _processing(path, given.get("processing_kwargs") or {})
    return TransformerSettings(
        task=given.get("transformer_task"),
        messages=_modality(path, given.get("modality_config")),
        keeps_end=template.pop("restore_suffix", True),
        template=tuple(sorted(template.items())),
        lower=lower,
        query_length=lengths.get("query_length", usual),
        key_length=lengths.get("document_length", usual),
        tokenizer=tuple(sorted(tokenizer.items())),
        config=tuple(config.items()),
    )


def _processing(path: Path, given: dict) -> dict:
    """What the chat template is filled in with."""
    check_object(path, "processing_kwargs", given)
    for name, value in given.items():
        check_object(path, f"processing_kwargs.{name}", value)
    keys.PROCESSING.check(path, {name: value for name, value in given.items() if value})
    template = dict(given.get("chat_template", {}))
    if sizes := template.keys() & {"padding", "truncation", "max_length", "return_tensors"}:
        raise InputError(
            f"{path}: processing_kwargs.chat_template.{min(sizes)} is not served; give the length "
            "as max_seq_length"
        )
    return template


def _modality(path: Path, given: dict | None) -> str | None:
    """How messages look where texts become messages; None where they are read as they are."""
    if given is None:
        return None
    check_object(path, "modality_config", given)
    for kind, how in given.items():
        check_object(path, f"modality_config.{kind}", how)
        if kind in ("text", "message") and how.get("method") != "forward":
            raise InputError(
                f"{path}: modality_config.{kind} calls {json.dumps(how.get('method'))}, which is "
                "not served; give a model that computes texts by forward"
            )
    if "text" not in given:  # not for messages alone either
        raise InputError(
            f"{path}: modality_config has {', '.join(given) or 'nothing'}, no text; give a model "
            "that reads texts"
        )
    return given["message"].get("format", "auto") if "message" in given else None
