"""The evaluator, end to end on a small BERT: metrics, files, cache, what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from named import files_of
from tiny import WORDS, save_bert
from transformers import AutoTokenizer, BertModel

from llme_jax.config import Config
from llme_jax.devices.sharding import make_mesh, state_sharding, to_mesh
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.retrieval import evaluate
from llme_jax.retrieval.evaluate import RetrievalEvaluator


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    passages = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(40)]
    # Queries are parts of their passage, so that there is something to be found.
    queries = [" ".join(passages[i].split()[:4]) for i in range(0, 40, 3)]
    config = Config()
    config.data.corpus = write(
        tmp_path / "corpus.json", [{"title": p[:5], "text": p} for p in passages]
    )
    config.data.eval_data = write(
        tmp_path / "dev.set.json",
        [
            {"query": query, "query_id": f"q{i}", "pos_index": [3 * i], "answers": [query]}
            for i, query in enumerate(queries)
        ],
    )
    config.data.query_max_length, config.data.key_max_length = 8, 16
    config.data.truncation_side, config.data.version = "right", "e5"
    config.encoder.query_encoder = str(model)
    config.encoder.dtype = "fp32"
    config.evaluation.metrics = ["ndcg", "nq", "mrr"]
    config.evaluation.cutoffs = [1, 10]
    config.evaluation.hits = 12
    config.evaluation.batch_size = 9
    config.evaluation.log_path = str(tmp_path / "logs" / "performance.log")
    config.training.output_dir = str(tmp_path / "out")
    return config


def torch_scores(config, model):
    """Inner products of normalised [CLS] vectors, by transformers."""
    tokenizer, bert = AutoTokenizer.from_pretrained(model), BertModel.from_pretrained(model).eval()

    def encode(texts, max_length):
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        with torch.no_grad():
            return torch.nn.functional.normalize(bert(**inputs).last_hidden_state[:, 0]).numpy()

    queries = [row["query"] for row in read(config.data.eval_data)]
    passages = read(config.data.corpus)
    return (
        encode([f"query: {query}" for query in queries], 8)
        @ encode([f"passage: {p['title']} {p['text']}" for p in passages], 16).T
    )


@pytest.mark.parametrize("fsdp", [None, 2])
def test_equals_transformers(config, model, fsdp):
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    mesh = fsdp and make_mesh(fsdp)
    if mesh:
        params = to_mesh(params, state_sharding(mesh, params))
    evaluator = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder, mesh)
    metrics = evaluator(params, step=7)

    expected = torch_scores(config, model)
    order = np.argsort(-expected, axis=1)[:, :12]
    lines = read(f"{config.training.output_dir}/dev.set.result.json")
    assert [line["query_id"] for line in lines] == [f"q{i}" for i in range(14)]
    for line, row, best in zip(lines, expected, order, strict=True):
        # Two fp32 implementations of two layers; ids may differ only where scores nearly tie.
        np.testing.assert_allclose(line["score"], row[best], atol=2e-5)
        np.testing.assert_allclose(row[line["pred"]], row[best], atol=4e-5)

    found = order == 3 * np.arange(14)[:, None]
    ranks = np.where(found.any(1), found.argmax(1) + 1.0, np.inf)
    names = [f"{metric}@{k}" for metric in ("ndcg", "mrr") for k in (1, 10)]
    assert list(metrics) == names + [f"answer_recall@{k}" for k in (1, 5, 10, 20, 100)]
    assert metrics["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    assert metrics["ndcg@1"] == pytest.approx((ranks == 1).mean())
    (logged,) = read(config.evaluation.log_path)
    assert (logged["metrics"], logged["step"]) == (metrics, 7)
    assert logged["settings"]["hits"] == 12


def test_passages_with_the_text_of_the_query_are_no_hits(config, tmp_path):
    passages = read(config.data.corpus)
    passages[4] = dict.fromkeys(passages[4], "") | {"text": read(config.data.eval_data)[2]["query"]}
    config.data.corpus = write(tmp_path / "with_query.json", passages)
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    hits = []
    for config.evaluation.ignore_identical in (False, True):
        hits.append(
            RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder).retrieve(
                params, "dev.set"
            )[1]
        )
    assert hits[0][2, 0] == 4 and 4 not in hits[1][2] and (hits[1] == 4).any()
    np.testing.assert_array_equal(hits[1][2, :11], hits[0][2, 1:12])


def test_files_only_when_wanted(config, tmp_path):
    config.evaluation.save_result, config.evaluation.log_path = False, None
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)(params)
    assert not (tmp_path / "out").exists()
    config.evaluation.save_result, config.evaluation.save_name = True, "mine"
    RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)(params)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["dev.set.result.mine.json", "dev.set.source.mine.json"]


def test_only_the_first_process_writes(config, tmp_path, monkeypatch):
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    evaluator = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)
    monkeypatch.setattr(evaluate.jax, "process_index", lambda: 1)
    assert evaluator(params)
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


def test_tokens_are_cached_by_content_and_settings(config, tmp_path):
    encoder, _, tokenizer = load_dual_encoder(config.encoder)

    def folders():
        RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)
        return len(list((tmp_path / "cache" / "tokens").iterdir()))

    assert folders() == 2  # queries and passages
    assert folders() == 2
    config.data.key_max_length = 12
    assert folders() == 3
    config.data.add_instruction = False
    assert folders() == 5
    config.data.key_template = "{text}"
    assert folders() == 6
    with open(config.data.corpus, "a") as file:
        file.write('{"title": "", "text": "new"}\n')
    assert folders() == 7


def test_refuses_what_cannot_work(config):
    encoder, _, tokenizer = load_dual_encoder(config.encoder)
    config.data.version = "llm-embedder"  # which has an instruction for each task
    with pytest.raises(InputError, match=r"dev.set.json: task is missing"):
        RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)
    config.data.version, config.data.key_template = "bge", "{body}"
    with pytest.raises(InputError, match=r"corpus.json:1: has no field 'body', only title, text"):
        RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)


def test_parameters_stay_where_they_are(config):
    """A call must not donate or move the training state's parameters."""
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    mesh = make_mesh(4)
    placed = to_mesh(params, state_sharding(mesh, params))
    RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder, mesh)(placed)
    for leaf, before in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), before)
