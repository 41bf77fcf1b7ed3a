"""A training run small enough to be killed and repeated: its data, its flags, its weights."""

from pathlib import Path

import numpy as np
import tiny
from commands import flags
from safetensors.numpy import load_file

STEPS = 8
EVALUATION = [
    *("--eval_data", "llm-embedder:test.json", "--corpus", "llm-embedder:corpus.json"),
    *("--eval_steps", "4", "--cutoffs", "1", "10"),
]


def write_data(folder: Path) -> Path:
    """A model, and a data set in which a query shares words with its positive."""
    tiny.save_bert(folder / "bert", dropout=0.1, layers=1)
    rng = np.random.default_rng(0)
    corpus = [{"title": f"w{i}", "text": tiny.text(rng)} for i in range(40)]
    texts = [f"{row['title']} {row['text']}" for row in corpus]
    rows = []
    for i in range(48):
        positive, *negatives = rng.permutation(40)[:6].tolist()
        rows.append(
            {
                "query": texts[positive].split()[0] + " " + tiny.text(rng, 1, 4),
                "pos": [texts[positive]],
                "neg": [texts[n] for n in negatives],
                "pos_index": [positive],
                "neg_index": negatives,
                "task": "qa",
            }
        )
        if i % 3:  # rows with and without scores in one batch
            rows[-1]["teacher_scores"] = rng.normal(size=6).tolist()
    tiny.write_lines(folder / "train.json", rows)
    tiny.write_lines(
        folder / "test.json", [{k: r[k] for k in ("query", "pos_index")} for r in rows[:20]]
    )
    tiny.write_lines(folder / "corpus.json", corpus)
    return folder


def arguments(data: Path, output_dir: Path, *more: str) -> list[str]:
    settings = {
        "data_root": data,
        "train_data": "llm-embedder:train.json",
        "query_encoder": data / "bert",
        "dataset_cache_dir": data / "cache",
        "output_dir": output_dir,
        "log_path": output_dir.with_suffix(".log"),
        "query_max_length": 24,
        "key_max_length": 32,
        "train_group_size": 4,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    return [*flags(settings), *more]


def weights(output_dir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    return load_file(output_dir / f"checkpoint-{step}/encoder/model.safetensors")


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_to_rounding(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("self.key.bias"):
            continue  # its true gradient is 0, AdamW scales up what rounding leaves of it
        # At a rate of 1e-3 the steps move a weight by up to 4e-3, rounding by under 1e-5.
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)
