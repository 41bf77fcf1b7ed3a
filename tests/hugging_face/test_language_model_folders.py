"""Folders of language models, against transformers: which head counts, which tokens it has."""

import logging

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from llme_jax import Reranker, Scorer, score
from llme_jax.errors import InputError

PAIRS = [("the lighthouse keeper", " paints"), ("who knows", " nobody at all")]


def log_likelihoods(folder) -> list[float]:
    """Mean log-probability of a token of each answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for prompt, answer in PAIRS:
        ids = tokenizer(prompt + answer).input_ids
        start = len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        found.append(np.mean([float(logs[i - 1, ids[i]]) for i in range(start, len(ids))]))
    return found


@pytest.mark.parametrize("another", [True, False])
def test_a_head_in_the_file_counts(another, tmp_path, caplog):
    """As in transformers 5, whatever tie_word_embeddings says."""
    folder = tiny.save_llama(tmp_path / "lm", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    words = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = np.ascontiguousarray(words[::-1]) if another else words
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        scorer = Scorer.load(folder, lm_dtype="fp32", context_max_length=64, lm_batch_size=6)
    assert ("has a lm_head of its own, which counts" in caplog.text) == another
    np.testing.assert_allclose(scorer.score(PAIRS), log_likelihoods(folder), atol=1e-5)


def test_tokens_that_the_table_does_not_have(tmp_path):
    folder = tiny.save_llama(tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"lighthouse{i}" for i in range(400)])
    tokenizer.save_pretrained(folder)
    row = {"query": "q", "pos": ["a"], "neg": ["b"], "answers": ["c"], "task": "qa"}
    tiny.write_lines(tmp_path / "rows.json", [row])
    rows = ["--eval_data", str(tmp_path / "rows.json")]
    lengths = {"query_max_length": 16, "key_max_length": 16}
    for load in (
        lambda: Scorer.load(folder, context_max_length=64),
        lambda: Reranker.load(folder, ranker_method="yes-no", **lengths),
        lambda: score.main([*rows, "--model_name_or_path", str(folder)]),
    ):
        with pytest.raises(InputError, match="the tokenizer gives ids up to "):
            load()
    assert {path.name for path in tmp_path.iterdir()} == {"lm", "rows.json"}
