"""Where a model lies: its folder here or a copy of the Hub's, and the base of an adapter."""

from dataclasses import dataclass
from pathlib import Path

from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.keys import ADAPTER, MODULES

_CHECKPOINT = ("encoder", "query_encoder", "ranker")  # folders of a checkpoint that hold models
_ADAPTER = "adapter_config.json"
_DESCRIBES = [
    "config.json", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
    "*_Pooling/*", "*_Dense/*", "*_LayerNorm/*", "*_Normalize/*", "*_StaticEmbedding/*",
    "dense_pooler*", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "sentencepiece*", "spiece.model", "adapter_*",
]  # fmt: skip
# Not *.safetensors: some repositories hold the weights a second time in another format.
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model.

    Attributes:
        path: of the tokenizer, of what is behind the encoder, of adapters; a model by itself has
            all its files there.
        base: of config.json and the weights; another folder for an adapter that is alone.
        adapted: whether there is an adapter in `path`, which belongs to the weights.
    """

    path: Path
    base: Path
    adapted: bool = False

    @property
    def config(self) -> Path:
        """config.json, which static embeddings may not have."""
        return self.base / "config.json"

    @classmethod
    def of(cls, place: "Path | ModelFolder") -> "ModelFolder":
        """Of a folder with a config.json."""
        if isinstance(place, ModelFolder):
            return place
        return cls(place, place, (place / _ADAPTER).is_file())

    def __str__(self) -> str:
        return str(self.path)


def find_model(name: str, cache_dir: str | None, *, weights: bool = True) -> ModelFolder:
    """The folder of a model: `name` itself, or a copy of the Hub's `name` under `cache_dir`.

    Args:
        weights: whether they are fetched too.

    Raises:
        InputError: neither a folder with a config.json or an adapter nor a model that the Hub
            hands out.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise InputError(f"{name}: no such folder; give a Hugging Face folder or a Hub name")
        folder = _fetched(name, cache_dir, weights)
    if place := _with_config(folder):
        return ModelFolder.of(place)
    if (folder / _ADAPTER).is_file():
        return ModelFolder(folder, _base_of(folder, cache_dir, weights), adapted=True)
    inner = [p for p in _CHECKPOINT if (folder / p / "config.json").is_file()]
    hint = f"did you mean {folder / inner[0]}?" if inner else "give a Hugging Face folder"
    raise InputError(f"{name}: no config.json in this folder; {hint}")


def check_no_adapter(name: str, cache_dir: str | None) -> None:
    """Refuses a base of new adapters that has one already: no folder would be theirs.

    Raises:
        InputError: names the model and the remedy.
    """
    if find_model(name, cache_dir, weights=False).adapted:
        raise InputError(
            f"--lora_rank: {name} has an adapter already, and no model would be the base of new "
            "ones; merge it with peft's merge_and_unload first, or train without --lora_rank"
        )


def _base_of(folder: Path, cache_dir: str | None, weights: bool) -> Path:
    """The folder of the model that an adapter is for."""
    path = folder / _ADAPTER
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: names no base_model_name_or_path; add the model it is for")
    try:
        found = find_model(base, cache_dir, weights=weights)
    except InputError as error:
        raise InputError(f"{path}: its base_model_name_or_path cannot be opened: {error}") from None
    if found.adapted:
        raise InputError(
            f"{path}: its base_model_name_or_path {base} is an adapter itself, which is not "
            "served; merge that one into its base"
        )
    return found.path


def _fetched(name: str, cache_dir: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_DESCRIBES, *(_WEIGHTS if weights else ())]
        patterns += [f"0_Transformer/{pattern}" for pattern in patterns]
        folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
        if weights and not any(folder.rglob("*.safetensors")):
            files = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
            patterns += [*files, *(f"0_Transformer/{file}" for file in files)]
            folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        raise InputError(
            f"{name} is no folder here and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); check the name and the network, or give a folder"
        ) from error
    return folder


def _with_config(folder: Path) -> Path | None:
    """Where the model's config.json lies; sentence-transformers may keep it in a folder below.

    Static embeddings may have none: where their table lies.
    """
    if (folder / "config.json").is_file():
        return folder
    places = {
        kind: place
        for kind, place in listed_modules(folder)
        if kind == "StaticEmbedding" or (place / "config.json").is_file()
    }
    return places.get("Transformer") or places.get("StaticEmbedding")


def model_root(folder: Path) -> Path:
    """The folder of a whole sentence-transformers model.

    Args:
        folder: of its Transformer, where config.json lies; mostly the same.
    """
    if (folder / "modules.json").is_file():
        return folder
    above = [place for _, place in listed_modules(folder.parent)]
    return folder.parent if folder in above else folder


def listed_modules(root: Path) -> list[tuple[str, Path]]:
    """Kind and folder of the modules of a sentence-transformers model, in order; none for others.

    Raises:
        InputError: modules.json cannot be read, or lists a module of other people's code.
    """
    path = root / "modules.json"
    if not path.is_file():
        return []
    found = []
    for module in read_json(path, list):
        if not isinstance(module, dict) or not all(
            isinstance(module.get(key), str) for key in ("type", "path")
        ):
            raise InputError(f"{path}: a module has no type and path; copy the file again")
        MODULES.check(path, module)
        package, _, kind = module["type"].rpartition(".")
        if not package.startswith("sentence_transformers."):
            raise InputError(
                f"{path}: type {module['type']} is code of its own, which is not served; give a "
                "model of sentence-transformers' own modules"
            )
        found.append((kind, root / module["path"]))
    return found


def is_static(folder: Path) -> bool:
    """Whether a sentence-transformers model has its table of static embeddings in this folder."""
    return ("StaticEmbedding", folder) in listed_modules(model_root(folder))


def read_adapter(folder: Path) -> dict:
    """adapter_config.json.

    Raises:
        InputError: it asks for something that is not served, as DoRA.
    """
    path = folder / _ADAPTER
    given = read_json(path)
    ADAPTER.check(path, given)
    return given
