"""Rows, batches, and how to compare them."""

import random
import re
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


def in_order(texts, field: str, devices: int = 1) -> tuple[list[list[int]], list[int]]:
    """Ids of a field's texts, in their order, and the texts' numbers in the batch."""

    def of_devices(blocks):
        return np.concatenate([x.reshape(devices, -1) for x in blocks], axis=1)

    found, numbers = [], []
    parts = texts.ids, of_devices(texts.lengths), of_devices(texts.numbers), texts.place[field]
    for ids, lengths, of_rows, place in zip(*(x.reshape(devices, -1) for x in parts), strict=True):
        rows = np.split(ids, np.cumsum(lengths))[:-1]
        found += [rows[i].tolist() for i in place]
        numbers += of_rows[place].tolist()
    return found, numbers


def assert_same(one, other, devices: int = 1, others: int | None = None):
    """Two batches with the same texts and targets, on so many devices."""
    assert one.texts.keys() == other.texts.keys()
    for name, texts in one.texts.items():
        assert texts.place.keys() == other.texts[name].place.keys()
        for field in texts.place:
            found = in_order(other.texts[name], field, others or devices)
            assert in_order(texts, field, devices) == found
    for x, y in zip(one[1:], other[1:], strict=True):
        np.testing.assert_array_equal(x, y)


def joined(parts):
    """The batch whose consecutive devices' parts these are."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def hash_of(text: str) -> list[int]:
    """What a batch calls a key: its hash in two halves."""
    value = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    return [value & 0xFFFFFFFF, value >> 32]


def texts_of(batch, field: str, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in in_order(batch.texts["texts"], field)[0]]


def torch_loss(model, batch, recipe, pooling: str = "cls"):
    """The losses as a plain torch loop has them: of cosines, without masks."""
    import torch  # here only: some tests run where there is none
    import torch.nn.functional as F

    def embed(field):
        texts, _ = in_order(batch.texts["texts"], field)
        lengths = np.array([len(ids) for ids in texts])
        ids = np.array([ids + [0] * (lengths.max() - len(ids)) for ids in texts])
        mask = torch.tensor(np.arange(ids.shape[1]) < lengths[:, None]).long()
        hidden = model(torch.tensor(ids).long(), attention_mask=mask).last_hidden_state
        at = np.zeros_like(lengths) if pooling == "cls" else lengths - 1
        return F.normalize(hidden[torch.arange(len(at)), torch.tensor(at)], dim=-1)

    query, key = embed("query"), embed("key")
    scores = query @ key.T / recipe.cos_temperature
    count, group = batch.teacher_scores.shape
    target = torch.arange(count) * group
    contrastive = F.cross_entropy(scores, target)
    if recipe.distill_weight == 0:
        return contrastive
    own = scores.gather(1, target[:, None] + torch.arange(group))
    teacher = F.softmax(torch.tensor(batch.teacher_scores), -1)
    rows = torch.tensor(batch.has_scores)
    kl = F.kl_div(F.log_softmax(own, -1)[rows], teacher[rows], reduction="batchmean")
    return recipe.contrastive_weight * contrastive + recipe.distill_weight * kl


def near(one: bytes | None, other: bytes) -> bool:
    """Are two files the same but for the last digits of numbers?"""
    number = re.compile(rb"-?\d+\.\d+(?:e-?\d+)?")
    if one is None or number.sub(b"", one) != number.sub(b"", other):
        return False
    return np.allclose(*(np.array(number.findall(x), float) for x in (one, other)), atol=1e-4)
