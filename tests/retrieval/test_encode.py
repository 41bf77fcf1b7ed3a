"""Encoding a token store: order, padding and devices change nothing."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from llme_jax.data.tokens import TokenStore
from llme_jax.devices.sharding import batch_sharding, make_mesh, state_sharding, to_mesh
from llme_jax.retrieval import encode as encode_module
from llme_jax.retrieval.encode import encode

VOCABULARY, WIDTH = 50, 16


@dataclass(frozen=True)
class MeanOfTokens:
    """An encoder small enough to be checked by hand: the mean of a text's token vectors."""

    tied: bool = False

    def encode(self, params, ids, lengths, *, field):
        vectors = params[field]["embedding"][ids]
        real = jnp.arange(ids.shape[1]) < lengths[:, None]
        return (vectors * real[..., None]).sum(1) / lengths[:, None]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        field: {"embedding": rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)}
        for field in ("query", "key")
    }


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 100, 53)
    np.save(tmp_path / "values.npy", rng.integers(1, VOCABULARY, lengths.sum()))
    np.save(tmp_path / "offsets.npy", np.r_[0, lengths.cumsum()])
    return TokenStore(tmp_path)


def expected(store, params, field):
    return np.stack([params[field]["embedding"][store[i]].mean(0) for i in range(len(store))])


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
@pytest.mark.parametrize("fsdp", [None, 1, 4])
@pytest.mark.parametrize("field", ["query", "key"])
def test_equals_one_text_at_a_time(store, params, batch_size, fsdp, field):
    mesh = fsdp and make_mesh(fsdp)
    placed = to_mesh(params, state_sharding(mesh, params)) if mesh else params
    got = encode(
        MeanOfTokens(), placed, store, field=field, batch_size=batch_size, pad_id=0, mesh=mesh
    )
    assert (got.dtype, got.shape) == (np.float32, (53, WIDTH))
    # Means of at most 99 fp32 numbers, summed in another order.
    np.testing.assert_allclose(got, expected(store, params, field), rtol=0, atol=2e-6)


def test_batches_are_spread_over_all_devices_and_shapes_are_few(store, params, monkeypatch):
    mesh, seen = make_mesh(2), []

    def spy(params, ids, lengths, **static):
        seen.append(ids)
        return forward(params, ids, lengths, **static)

    forward = encode_module._forward
    monkeypatch.setattr(encode_module, "_forward", spy)
    encode(MeanOfTokens(), params, store, field="key", batch_size=10, pad_id=0, mesh=mesh)
    assert all(ids.sharding.is_equivalent_to(batch_sharding(mesh), 2) for ids in seen)
    assert {ids.shape[0] for ids in seen} == {16}  # 10 texts, rounded up to the 8 devices
    widths = [ids.shape[1] for ids in seen]
    assert widths == sorted(widths, reverse=True)
    assert len(seen) == 4  # 53 texts
