"""faiss: its flat index against ours, approximate ones, saving, what it refuses."""

import numpy as np
import pytest

from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.retrieval import faiss_index
from llme_jax.retrieval.exact import search
from llme_jax.retrieval.faiss_index import build_index, open_index, save_index, search_index


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    queries, keys = (rng.normal(size=(n, 24)).astype(np.float32) for n in (30, 700))
    return queries, keys


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
@pytest.mark.parametrize("devices", [1, 8])
def test_flat_is_what_we_find(vectors, metric, devices):
    queries, keys = vectors
    if metric == "cos":
        queries, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
    index = build_index(keys, "Flat", metric, seed=0)
    scores, ids = search_index(index, queries, 40, batch_size=7)
    mesh = make_mesh() if devices == 8 else None
    ours = search(queries, keys, 40, metric, batch_size=16, mesh=mesh, block=64)
    np.testing.assert_array_equal(ids, ours[1])
    np.testing.assert_allclose(scores, ours[0], rtol=1e-5, atol=1e-4)  # fp32, another order


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,Flat", "PCA16,IVF4,SQ8"])
def test_approximate_indexes_find_most_and_can_be_saved(vectors, factory, tmp_path):
    _, keys = vectors
    index = build_index(keys, factory, "ip", seed=0)
    near = keys[:20] * 2  # the key itself is the best by far
    _, ids = search_index(index, near, 5, batch_size=100)
    assert np.mean(ids[:, 0] == np.arange(20)) > 0.5
    path = faiss_index.index_path(tmp_path / "new", "name", factory)
    save_index(index, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = search_index(open_index(path), near, 5, batch_size=100)
    np.testing.assert_array_equal(again[1], ids)


def test_more_hits_than_keys(vectors):
    queries, keys = vectors
    index = build_index(keys[:3], "Flat", "l2", seed=0)
    scores, ids = search_index(index, queries, 5, batch_size=100)
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert (scores[:, :3] <= 0).all() and (np.diff(scores[:, :3]) <= 0).all()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Nonsense", r"--faiss_index_factory Nonsense: faiss says '.+'; give Flat or a string"),
        ("IVF1024,Flat", r"--faiss_index_factory IVF1024,Flat: faiss says '.*training points"),
    ],
)
def test_what_faiss_refuses_is_said(vectors, factory, message):
    with pytest.raises(InputError, match=message) as error:
        build_index(vectors[1], factory, "ip", seed=0)
    assert "\n" not in str(error.value)
