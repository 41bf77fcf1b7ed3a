"""Memory and traffic of scoring, read from what XLA compiles."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
import tiny

from llme_jax.devices.sharding import batch_sharding, make_mesh, to_mesh
from llme_jax.inference.over_store import batch_shapes
from llme_jax.lm.likelihood import analyse, answer_log_likelihood
from llme_jax.models.causal_lm import load_causal_lm, open_causal_lm, sharded_shapes
from llme_jax.models.llama import LlamaConfig


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
COLLECTIVE = re.compile(rf"= \(?\w+\[([\d,]*)\].*? ({KINDS})\(")


def exchanged(llama, mesh, width: int = 64) -> tuple[Counter, LlamaConfig]:
    """How often each kind of collective stands in the program, with the shape that comes out."""
    lm, _, _ = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    batch = batch_shapes(mesh, 3, (width,), (), ())
    how = {"lm": lm.on(mesh), "slots": 8, "group": 8}
    lowered = answer_log_likelihood.lower(sharded_shapes(lm, mesh), *batch, **how)
    return Counter(
        (match[2], tuple(map(int, match[1].split(","))))
        for match in map(COLLECTIVE.search, lowered.compile().as_text().splitlines())
        if match
    ), lm.config


def test_heads_stay_on_their_devices(llama):
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])  # a device for each of the two keys' heads
    found, config = exchanged(llama, mesh)
    layers, width = config.num_hidden_layers, config.hidden_size
    # The lower bound of Megatron-LM's split: a sum behind attention and one behind the MLP of each
    # layer, one for the words; then few numbers for each of 3 answers' 8 tokens.
    assert found == {("all-reduce", (3, 64, width)): 2 * layers + 1, ("all-reduce", (3, 8)): 2}


def test_with_fsdp_weights_travel_and_texts_do_not(llama):
    found, config = exchanged(llama, make_mesh(8))
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    layers, inner = config.num_hidden_layers, config.intermediate_size
    # Every kernel once, a layer at a time, and that of the vocabulary. A device has its part of
    # each word's vector, which goes to the device that has the text: a 4L-th of what it would be
    # to move texts in every product of L layers.
    assert found == {
        ("all-gather", (width, width)): 2 * layers,
        ("all-gather", (width, keys)): 2 * layers,
        ("all-gather", (width, inner)): 2 * layers,
        ("all-gather", (inner, width)): layers,
        ("all-gather", (width, config.vocab_size)): 1,
        ("all-gather", (24, 64, 1)): 1,
        ("all-to-all", (1, 3, 64, width // 8)): 1,
    }


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (2, 4)])
def test_spread_weights_give_the_same_likelihoods(llama, fsdp, tensor):
    lm, folder, _ = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 250, (8, 64)).astype(np.int32)
    lengths, answers = rng.integers(20, 65, 8), rng.integers(1, 8, 8)

    def likelihoods(mesh):
        params, rows = load_causal_lm(lm, folder, mesh), batch_sharding(mesh)
        batch = to_mesh((ids, lengths.astype(np.int32), answers.astype(np.int32)), (rows,) * 3)
        return answer_log_likelihood(params, *batch, lm=lm.on(mesh), slots=8, group=8)

    want = likelihoods(make_mesh(devices=jax.devices()[:1]))
    # fp32 sums in another order
    np.testing.assert_allclose(likelihoods(make_mesh(fsdp, tensor)), want, atol=1e-5)
