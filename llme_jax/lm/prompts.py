"""What a language model reads to score a candidate: key, query and answer as tokens."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from llme_jax.data.rows import ScoringRow
from llme_jax.data.tokens import TokenStore
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import plain_backend

CHUNK = 1024  # prompts that one call of the tokenizer sees, which bounds its memory


class Template(NamedTuple):
    """{before}{key}{between}{query}{then}{answer}, the fields stripped or as they are."""

    before: str
    between: str
    then: str
    strip: bool = False


# Source: process_lm_scoring in LLM-Embedder's `run_lm_score.py` (MIT), which has none for tool; and
# lrlm there is token lists only, which a row may have here too.
TEMPLATES = {
    "qa": Template("Knowledge: ", "\n\nQuestion: ", "\n\nAnswer: ", strip=True),
    "convsearch": Template("Knowledge: ", "\n\nQuestion: ", "\n\nAnswer: ", strip=True),
    "icl": Template("", "\n", "\n"),
    "chat": Template("", "\nSpeaker 1: ", "\nSpeaker 2: "),
    "lrlm": Template("", "", ""),
    "tool": Template("Tool: ", "\n\nRequest: ", "\n\nCall: ", strip=True),
}


class Pair(NamedTuple):
    """One thing to score: how likely `answer` is after the row's candidate `key`."""

    row: ScoringRow
    key: int  # index of the candidate
    answer: int  # index of the answer
    place: str  # where the row is, for messages: train.json:3


class Prompts(NamedTuple):
    """Tokens of many pairs; the answer is the end of each."""

    store: TokenStore
    answer_lengths: np.ndarray  # int32[n], tokens of each that are the answer's


class PromptMaker:
    """Turns pairs into tokens.

    Special tokens are those that the tokenizer puts in front; none follow the answer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        key_max_length: tokens a key keeps at most.
        context_max_length: tokens a prompt has at most; what is too long loses tokens of the key's
            end, then of the query's beginning, never of the answer.
    """

    def __init__(self, tokenizer, *, key_max_length: int, context_max_length: int):
        self._tokenizer, self._cutter = plain_backend(tokenizer), plain_backend(tokenizer)
        self._cutter.enable_truncation(key_max_length)
        self._key_max_length, self._limit = key_max_length, context_max_length
        self._end = end_of_text(self._tokenizer)

    def __call__(self, pairs: Sequence[Pair]) -> Prompts:
        """
        Raises:
            InputError: an answer leaves no room for anything else, or nothing is before it; names
                its place.
        """
        ids, lengths = [], []
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            for pair, (tokens, length) in zip(chunk, self._tokenize(chunk), strict=True):
                if length >= self._limit:
                    raise InputError(
                        f"{pair.place}: the answer has {length} tokens; give a "
                        f"--context_max_length above {length}, or shorten the answer"
                    )
                if len(tokens) < 2:
                    raise InputError(
                        f"{pair.place}: key, query and answer are one token in all: give "
                        "the model something to read before the answer"
                    )
                ids.append(np.array(tokens, np.uint32))
                lengths.append(min(length, len(tokens) - 1))  # nothing predicts the first token
        return Prompts(TokenStore.of(ids), np.array(lengths, np.int32))

    def _tokenize(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], int]]:
        """(tokens, how many of them are the answer's) of each pair."""
        texts = [self._text(*pair) for pair in zip(pairs, self._cut_keys(pairs), strict=True)]
        encodings = iter(self._tokenizer.encode_batch([text for text, _ in texts if text]))
        for pair, (text, at) in zip(pairs, texts, strict=True):
            if pair.row.tokens is not None:
                keys, *rest = pair.row.tokens
                parts = [keys[pair.key], *rest]
                tokens = list(chain.from_iterable(parts))
                at = np.cumsum([0, *map(len, parts)]).tolist()
                key, query, first = (0, at[1]), (at[1], at[3]), at[3]
            else:
                encoding = next(encodings)
                tokens = encoding.ids[: self._end]
                first = token_at(encoding, at[4], text)
            length = len(tokens) - first
            if len(tokens) > self._limit:
                if pair.row.tokens is None:
                    at = [token_at(encoding, place, text) for place in at]
                    key, query = (at[0], at[1]), (at[2], at[3])
                tokens = _cut(tokens, len(tokens) - self._limit, key, query)
            yield tokens, length

    def _cut_keys(self, pairs: Sequence[Pair]) -> list[str]:
        """Each pair's key, cut where its tokens exceed their number."""
        keys = [pair.row.keys[pair.key] if pair.row.tokens is None else "" for pair in pairs]
        # A token is a byte at least, and a space may be put in front.
        long = [i for i, k in enumerate(keys) if len(k.encode()) >= self._key_max_length]
        cut = self._cutter.encode_batch([keys[i] for i in long], add_special_tokens=False)
        for i, encoding in zip(long, cut, strict=True):
            if encoding.overflowing:
                keys[i] = keys[i][: encoding.offsets[-1][1]]
        return keys

    def _text(self, pair: Pair, key: str) -> tuple[str, list[int]]:
        """A pair's text, and where key, query (begin and end) and answer (begins) are in it."""
        row = pair.row
        if row.tokens is not None:
            return "", []
        template = TEMPLATES[row.task]
        parts = [key, row.query, row.answers[pair.answer]]
        if template.strip:
            parts = [part.strip() for part in parts]
        pieces = template.before, parts[0], template.between, parts[1], template.then, parts[2]
        return "".join(pieces), np.cumsum([len(piece) for piece in pieces[:-1]]).tolist()


def end_of_text(backend) -> int | None:
    """Where a text's tokens end: some tokenizers put one of their own behind every text."""
    return -1 if backend.encode("test").special_tokens_mask[-1] else None


def token_at(encoding, place: int, text: str) -> int:
    """The token that covers the text's character `place`, or the first one after it.

    A token over both sides of the border counts: it is part of what follows.
    """
    tokens = map(encoding.char_to_token, range(place, len(text)))
    return next((token for token in tokens if token is not None), len(encoding.ids))


def _cut(tokens: list[int], excess: int, key: tuple[int, int], query: tuple[int, int]) -> list[int]:
    """`tokens` less `excess` of them: the key's last, then the query's first, then any first."""
    from_key = min(excess, key[1] - key[0])
    from_query = min(excess - from_key, query[1] - query[0])
    kept = tokens[: key[1] - from_key] + tokens[key[1] : query[0]]
    kept += tokens[query[0] + from_query :]
    return kept[excess - from_key - from_query :]
