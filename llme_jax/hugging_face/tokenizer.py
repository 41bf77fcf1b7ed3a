"""Tokenizers of model folders, free of the state that texts were last cut and padded with."""

import copy
from pathlib import Path

from llme_jax.errors import InputError
from llme_jax.hugging_face.foreign import is_static, read_json

# How tokenizer.json's truncation and padding come back as settings of tokenizer_config.json.
_STATE = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
CLASSES = {  # how the names of transformers' classes begin
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
    "deberta-v2": "DebertaV2",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "nomic_bert": "NomicBert",
    "gte": "Gte",
}


def load_tokenizer(folder: Path):
    """The fast tokenizer of a Hugging Face folder, which neither cuts nor pads by itself.

    That of static embeddings adds no special tokens.

    The class is looked up here because `AutoTokenizer` imports torch where that is installed.

    Raises:
        InputError: the folder has no tokenizer that the tokenizers library can run.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    static = is_static(folder)  # which may have no config.json
    config = {} if static else read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    name = settings.get("tokenizer_class") or f"{CLASSES.get(model_type, 'PreTrained')}Tokenizer"
    if model_type not in CLASSES and (folder / "tokenizer.json").is_file():
        # The classes of language models build a tokenizer by rules of their own; this one takes
        # the file as it is.
        name = "PreTrainedTokenizerFast"
    for candidate in (f"{name.removesuffix('Fast')}Fast", name, "PreTrainedTokenizerFast"):
        if cls := getattr(transformers, candidate, None):
            break
    # Without these files transformers would make up a tokenizer that knows no word.
    if not any((folder / file).is_file() for file in cls.vocab_files_names.values()):
        raise InputError(f"{folder}: no tokenizer.json in this folder; copy the tokenizer there")
    try:
        tokenizer = cls.from_pretrained(folder)
    except Exception as error:  # a dozen types, from a missing file to a Rust panic
        raise InputError(f"{folder}: the tokenizer cannot be read ({error})") from error
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {name} has no fast tokenizer; add a tokenizer.json")
    if static or model_type == "model2vec":
        tokenizer.backend_tokenizer.post_processor = None
    return _without_state(tokenizer)


def save_tokenizer(
    tokenizer, folder: Path, max_length: int | None = None, cut_to: int | None = None
) -> None:
    """Write the tokenizer as transformers does, without padding.

    Args:
        max_length: what others are to cut texts to by default.
        cut_to: what tokenizer.json itself cuts texts to; None for no cutting.
    """
    tokenizer = _without_state(copy.deepcopy(tokenizer))
    if cut_to is not None:
        tokenizer.backend_tokenizer.enable_truncation(cut_to, direction=tokenizer.truncation_side)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


def check_vocabulary(tokenizer, vocab_size: int, name: str) -> None:
    """Refuses a tokenizer that gives ids for which a model has no vector.

    Raises:
        InputError: names the model.
    """
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(
            f"{name}: the tokenizer gives ids up to {largest}, the encoder has {vocab_size} word "
            "vectors; give the tokenizer that belongs to it"
        )


def _without_state(tokenizer):
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in _STATE:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer
