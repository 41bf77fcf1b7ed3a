"""What a folder says of texts: its tokenizer with all that other files say of it; how long texts
are, where they are cut, what stands before them."""

import statistics
from typing import NamedTuple

from tokenizers.normalizers import Lowercase, Sequence

from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import ModelFolder, is_static, listed_modules, model_root
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.reading import Reading, carries_pairs, message_format
from llme_jax.hugging_face.sentence_transformers import (
    TransformerSettings,
    is_reranker,
    pools_prompt,
    read_prompts,
    read_transformer,
)
from llme_jax.hugging_face.tokenizer import load_tokenizer, unknown_token

NO_LIMIT = 2**31 - 1  # of tokens; larger numbers in tokenizer_config.json mean none


class TextDefaults(NamedTuple):
    """What counts where no flag says otherwise.

    Attributes:
        prompts: before a query and before a key; None where the folder has none.
        query_length, key_length: tokens that are kept; None where nothing is said.
        side: the one that is cut off, "right" or "left".
    """

    prompts: tuple[str, str] | None
    query_length: int | None
    key_length: int | None
    side: str


def open_tokenizer(model: ModelFolder):
    """The tokenizer of an encoder or a reranker, which knows how the folder reads texts.

    Its `reading` is that of `reading_of`.

    Raises:
        InputError: it cannot be read, or something is said of texts that is not served.
    """
    settings = read_transformer(model.path)
    tokenizer = load_tokenizer(model, **dict(settings.tokenizer))
    if settings.lower:
        _lower(tokenizer.backend_tokenizer)
    messages = settings.messages
    if messages and not tokenizer.chat_template:
        raise InputError(
            f"{model}: sentence_bert_config.json sends texts through a chat template, the "
            "tokenizer has none; copy chat_template.jinja there"
        )
    tokenizer.reading = Reading(
        messages=message_format(tokenizer) if messages == "auto" else messages,
        template=settings.template,
        keeps_end=settings.keeps_end,
        prompt_apart=not pools_prompt(model.path),
        lower=settings.lower,
    )
    if is_model2vec(model):
        lengths = sorted(map(len, tokenizer.get_vocab()))
        tokenizer.reading = Reading(
            dropped=unknown_token(tokenizer), characters=int(statistics.median(lengths))
        )
    if is_static(model.path) or is_model2vec(model):
        tokenizer.backend_tokenizer.post_processor = None  # they add no special tokens
    return tokenizer


def read_pairs_as_messages(tokenizer, model: ModelFolder, classifier: bool) -> None:
    """Sends a reranker's pairs through the chat template where sentence-transformers does.

    Args:
        classifier: is it a language model that has become a sequence classifier? Without files of
            sentence-transformers its template counts, if it has one that tells query from document.
    """
    reading = tokenizer.reading
    if listed_modules(model_root(model.path)):
        if reading.messages and not carries_pairs(tokenizer, reading):
            raise InputError(
                f"{model}: its chat template does not show both query and document, which have "
                "roles of these names; give the template that the model was trained with"
            )
    elif classifier and tokenizer.chat_template:
        of_template = reading._replace(messages=message_format(tokenizer))
        if carries_pairs(tokenizer, of_template):
            tokenizer.reading = of_template


NOTHING_SAID = TextDefaults(None, None, None, "right")


def text_defaults(model: ModelFolder, tokenizer, longest: int) -> TextDefaults:
    """
    Args:
        longest: tokens that the model reads at most.

    Raises:
        InputError: the folder says what is not served, or keeps longer texts than its model reads.
    """
    settings, prompts = read_transformer(model.path), read_prompts(model.path)
    lengths = settings.query_length, settings.key_length
    if given := [length for length in lengths if length]:
        # RoBERTa's first positions are of no token, and old files have the number of all.
        positions = max(longest, read_json(model.config).get("max_position_embeddings") or 0)
        if max(given) > positions:
            raise InputError(
                f"{model}: sentence_bert_config.json keeps {max(given)} tokens, the model "
                f"has {positions} positions; give max_seq_length {longest} there"
            )
    usual = _usual_length(model, tokenizer, settings)
    lengths = [usual if length is None else length for length in lengths]
    lengths = [None if length is None else min(length, longest) for length in lengths]
    return TextDefaults(prompts, *lengths, tokenizer.truncation_side)


def _usual_length(model: ModelFolder, tokenizer, settings: TransformerSettings) -> int | None:
    """That of sentence-transformers' folders: there it is the tokenizer's own."""
    if is_model2vec(model):
        length = read_json(model.config).get("max_length", 512)
        return NO_LIMIT if length is None else length
    if is_static(model.path):
        truncation = read_json(model.path / "tokenizer.json").get("truncation") or {}
        return truncation.get("max_length", NO_LIMIT)
    kinds = [kind for kind, _ in listed_modules(model_root(model.path))]
    if kinds[1:] or (kinds and is_reranker(model.path)):
        return min(int(tokenizer.model_max_length), NO_LIMIT)
    return None


def is_model2vec(model: ModelFolder) -> bool:
    """Whether model2vec saved it. Texts are then read as there: sentence-transformers, which opens
    most such folders, counts unknown tokens too.
    """
    if not model.config.is_file():
        return False
    given = read_json(model.config)
    return given.get("model_type") == "model2vec" or (
        is_static(model.path) and "normalize" in given
    )


def _lower(backend) -> None:
    """As sentence-transformers has a tokenizer lower texts that would not."""
    steps = backend.normalizer
    steps = [*steps] if isinstance(steps, Sequence) else [] if steps is None else [steps]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])
