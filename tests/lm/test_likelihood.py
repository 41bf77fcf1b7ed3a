"""Memory and traffic of scoring, read from what XLA compiles."""

import re
from collections import Counter

import jax
import pytest
import tiny

from llme_jax.devices.sharding import make_mesh
from llme_jax.lm.batch_rows import batch_shapes
from llme_jax.lm.likelihood import analyse, answer_log_likelihood
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


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= \(?\w+\[([\d,]*)\]\S* ({KINDS})\(")


def test_heads_stay_on_their_devices(llama):
    lm, _, _ = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])  # a device for each of the two keys' heads
    batch = batch_shapes(mesh, 3, (64,), (), ())
    how = {"lm": lm, "slots": 8, "group": 8}
    lowered = answer_log_likelihood.lower(sharded_shapes(lm, mesh), *batch, **how)
    found = Counter(
        (match[2], tuple(map(int, match[1].split(","))))
        for match in map(COLLECTIVE.search, lowered.compile().as_text().splitlines())
        if match
    )
    layers, width = lm.config.num_hidden_layers, lm.config.hidden_size
    # The lower bound of Megatron-LM's split: a sum behind attention and one behind the MLP of each
    # layer, one for the words; then a number for each of 3 answers' 8 tokens.
    assert found == {("all-reduce", (3, 64, width)): 2 * layers + 1, ("all-reduce", (3, 8)): 1}
