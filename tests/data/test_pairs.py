"""Pairs joined from the tokens of each text against the tokenizer's own call on the two."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from llme_jax.data.pairs import Pairs, longest_first, pair_layout
from llme_jax.data.tokens import TokenStore, TokenWriter, bare_tokens
from llme_jax.errors import InputError
from llme_jax.files.cache import cache_dir
from llme_jax.hugging_face.tokenizer import load_tokenizer, plain_backend
from llme_jax.quickstart import data as quickstart

LIMITS = (8, 31, 40, 64, 192)


@pytest.fixture(scope="module")
def real():
    """1,000 real requests and functions, some of them put together to be long."""
    files = quickstart.prepare(cache_dir(None))
    rng = np.random.default_rng(0)

    def read(path: Path, field: str) -> list[str]:
        texts = [json.loads(line)[field] for line in path.read_text("utf-8").splitlines()]
        return [" ".join(rng.choice(texts, rng.integers(1, 4))) for _ in range(1000)]

    return files.model, read(files.train, "query"), read(files.corpus, "text")


def joined(tokenizer, queries, keys, limit: int, side: str) -> tuple[np.ndarray, ...]:
    layout = pair_layout(tokenizer, limit, side)
    backend = plain_backend(tokenizer)
    stores = [bare_tokens(texts, backend, limit, side) for texts in (queries, keys)]
    numbers = np.arange(len(queries))
    pairs = Pairs(*stores, layout, numbers, numbers)
    width = int(pairs.lengths.max())
    assert width <= limit and len(pairs) == len(queries)
    ids, lengths, second = pairs.padded(numbers, width + 3, tokenizer.pad_token_id)
    np.testing.assert_array_equal(lengths, pairs.lengths)
    np.testing.assert_array_equal(pairs.lengths_of(numbers[::7]), pairs.lengths[::7])
    return ids, lengths, second


def assert_as_the_tokenizer(tokenizer, queries, keys, limit: int, side: str) -> None:
    ids, lengths, second = joined(tokenizer, queries, keys, limit, side)
    tokenizer.truncation_side = side
    want = tokenizer(queries, keys, truncation=True, max_length=limit, return_token_type_ids=True)
    for i, (own, types) in enumerate(zip(want["input_ids"], want["token_type_ids"], strict=True)):
        assert ids[i, : lengths[i]].tolist() == own, i
        assert (ids[i, lengths[i] :] == tokenizer.pad_token_id).all()
        of = [s for s in want.sequence_ids(i)]
        assert second[i] == of.index(1)
        if any(types):
            np.testing.assert_array_equal(types, np.arange(len(own)) >= second[i])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", LIMITS)
def test_pairs_are_those_of_the_tokenizer(real, limit, side):
    folder, queries, keys = real
    assert_as_the_tokenizer(load_tokenizer(folder), queries, keys, limit, side)


@pytest.fixture(scope="module")
def roberta():
    """As RoBERTa joins texts: <s> a </s></s> b </s>, tokens of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def test_pairs_of_roberta(real, roberta):
    _, queries, keys = real
    assert_as_the_tokenizer(roberta, queries[:200], keys[:200], 300, "right")


def test_who_gives_way():
    """The examples of the reference: lengths 16 + 24, of which 3 are special."""
    room = 40 - 3
    for first, second, kept in (
        (9, 100, (9, 28)),
        (100, 10, (27, 10)),
        (100, 200, (18, 19)),
        (200, 100, (19, 18)),
        (100, 100, (18, 19)),
        (3, 4, (3, 4)),
    ):
        found = longest_first([first], [second], room)
        assert tuple(x.item() for x in found) == kept


def test_a_store_on_disk_is_the_one_in_memory(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    texts = [tiny.text(rng, 1, 9).replace("w", "a ") for _ in range(50)]
    with TokenWriter(
        tmp_path / "store", tokenizer, max_length=7, truncation_side="left", bare=True
    ) as writer:
        for text in texts:
            writer.append(text)
    found, backend = TokenStore(tmp_path / "store"), plain_backend(tokenizer)
    want = bare_tokens(texts, backend, 7, "left")
    for name in ("values", "offsets", "whole"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
    assert found.whole.max() > 7 >= found.lengths.max()
    np.testing.assert_array_equal(found.part(3, 9).whole, want.whole[3:9])


def test_no_room_for_two_texts(tokenizer):
    with pytest.raises(InputError, match=r"are 4 tokens together, .* give 5 or more"):
        pair_layout(tokenizer, 4, "right")
