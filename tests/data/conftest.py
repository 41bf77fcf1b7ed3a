"""A tiny tokenizer, helpers that write training files, and the data doctor."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llme_jax.config import DataConfig, LossConfig
from llme_jax.data.__main__ import main
from llme_jax.data.rows import BadRows
from llme_jax.data.train_data import prepare

WORDS = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "i",
    "j",
    "k",
    "l",
    "m",
    "n",
    "o",
    "p",
    "q",
    "r",
    "s",
    "t",
    "u",
    "v",
    "w",
    "x",
    "y",
    "z",
    "query",
    "passage",
    ":",
    "represent",
    "this",
]


def _make_tokenizer(extra_words: int = 0) -> PreTrainedTokenizerFast:
    """WordPiece over single letters, digits and a few words, [CLS] text [SEP]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"0123456789"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces += [f"word{i}" for i in range(extra_words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # As in some published tokenizers: padding and truncation are on, and must not matter.
    backend.enable_padding(length=40)
    backend.enable_truncation(40)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", **special)


@pytest.fixture(scope="session")
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return _make_tokenizer()


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(name, rows): a JSON-lines file; strings are written as they are."""

    def write(name: str, rows: list) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """prepared(paths, loss, **data settings): TrainData with its cache in the test's folder."""

    def call(paths, loss=None, *, seed=0, tokenizer=tokenizer, bad_rows=None, **settings):
        paths = [paths] if isinstance(paths, str) else paths
        defaults = {
            "train_group_size": 3,
            "query_max_length": 16,
            "key_max_length": 24,
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        data = DataConfig(train_data=paths, **(defaults | settings))
        loss = loss or LossConfig()
        bad_rows = bad_rows or BadRows(data.max_bad_rows)
        return prepare(data, loss, tokenizer, seed=seed, bad_rows=bad_rows)

    return call


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, make_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return str(folder)


@pytest.fixture
def doctor(encoder, capsys):
    """doctor("a.json --flag ..."): exit code, what was printed."""

    def call(*argv: str) -> tuple[int, str]:
        code = main([*argv, "--query_encoder", encoder])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def found(doctor):
    """found("a.json --flag ..."): exit code, what --json says."""

    def call(*argv: str) -> tuple[int, dict]:
        code, printed = doctor(*argv, "--json", "-")
        return code, json.loads(printed)

    return call
