"""Rows, batches, and how to compare them."""

import random
from hashlib import blake2b

import jax
import numpy as np

from llme_jax.data.plan import PlannedBatch


def make_rows(count: int, seed: int = 0, *, task="qa", scores=True, tag="") -> list[dict]:
    """Rows of unlike lengths; some share a positive, every third has no scores."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        positive = rng.choice(["shared", f"p{tag}{i} {'k ' * i}"])
        pos = [positive, f"p{i}"][: rng.randint(1, 2)]
        neg = [f"n{tag}{i}{j} {'y ' * rng.randint(0, 30)}" for j in range(rng.randint(1, 6))]
        row = {"query": f"q{tag}{i} {'z ' * (i % 9)}", "pos": pos, "neg": neg, "task": task}
        if scores and i % 3:
            row["teacher_scores"] = [rng.uniform(-2, 2) for _ in pos + neg]
        rows.append(row)
    return rows


def plan_rows(rows, dataset=None, epoch=0) -> PlannedBatch:
    return PlannedBatch(dataset, epoch, np.array(rows, np.int64))


def in_order(texts) -> tuple[np.ndarray, np.ndarray]:
    """Ids, padded to the widest block, and lengths, in the order of the texts."""
    width = max(block.shape[1] for block in texts.ids)
    ids = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in texts.ids])
    return ids[texts.place], np.concatenate(texts.lengths)[texts.place]


def assert_same(one, other):
    """Two batches with the same texts and targets, however their blocks are cut."""
    assert one.texts.keys() == other.texts.keys()
    for name, texts in one.texts.items():
        for x, y in zip(in_order(texts), in_order(other.texts[name]), strict=True):
            width = max(x.shape[-1], y.shape[-1]) if x.ndim == 2 else 0
            pads = [(0, 0), (0, width - x.shape[-1])], [(0, 0), (0, width - y.shape[-1])]
            x, y = (np.pad(v, p) if width else v for v, p in zip((x, y), pads, strict=True))
            np.testing.assert_array_equal(x, y)
    for x, y in zip(one[1:], other[1:], strict=True):
        np.testing.assert_array_equal(x, y)


def joined(parts):
    """The batch whose consecutive devices' parts these are."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def hash_of(text: str) -> list[int]:
    """What a batch calls a key: its hash in two halves."""
    value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    return [value & 0xFFFFFFFF, value >> 32]


def texts_of(ids, lengths, tokenizer) -> list[str]:
    return [tokenizer.decode(row[:n]) for row, n in zip(ids, lengths, strict=True)]
