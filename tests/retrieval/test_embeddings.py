"""Embeddings on disk: shards, what is kept, what is never taken for something else."""

import json

import numpy as np
import pytest

from llme_jax.data.tokens import TokenStore
from llme_jax.errors import InputError
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.retrieval.embeddings import Embeddings, encode_to_disk, forget

DESCRIBE = {"params": "p", "texts": "t"}


@pytest.fixture
def store(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 9, 23)
    np.save(tmp_path / "values.npy", np.arange(lengths.sum()))
    np.save(tmp_path / "offsets.npy", np.r_[0, lengths.cumsum()])
    return TokenStore(tmp_path)


def sums(store):
    """Embeddings that tell which text they belong to."""
    return np.array([[store[i].sum(), len(store[i])] for i in range(len(store))], np.float32)


@pytest.mark.parametrize("shard", [1, 7, 23, 100])
def test_slices_are_those_of_the_whole(store, tmp_path, shard):
    got, made = encode_to_disk(tmp_path / "e", store, DESCRIBE, sums, shard=shard)
    whole = sums(store)
    assert len(got) == 23 and got.shape == (23, 2)
    for start in range(24):
        for stop in (0, start, start + 1, start + 8, 23, 40):
            np.testing.assert_array_equal(got[start:stop], whole[start:stop])
    np.testing.assert_array_equal(got[:], whole)
    rows = np.random.default_rng(1).integers(0, 23, (5, 3))
    np.testing.assert_array_equal(got[rows], whole[rows])
    assert json.loads((made / "manifest.json").read_text())["texts"] == 23
    forget(made)
    assert not made.exists()


def test_only_what_is_missing_is_encoded(store, tmp_path):
    calls = []

    def encode(part):
        if len(calls) == 2 and not again:
            raise KeyboardInterrupt  # killed in the third shard
        calls.append(len(part))
        return sums(part)

    again = False
    with pytest.raises(KeyboardInterrupt):
        encode_to_disk(tmp_path / "e", store, DESCRIBE, encode, shard=6)
    again = True
    got, made = encode_to_disk(tmp_path / "e", store, DESCRIBE, encode, shard=6)
    assert calls == [6, 6, 6, 5] and made is not None
    np.testing.assert_array_equal(got[:], sums(store))
    _, made = encode_to_disk(tmp_path / "e", store, DESCRIBE, encode, must_exist=True, shard=6)
    assert len(calls) == 4 and made is None  # whoever made them may delete them


@pytest.mark.parametrize("damage", ["short", "other shape", "no array", "bit"])
def test_a_damaged_shard_is_encoded_again(store, tmp_path, damage, caplog):
    got, made = encode_to_disk(tmp_path / "e", store, DESCRIBE, sums, shard=6)
    want, path = got[:].copy(), made / "000000000006.npy"
    del got
    content = path.read_bytes()
    path.unlink()  # the old one is still mapped
    path.write_bytes({"short": content[:-5], "no array": b"x" * 200}.get(damage, b""))
    if damage == "bit":
        path.write_bytes(content[:150] + bytes([content[150] ^ 1]) + content[151:])
    if damage == "other shape":
        np.save(path, want[:5])
    got, again = encode_to_disk(tmp_path / "e", store, DESCRIBE, sums, shard=6)
    assert again == made and f"{path} is damaged" in caplog.text
    np.testing.assert_array_equal(got[:], want)


def test_other_weights_or_texts_have_other_embeddings(store, tmp_path):
    encode_to_disk(tmp_path / "e", store, DESCRIBE, sums)
    for change in ({"params": "other"}, {"texts": "other"}):
        with pytest.raises(InputError, match=r"has no embeddings of this corpus by this encoder"):
            encode_to_disk(tmp_path / "e", store, DESCRIBE | change, sums, must_exist=True)
    assert len(list((tmp_path / "e").iterdir())) == 1


def test_every_bit_of_the_parameters_counts():
    params = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    names = {fingerprint_params(params)}
    params["a"][1, 2] = 1e-30
    names.add(fingerprint_params(params))
    names.add(fingerprint_params({"a": params["a"].T.copy(), "b": params["b"]}))
    names.add(fingerprint_params({"c": params["a"], "b": params["b"]}))
    assert len(names) == 4
    assert fingerprint_params({"b": params["b"], "a": params["a"]}) in names


def test_one_shard_is_enough():
    assert Embeddings([np.eye(3, dtype=np.float32)])[1:2].tolist() == [[0, 1, 0]]
