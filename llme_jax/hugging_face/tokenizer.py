"""Tokenizers of model folders, free of the state that texts were last cut and padded with."""

import copy
import json
from hashlib import blake2b
from pathlib import Path

from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import ModelFolder
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.keys import TOKENIZER

# How tokenizer.json's truncation and padding come back as settings of tokenizer_config.json.
_STATE = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
_ANY = "TokenizersBackend"  # takes tokenizer.json as it is
# Which class transformers' AutoTokenizer has for a model_type; None: that of the folder's files.
CLASSES = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "electra": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "modernbert": _ANY,
    "nomic_bert": "BertTokenizer",
    "gte": "XLMRobertaTokenizer",
    "mistral": _ANY,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "phi3": _ANY,
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
# Of which published folders name a wrong class.
_OWN_CLASS = ("modernbert", "qwen2", "phi3")


def load_tokenizer(place: Path | ModelFolder, **arguments):
    """The fast tokenizer of a Hugging Face folder, which neither cuts nor pads by itself.

    It is of the class that transformers' AutoTokenizer would choose, which imports torch where that
    is installed.

    Args:
        arguments: for the class, besides those in the folder.

    Raises:
        InputError: the folder has no tokenizer that the tokenizers library can run.
    """
    import transformers

    model = ModelFolder.of(place)
    config = read_json(model.config) if model.config.is_file() else {}
    folder = model.path
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        folder = model.base  # an adapter need not have one
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    name = _class_name(folder, str(config.get("model_type")), config, settings)
    cls = getattr(transformers, name, None) or transformers.PreTrainedTokenizerFast
    # Without these files transformers would make up a tokenizer that knows no word.
    if not any((folder / file).is_file() for file in cls.vocab_files_names.values()):
        raise InputError(f"{folder}: no tokenizer.json in this folder; copy the tokenizer there")
    try:
        tokenizer = cls.from_pretrained(folder, **arguments)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.encode("a\U0001f600")  # are there ids for all of a text?
    except Exception as error:  # a dozen types, from a missing file to a Rust panic
        raise InputError(f"{folder}: the tokenizer cannot be read ({error})") from error
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {name} has no fast tokenizer; add a tokenizer.json")
    known = {name: getattr(tokenizer, name) for name in TOKENIZER.only}
    TOKENIZER.check(path, known)
    return _without_state(tokenizer)


def _class_name(folder: Path, model_type: str, config: dict, settings: dict) -> str:
    """The decision of transformers' AutoTokenizer, for its own classes."""
    own = CLASSES.get(model_type)
    given = settings.get("tokenizer_class") or config.get("tokenizer_class")
    given = given.removesuffix("Fast") if isinstance(given, str) else None
    if given == "PreTrainedTokenizer":
        given = _ANY
    # Llama 3's tokenizers call themselves Llama 2's, whose class has other rules.
    if given == "LlamaTokenizer" and model_type not in _OWN_CLASS and _has_byte_level(folder):
        return _ANY
    if given and own and given != own:
        if own == _ANY:
            return _ANY
        return own if model_type in _OWN_CLASS else given
    return given or own or _ANY


def _has_byte_level(folder: Path) -> bool:
    path = folder / "tokenizer.json"
    return path.is_file() and '"ByteLevel"' in path.read_text(encoding="utf-8")


def save_tokenizer(
    tokenizer, folder: Path, *, max_length: int, side: str | None, cut_to: int | None = None
) -> None:
    """Write the tokenizer as transformers does, without padding.

    Args:
        max_length: what others are to cut texts to by default.
        side: where they are to cut them, "right" or "left"; None: as the tokenizer says.
        cut_to: what tokenizer.json itself cuts texts to; None for no cutting.
    """
    tokenizer = _without_state(copy.deepcopy(tokenizer))
    side = side or tokenizer.truncation_side
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = side
    if cut_to is not None:
        tokenizer.backend_tokenizer.enable_truncation(cut_to, direction=side)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


def check_vocabulary(tokenizer, vocab_size: int, name: str) -> None:
    """Refuses a tokenizer that gives ids for which a model has no vector.

    Special tokens beyond the table, as Gemma 3's for images, are given for their own names alone.

    Raises:
        InputError: names the model.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    if {*beyond} - special:
        raise InputError(
            f"{name}: the tokenizer gives ids up to {max(beyond.values())}, the model has "
            f"{vocab_size} word vectors; give the tokenizer that belongs to it"
        )


def fingerprint(tokenizer) -> str:
    """A name for what a tokenizer does to texts, the same on every machine."""
    does = plain_backend(tokenizer).to_str()
    if reading := getattr(tokenizer, "reading", None):
        template = tokenizer.chat_template if reading.messages else None
        does += repr((reading, template)) if reading != type(reading)() else ""
    return blake2b(does.encode(), digest_size=16).hexdigest()


def plain_backend(tokenizer):
    """A copy of the Rust tokenizer inside, with padding and truncation switched off."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} has no fast tokenizer: save a tokenizer.json beside it"
        )
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend


def unknown_token(tokenizer) -> int | None:
    """The id that words get which the vocabulary does not have."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if "unk_id" in described:
        return described["unk_id"]
    token = described.get("unk_token")
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(token)


def _without_state(tokenizer):
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in _STATE:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer
