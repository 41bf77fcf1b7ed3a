"""What compilers of TPUs and GPUs say, read from their programs; all programs compile for them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from small_run import write_data

from llme_jax import rank, train
from llme_jax.config.plan import TOPOLOGIES
from llme_jax.devices.topology import CHIPS, Chip, chip, environment, estimate
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

# The same of a GPU, in bf16: a product of [8, 4] by [4, 16] in a fusion, attention of 2 texts with
# 3 heads of 64 and its gradient, the causal one, a sum, a copy, two of the same sums of gradients,
# queries that are gathered with their numbers, their gradient.
GPU_PROGRAM = """
%gemm_computation (p.0: bf16[8,4], p.1: bf16[4,16]) -> bf16[8,16] {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  %p.1 = bf16[4,16]{1,0} parameter(1)
  ROOT %dot.5 = bf16[8,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x)
}
%fused_reduce (p.2: bf16[8,16]) -> f32[8] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %reduce.6 = f32[8]{0} reduce(%p.2, %zero), dimensions={1}, to_apply=%add
}
ENTRY %main.0_spmd (a: bf16[8,4], b: bf16[4,16], q: bf16[2,128,3,64]) -> f32[8] {
  %a = bf16[8,4]{1,0} parameter(0), sharding={replicated}
  %b = bf16[4,16]{1,0} parameter(1)
  %q = bf16[2,128,3,64]{3,2,1,0} parameter(2)
  %f.1 = bf16[8,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_computation, metadata={op_name="jit(f)/dot_general"}
  %c.2 = (bf16[2,3,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/attention/fwd"}, backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "128", "128"]}, "mask_type": "PADDING", "lhs_contracting_dimensions": ["3"]}}
  %c.3 = bf16[2,3,128,64]{3,1,2,0} custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(f)/attention/bwd"}, backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "3", "128", "128"]}, "mask_type": "CAUSAL"}}
  %r.4 = f32[8]{0} fusion(%f.1), kind=kInput, calls=%fused_reduce, metadata={op_name="jit(f)/reduce_sum"}
  %copy.5 = bf16[8,16]{0,1} copy(%f.1), metadata={op_name="jit(f)/transpose"}
  %m.6 = (f32[2,5]{1,0}, s8[64]{0}) custom-call(%w, /*index=1*/%w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %w = f32[100,2]{1,0} parameter(3)
  %s.6 = f32[256]{0} all-reduce-start(%g.1), channel_id=1, to_apply=%add
  %d.6 = f32[256]{0} all-reduce-done(%s.6)
  %s.7 = f32[256]{0} all-reduce-start(%g.2), channel_id=1, to_apply=%add
  %s.8 = ((f32[1,8]{1,0}, u32[1]{0}), (f32[8,8]{1,0}, u32[8]{0})) all-gather-start(%q.1, %q.2), channel_id=2, dimensions={0}
  %s.9 = ((f32[8,8]{1,0}), f32[1,8]{1,0}) reduce-scatter-start(%q.3), channel_id=3, to_apply=%add
}
"""  # noqa: E501
# All but one that tells nothing new, each for whoever has its compiler.
COMPILED = [
    pytest.param(
        name, marks=getattr(pytest.mark, "tpu_compile" if chip(name).host else "cuda_compile")
    )
    for name in TOPOLOGIES
    if name != "h100:1"
]


def test_a_program_is_read():
    found = estimate(PROGRAM, CHIPS["v5e"])
    assert found.seconds == {"products": 2e-3, "attention": 2e-3, "copies": 0.5e-3}
    assert found.exchanged == {"all-reduce": 4096 + 512, "all-gather": 4 * 256 + 2 * 128}
    assert not found.loops and estimate("  %w = (s32[]) while(%t)", CHIPS["v5e"]).loops


def test_a_program_of_a_gpu_is_read():
    # 1 operation and 1 byte a second: the seconds are those of the larger of both.
    found = estimate(GPU_PROGRAM, Chip("gpu", 1.0, flops=1.0, bandwidth=1.0))
    pairs, exact = 2 * 3 * 128 * 128, 2 * 100 * 2 * 5
    assert found.seconds == {
        "attention": 2 * 2 * pairs * 64 + 5 * pairs * 64,  # causal: half of the pairs
        "products": pytest.approx(2 * 8 * 4 * 16 + exact / 0.068),
        "copies": 2 * 2 * 8 * 16,
        "reductions": 2 * 8 * 16 + 4 * 8,
    }
    assert found.exchanged == {"all-reduce": 2 * 1024, "all-gather": 288, "reduce-scatter": 32}
    # With nothing to compute at: products move their operands and results, 2 bytes a number.
    found = estimate(GPU_PROGRAM, Chip("gpu", 1.0, flops=1e12, bandwidth=1.0))
    assert found.seconds["products"] == 2 * (8 * 4 + 4 * 16 + 8 * 16) + 2 * 4 * 200 + 4 * 10 + 64


def test_peaks_are_those_of_the_matrix_units():
    """A multiplication and an addition a cell and cycle: 4 units of 128 x 128, on v5p twice as
    many, on v6e 4 of 256 x 256."""
    for name, cells in (("v5e", 4 * 128**2), ("v5p", 8 * 128**2), ("v6e", 4 * 256**2)):
        assert CHIPS[name].flops == pytest.approx(2 * cells * CHIPS[name].clock, rel=0.01)
    # https://resources.nvidia.com/en-us-tensor-core: 132 cores with 4 units of 512 cells, 1.83 GHz.
    assert CHIPS["h100"].flops == pytest.approx(2 * 132 * 4 * 512 * 1.83e9, rel=0.01)
    assert {chip(name) for name in TOPOLOGIES} == set(CHIPS.values())


def test_it_is_for_plan_alone(tmp_path):
    with pytest.raises(InputError, match="--topology: says for which devices --plan compiles"):
        train.main(["--train_data", "t.json", "--output_dir", str(tmp_path), "--topology",
                    "v5e:2x4"])  # fmt: skip


@pytest.mark.parametrize(
    "topology, what, extra", [("v5e:2x4", "TPU", "tpu"), ("h100:8", "GPU", "cuda")]
)
def test_without_their_compiler_it_is_one_sentence(tmp_path, monkeypatch, topology, what, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = rf"compiler for {what}s is not installed: pip install 'llme_jax\[plan-{extra}\]'"
    for command in (train, rank):
        with pytest.raises(InputError, match=said):
            command.main(["--train_data", "t.json", "--output_dir", str(tmp_path), "--plan",
                          "--topology", topology])  # fmt: skip


@pytest.mark.parametrize("topology", COMPILED)
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
        assert 0 <= float(estimated[1]) < 100
        assert float(estimated[1]) or chip(topology).platform == "gpu"  # there 10 us
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
from llme_jax.devices.sharding import batch_sharding, make_mesh
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
encoder, params, _ = load_dual_encoder(EncoderConfig(query_encoder=bert))
reading = [encode.analyse(encoder, params, mesh, "key", 16, 64)]
encoder, params, _ = load_cross_encoder(bert, dtype="auto", cache_dir=None)
reading.append(cross_scorer.analyse(encoder, params, mesh, 16, 64))
# Two products a device; then what joins their hits.
searching = exact.analyse(mesh, 4, 2 * 8 * exact.UNIT, 32, 10, "cos", 4)
_, join = exact._compiled(mesh, "cos", exact.UNIT)
rows = batch_sharding(mesh)
best = [jax.ShapeDtypeStruct((8, 4, 10), t, sharding=rows) for t in (np.float32, np.int32)]
platform = mesh.devices.flat[0].platform
kernel = {"tpu": "forward_kernel", "gpu": "__cudnn$fmhaSoftmax"}[platform]
assert all(kernel in of.compiled.as_text() for of in reading)
needed += [*reading, searching, join.lower(*best).compile().memory_analysis()]
print(len(needed), all(needed), platform)
"""


@pytest.mark.parametrize("topology", COMPILED)
def test_what_only_reads_compiles(tmp_path, topology):
    bert = tiny.save_bert(tmp_path / "bert", width=64)
    models = [str(bert), str(tiny.save_llama(tmp_path / "llama"))]
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *models], env=os.environ | environment(topology),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["7", "True", chip(topology).platform]


# A step of a tiny model in bf16: bytes of its weights, what devices exchange, cuDNN's calls.
STEP = """
import sys
import jax
import tiny
from llme_jax.config import Config, EncoderConfig, LossConfig, TrainConfig
from llme_jax.devices import sharding
from llme_jax.devices.topology import chip, compiles_for, devices, estimate
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training.dual import DualTask
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, init_state

topology = compiles_for()
encoder, params, _ = load_dual_encoder(EncoderConfig(query_encoder=sys.argv[1]))
task, optimizer = DualTask(Config(), encoder, None), make_optimizer(TrainConfig(), 10)
mesh = sharding.make_mesh(devices=devices(topology))
state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
placed = sharding.state_sharding(mesh, state)
step = Step(task, optimizer, mesh=mesh, chunk=None, seed=0, shardings=placed)
batch = tiny.random_batch(16, 4, devices=8, blocks=True)
batch = sharding.abstract(batch, sharding.batch_sharding(mesh))
loss = LossConfig(contrastive_weight=1.0, distill_weight=0.0)
lowered = step.lower(sharding.abstract(state, placed), batch, loss, accumulating=False)
program = lowered.compile().as_text()
weights = sum(4 * x.size for x in jax.tree.leaves(params))
exchanged = estimate(program, chip(topology)).exchanged
print([weights, exchanged, program.count("__cudnn$fmhaSoftmax")])
"""


@pytest.mark.cuda_compile
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gpus_exchange_the_least_there_is(tmp_path, dropout):
    """Every gradient once in fp32; queries are gathered and so are their gradients."""
    model = tiny.save_bert(tmp_path / "bert", width=128, dropout=dropout)
    path = os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(model)], capture_output=True, text=True,
        env=os.environ | environment("h100:8") | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, exchanged, fused = ast.literal_eval(done.stdout.splitlines()[-1])
    queries, few = 4 * 16 * 128, 1000  # bytes; the loss, maxima and sums of the softmax
    least = {"all-reduce": weights, "all-gather": queries, "reduce-scatter": queries // 8}
    assert exchanged.keys() == least.keys()
    for kind, size in least.items():
        assert size <= exchanged[kind] < size + few, kind
    assert bool(fused) == (dropout == 0.0)
