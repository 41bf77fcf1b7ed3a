"""Static embeddings against torch's, and what is refused; test_space.py trains and reopens them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import unknown_token
from llme_jax.models.cross_encoder import load_cross_encoder
from llme_jax.models.dual_encoder import load_dual_encoder, save_dual_encoder
from llme_jax.models.lora import Lora, new_adapters
from llme_jax.models.packing import pack

TEXTS = ["query", "this passage : abc", "represent this", "z9 z9"]
LENGTHS = [1, 6, 2, 4]


@pytest.fixture
def saved(tmp_path):
    """(folder, the torch module)."""
    tokenizer = tiny.letter_tokenizer()
    table = np.random.default_rng(0).normal(size=(len(tokenizer), 16)).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=table)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "model"))
    return tmp_path / "model", module


def load(folder, **settings):
    return load_dual_encoder(EncoderConfig(query_encoder=str(folder), dtype="fp32", **settings))


def test_vectors_and_gradient_are_those_of_torch(saved):
    folder, module = saved
    encoder, params, tokenizer = load(folder, dense_metric="ip")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [len(row) for row in ids] == LENGTHS
    weight = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    theirs = module(module.preprocess(TEXTS))["sentence_embedding"]
    (theirs * torch.tensor(weight)).sum().backward()

    numbers = [jnp.arange(2), jnp.arange(2, 4)]
    packing = pack([jnp.asarray(LENGTHS[:2]), jnp.asarray(LENGTHS[2:])], [6, 4], 16, numbers)
    packed = jnp.asarray(np.pad(np.concatenate(ids), (0, 3), constant_values=7))

    @jax.jit
    def loss(params):
        vectors = encoder.encode_packed(params, packed, packing, field="query")
        return (vectors * weight).sum(), vectors

    (_, ours), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    # Sums of up to 6 numbers around 1.
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-6)
    found = gradient["encoder"]["embedding"]["embedding"]
    np.testing.assert_allclose(found, module.embedding.weight.grad, atol=1e-6)


def below(folder):
    """As older models were saved."""
    (folder / "0_StaticEmbedding").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "0_StaticEmbedding" / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps(modules))


def without_modules(folder):
    (folder / "config.json").write_text('{"model_type": "model2vec"}')
    (folder / "modules.json").unlink()


@pytest.mark.parametrize("laid_out", [below, without_modules])
def test_a_saved_folder_cuts_texts_where_we_do(saved, tmp_path, laid_out):
    laid_out(saved[0])
    encoder, params, tokenizer = load(saved[0])
    lengths = {"query_max_length": 2, "key_max_length": 3}
    save_dual_encoder(tmp_path / "out", encoder, params, tokenizer, **lengths, prompts={})
    model = SentenceTransformer(str(tmp_path / "out/encoder"), device="cpu")
    one, other = model.encode(["this passage : abc", "this passage :"])
    np.testing.assert_array_equal(one, other)
    assert not np.allclose(model.encode("this passage"), one)
    again, loaded, _ = load(tmp_path / "out/encoder")
    assert again == encoder
    tables = [m.embedding.weight.detach().numpy() for m in (model[0], saved[1])]
    if laid_out is without_modules:  # model2vec leaves out unknown tokens: they add nothing there
        unknown = unknown_token(tokenizer)
        assert not tables[0][unknown].any() and tables[1][unknown].any()
        tables = [np.delete(table, unknown, axis=0) for table in tables]
    np.testing.assert_array_equal(*tables)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_what_is_refused(saved, tmp_path):
    folder, _ = saved
    bert = tiny.save_bert(tmp_path / "bert")
    with pytest.raises(InputError, match="an encoder of another kind cannot be trained together"):
        load(folder, key_encoder=str(bert), tie_encoders=False)
    with pytest.raises(InputError, match=r"the last token of .* sees no other, give mean"):
        load(folder, pooling_method=["last_token"])
    _, params, _ = load(folder)
    with pytest.raises(InputError, match=r"^--lora_rank: static embeddings have no linear maps"):
        new_adapters(params["encoder"], (), Lora(4, 8.0), 0)
    with pytest.raises(InputError, match="static_embedding is not served as a cross-encoder; give"):
        load_cross_encoder(str(folder), dtype="fp32", cache_dir=None)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, modules[0] | {"path": "a"}]))
    with pytest.raises(InputError, match="StaticEmbedding, StaticEmbedding, an order that is not"):
        load(folder)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"embeddings": np.ones((4, 2)), "mapping": np.arange(6)}, "do not fit the table"),
        ({"embeddings": np.ones((4, 2)), "weights": np.ones(3)}, "do not fit the table"),
        ({"embeddings": np.ones((4, 2), np.int8)}, "is stored as .*8, these weights are quantised"),
        ({"embedding.weight": np.ones(4)}, "no table embedding.weight or embeddings"),
    ],
)
def test_damaged_tables_are_refused(saved, tensors, message):
    folder, _ = saved
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {
            "type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    )  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load(folder)
