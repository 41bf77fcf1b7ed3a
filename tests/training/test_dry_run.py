"""--plan: what is said of a run is what the run is, and nothing is trained or written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny
from transformers import BertModel

from llme_jax import train
from llme_jax.config import Config, EncoderConfig
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training import dry_run
from llme_jax.training.dual import DualTask
from llme_jax.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files whose texts differ in length, so that each has a program of its own."""
    folder = tmp_path_factory.mktemp("data")
    tiny.save_bert(folder / "bert")
    rng = np.random.default_rng(0)
    for name, most in (("short", 4), ("long", 30)):
        keys = [[tiny.text(rng, 2, most)] for _ in range(128)]
        rows = [
            {"query": tiny.text(rng), "pos": pos, "neg": neg}
            for pos, neg in zip(keys[:64], keys[64:], strict=True)
        ]
        tiny.write_lines(folder / f"{name}.json", rows)
    return folder


def arguments(data, out, *more: str) -> list[str]:
    words = (
        "--train_data llm-embedder:short.json llm-embedder:long.json --inbatch_same_dataset epoch "
        "--key_max_length 48 --query_max_length 32 --train_group_size 2 --save_steps 8 "
        "--per_device_train_batch_size 2"
    )
    return small_run.arguments(data, out, *words.split(), *more)


@pytest.mark.slow
def test_the_programs_are_those_that_are_compiled(data, tmp_path, capsys):
    assert train.main(arguments(data, tmp_path / "out", "--plan")) == 0
    said = capsys.readouterr().out
    assert not any(tmp_path.iterdir())  # nothing was written
    model = BertModel.from_pretrained(data / "bert", add_pooling_layer=False)
    assert f"parameters         {model.num_parameters():,};" in said
    assert "no limit is known here: --device_memory GIB" in said
    programs = re.findall(r"^ +([\d.]+)%: (.* tokens of texts .*)", said, re.MULTILINE)
    assert sum(float(share) for share, _ in programs) == pytest.approx(100, abs=0.5)

    assert train.main(arguments(data, tmp_path / "out")) == 0
    compiled = re.findall(r"compiled the step for (.*)", capsys.readouterr().err)
    assert len(compiled) == len(set(compiled)) > 1
    assert set(compiled) <= {shapes for _, shapes in programs}
    share = float(re.search(r"padding +([\d.]+)%", said)[1]) / 100
    steps = [r["padding_fraction"] for r in read_metrics(tmp_path / "out/metrics.jsonl")
             if "padding_fraction" in r]  # fmt: skip
    assert min(steps) - 0.001 <= share <= max(steps) + 0.001


@pytest.mark.slow
def test_what_does_not_fit_has_remedies_that_do(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(arguments(data, out, "--plan", "--device_memory", "100")) == 0
    said = capsys.readouterr().out
    assert "it fits: a device has 100.00 GiB" in said

    # At these lengths no text is longer than usual: there is one program to compile.
    more = "--per_device_train_batch_size 32 --query_max_length 16 --key_max_length 16".split()
    assert train.main(arguments(data, out, "--plan", *more, "--device_memory", "0.002")) == 1
    said = capsys.readouterr().out
    assert "it does not fit: " in said
    remedies = re.findall(r"^  (--.*): [\d.]+ GiB$", said, re.MULTILINE)
    assert {r.split()[0] for r in remedies} >= {"--sub_batch_size", "--per_device_train_batch_size"}
    for remedy in remedies:
        flags = [*more, "--device_memory", "0.002", *remedy.split()]
        assert train.main(arguments(data, out, "--plan", *flags)) == 0, remedy
        assert "it fits" in capsys.readouterr().out
    assert not out.exists()

    # Nothing is enough: what was tried last, everything together, takes least.
    tokens = ["--sub_batch_tokens", "64"]
    for flags, least in (([], "--sub_batch_size 1"), (tokens, "--sub_batch_tokens 16")):
        flags = [*more, *flags, "--device_memory", "1e-5"]
        assert train.main(arguments(data, out, "--plan", *flags)) == 1
        said = capsys.readouterr().out
        assert re.search(
            r"none of the settings that were tried, --gradient_checkpointing true --fsdp 8 "
            rf"{least} takes 0\.00 GiB",
            said,
        )


def test_batches_that_add_up_take_the_gradients_besides(data, tmp_path, capsys, monkeypatch):
    """Once: the newest gradient is in both programs, the sum of several only in the one."""
    monkeypatch.setattr(dry_run, "GIB", 2**20)  # so that what is printed has digits enough

    def takes(*more: str) -> float:
        assert train.main(arguments(data, tmp_path / "out", "--plan", *more)) == 0
        return float(re.search(r"^memory +([\d.]+) GiB", capsys.readouterr().out, re.MULTILINE)[1])

    bert = tiny.save_bert(tmp_path / "wide", width=512)
    wide = ["--query_encoder", str(bert), "--dataset_cache_dir", str(data / "cache")]
    parameters = BertModel.from_pretrained(bert, add_pooling_layer=False).num_parameters()
    more = takes(*wide, "--gradient_accumulation_steps", "2") - takes(*wide)
    # XLA plans the memory of the two programs apart; the next larger claim would be twice as much.
    assert more == pytest.approx(4 * parameters / 2**20, rel=0.2)


def test_operations_are_those_that_xla_counts(tmp_path):
    """Of matrix products; XLA's count has softmax, GELU and LayerNorm besides, a few percent."""
    folder = tiny.save_bert(tmp_path / "bert", width=256)
    config = EncoderConfig(query_encoder=str(folder), pooling_method=["mean"])
    encoder, params, _ = load_dual_encoder(config)
    ids, lengths = jnp.ones((16, 64), jnp.int32), jnp.full(16, 64)
    encode = jax.jit(lambda p, *texts: encoder.encode(p, *texts, field="key"))
    xla = encode.lower(params, ids, lengths).compile().cost_analysis()["flops"]
    ours = DualTask(Config(), encoder, None).forward_flops(params, {"texts": (16 * 64, 16 * 64**2)})
    assert 0.9 * xla < ours < xla
