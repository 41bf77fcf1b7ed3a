"""How a model's folder reads a text: what stands around it, which ids it has, where it is cut."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import plain_backend

logger = logging.getLogger(__name__)
_FILLERS = ("0", "1 2 3 4")  # two contents that share no token


class Reading(NamedTuple):
    """What there is besides the tokenizer's own rules; without anything, a text is read as it is,
    behind its prompt.

    Attributes:
        messages: a text is what a user says in the tokenizer's chat template, its prompt what the
            system says; `structured`: as a list of parts, for templates that want one.
        template: further values that the template is filled in with, by name.
        keeps_end: the template's end stays when a text is cut.
        prompt_apart: pooling leaves the prompt's tokens out.
        dropped: a token that is left out of every text, as model2vec does with unknown ones.
        characters: those of a text that are read, times the tokens it keeps; None: all. model2vec
            saves time so.
        lower: the tokenizer was made to lower texts, whatever its own files say.
    """

    messages: Literal["flat", "structured"] | None = None
    template: tuple[tuple[str, object], ...] = ()
    keeps_end: bool = True
    prompt_apart: bool = False
    dropped: int | None = None
    characters: int | None = None
    lower: bool = False


def reading_of(tokenizer) -> Reading:
    """That of a tokenizer that `load_tokenizer` has opened; nothing special for another one."""
    return getattr(tokenizer, "reading", Reading())


class Cutter:
    """Texts behind their prompts to token ids, cut to a length.

    Args:
        tokenizer: a fast one of transformers.
        max_length: tokens that a text keeps, special tokens included.
        side: "right" or "left", the side that is cut off.

    Raises:
        InputError: `max_length` leaves no room for text.
    """

    def __init__(self, tokenizer, max_length: int, side: str):
        self._tokenizer, self._reading = tokenizer, reading_of(tokenizer)
        self._backend, self._max_length = plain_backend(tokenizer), max_length
        special = 0 if self._reading.messages else self._backend.num_special_tokens_to_add(False)
        if max_length <= special:
            raise InputError(
                f"a maximum length of {max_length} tokens leaves no room for text beside the "
                f"tokenizer's {special} special tokens: give {special + 1} or more"
            )
        self._backend.enable_truncation(max_length, direction=side)
        self._empty = tokenizer.pad_token_id or 0
        self.before = cache(self._before)
        self._end = cache(self._end_of_template)
        self._said_of_empty = False

    @property
    def splits(self) -> bool:
        """Whether a text's pooled part begins behind its prompt, see `before`."""
        return self._reading.prompt_apart

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._reading.messages:
            both = zip(prompts, texts, strict=True)
            return self._in_template([_messages(self._reading, *parts) for parts in both])
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        if self._reading.characters:
            whole = [text[: self._reading.characters * self._max_length] for text in whole]
        return [self._known(encoding.ids) for encoding in self._backend.encode_batch_fast(whole)]

    def pairs(
        self, queries: Sequence[str], keys: Sequence[str], prompts: Sequence[str]
    ) -> list[list[int]]:
        """The ids of pairs in a template that tells queries from documents."""
        return self._in_template(
            [_pair(self._reading, *parts) for parts in zip(prompts, queries, keys, strict=True)]
        )

    def _before(self, prompt: str) -> int:
        """Tokens at the beginning of texts behind this prompt that pooling leaves out.

        Counted as sentence-transformers does: those of the prompt alone, but for a special one at
        its end.
        """
        if not prompt or not self._reading.prompt_apart or self._reading.messages:
            return 0
        ids = self._backend.encode(prompt).ids
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def _known(self, ids: list[int]) -> list[int]:
        if self._reading.dropped is not None:
            ids = [token for token in ids if token != self._reading.dropped]
        if not ids and not self._said_of_empty:
            self._said_of_empty = True
            logger.warning(
                "there are texts without any token, as empty ones where a tokenizer adds none: "
                "they are read as one token of padding"
            )
        return ids or [self._empty]

    def _in_template(self, conversations: list[list[dict]]) -> list[list[int]]:
        texts = _filled(self._tokenizer, self._reading, conversations)
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        found = []
        for conversation, encoding in zip(conversations, encodings, strict=True):
            ids = self._known(encoding.ids)
            if self._reading.keeps_end and len(ids) >= self._max_length:
                end = self._end(_key(conversation))[-len(ids) :]
                ids = ids[: len(ids) - len(end)] + list(end)
            found.append(ids)
        return found

    def _end_of_template(self, key: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        """The ids that end all conversations of these roles and this system's message."""
        structured = self._reading.messages == "structured"
        filled = []
        for filler in _FILLERS:
            said = [(role, what if role == "system" else filler) for role, what in key]
            filled.append([_message(role, what, structured) for role, what in said])
        backend = plain_backend(self._tokenizer)
        texts = _filled(self._tokenizer, self._reading, filled)
        first, second = (backend.encode(t, add_special_tokens=False).ids for t in texts)
        count = 0
        while count < min(len(first), len(second)) and first[-count - 1] == second[-count - 1]:
            count += 1
        # Where they do not differ at all, the template says nothing of the content.
        return tuple(first[len(first) - count :]) if count < min(len(first), len(second)) else ()


def carries_pairs(tokenizer, reading: Reading) -> bool:
    """Whether the chat template shows both of a query and a document."""
    probes = [("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot")]
    try:
        base, *others = _filled(tokenizer, reading, [_pair(reading, "", *x) for x in probes])
    except InputError:
        return False
    return base not in others


def message_format(tokenizer) -> Literal["flat", "structured"]:
    """The form of messages that a chat template wants, as sentence-transformers guesses it."""
    template = tokenizer.chat_template
    signs = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
    if isinstance(template, str) and template and not any(sign in template for sign in signs):
        return "flat"
    return "structured"


def _messages(reading: Reading, prompt: str, text: str) -> list[dict]:
    return _conversation(reading, prompt, ("user", text))


def _pair(reading: Reading, prompt: str, query: str, key: str) -> list[dict]:
    return _conversation(reading, prompt, ("query", query), ("document", key))


def _conversation(reading: Reading, prompt: str, *said: tuple[str, str]) -> list[dict]:
    system = [("system", prompt)] if prompt else []
    structured = reading.messages == "structured"
    return [_message(role, text, structured) for role, text in [*system, *said]]


def _message(role: str, text: str, structured: bool) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}] if structured else text}


def _key(conversation: Iterable[dict]) -> tuple[tuple[str, str], ...]:
    """What decides the end of a conversation: its roles, and what the system says."""

    def said(message: dict) -> str:
        if message["role"] != "system":
            return ""
        content = message["content"]
        return content if isinstance(content, str) else content[0]["text"]

    return tuple((message["role"], said(message)) for message in conversation)


def _filled(tokenizer, reading: Reading, conversations: list[list[dict]]) -> list[str]:
    try:
        return tokenizer.apply_chat_template(
            conversations, tokenize=False, **dict(reading.template)
        )
    except Exception as error:  # templates raise what they like
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(
            f"{name}: its chat template cannot be filled in ({' '.join(str(error).split())}); give "
            "a model whose template takes such texts"
        ) from error
