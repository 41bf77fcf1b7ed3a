"""The seam holds: another task trains through the loop, step, dry run and checkpoint as they are.

Words have vectors; a query and a key are the sums of theirs, scored by a dot product, and the loss
is the cross-entropy over the query's own keys. Half of each vector is trained, half is frozen.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import write_data

from llme_jax.config import Config
from llme_jax.data.instructions import with_model_texts
from llme_jax.devices.sharding import FSDP_RULES
from llme_jax.hugging_face.texts import NOTHING_SAID
from llme_jax.hugging_face.tokenizer import load_tokenizer
from llme_jax.training.loop import train
from llme_jax.training.metrics_log import read_metrics
from llme_jax.training.task import Opened

WIDTH, STEPS = 8, 12


class DotPairs:
    flag, rules, exports, layout = "--words", FSDP_RULES, ("words",), None
    teacher = None

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.streams = {"texts": ("query", "key")}

    def outputs(self, params, texts, key, *, chunk):
        table = jnp.concatenate([params[n]["embedding"] for n in ("words", "fixed")], axis=1)
        ends = jnp.cumsum(jnp.concatenate(texts["texts"].lengths))
        before = jnp.concatenate(
            [jnp.zeros((1, 2 * WIDTH)), jnp.cumsum(table[texts["texts"].ids], 0)]
        )
        sums = jnp.diff(before[ends], axis=0, prepend=before[:1])
        return {field: sums[place] for field, place in texts["texts"].place.items()}

    def loss(self, outputs, batch, *, recipe, devices):
        query, keys = outputs["query"], outputs["key"]
        scores = jnp.einsum("bd,bnd->bn", query, keys.reshape(len(query), -1, 2 * WIDTH))
        value = -jax.nn.log_softmax(scores)[:, 0].mean()
        return value, {"pairs": value}

    def forward_flops(self, params, work):
        tokens, _ = work["texts"]
        return 4.0 * WIDTH * tokens

    def recomputing(self, on):
        return self

    def evaluator(self, mesh):
        return Norm()

    def exporter(self, params, tasks):
        def export(folder: Path) -> None:
            (folder / "words").mkdir(exist_ok=True)
            np.savez(folder / "words/table.npz", **{n: p["embedding"] for n, p in params.items()})

        return export


class Norm:
    """Stands for a metric: how large what is trained and what is not has become."""

    sizes = (1,)

    def __call__(self, params, step):
        return {n: float(jnp.linalg.norm(p["embedding"])) for n, p in params.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def start_tables(tokenizer):
    rng = np.random.default_rng(0)
    shape = len(tokenizer), WIDTH
    return [rng.normal(size=shape).astype(np.float32) / 4 for _ in ("words", "fixed")]


def open_dot_pairs(config, files):
    name = config.encoder.query_encoder
    tokenizer = load_tokenizer(Path(name))
    config = replace(config, data=with_model_texts(config.data, name, NOTHING_SAID))
    words, fixed = start_tables(tokenizer)
    params, frozen = {"words": {"embedding": words}}, {"fixed": {"embedding": fixed}}
    return Opened(DotPairs(config, tokenizer), params, frozen)


def settings(data, out, **training) -> Config:
    config = Config()
    config.data.train_data = [str(data / "train.json")]
    config.data.dataset_cache_dir = str(data / "cache")
    config.data.query_max_length, config.data.key_max_length = 24, 32
    config.data.train_group_size = 4
    config.encoder.query_encoder = str(data / "bert")
    config.training.output_dir = str(out)
    config.training.per_device_train_batch_size = 2
    config.training.learning_rate, config.training.max_steps = 0.05, STEPS
    config.training.save_steps, config.training.logging_steps = 4, 1
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def tables(out, step: int) -> dict[str, np.ndarray]:
    return dict(np.load(out / f"checkpoint-{step}/words/table.npz"))


def test_it_trains(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(settings(data, out), open_dot_pairs) == 0
    assert losses(out)[-1] < 0.7 * losses(out)[0] and len(losses(out)) == STEPS
    trained, (words, fixed) = tables(out, STEPS), start_tables(load_tokenizer(data / "bert"))
    np.testing.assert_array_equal(trained["fixed"], fixed)
    assert np.abs(trained["words"] - words).max() > 0.1
    assert f"words:   {out}/checkpoint-{STEPS}/words" in capsys.readouterr().out
    # A metric that grows: the last checkpoint is the best.
    assert (out / "best").resolve().name == f"checkpoint-{STEPS}"


def test_the_first_loss_is_that_of_the_formula(data, tmp_path):
    """Texts of a few words as sums, in numpy, from the rows themselves."""
    out = tmp_path / "out"
    config = settings(data, out, max_steps=1)
    config.data.select_negative, config.data.add_instruction = "first", False
    config.training.per_device_train_batch_size = 6  # all 48 rows, on 8 devices
    train(config, open_dot_pairs)
    tokenizer = load_tokenizer(data / "bert")
    table = np.concatenate(start_tables(tokenizer), axis=1).astype(np.float64)
    each = []
    for line in (data / "train.json").read_text().splitlines():
        row = json.loads(line)
        texts = [(row["query"], 24), *((key, 32) for key in (row["pos"] + row["neg"])[:4])]
        query, *keys = (
            table[tokenizer(t, truncation=True, max_length=n)["input_ids"]].sum(0) for t, n in texts
        )
        scores = np.array(keys) @ query
        each.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[0])
    assert losses(out) == [pytest.approx(np.mean(each), rel=1e-5)]


@pytest.mark.parametrize("how", [{}, {"fsdp": 4}, {"gradient_accumulation_steps": 2}])
def test_it_goes_on_where_it_was(data, tmp_path, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(data, whole, **how), open_dot_pairs)
    train(settings(data, parts, early_exit_steps=5, **how), open_dot_pairs)
    names = {path.name for path in (parts / "checkpoint-5").iterdir()}
    assert names == {"checksums.json", "state", "words"}
    train(settings(data, parts, **how), open_dot_pairs)
    assert losses(parts) == losses(whole)
    for name, table in tables(whole, STEPS).items():
        np.testing.assert_array_equal(tables(parts, STEPS)[name], table)


def test_what_it_takes_is_said(data, tmp_path, capsys):
    config = settings(data, tmp_path / "out")
    config.planning.plan = True
    assert train(config, open_dot_pairs) == 0
    said = capsys.readouterr().out
    words = len(load_tokenizer(data / "bert"))
    assert f"parameters         {2 * words * WIDTH:,}; with the optimizer's state" in said
    assert re.search(r"\d%: [\d,]+ tokens of texts in \d+x\d+", said)
    assert not (tmp_path / "out").exists()
