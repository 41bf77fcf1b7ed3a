"""Memory of scoring, read from XLA's own analysis."""

import jax
import pytest
import tiny

from llme_jax.devices.sharding import make_mesh
from llme_jax.lm.likelihood import analyse
from llme_jax.models.causal_lm import load_causal_lm, open_causal_lm, sharded_shapes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama")


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 8), (8, 1), (2, 4)])
def test_eight_devices_hold_an_eighth_each(llama, fsdp, tensor):
    lm, folder, _ = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    weights = sum(leaf.size for leaf in jax.tree.leaves(lm.abstract_params())) * 4
    spread = make_mesh(fsdp, tensor)
    memory = analyse(lm, sharded_shapes(lm, spread), spread, rows=1, width=64)
    # Vectors are whole everywhere, matrices are not.
    assert weights / 8 <= memory.arguments < 0.15 * weights
    # Compiled without weights or with them, it is the same program.
    params = load_causal_lm(lm, folder, spread)
    again = analyse(lm, params, spread, rows=1, width=64)
    assert again.arguments == memory.arguments


def test_logits_exist_for_answers_only(llama):
    lm, _, _ = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    mesh = make_mesh(devices=jax.devices()[:1])
    shapes, vocabulary = sharded_shapes(lm, mesh), 10**5
    lm = type(lm)(type(lm.config)(**vars(lm.config) | {"vocab_size": vocabulary}), lm.dtype)
    shapes = sharded_shapes(lm, mesh)
    needed = analyse(lm, shapes, mesh, rows=8, width=512).temporary
    assert needed < 8 * 512 * vocabulary * 4 / 4  # a quarter of all logits
