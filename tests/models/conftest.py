"""A real encoder and real texts (the quickstart's), and tiny random encoders."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny import keep_own_fields

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart


@pytest.fixture(scope="session")
def prepared() -> quickstart.Quickstart:
    return quickstart.prepare(cache_dir(None))


@pytest.fixture(scope="session")
def minilm(prepared) -> Path:
    """all-MiniLM-L6-v2, a Hugging Face folder."""
    return prepared.model


@pytest.fixture(scope="session")
def texts(prepared) -> list[str]:
    """100 requests that people made, of 5 to 200 tokens."""
    rows = [json.loads(line) for line in prepared.test.read_text(encoding="utf-8").splitlines()]
    return [row["query"] for row in rows[-100:]]


@pytest.fixture
def tiny(tmp_path):
    """Makes (folder, torch model): a random encoder in which no two parameters are alike."""

    def make(model_type: str = "bert", name: str = "tiny", seed: int = 0, **changes):
        settings = {
            "vocab_size": 101,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 80,
            "max_position_embeddings": 40,
            "type_vocab_size": 2,
            "pad_token_id": 0 if model_type == "bert" else 1,
        } | changes
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(model_type, **settings), dtype=torch.float32
        ).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        keep_own_fields(tmp_path / name)
        return tmp_path / name, model

    return make
