"""Exact search against a sort of all scores in float64."""

import jax
import numpy as np
import pytest
import torch
from commands import finish, patient, start_together

from llme_jax.devices.sharding import make_mesh
from llme_jax.retrieval import exact as index
from llme_jax.retrieval.exact import search


def sorted_scores(queries, corpus, metric, hits):
    q, c = queries.astype(np.float64), corpus.astype(np.float64)
    scores = -((q[:, None] - c[None]) ** 2).sum(-1) if metric == "l2" else q @ c.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :hits]
    return np.take_along_axis(scores, ids, axis=1), ids


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
@pytest.mark.parametrize(("block", "unit"), [(16, 16), (32, 16), (1000, 48), (1000, 4096)])
@pytest.mark.parametrize("hits", [2, 20])
@pytest.mark.parametrize("fsdp", [None, 1, 4])
def test_equals_a_sort(metric, block, unit, hits, fsdp):
    mesh = fsdp and make_mesh(fsdp)
    rng = np.random.default_rng(0)
    # Small integers: products are exact in any order, so equal scores are truly equal. They
    # are many here, and the lower id has to come first across blocks too.
    queries = rng.integers(-2, 3, (13, 8)).astype(np.float32)
    corpus = rng.integers(-2, 3, (101, 8)).astype(np.float32)
    settings = {"batch_size": 5, "mesh": mesh, "block": block, "unit": unit}
    scores, ids = search(queries, corpus, hits, metric, **settings)
    expected_scores, expected_ids = sorted_scores(queries, corpus, metric, hits)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
@pytest.mark.parametrize("devices", [1, 8])
def test_finds_what_torch_finds(metric, devices):
    queries, corpus = random_vectors(metric)
    mesh = make_mesh(devices=jax.devices()[:devices])
    # Small units, so that all devices have keys.
    scores, ids = search(queries, corpus, 10, metric, batch_size=100, mesh=mesh, unit=256)
    check_with_torch(queries, corpus, metric, scores, ids)


def random_vectors(metric):
    rng = np.random.default_rng(1)
    vectors = [rng.normal(size=(n, 384)).astype(np.float32) for n in (20, 3000)]
    if metric == "cos":
        vectors = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
    return vectors


def check_with_torch(queries, corpus, metric, scores, ids):
    q, c = torch.from_numpy(queries), torch.from_numpy(corpus)
    exact = "donot_use_mm_for_euclid_dist"
    all_scores = -(torch.cdist(q, c, compute_mode=exact) ** 2) if metric == "l2" else q @ c.T
    wanted = all_scores.topk(ids.shape[1])
    np.testing.assert_array_equal(ids, wanted.indices.numpy())
    # fp32 sums of 384 products of magnitude up to 1000, in another order.
    np.testing.assert_allclose(scores, wanted.values.numpy(), rtol=1e-5, atol=1e-3)


SEARCH = """
import sys
import jax
import numpy as np
from llme_jax.config import ProcessConfig
from llme_jax.retrieval.exact import search
from llme_jax.devices.runtime import started
from llme_jax.devices.sharding import make_mesh

with started(ProcessConfig(), None, ""):
    vectors, metric = np.load(sys.argv[1]), sys.argv[2]
    mesh = make_mesh()
    assert mesh.size == 8
    found = search(*vectors.values(), 10, metric, batch_size=8, mesh=mesh, unit=256)
    np.savez(sys.argv[3] + f"/{jax.process_index()}", *found)
"""


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
@patient
def test_two_processes_find_what_torch_finds(metric, tmp_path):
    queries, corpus = random_vectors(metric)
    np.savez(tmp_path / "vectors.npz", queries, corpus)
    words = [str(tmp_path / "vectors.npz"), metric, str(tmp_path)]
    for process in start_together(words, 2, devices=4, code=SEARCH):
        finish(process)
    alone = search(queries, corpus, 10, metric, batch_size=8, unit=256)
    for process in (0, 1):
        found = np.load(tmp_path / f"{process}.npz")
        check_with_torch(queries, corpus, metric, *found.values())
        np.testing.assert_array_equal(found["arr_0"], alone[0])  # bit for bit


def test_fewer_keys_than_hits():
    scores, ids = search(np.eye(2, dtype="f4"), np.eye(2, dtype="f4"), 4, "ip", batch_size=8)
    assert ids.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1]]
    assert scores.tolist() == [[1, 0, -np.inf, -np.inf]] * 2


def test_equal_shapes_compile_once():
    rng = np.random.default_rng(2)
    mesh = make_mesh(8)
    for _ in range(2):
        queries, corpus = (rng.normal(size=(n, 8)).astype(np.float32) for n in (24, 30))
        search(queries, corpus, 3, "ip", batch_size=8, mesh=mesh)
    merge, _ = index._compiled(mesh, "ip", 32)
    assert merge._cache_size() == 1
