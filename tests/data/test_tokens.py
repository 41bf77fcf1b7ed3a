"""The token store against the tokenizer of transformers."""

import numpy as np
import pytest

from llme_jax.data import arrays, tokens
from llme_jax.data.tokens import TokenStore, tokenize
from llme_jax.data.widths import usual_width
from llme_jax.errors import InputError
from llme_jax.files.cache import cache_dir
from llme_jax.hugging_face.tokenizer import fingerprint

TEXTS = ["", "a b c", "hello world " * 30, "Ä ü ß 東京 ???", "abc " * 5, "x" * 200]


def _store(texts, tokenizer, cache, key="k", max_length=12, side="right") -> TokenStore:
    return tokenize(
        [("", text) for text in texts],
        tokenizer,
        max_length=max_length,
        truncation_side=side,
        name=key,
        cache=cache,
        total=len(texts),
        desc="Tokenising",
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 12, 64])
def test_ids_are_those_of_transformers(tmp_path, make_tokenizer, side, max_length):
    tokenizer = make_tokenizer()
    store = _store(TEXTS, tokenizer, tmp_path, max_length=max_length, side=side)
    tokenizer.truncation_side = side
    expected = tokenizer(TEXTS, truncation=True, max_length=max_length, padding=True)
    width = len(expected["input_ids"][0])
    ids, lengths = store.padded(np.arange(len(TEXTS)), width, tokenizer.pad_token_id)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(lengths, np.sum(expected["attention_mask"], 1))
    np.testing.assert_array_equal(store.lengths, lengths)
    assert ids.dtype == lengths.dtype == np.int32


def test_texts_in_chunks_keep_their_order(tmp_path, tokenizer, monkeypatch):
    texts = [f"a{i} " * (i % 7) for i in range(50)]
    whole = _store(texts, tokenizer, tmp_path, "whole")
    monkeypatch.setattr(tokens, "CHUNK_TEXTS", 7)
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 60)
    chunks = _store(texts, tokenizer, tmp_path, "chunks")
    assert len(whole) == len(chunks) == 50
    np.testing.assert_array_equal(whole.values, chunks.values)
    np.testing.assert_array_equal(whole.offsets, chunks.offsets)


def test_padded_takes_any_order_repeats_and_cuts(tmp_path, tokenizer):
    store = _store(TEXTS, tokenizer, tmp_path)
    ids, lengths = store.padded([4, 0, 4, 2], 5, 9)
    assert lengths.tolist() == [5, 2, 5, 5]
    np.testing.assert_array_equal(ids[0], store[4][:5])
    np.testing.assert_array_equal(ids[0], ids[2])
    assert ids[1].tolist() == [2, 3, 9, 9, 9]
    assert store.padded([], 5, 9)[0].shape == (0, 5)


def test_an_existing_store_is_opened_and_leftovers_are_ignored(tmp_path, tokenizer):
    leftover = tmp_path / "tokens/.k.12345678.tmp"  # of a killed process
    leftover.mkdir(parents=True)
    (leftover / "values.npy").write_bytes(b"half")
    first = _store(TEXTS, tokenizer, tmp_path)
    again = _store(["something else"], tokenizer, tmp_path)
    np.testing.assert_array_equal(first.values, again.values)


def test_a_failure_leaves_nothing_behind(tmp_path, tokenizer):
    def texts():
        yield "", "a"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(
            texts(),
            tokenizer,
            max_length=8,
            truncation_side="right",
            name="k",
            cache=tmp_path,
            total=None,
            desc="",
        )
    assert list((tmp_path / "tokens").iterdir()) == []


def test_no_texts(tmp_path, tokenizer):
    store = _store([], tokenizer, tmp_path)
    assert len(store) == 0 and store.lengths.shape == (0,)


def test_small_vocabularies_take_two_bytes_a_token(tmp_path, make_tokenizer):
    assert _store(["a"], make_tokenizer(), tmp_path, "small").values.dtype == np.uint16
    large = make_tokenizer(extra_words=70_000)
    store = _store(["word69999"], large, tmp_path, "large")
    assert store.values.dtype == np.uint32
    assert store.values[1] == large.convert_tokens_to_ids("word69999") > 2**16


def test_no_room_for_text(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"2 tokens leaves no room .* 2 special tokens: give 3"):
        _store(["a"], tokenizer, tmp_path, max_length=2)


def test_fingerprint_is_of_the_contents(make_tokenizer):
    tokenizer, padded, other = make_tokenizer(), make_tokenizer(), make_tokenizer(1)
    padded.backend_tokenizer.no_padding()  # a setting of calls, not of what texts become
    assert fingerprint(tokenizer) == fingerprint(padded) != fingerprint(other)
    assert tokenizer.backend_tokenizer.padding is not None  # the caller's tokenizer is untouched


def test_bucket_is_the_smallest_of_the_list():
    widths = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    for length in range(1, 2049):
        assert usual_width(length, 10_000) == next(w for w in widths if w >= length)
    assert usual_width(130, 150) == 150 and usual_width(20, 24) == 24 and usual_width(0, 512) == 16


def test_cache_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "env"))
    assert cache_dir(str(tmp_path / "flag")) == tmp_path / "flag"
    assert cache_dir(None) == tmp_path / "env"
    monkeypatch.delenv("LLME_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir(None) == tmp_path / ".cache/llme_jax"


def test_array_writer_writes_what_numpy_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BUFFERED", 3)
    for count in (0, 2, 3, 10, 100_000):
        writer = arrays.ArrayWriter(tmp_path / "a.npy", np.uint64)
        values = [2**64 - 1 - i for i in range(count)]
        writer.extend(values[: count // 2])
        for value in values[count // 2 :]:
            writer.append(value)
        assert len(writer) == count
        writer.close()
        for mode in (None, "r"):
            loaded = np.load(tmp_path / "a.npy", mmap_mode=mode)
            np.testing.assert_array_equal(loaded, np.array(values, np.uint64))
