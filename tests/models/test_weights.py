"""Weights in every form they come in, and what is said when they do not fit."""

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.weights import load_params, save_params
from llme_jax.models.bert import abstract_params
from llme_jax.models.families import ENCODERS, read_config


def _load(folder):
    return load_params(folder, abstract_params(read_config(folder, ENCODERS)))


def _same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 0} | tolerance))


def _rewrite(folder, change):
    """Replace the tensors of a folder by `change(tensors)`."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_saved_tensors_are_those_that_were_read(tiny, tmp_path):
    folder, _ = tiny()
    save_params(tmp_path / "again.safetensors", _load(folder))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "again.safetensors")
    assert set(before) - set(after) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_prefix_heads_buffers_and_old_names_are_understood(tiny):
    folder, _ = tiny()
    want = _load(folder)

    def dress(tensors):
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            tensors = {
                name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): tensor
                for name, tensor in tensors.items()
            }
        heads = ["cls.predictions.bias", "cls.seq_relationship.weight", "classifier.weight"]
        tensors |= {name: np.zeros(3, np.float32) for name in heads}
        return tensors | {"bert.embeddings.position_ids": np.arange(40)}

    _rewrite(folder, dress)
    _same(_load(folder), want)


@pytest.mark.parametrize("dtype, digits", [(np.float16, 2e-3), (ml_dtypes.bfloat16, 8e-3)])
def test_half_precision_files_become_float32(tiny, dtype, digits):
    folder, _ = tiny()
    want = _load(folder)
    _rewrite(folder, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    params = _load(folder)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    _same(params, want, rtol=digits, atol=1e-6)  # half a unit in the last of 11 and 8 bits


def test_sharded_safetensors(tiny):
    folder, model = tiny()
    want = _load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    _same(_load(folder), want)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"lists {shards[1].name}, which is not there"):
        _load(folder)


def test_torch_file(tiny, monkeypatch):
    folder, model = tiny()
    want = _load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _same(_load(folder), want)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # as if not installed
    with pytest.raises(InputError, match=r"pytorch_model.bin: .* install it or convert"):
        _load(folder)


def test_every_tensor_that_does_not_fit_is_named_once(tiny):
    folder, _ = tiny()

    def spoil(tensors):
        del tensors["embeddings.LayerNorm.bias"]
        del tensors["encoder.layer.1.output.dense.weight"]
        tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((81, 48), np.float32)
        tensors["encoder.layer.2.output.dense.bias"] = np.zeros(48, np.float32)
        return tensors

    _rewrite(folder, spoil)
    with pytest.raises(InputError) as error:
        _load(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}: the weights do not fit config.json")
    for part in (
        "embeddings.LayerNorm.bias is missing",
        "encoder.layer.1.output.dense.weight is missing",
        "encoder.layer.0.intermediate.dense.weight has shape (81, 48) instead of (80, 48)",
        "encoder.layer.2.output.dense.bias is unexpected",
    ):
        assert message.count(part) == 1
    assert message.count(";") == 4


def test_a_folder_is_taken_as_it_is(tiny, tmp_path):
    folder, _ = tiny(name="encoder")
    assert find_model(str(folder), None).path == folder
    with pytest.raises(InputError, match=f"did you mean {folder}"):
        find_model(str(tmp_path), None)
    with pytest.raises(InputError, match="no such folder"):
        find_model(str(tmp_path / "missing"), None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        _load(folder)


def test_a_hub_name_is_downloaded(tiny, tmp_path, monkeypatch):
    folder, _ = tiny()
    calls = []

    def download(name, *, cache_dir, allow_patterns):
        calls.append((name, cache_dir, "pytorch_model.bin" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("BAAI/bge-base-en", "cache").path == folder
    (folder / "model.safetensors").unlink()
    find_model("bert-base-uncased", None)
    assert calls == [
        ("BAAI/bge-base-en", "cache", False),
        ("bert-base-uncased", None, False),
        ("bert-base-uncased", None, True),
    ]

    def fail(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"BAAI/nothing is no folder.*or give a folder"):
        find_model("BAAI/nothing", None)
