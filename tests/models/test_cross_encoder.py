"""Rerankers against transformers and sentence-transformers: scores, gradients, folders."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from sentence_transformers import CrossEncoder as TorchCrossEncoder
from tiny import gradients_as_files, keep_own_fields, letter_tokenizer

from llme_jax.config import RankConfig
from llme_jax.data.pairs import Pairs, pair_layout
from llme_jax.data.tokens import bare_tokens
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import plain_backend
from llme_jax.models.cross_encoder import load_cross_encoder, save_cross_encoder
from llme_jax.rerank.cross_scorer import open_ranker

LIMIT = 40
FAMILIES = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "camembert": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "electra": {"embedding_size": 24},
    "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80},
    "mpnet": {"max_position_embeddings": 66, "pad_token_id": 1},
    "modernbert": {
        "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"],
        "classifier_pooling": "mean", "norm_bias": True,
        "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
    },
    "nomic_bert": {},
    "gte": {"type_vocab_size": 1},
    "deberta-v2": {
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "pooler_hidden_size": 48,
    },
}  # fmt: skip


@pytest.fixture
def classifier(tmp_path):
    """classifier(model_type): (folder, torch model), one label, no two parameters alike."""

    def make(model_type: str, name: str = "cross", num_labels: int = 1, head: bool = True,
             typed: bool = True):  # fmt: skip
        settings = {
            "vocab_size": 128,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 80,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "num_labels": num_labels,
        } | FAMILIES[model_type]
        config = transformers.AutoConfig.for_model(model_type, **settings)
        kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        keep_own_fields(tmp_path / name)
        letter_tokenizer().save_pretrained(tmp_path / name)
        if typed and getattr(config, "type_vocab_size", 0) > 1:
            path = tmp_path / name / "tokenizer_config.json"
            names = ["input_ids", "token_type_ids", "attention_mask"]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
        return tmp_path / name, model

    return make


def load(folder, **settings):
    how = {"dtype": "fp32", "cache_dir": None} | settings
    return load_cross_encoder(str(folder), **how)


def pairs_of_all_lengths(count: int = 24) -> list[tuple[str, str]]:
    """Some longer than the limit."""
    rng = np.random.default_rng(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]

    def text(most):
        return " ".join(rng.choice(letters, rng.integers(1, most)))

    return [(text(12), text(60)) for _ in range(count)]


def tokens(tokenizer, pairs, limit: int = LIMIT):
    layout = pair_layout(tokenizer, limit, "right")
    backend = plain_backend(tokenizer)
    stores = [bare_tokens(texts, backend, limit, "right") for texts in zip(*pairs, strict=True)]
    numbers = np.arange(len(pairs))
    padded = Pairs(*stores, layout, numbers, numbers).padded(numbers, limit, 0)
    return tuple(map(jnp.asarray, padded))


def torch_inputs(tokenizer, pairs, model):
    first, second = map(list, zip(*pairs, strict=True))
    inputs = tokenizer(first, second, truncation=True, max_length=LIMIT, padding=True,
                       return_tensors="pt", return_token_type_ids=True)  # fmt: skip
    if getattr(model.config, "type_vocab_size", 0) < 2:
        inputs.pop("token_type_ids")
    return inputs


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_and_gradients_are_those_of_transformers(classifier, model_type, tmp_path):
    folder, model = classifier(model_type)
    encoder, params, tokenizer = load(folder)
    pairs = pairs_of_all_lengths()
    ids, lengths, second = tokens(tokenizer, pairs)
    assert (lengths == LIMIT).any() and (lengths < LIMIT).any()

    def loss(params):
        scores = encoder.score(params, ids, lengths, second)
        return (scores**2).mean(), scores

    (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = model(**torch_inputs(tokenizer, pairs, model)).logits[:, 0]
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
    (theirs**2).mean().backward()
    found, wanted = gradients_as_files(gradient, encoder.config.names, model, tmp_path)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        atol = 1e-5 * max(1, np.abs(want).max())
        np.testing.assert_allclose(found[name], want, atol=atol, err_msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_folders_give_the_same_raw_scores_elsewhere(classifier, model_type, tmp_path):
    folder, model = classifier(model_type)
    encoder, params, tokenizer = load(folder)
    save_cross_encoder(tmp_path / "out", encoder, params, tokenizer, max_length=LIMIT)
    saved = tmp_path / "out/ranker"
    mine, others = load_file(saved / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in mine.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)
    assert json.loads((saved / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    pairs = pairs_of_all_lengths()
    ours = encoder.score(params, *tokens(tokenizer, pairs))
    theirs = TorchCrossEncoder(str(saved), device="cpu").predict(pairs, show_progress_bar=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    again, params_again, _ = load(saved)
    assert again == encoder
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_two_hundred_real_pairs(prepared, tmp_path):
    """MiniLM with a new head, requests with functions; a fifth of the pairs is cut."""
    encoder, params, tokenizer = load(prepared.model)
    params["classifier"]["kernel"] *= 10  # of scores around 0.1 every digit would be the bias
    save_cross_encoder(tmp_path, encoder, params, tokenizer, max_length=48)
    requests, functions = (
        [json.loads(line)[name] for line in path.read_text("utf-8").splitlines()]
        for path, name in ((prepared.test, "query"), (prepared.corpus, "text"))
    )
    pairs = [*zip(requests[-100:], functions[:100], strict=True)]
    pairs += [*zip(functions[100:200], requests[-200:-100], strict=True)]
    ids, lengths, second = tokens(tokenizer, pairs, limit=48)
    assert 20 < (lengths == 48).sum() < 180
    ours = jax.jit(encoder.score)(params, ids, lengths, second)
    theirs = TorchCrossEncoder(str(tmp_path / "ranker"), device="cpu")
    want = theirs.predict(pairs, show_progress_bar=False)
    assert np.std(want) > 0.05
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_without_token_types_all_are_0(classifier):
    """What others do where the tokenizer's configuration does not name them."""
    folder, _ = classifier("bert", typed=False)
    encoder, params, tokenizer = load(folder)
    pairs = pairs_of_all_lengths()
    ours = encoder.score(params, *tokens(tokenizer, pairs))
    theirs = TorchCrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    want = theirs.predict([(a, b[:20]) for a, b in pairs], show_progress_bar=False)
    short = [len(b) <= 20 for _, b in pairs]
    np.testing.assert_allclose(ours[np.array(short)], want[short], rtol=1e-5, atol=1e-5)
    assert any(short)


def test_an_encoder_without_head_gets_a_new_one(classifier, caplog):
    folder, model = classifier("bert", head=False)
    with caplog.at_level(logging.WARNING):
        _, params, _ = load(folder, seed=3)
    assert "has no classifier, which starts from random (seed 3)" in caplog.text
    pooler = model.pooler.dense.weight.detach().numpy()  # as transformers takes it over
    np.testing.assert_array_equal(params["bert"]["pooler"]["dense"]["kernel"], pooler.T)
    kernel = params["classifier"]["kernel"]
    assert kernel.shape == (48, 1) and 0.01 < kernel.std() < 0.04
    assert not params["classifier"]["bias"].any()
    np.testing.assert_array_equal(load(folder, seed=3)[1]["classifier"]["kernel"], kernel)
    assert (load(folder, seed=4)[1]["classifier"]["kernel"] != kernel).any()


def test_what_cannot_be_a_reranker_is_refused(classifier):
    folder, _ = classifier("bert", num_labels=3)
    with pytest.raises(InputError, match=r"classifier.weight is \(3, 48\).* one label"):
        load(folder)
    folder, _ = classifier("bert", name="other")
    config = RankConfig()
    config.ranker.ranker = str(folder)
    config.data.query_max_length, config.data.key_max_length = 33, 32
    with pytest.raises(InputError, match=r"are 65 tokens together: .* has 64 positions, give 64"):
        open_ranker(config)


def test_bf16_is_close(classifier):
    folder, _ = classifier("bert")
    (encoder, params, tokenizer), (exact, _, _) = load(folder, dtype="bf16"), load(folder)
    inputs = tokens(tokenizer, pairs_of_all_lengths())
    found, want = encoder.score(params, *inputs), exact.score(params, *inputs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=0.05 * np.abs(want).max())
