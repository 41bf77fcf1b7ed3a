"""Other people's model folders: they are read, or refused in one sentence that says what to do."""

import json
import logging
import shutil
from collections import OrderedDict

import jax
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dropout, Pooling, Transformer

from llme_jax.config import EncoderConfig
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.hugging_face.weights import load_params_to
from llme_jax.models.causal_lm import open_causal_lm
from llme_jax.models.dual_encoder import load_dual_encoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 437951328\n"
WEIGHT = "encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("original") / "bert")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(folder):
    return load_dual_encoder(EncoderConfig(query_encoder=str(folder)))


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in config.items() if v != "left out"}))


def rewrite(folder, change, **more):
    """The weights changed by a function, and others added."""
    path = folder / "model.safetensors"
    tensors = {name: change(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors | more, path, metadata={"format": "pt"})


def write_torch(folder, content, **how):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **how)


def not_a_number(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def sharded(folder, listed=True):
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    names = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        shard = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save(dict(part), folder / shard)
        names |= {name: shard for name, _ in part}
    index = {"weight_map": names} if listed else {"metadata": {}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


READ = {
    "a config of 2019": lambda f: edit(f, layer_norm_eps="left out", type_vocab_size="left out"),
    "a prefix": lambda f: save_file(
        {f"0.auto_model.{name}": t for name, t in load_file(f / "model.safetensors").items()},
        f / "model.safetensors",
    ),
    "no metadata": lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors"),
    "a checkpoint of Lightning": lambda f: write_torch(
        f, {"epoch": 3, "state_dict": load_file(f / "model.safetensors")}
    ),
    "torch's old format": lambda f: write_torch(
        f, OrderedDict(load_file(f / "model.safetensors")), _use_new_zipfile_serialization=False
    ),
    "shards of torch": sharded,
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind, original, folder):
    READ[kind](folder)
    (_, want, _), (encoder, got, _) = load(original), load(folder)
    assert encoder.query_config.layer_norm_eps == 1e-12
    jax.tree.map(np.testing.assert_array_equal, want, got)


def pooled_by_sentence_transformers(folder, *more):
    bert = Transformer(str(folder), max_seq_length=32)
    pooling = Pooling(bert.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[bert, pooling, *more], device="cpu")


def test_the_transformer_may_lie_in_a_folder_of_its_own(original, tmp_path):
    place = tmp_path / "model/0_Transformer"
    shutil.copytree(original, place)
    pooled_by_sentence_transformers(original).save(str(tmp_path / "flat"))
    shutil.copytree(tmp_path / "flat/1_Pooling", tmp_path / "model/1_Pooling")
    modules = json.loads((tmp_path / "flat/modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "model/modules.json").write_text(json.dumps(modules))
    want = load(original)[1]
    for folder in (place.parent, place):
        jax.tree.map(np.testing.assert_array_equal, load(folder)[1], want)
        assert load(folder)[0].pooling == "mean"


def test_a_module_that_is_not_served_is_refused(original, tmp_path):
    pooled_by_sentence_transformers(original, Dropout()).save(str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"lists 2_Dropout \(Dropout\), which is not served"):
        load(tmp_path / "model")


def test_heads_are_left_out_and_named(original, folder, caplog):
    caplog.set_level(logging.INFO)
    tensors = load_file(folder / "model.safetensors")
    heads = {"mlp.dense.weight": torch.ones(4, 4), "linear.weight": torch.ones(2, 4)}
    heads["cls.predictions.bias"] = torch.ones(4)  # every masked model has it, nothing is said
    save_file({f"bert.{name}": t for name, t in tensors.items()} | heads,
              folder / "model.safetensors")  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, load(original)[1], load(folder)[1])
    assert (
        "left out, as they are not of the encoder: linear.weight, mlp.dense.weight" in caplog.text
    )


REFUSED = {
    "config.json: is a git-lfs pointer instead of the file; run git lfs pull": lambda f: (
        f / "config.json"
    ).write_text(POINTER),
    "model.safetensors: is a git-lfs pointer": lambda f: (f / "model.safetensors").write_text(
        POINTER
    ),
    "pytorch_model.bin: is a git-lfs pointer": lambda f: (
        (f / "model.safetensors").rename(f / "pytorch_model.bin").write_text(POINTER)
    ),
    "model.safetensors: not a whole safetensors file": cut_short,
    "config.json: not readable JSON": lambda f: (f / "config.json").write_text(""),
    "config.json: not readable JSON (Unterm": lambda f: (f / "config.json").write_text('{"a'),
    "config.json: holds a list instead of an object": lambda f: (f / "config.json").write_text(
        "[]"
    ),
    "config.json: model_type is missing; add it": lambda f: edit(f, model_type=None),
    "config.json: model_type ['bert'] is not served": lambda f: edit(f, model_type=["bert"]),
    'config.json: hidden_size is "32"; give a whole number': lambda f: edit(f, hidden_size="32"),
    "config.json: num_hidden_layers is 2.5; give a wh": lambda f: edit(f, num_hidden_layers=2.5),
    'config.json: layer_norm_eps is "small"; give a number': lambda f: edit(
        f, layer_norm_eps="small"
    ),
    "tokenizer_config.json: not readable JSON": lambda f: (f / "tokenizer_config.json").write_text(
        "{"
    ),
    f"there are values in {WEIGHT} that are not finite": not_a_number,
    "is stored as I8, these weights are quantised": lambda f: rewrite(
        f, lambda t: (t * 10).to(torch.int8)
    ),
    "encoder.layer.2.x is unexpected": lambda f: rewrite(
        f, lambda t: t, **{"encoder.layer.2.x": torch.ones(2)}
    ),
    "pytorch_model.bin: torch cannot read tensors from it": lambda f: write_torch(
        f, {"model": load_file(f / "model.safetensors"), "loss": np.float64(0.1)}
    ),
    "pytorch_model.bin: holds no state dict": lambda f: write_torch(f, [torch.ones(2)]),
    "index.json: has no weight_map": lambda f: sharded(f, listed=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message, folder):
    REFUSED[message](folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_language_model_that_is_not_finite(tmp_path):
    folder = tiny.save_llama(tmp_path / "llama")
    lm, path, _ = open_causal_lm(str(folder), dtype="bf16", cache_dir=None)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 2] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.weight that are not finite"):
        load_params_to(path, lm.abstract_params(), lm.shardings(make_mesh()))
