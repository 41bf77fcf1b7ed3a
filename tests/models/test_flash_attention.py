"""The kernel for TPUs, interpreted, against the plain path."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llme_jax.errors import InputError
from llme_jax.hugging_face.weights import load_params
from llme_jax.models import platform
from llme_jax.models.attention import attention
from llme_jax.models.bert import abstract_params, hidden_states
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.models.flash_attention import BLOCK, flash_attention, reach
from llme_jax.models.packing import pack, padded
from llme_jax.models.platform import attention_kernel

# Texts that end in a block, fill one, cross one, cross two; one of a token.
LENGTHS = np.array([300, 256, 150, 128, 40, 5, 1], np.int32)
SIZE, LONGEST = 1000, 304  # 880 tokens; no multiple of a block


def packed():
    lengths = jnp.asarray(LENGTHS)
    return pack([lengths], [LONGEST], SIZE, [jnp.arange(len(LENGTHS)) + 3])


@pytest.mark.parametrize("lengths", [LENGTHS, [1] * 9, [500], [7, 130, 250, 3, 129]])
def test_blocks_meet_those_that_their_texts_reach_into(lengths):
    size = 640 if sum(lengths) <= 640 else 1280
    lengths = jnp.asarray(lengths, jnp.int32)
    packing = pack([lengths], [512], size, [lengths])
    begin, end = map(np.asarray, packing.spans)
    found = reach(*packing.spans, 512)
    pairs = np.asarray(found.pairs)[:, : int(found.count)]
    blocks = len(begin) // BLOCK
    want = [
        (i, j)
        for i in range(blocks)
        for j in range(blocks)
        if any(
            begin[at] < (j + 1) * BLOCK and end[at] > j * BLOCK
            for at in range(i * BLOCK, (i + 1) * BLOCK)
        )
    ]
    assert list(map(tuple, pairs[:2].T)) == want
    first = {j: min(i for i, other in want if other == j) for j in range(blocks)}
    assert all(fresh == (i == first[j]) for i, j, _, fresh in pairs.T)
    # The blocks are done in order, each at the last of its pairs.
    last = {j: at for at, (_, j) in enumerate(want)}
    assert [j for j, _ in sorted(last.items(), key=lambda item: item[1])] == list(range(blocks))
    for at, (_, j, done, _) in enumerate(pairs.T):
        assert all(other >= done for other in last if last[other] >= at)
        assert at != last[j] or done == j
    assert max(np.bincount(pairs[0])) <= found.most


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_values_and_gradients(rate):
    heads, width = 2, 16
    rng = np.random.default_rng(0)
    *qkv, g = (jnp.asarray(rng.standard_normal((SIZE, heads * width)), jnp.float32)
               for _ in range(4))  # fmt: skip
    packing, key = packed(), jax.random.key(5)
    inside = (jnp.arange(SIZE) < LENGTHS.sum())[:, None]

    def ours(q, k, v):
        seen = reach(*packing.spans, LONGEST)
        out = flash_attention(
            q, k, v, seen, heads, key=key, numbers=packing.tokens.texts, rate=rate
        )
        return jnp.where(inside, out, 0)

    def plain(*qkv):
        blocks = (packing.in_blocks(x)[0].reshape(-1, LONGEST, heads, width) for x in qkv)
        how = {"key": key, "numbers": packing.numbers[0], "rate": rate}
        out = attention(*blocks, packing.lengths[0], **how)
        return jnp.where(inside, packing.from_blocks([out.reshape(*out.shape[:2], -1)]), 0)

    (out, back), (want, want_back) = (jax.vjp(jax.jit(f), *qkv) for f in (ours, plain))
    np.testing.assert_allclose(out, want, atol=2e-6)  # fp32 rounding of sums over 300 keys
    for x, y in zip(back(g), want_back(g), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["padded", "packed"])
def test_an_encoder_gives_the_same(tmp_path, together, first, dropped):
    folder = tiny.save_bert(tmp_path / "m", width=64, positions=LONGEST, dropout=0.1)
    config = read_config(folder, ENCODERS)
    params = load_params(folder, abstract_params(config))
    key = jax.random.key(0) if dropped else None
    packing = packed() if together else padded(jnp.asarray(LENGTHS), LONGEST)
    size = len(packing.texts)
    ids = jnp.asarray(np.random.default_rng(1).integers(5, 20, size), jnp.int32)
    begin, end = packing.spans
    rows = jnp.ones(len(LENGTHS), bool) if first else end - begin > 1

    how = "float32", dropped  # with dropout the layers are computed again in the backward pass

    @partial(jax.jit, static_argnames="kernel")
    @partial(jax.value_and_grad, has_aux=True)
    def run(params, kernel):
        hidden = hidden_states(config, *how, kernel, params, ids, packing, key, first)
        hidden = jnp.where(rows[:, None], hidden, 0)
        return jnp.sin(hidden).sum(), hidden

    ((_, ours), gradient), ((_, theirs), other) = run(params, "flash"), run(params, "plain")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # the same sums, in other products
    # Rounding of sums over all tokens; a key's bias has no gradient besides.
    largest = max(np.abs(b).max() for b in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * largest)


def test_the_kernel_is_chosen_by_platform(monkeypatch):
    bf16, fp32 = map(jnp.dtype, ("bfloat16", "float32"))
    base = {"heads": 12, "longest": 512}
    for here, dtype, drops, want in (
        ("cpu", fp32, False, "plain"),
        ("tpu", bf16, True, "flash"),
        ("gpu", bf16, False, "cudnn"),
        ("gpu", bf16, True, "plain"),
        ("gpu", fp32, False, "plain"),
    ):
        monkeypatch.setattr(platform, "platform", lambda here=here: here)
        assert attention_kernel("auto", dtype, drops=drops, **base) == want
        assert attention_kernel("plain", dtype, drops=drops, **base) == "plain"
    monkeypatch.setattr(platform, "platform", lambda: "tpu")
    for changed in ({"biased": True}, {"width": 8}, {"longest": 4096}):
        assert attention_kernel("auto", bf16, **base | changed) == "plain"


def test_one_that_is_named_and_cannot_is_refused(monkeypatch):
    for here, kernel, changed, why in (
        ("gpu", "flash", {}, "it needs a TPU"),
        ("tpu", "flash", {"width": 8}, "its heads are multiples of 16 wide, these 8"),
        ("tpu", "flash", {"longest": 4096}, "texts of 4096 tokens are too long for it"),
        ("tpu", "flash", {"biased": True}, "it does not score by position"),
        ("gpu", "cudnn", {"softcapped": True}, "it does not cap scores"),
        ("cpu", "cudnn", {}, "it needs a GPU"),
        ("gpu", "cudnn", {"drops": True}, "it does not drop attention weights"),
    ):
        monkeypatch.setattr(platform, "platform", lambda here=here: here)
        with pytest.raises(InputError, match=f"--attention {kernel}: {why}.*; give auto"):
            attention_kernel(
                kernel, jnp.dtype("bfloat16"), **{"heads": 12, "longest": 64} | changed
            )
