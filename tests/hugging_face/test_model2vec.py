"""Folders that model2vec saved: its vectors."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from folder_edits import edit
from model2vec import StaticModel
from tiny import letter_tokenizer

from llme_jax import Encoder

LONG = "a b " * 700  # more characters than are read
TEXTS = [LONG, "word1 word2 abc", "東京 word3", "word4 " * 30, "a [PAD] b", "Word1"]
TOKENS = letter_tokenizer(20).backend_tokenizer.get_vocab_size()
SAVED = {
    "as it is": {},
    "of length 1": {"normalize": True},
    "short": {"max_length": 7},
    "without a limit": {"max_length": None},
    "weights": {"weights": np.linspace(0.1, 2, TOKENS)},
    "fewer rows": {"token_mapping": np.arange(TOKENS) % 12, "weights": np.linspace(2, 1, TOKENS)},
}


def without_modules(folder: Path) -> None:
    """As versions before sentence-transformers opened such folders."""
    (folder / "modules.json").unlink()
    edit("config.json", model_type="model2vec", architectures=["StaticModel"])(folder)


@pytest.mark.parametrize("change", [lambda folder: None, without_modules])
@pytest.mark.parametrize("name", SAVED)
def test_vectors_are_those_of_model2vec(name, change, tmp_path, caplog):
    rows = 12 if "token_mapping" in SAVED[name] else TOKENS
    table = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float32)
    backend = letter_tokenizer(20).backend_tokenizer
    StaticModel(table, backend, **SAVED[name]).save_pretrained(tmp_path)
    change(tmp_path)
    model = StaticModel.from_pretrained(tmp_path)
    wanted = np.stack([model.encode(text) for text in TEXTS])
    if not json.loads((tmp_path / "config.json").read_text())["normalize"]:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)  # the similarity is the cosine
    encoder = Encoder.load(tmp_path, dtype="fp32")
    np.testing.assert_allclose(encoder.encode(TEXTS, kind="query"), wanted, atol=1e-5)
    with caplog.at_level(logging.WARNING):
        encoder.encode([""], kind="key")
    assert "read as one token of padding" in caplog.text
