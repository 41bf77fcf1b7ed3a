"""Folders of sentence-transformers with all that they may say: same vectors before and after."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny
import torch
from commands import flags
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer

from llme_jax import retrieve, train
from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.models.space import encoder_texts

PROMPTS = {"query": "w1 w2 ", "document": "w3 ", "other": "w4 "}


def model(folder, pooling, *more, similarity="cosine", prompts=None):
    bert = Transformer(str(folder), max_seq_length=32)
    pooled = Pooling(bert.get_embedding_dimension(), pooling)
    torch.manual_seed(0)
    return SentenceTransformer(
        modules=[bert, pooled, *more],
        device="cpu",
        similarity_fn_name=similarity,
        prompts=prompts,
    )


def static(folder, *more):
    """A table of the tokens' vectors; the tokenizer has special tokens, which are not for it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 32))
    table = StaticEmbedding(tokenizer, embedding_weights=table.astype(np.float32))
    return SentenceTransformer(modules=[table, *more], device="cpu")


def as_model2vec(folder):
    """Tokens share rows and have weights."""
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    tensors = {
        "embeddings": table[:50],
        "mapping": np.arange(len(table)) % 50,
        "weights": np.linspace(0.5, 1.5, len(table)),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "model2vec", "normalize": true}')


def in_a_folder_of_its_own(folder):
    """As older models were saved."""
    place = folder / "0_Transformer"
    place.mkdir()
    for path in list(folder.iterdir()):
        kept = ("modules.json", "config_sentence_transformers.json")
        if path.is_file() and path.name not in kept:
            shutil.move(path, place / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


KINDS = {
    "another width, Tanh": lambda bert: model(
        bert, "mean", Dense(32, 20), similarity="dot", prompts=PROMPTS
    ),
    "two layers": lambda bert: model(
        *(bert, "cls", Dense(32, 48, bias=False, activation_function=torch.nn.GELU())),
        *(Dense(48, 16, activation_function=torch.nn.Identity()), Normalize()),
    ),
    "euclidean": lambda bert: model(bert, "mean", similarity="euclidean"),
    "a folder of its own": lambda bert: model(bert, "mean", Normalize(), prompts=PROMPTS),
    "model2vec": lambda bert: static(bert, Dense(32, 20), Normalize()),
}
AFTERWARDS = {"a folder of its own": in_a_folder_of_its_own, "model2vec": as_model2vec}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=KINDS)
def folder(request, data, tmp_path):
    KINDS[request.param](data / "bert").save(str(tmp_path / "model"))
    AFTERWARDS.get(request.param, lambda _: None)(tmp_path / "model")
    return tmp_path / "model"


def vectors(folder, texts):
    encoder, params, tokenizer = load_dual_encoder(
        EncoderConfig(query_encoder=str(folder)), new_dense=False
    )
    ids = [tokenizer(text)["input_ids"] for text in texts]
    padded = np.zeros((len(ids), 40), np.int32)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    lengths = jnp.asarray([len(tokens) for tokens in ids])
    encode = jax.jit(encoder.encode, static_argnames="field")
    found = np.asarray(encode(params, jnp.asarray(padded), lengths, field="query"))
    assert found.shape[1] == encoder.width
    return found


def compare(folder):
    rng = np.random.default_rng(1)
    texts = [tiny.text(rng, 1, 20) for _ in range(30)]
    theirs = SentenceTransformer(str(folder), device="cpu")
    want, got = theirs.encode(texts, prompt=""), vectors(folder, texts)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    return theirs


def test_vectors_are_theirs_before_and_after_training(data, folder, tmp_path):
    before = compare(folder)
    more = flags({"query_encoder": folder, "max_steps": 5, "save_steps": 5, "dtype": "fp32"})
    if before.prompts.get("query"):
        more += ["--version", "model"]
    if isinstance(before[0], StaticEmbedding):
        more += [*flags({"learning_rate": 0.1, "fsdp": 2}), "--matryoshka_dims", "8", "20"]
        more += small_run.EVALUATION
    out = tmp_path / "out"
    train.main(small_run.arguments(data, out, *more))
    after = compare(out / "best/encoder")
    assert after.similarity_fn_name == before.similarity_fn_name
    assert [type(m).__name__ for m in after][: len(before)] == [type(m).__name__ for m in before]
    assert not np.allclose(before.encode("w1 w2"), after.encode("w1 w2"), atol=1e-3)
    for trained, layer in zip(after, before, strict=False):
        if isinstance(layer, Dense):
            assert not torch.equal(trained.linear.weight, layer.linear.weight)
    if before.prompts.get("query"):
        config = EncoderConfig(query_encoder=str(out / "best/encoder"))
        found = encoder_texts(config, load_dual_encoder(config)[2], 64).prompts
        assert found == (PROMPTS["query"], PROMPTS["document"])


def search(data, folder, out, *more):
    words = {
        "query_encoder": folder,
        "data_root": data,
        "eval_data": "llm-embedder:test.json",
        "corpus": "llm-embedder:corpus.json",
        "output_dir": out,
        "dataset_cache_dir": data / "cache",
        "log_path": out / "log",
        "query_max_length": 32,
        "key_max_length": 32,
        "hits": 40,
        "metrics": "mrr",
    }
    retrieve.main([*flags(words), *more])
    (result,) = out.glob("*.result.json")
    return tiny.read_lines(result)


@pytest.mark.parametrize("own", [True, False])
def test_prompts_of_the_folder_are_a_choice(data, tmp_path, own, capfd):
    theirs = model(data / "bert", "mean", Normalize(), prompts=PROMPTS)
    theirs.save(str(tmp_path / "model"))
    more = ["--version", "model"] if own else ["--add_instruction", "false"]
    found = search(data, tmp_path / "model", tmp_path / "out", *more)
    said = capfd.readouterr().err
    queries = [row["query"] for row in tiny.read_lines(data / "test.json")]
    corpus = [f"{r['title']} {r['text']}" for r in tiny.read_lines(data / "corpus.json")]
    if own:
        want = theirs.encode_query(queries) @ theirs.encode_document(corpus).T
        assert "before each query: 'w1 w2 ', before each key: 'w3 '" in said
    else:
        want = theirs.encode(queries, prompt="") @ theirs.encode(corpus, prompt="").T
        assert "was made for 'w1 w2 ' before a query and 'w3 ' before a key" in said
    for row, scores in zip(found, want, strict=True):
        np.testing.assert_allclose(row["score"], -np.sort(-scores), atol=1e-5)


def test_own_texts_and_those_of_a_row(data, tmp_path):
    theirs = model(data / "bert", "mean", Normalize())
    theirs.save(str(tmp_path / "model"))
    rows = tiny.read_lines(data / "test.json")[:4]
    for row in rows[:2]:
        row["prompt"] = "w9 w8 "
    tiny.write_lines(data / "prompted.json", rows)
    more = ["--query_instruction", "w1 ", "--key_instruction", "w2 w2 "]
    more += ["--eval_data", "llm-embedder:prompted.json"]
    found = search(data, tmp_path / "model", tmp_path / "out", *more)
    queries = [row.get("prompt", "w1 ") + row["query"] for row in rows]
    corpus = [f"w2 w2 {r['title']} {r['text']}" for r in tiny.read_lines(data / "corpus.json")]
    want = theirs.encode(queries) @ theirs.encode(corpus).T
    for row, scores in zip(found, want, strict=True):
        np.testing.assert_allclose(row["score"], -np.sort(-scores), atol=1e-5)


def reordered(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[i] for i in (0, 1, 3, 2)]))


REFUSED = {
    "asks for max, which is not served; --pooling_method cls or mean": lambda f: tiny.rewrite(
        f / "1_Pooling/config.json", pooling_mode="max"
    ),
    "asks for manhattan, which is not served": lambda f: tiny.rewrite(
        f / "config_sentence_transformers.json", similarity_fn_name="manhattan"
    ),
    "activation_function torch.nn.modules.activation.Mish is not served": lambda f: tiny.rewrite(
        f / "2_Dense/config.json", activation_function="torch.nn.modules.activation.Mish"
    ),
    "takes vectors of 31 numbers, those before it have 32": lambda f: tiny.rewrite(
        f / "2_Dense/config.json", in_features=31
    ),
    "in_features is \"32\"; give a whole number": lambda f: tiny.rewrite(
        f / "2_Dense/config.json", in_features="32"
    ),
    "use_residual true is not served": lambda f: tiny.rewrite(
        f / "2_Dense/config.json", use_residual=True
    ),
    "linear.bias is unexpected": lambda f: tiny.rewrite(f / "2_Dense/config.json", bias=False),
    "no model.safetensors in this folder": lambda f: (
        f / "2_Dense/model.safetensors"
    ).unlink(),
    "Transformer, Pooling, Normalize, Dense, an order that is not served": reordered,
    "truncate_dim is 0; give what the model has": lambda f: tiny.rewrite(
        f / "config_sentence_transformers.json", truncate_dim=0
    ),
    "prompts in config_sentence_transformers.json are not texts": lambda f: tiny.rewrite(
        f / "config_sentence_transformers.json", prompts={"query": 3}
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(said, data, tmp_path):
    model(data / "bert", "mean", Dense(32, 20), Normalize()).save(str(tmp_path / "model"))
    REFUSED[said](tmp_path / "model")
    config = EncoderConfig(query_encoder=str(tmp_path / "model"))
    with pytest.raises(InputError) as error:
        encoder_texts(config, load_dual_encoder(config)[2], 64)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_measured_with_random_weights(data, tmp_path):
    with pytest.raises(InputError, match="has no dense pooler, which --pooling_method asks for"):
        search(data, data / "bert", tmp_path / "out", "--pooling_method", "mean", "dense")


def test_no_prompts_to_take(data, tmp_path):
    with pytest.raises(InputError, match="its folder has no prompts, which --version model takes"):
        search(data, data / "bert", tmp_path / "out", "--version", "model")


def test_two_encoders_share_a_space(data, tmp_path):
    for name, layers in (("a", [Dense(32, 20)]), ("b", [Dense(32, 20)]), ("c", [])):
        bert = model(data / "bert", "cls" if name == "c" else "mean", *layers)
        if name == "b":
            torch.nn.init.ones_(bert[2].linear.weight)
        bert.save(str(tmp_path / name))
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    tiny.rewrite(tmp_path / "cut/config_sentence_transformers.json", truncate_dim=8)

    def load(key, **how):
        return load_dual_encoder(
            EncoderConfig(
                query_encoder=str(tmp_path / "a"),
                key_encoder=str(tmp_path / key),
                tie_encoders=False,
                **how,
            )
        )

    assert load("a")[0].width == 20
    with pytest.raises(InputError, match="have different layers behind pooling"):
        load("b")
    with pytest.raises(InputError, match=r"ask for .*: give --pooling_method"):
        load("c")
    with pytest.raises(InputError, match="keep different parts of their vectors: give --trunc"):
        load("cut")
