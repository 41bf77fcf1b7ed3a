"""What the compiler of TPUs says, read from its programs; every program compiles for them."""

import re
import subprocess
import sys

import pytest
import tiny
from small_run import write_data

from llme_jax import rank, train
from llme_jax.config.training import TOPOLOGIES
from llme_jax.devices.topology import CHIPS, chip, estimate
from llme_jax.errors import InputError

# Lines of an optimised program, shortened: a product, one of attention, a copy, a sum of gradients
# that is started and awaited, a gather of two arrays.
PROGRAM = """
  %f.1 = bf16[8,4]{1,0} fusion(%a), metadata={op_name="jit(f)/dot_general"}, b={"estimated_cycles":"3000000"}
  %f.2 = f32[8,4]{1,0} fusion(%a), metadata={op_name="jit(f)/attention/dot_general"}, b={"estimated_cycles":"1500000"}
  %copy.3 = bf16[8,4]{0,1} copy(%f.1), metadata={op_name="jit(f)/transpose"}, b={"estimated_cycles":"750000"}
  %r.4 = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%a), channel_id=1, metadata={op_name="jit(f)/psum"}
  %scatter.5 = f32[8] fusion(%a), metadata={op_name="jit(f)/scatter"}, b={"estimated_cycles":"9223372036854775807"}
  %r.5 = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%a), channel_id=1, metadata={op_name="jit(f)/psum"}
  %g.6 = (f32[256]{0}, bf16[8,16]{1,0}) all-gather(%a, %b), channel_id=2, metadata={op_name="jit(f)/gather"}
"""  # noqa: E501


def test_a_program_is_read():
    found = estimate(PROGRAM, CHIPS["v5e"])
    assert found.seconds == {"products": 2e-3, "attention": 1e-3, "copies": 0.5e-3}
    assert found.exchanged == {"all-reduce": 4096, "all-gather": 4 * 256 + 2 * 128}
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
    model = str(tiny.save_bert(tmp_path / "wide", width=128))
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
