"""The encoder pair: what it computes, and the folders it is read from and saved to."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny import save_word_tokenizer
from transformers import AutoModel, AutoTokenizer

from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import load_tokenizer
from llme_jax.models.dual_encoder import load_dual_encoder, save_dual_encoder
from llme_jax.models.packing import padded

PROMPTS = {"query": "Find the tool: ", "document": "Tool: "}


def _config(query, key=None, **changes):
    settings = {"tie_encoders": key is None, "pooling_method": ["mean"], "dtype": "fp32"}
    return EncoderConfig(
        query_encoder=str(query), key_encoder=str(key or query), **(settings | changes)
    )


def _save(folder, encoder, params, tokenizer, *, prompts=PROMPTS, lengths=(64, 48)):
    save_dual_encoder(
        folder, encoder, params, tokenizer, query_max_length=lengths[0], key_max_length=lengths[1],
        prompts=prompts,
    )  # fmt: skip


def _encode(encoder, params, tokenizer, texts, *, field, prompt="", max_length=64):
    ids = [tokenizer(prompt + text)["input_ids"] for text in texts]
    ids = [row[: max_length - 1] + row[-1:] if len(row) > max_length else row for row in ids]
    lengths = jnp.asarray([len(row) for row in ids], jnp.int32)
    padded = np.zeros((len(ids), max_length), np.int32)
    for row, target in zip(ids, padded, strict=True):
        target[: len(row)] = row
    return np.asarray(_jitted(encoder, params, jnp.asarray(padded), lengths, field))


_jitted = jax.jit(
    lambda encoder, params, ids, lengths, field: encoder.encode(params, ids, lengths, field=field),
    static_argnums=(0, 4),
)


def _cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def _changed(params):
    """As if trained: every parameter moves a little."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.01 * rng.standard_normal(x.shape).astype(np.float32), params
    )


@pytest.fixture
def tiny_with_tokenizer(tiny):
    """A tiny random folder with a tokenizer, complete enough to be opened by others."""

    def make(name, **changes):
        folder, _ = tiny(name=name, **changes)
        save_word_tokenizer(folder, [f"w{i}" for i in range(96)], model_max_length=40)
        return folder

    return make


TINY_TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w90 w91 w3 w2"]


@pytest.mark.parametrize(
    "pooling, metric, similarity",
    [(["mean"], "cos", "cosine"), (["cls", "dense"], "ip", "dot")],
)
def test_others_open_what_is_saved(minilm, texts, tmp_path, pooling, metric, similarity):
    config = _config(minilm, pooling_method=pooling, dense_metric=metric)
    encoder, params, tokenizer = load_dual_encoder(config)
    params = _changed(params)
    _save(tmp_path, encoder, params, tokenizer)
    folder = tmp_path / "encoder"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]

    model = SentenceTransformer(str(folder), device="cpu")
    assert model.similarity_fn_name == similarity and model.max_seq_length == 64
    # tied encoders treat queries and keys alike, so one compiled batch serves both
    prompted = [PROMPTS["query"] + text for text in texts[:50]]
    prompted += [PROMPTS["document"] + text for text in texts[50:]]
    ours = _encode(encoder, params, tokenizer, prompted, field="key")
    theirs = np.concatenate([model.encode_query(texts[:50]), model.encode_document(texts[50:])])
    assert _cosine(ours, theirs).min() > 0.99999
    # the metric decides whether lengths count, so they have to agree as well; fp32 rounding
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    if metric == "cos":
        np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1, atol=1e-6)

    again, loaded, _ = load_dual_encoder(
        _config(folder, pooling_method=pooling, dense_metric=metric)
    )
    assert again == encoder
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    "family, pooling, changes",
    [
        ("camembert", "mean", {}),
        ("distilbert", "mean", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}),
        ("mpnet", "mean", {}),
        ("modernbert", "cls", {"local_attention": 4, "num_hidden_layers": 3}),
        ("nomic_bert", "mean", {}),
        ("gte", "cls", {}),
        ("llama", "mean", {"num_key_value_heads": 2}),
        ("qwen3", "mean", {"num_key_value_heads": 4, "is_causal": False}),
        ("qwen3", "last_token", {"num_key_value_heads": 2, "head_dim": 16}),
        ("eurobert", "last_token", {}),
    ],
)
def test_sentence_transformers_opens_every_family(
    tiny_with_tokenizer, tmp_path, family, pooling, changes
):
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    changes |= {"model_type": family, "pad_token_id": 1, "max_position_embeddings": 44} | special
    folder = tiny_with_tokenizer("base", **changes)
    encoder, params, tokenizer = load_dual_encoder(_config(folder, pooling_method=[pooling]))
    params = _changed(params)
    _save(tmp_path, encoder, params, tokenizer)
    model = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    ours = _encode(encoder, params, tokenizer, TINY_TEXTS, field="query", max_length=40)
    assert _cosine(ours, model.encode(TINY_TEXTS)).min() > 0.99999
    assert _cosine(ours[:1], ours[1:]).max() < 0.99
    again, loaded, _ = load_dual_encoder(
        EncoderConfig(query_encoder=str(tmp_path / "encoder"), dtype="fp32")
    )
    assert again == encoder
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_the_first_token_of_a_causal_model_is_refused(tiny_with_tokenizer):
    folder = tiny_with_tokenizer("base", model_type="llama")
    with pytest.raises(InputError, match="sees no other, give last_token or mean"):
        load_dual_encoder(_config(folder, pooling_method=["cls"]))
    assert load_dual_encoder(_config(folder, pooling_method=None))[0].pooling == "last_token"


@pytest.mark.parametrize("metric", ["cos", "ip"])
def test_truncated_vectors_are_those_of_sentence_transformers(minilm, texts, tmp_path, metric):
    config = _config(minilm, dense_metric=metric, truncate_dim=64)
    _save(tmp_path, *load_dual_encoder(config), prompts={})
    ours = _encode(*load_dual_encoder(_config(tmp_path / "encoder")), texts, field="key")
    model = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    theirs = model.encode(texts, normalize_embeddings=metric == "cos")
    assert model.truncate_dim == 64 and ours.shape == (len(texts), 64)
    assert load_dual_encoder(_config(tmp_path / "encoder", truncate_dim=384))[0].truncate_dim == 384
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())  # fp32 rounding
    with pytest.raises(InputError, match=r"^--truncate_dim 385: .* 384 numbers, give 384 or less"):
        load_dual_encoder(_config(minilm, truncate_dim=385))


def test_transformers_reads_every_weight(minilm, tmp_path):
    encoder, params, tokenizer = load_dual_encoder(_config(minilm))
    _save(tmp_path, encoder, params, tokenizer)
    model, report = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    original = AutoModel.from_pretrained(minilm)
    for name, tensor in original.state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(tensor, model.state_dict()[name]), name
    before = json.loads((minilm / "config.json").read_text())
    assert json.loads((tmp_path / "encoder" / "config.json").read_text()) == before


def test_untied_encoders_are_two_complete_folders(tiny_with_tokenizer, tmp_path):
    config = _config(
        tiny_with_tokenizer("q"),
        tiny_with_tokenizer("k", seed=1, num_hidden_layers=1),
        pooling_method=["cls", "dense"],
        dense_metric="l2",
    )
    encoder, params, tokenizer = load_dual_encoder(config)
    assert set(params) == {"query_encoder", "key_encoder", "dense_pooler"}
    _save(tmp_path / "out", encoder, params, tokenizer, prompts={"query": "w7 ", "document": ""})
    embedded = {}
    for field, prompt in (("query", "w7 "), ("key", "")):
        model = SentenceTransformer(str(tmp_path / "out" / f"{field}_encoder"), device="cpu")
        assert model.similarity_fn_name == "euclidean"
        encode = model.encode_query if field == "query" else model.encode_document
        embedded[field] = _encode(
            encoder, params, tokenizer, TINY_TEXTS, field=field, prompt=prompt, max_length=40
        )
        np.testing.assert_allclose(embedded[field], encode(TINY_TEXTS), atol=1e-5)  # rounding
    assert _cosine(embedded["query"], embedded["key"]).max() < 0.9

    folders = [tmp_path / "out" / f"{field}_encoder" for field in ("query", "key")]
    config = _config(*folders, pooling_method=["cls", "dense"], dense_metric="l2")
    again, loaded, _ = load_dual_encoder(config)
    assert again == encoder
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_encoders_that_do_not_fit_together_are_refused(tiny_with_tokenizer):
    query = tiny_with_tokenizer("q")
    wide = tiny_with_tokenizer("k", hidden_size=64)
    with pytest.raises(InputError, match=r"vectors of 64 numbers, those of .* have 48"):
        load_dual_encoder(_config(query, wide))
    other = tiny_with_tokenizer("o")
    file = json.loads((other / "tokenizer.json").read_text())
    file["model"]["vocab"]["new"] = file["model"]["vocab"].pop("w3")
    (other / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(InputError, match="another vocabulary than"):
        load_dual_encoder(_config(query, other))


def test_equal_architectures_are_compiled_once(tiny_with_tokenizer):
    first = load_dual_encoder(_config(tiny_with_tokenizer("a")))
    folder = tiny_with_tokenizer("b", seed=1)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n\n")
    second = load_dual_encoder(_config(folder))
    assert first[0] == second[0] and hash(first[0]) == hash(second[0])
    before = _jitted._cache_size()
    vectors = [_encode(*loaded, TINY_TEXTS, field="key", max_length=32) for loaded in
               (first, second)]  # fmt: skip
    assert _jitted._cache_size() == before + 1
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    assert load_dual_encoder(_config(folder), remat=True)[0] != first[0]


def test_texts_drop_differently(tiny_with_tokenizer):
    encoder, params, _ = load_dual_encoder(_config(tiny_with_tokenizer("a")))
    ids, packing = jnp.full(32, 9), padded(jnp.array([16, 16]), 16, numbers=jnp.arange(2))
    encode = jax.jit(partial(encoder.encode_packed, params, ids, packing, field="key"))
    one, other = encode(dropout_key=jax.random.key(0))
    assert jnp.abs(one - other).max() > 1e-2
    np.testing.assert_array_equal(*encode())


def test_a_missing_dense_pooler_starts_the_same_every_time(tiny_with_tokenizer, caplog):
    folder = tiny_with_tokenizer("a")
    loads = [load_dual_encoder(_config(folder, pooling_method=["mean", "dense"]))[1] for _ in "ab"]
    kernels = [params["dense_pooler"]["0"]["kernel"] for params in loads]
    np.testing.assert_array_equal(*kernels)
    bound = 48**-0.5
    assert 0.95 * bound < np.abs(kernels[0]).max() <= bound
    assert "no dense pooler in this folder" in caplog.text


def test_dense_pooler_of_the_reference(tiny_with_tokenizer, caplog):
    folder = tiny_with_tokenizer("a")
    layer = torch.nn.Linear(48, 48, bias=False)
    torch.save(layer.state_dict(), folder / "dense_pooler.bin")
    _, params, _ = load_dual_encoder(_config(folder, pooling_method=["cls", "dense"]))
    kernel = params["dense_pooler"]["0"]["kernel"]
    np.testing.assert_array_equal(kernel, layer.weight.detach().numpy().T)
    load_dual_encoder(_config(folder, pooling_method=["cls"]))
    assert "--pooling_method without dense leaves it out" in caplog.text
    torch.save(torch.nn.Linear(48, 32, bias=False).state_dict(), folder / "dense_pooler.bin")
    with pytest.raises(InputError, match=r"the dense pooler is \(48, 32\)"):
        load_dual_encoder(_config(folder, pooling_method=["cls", "dense"]))


def test_another_stored_pooling_is_warned_of(minilm, tmp_path, caplog):
    encoder, params, tokenizer = load_dual_encoder(_config(minilm))
    assert "--pooling_method" not in caplog.text
    load_dual_encoder(_config(minilm, pooling_method=["cls"]))
    assert "its folder says mean, --pooling_method cls is used" in caplog.text
    caplog.clear()
    _save(tmp_path, encoder, params, tokenizer)
    SentenceTransformer(str(tmp_path / "encoder"), device="cpu").save(str(tmp_path / "newer"))
    load_dual_encoder(_config(tmp_path / "newer"))  # written in the newest format
    assert "--pooling_method" not in caplog.text
    load_dual_encoder(_config(tmp_path / "newer", pooling_method=["cls"]))
    assert "says mean" in caplog.text


def test_tokenizer_neither_cuts_nor_pads_and_saves_clean(minilm, texts, tmp_path):
    encoder, params, tokenizer = load_dual_encoder(_config(minilm))
    long = " ".join(texts)
    reference = AutoTokenizer.from_pretrained(minilm)
    want = [reference(text, truncation=False, padding=False)["input_ids"] for text in texts]
    assert [tokenizer.backend_tokenizer.encode(text).ids for text in texts] == want
    assert len(tokenizer.backend_tokenizer.encode(long).ids) > 1000

    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    _save(tmp_path, encoder, params, tokenizer)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 7  # the caller's is untouched
    saved = json.loads((tmp_path / "encoder" / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    settings = json.loads((tmp_path / "encoder" / "tokenizer_config.json").read_text())
    assert settings["truncation_side"] == "left" and "max_length" not in settings
    assert settings["tokenizer_class"] == "BertTokenizer"
    model = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    tokens = model.tokenizer(long, truncation=True, max_length=10)["input_ids"]
    assert tokens[1:-1] == reference(long)["input_ids"][-9:-1]


def test_loading_imports_no_torch(minilm):
    code = (
        "import sys; from llme_jax.config import EncoderConfig;"
        "from llme_jax.models.dual_encoder import load_dual_encoder;"
        f"load_dual_encoder(EncoderConfig(query_encoder={str(minilm)!r}, pooling_method=['mean']));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_saved_again_is_replaced_whole(tiny_with_tokenizer, tmp_path, monkeypatch):
    encoder, params, tokenizer = load_dual_encoder(_config(tiny_with_tokenizer("a")))
    out = tmp_path / "out"
    _save(out, encoder, params, tokenizer)
    (out / "encoder" / "stale").touch()
    changed = _changed(params)
    monkeypatch.setattr("llme_jax.models.dual_encoder.save_tokenizer", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _save(out, encoder, changed, tokenizer)
    monkeypatch.undo()
    loaded = load_dual_encoder(_config(out / "encoder"))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _save(out, encoder, changed, tokenizer)
    loaded = load_dual_encoder(_config(out / "encoder"))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, changed)
    assert [p.name for p in out.iterdir()] == ["encoder"]
    assert not (out / "encoder" / "stale").exists()


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_tokenizer_without_tokenizer_json(tiny_with_tokenizer):
    folder = tiny_with_tokenizer("a")
    want = load_tokenizer(folder)("w1 w99 w5")["input_ids"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder)("w1 w99 w5")["input_ids"] == want == [2, 6, 1, 10, 3]
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json in this folder"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        load_tokenizer(folder)


def test_tokenizer_larger_than_the_word_table_is_refused(tiny_with_tokenizer):
    with pytest.raises(InputError, match="ids up to 100, the model has 90 word vectors"):
        load_dual_encoder(_config(tiny_with_tokenizer("a", vocab_size=90)))


def test_auto_dtype_is_float32_on_cpu(tiny_with_tokenizer):
    folder = tiny_with_tokenizer("a")
    assert load_dual_encoder(_config(folder, dtype="auto"))[0].dtype == "float32"
    assert load_dual_encoder(_config(folder, dtype="bf16"))[0].dtype == "bfloat16"
