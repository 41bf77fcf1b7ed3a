"""What the compiler of TPUs says, read from its programs; every program compiles for them."""

import os
import re
import subprocess
import sys

import pytest
import tiny
from small_run import write_data

from llme_jax import rank, train
from llme_jax.config.plan import TOPOLOGIES
from llme_jax.devices.topology import CHIPS, chip, environment, estimate
from llme_jax.errors import InputError

# Lines of an optimised program, shortened: a product, one of attention, a kernel, a copy, a sum of
# gradients that is started and awaited, another part of it, a gather of two arrays.
PROGRAM = """
  %f.1 = bf16[8,4]{1,0} fusion(%a), metadata={op_name="jit(f)/dot_general"}, b={"estimated_cycles":"3000000"}
  %f.2 = f32[8,4]{1,0} fusion(%a), metadata={op_name="jit(f)/attention/dot_general"}, b={"estimated_cycles":"1500000"}
  %k.9 = bf16[8,4]{1,0} custom-call(%a), metadata={op_name="jit(f)/attention/pallas_call"}, b={"cost_estimate":{"flops":"55500000000"}}
  %copy.3 = bf16[8,4]{0,1} copy(%f.1), metadata={op_name="jit(f)/transpose"}, b={"estimated_cycles":"750000"}
  %r.4 = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%a), channel_id=1, metadata={op_name="jit(f)/psum"}
  %scatter.5 = f32[8] fusion(%a), metadata={op_name="jit(f)/scatter"}, b={"estimated_cycles":"9223372036854775807"}
  %r.5 = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%a), channel_id=1, metadata={op_name="jit(f)/psum"}
  %r.6 = f32[16,8]{1,0} all-reduce(%b), channel_id=1, metadata={op_name="jit(f)/psum"}
  %g.6 = (f32[256]{0}, bf16[8,16]{1,0}) all-gather(%a, %b), channel_id=2, metadata={op_name="jit(f)/gather"}
"""  # noqa: E501


def test_a_program_is_read():
    found = estimate(PROGRAM, CHIPS["v5e"])
    assert found.seconds == {"products": 2e-3, "attention": 2e-3, "copies": 0.5e-3}
    assert found.exchanged == {"all-reduce": 4096 + 512, "all-gather": 4 * 256 + 2 * 128}
    assert not found.loops and estimate("  %w = (s32[]) while(%t)", CHIPS["v5e"]).loops


def test_peaks_are_those_of_the_matrix_units():
    """A multiplication and an addition a cell and cycle: 4 units of 128 x 128, on v5p twice as
    many, on v6e 4 of 256 x 256."""
    for name, cells in (("v5e", 4 * 128**2), ("v5p", 8 * 128**2), ("v6e", 4 * 256**2)):
        assert CHIPS[name].flops == pytest.approx(2 * cells * CHIPS[name].clock, rel=0.01)
    assert {chip(name) for name in TOPOLOGIES} == set(CHIPS.values())


def test_it_is_for_plan_alone(tmp_path):
    with pytest.raises(InputError, match="--topology: says for which devices --plan compiles"):
        train.main(["--train_data", "t.json", "--output_dir", str(tmp_path), "--topology",
                    "v5e:2x4"])  # fmt: skip


def test_without_their_compiler_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (train, rank):
        with pytest.raises(InputError, match=r"not installed: pip install 'llme_jax\[plan-tpu\]'"):
            command.main(["--train_data", "t.json", "--output_dir", str(tmp_path), "--plan",
                          "--topology", "v5e:2x4"])  # fmt: skip


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_training_compiles(tmp_path, topology):
    data, out = write_data(tmp_path), tmp_path / "out"
    common = ["--train_data", str(data / "train.json"), "--output_dir", str(out), "--plan",
              "--dataset_cache_dir", str(data / "cache"), "--topology", topology,
              "--per_device_train_batch_size", "2"]  # fmt: skip
    model = str(tiny.save_bert(tmp_path / "wide", width=128, dropout=0.1))
    for command in (
        ["train", "--query_encoder", model, "--query_max_length", "24", "--key_max_length", "32"],
        ["rank", "--ranker", model, "--query_max_length", "24", "--key_max_length", "32"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"llme_jax.{command[0]}", *command[1:], *common],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        memory = float(re.search(r"it fits: a device has ([\d.]+) GiB", done.stdout)[1])
        assert memory == chip(topology).memory
        estimated = re.search(r"time of the step +([\d.]+) ms .*products", done.stdout)
        assert 0 < float(estimated[1]) < 100
        # Every gradient once in fp32, and the queries' gradient; see tests/training/test_step.py.
        assert "MiB all-reduce" in done.stdout and "all-to-all" not in done.stdout
        assert not out.exists()


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "family, changes, more",
    [
        # Windows of 9 tokens, texts of up to 32.
        ("modernbert", {"local_attention": 8, "num_hidden_layers": 3}, []),
        ("gte", {"type_vocab_size": 1}, []),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 64}, ["--lora_rank", "4", "--fsdp", "2"]),
    ],
)
def test_training_of_other_families_compiles(tmp_path, family, changes, more):
    data = write_data(tmp_path)
    changes |= {"hidden_size": 128, "num_attention_heads": 2}
    model = tiny.save_encoder(tmp_path / "other", family, **changes)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llme_jax.train", "--query_encoder", str(model), "--plan"),
            *("--train_data", str(data / "train.json"), "--output_dir", str(tmp_path / "out")),
            *("--query_max_length", "24", "--key_max_length", "32", "--topology", "v5e:2x4"),
            *("--dataset_cache_dir", str(data / "cache"), *more),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout and re.search("time of the step +[0-9.]+ ms", done.stdout)


# Compiles what runs on devices besides training, with tiny models: language models on a mesh
# of 2 x 2 x 2, encoders on 8 devices that share the rows.
COMPILES = """
import sys
import jax, numpy as np
from llme_jax.config import EncoderConfig
from llme_jax.devices.sharding import abstract, batch_sharding, make_mesh, replicated
from llme_jax.devices.topology import compiles_for, devices
from llme_jax.lm import generation, likelihood, options
from llme_jax.models.causal_lm import open_causal_lm, sharded_shapes
from llme_jax.models.cross_encoder import load_cross_encoder
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.rerank import cross_scorer
from llme_jax.retrieval import encode, exact

bert, llama = sys.argv[1:]
spread = make_mesh(2, 2, devices=devices(compiles_for()))
lm, _, _ = open_causal_lm(llama, dtype="auto", cache_dir=None)
assert lm.dtype == "bfloat16"
of_lm = lm, sharded_shapes(lm, spread), spread, 2, 128
needed = [likelihood.analyse(*of_lm), options.analyse(*of_lm), generation.analyse(*of_lm, 8)]

mesh = make_mesh(devices=devices(compiles_for()))
rows, everywhere = batch_sharding(mesh), replicated(mesh)
integers = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)
encoder, params, _ = load_dual_encoder(EncoderConfig(query_encoder=bert))
how = {"encoder": encoder, "field": "key", "result": everywhere}
texts = integers(16, 64), integers(16)
compiled = [encode._forward.lower(abstract(params, everywhere), *texts, **how)]
encoder, params, _ = load_cross_encoder(bert, dtype="auto", cache_dir=None, max_length=64)
how = {"encoder": encoder, "result": everywhere}
compiled.append(cross_scorer._forward.lower(abstract(params, everywhere), *texts, texts[1], **how))
merge, join = exact._compiled(mesh, "cos", 64)
best = [jax.ShapeDtypeStruct((8, 4, 10), t, sharding=rows) for t in (np.float32, np.int32)]
queries = jax.ShapeDtypeStruct((4, 32), np.float32, sharding=everywhere)
keys = jax.ShapeDtypeStruct((8 * 128, 32), np.float32, sharding=rows)
bounds = jax.ShapeDtypeStruct((2,), np.int32, sharding=everywhere)
compiled += [merge.lower(*best, queries, keys, bounds), join.lower(*best)]
compiled = [program.compile() for program in compiled]
assert all("forward_kernel" in program.as_text() for program in compiled[:2])
needed += [program.memory_analysis() for program in compiled]
print(len(needed), all(needed), mesh.devices.flat[0].platform)
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_what_only_reads_compiles(tmp_path, topology):
    bert = tiny.save_bert(tmp_path / "bert", width=64)
    models = [str(bert), str(tiny.save_llama(tmp_path / "llama"))]
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *models], env=os.environ | environment(topology),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["7", "True", "tpu"]
