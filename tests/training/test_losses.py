"""The losses against the reference's numbers and against torch formulas written here.

`goldens/losses.*` were made by running LLM-Embedder's PyTorch code (FlagOpen/FlagEmbedding 7ed43d6)
on one process with the global batch, in fp32.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llme_jax.config import LossConfig
from llme_jax.training import losses

GOLDENS = Path(__file__).parent / "goldens"
CONFIGS = json.loads((GOLDENS / "losses.json").read_text())
VALUES = np.load(GOLDENS / "losses.npz")
# fp32 sums in another order: the largest difference seen is 4e-7 of the largest entry.
RELATIVE = 2e-6


def different_keys(num_queries, num_keys):
    key_hash = np.arange(2 * num_keys, dtype=np.uint32).reshape(-1, 2)
    return key_hash, key_hash.reshape(num_queries, -1, 2)[:, :1]


def value_and_grads(query, key, teacher, has_scores, key_hash, positive_hash, loss, metric):
    query, key, *rest = map(jnp.asarray, (query, key, teacher, has_scores, key_hash, positive_hash))

    def value(query, key):
        return losses.total(query, key, *rest, None, loss, metric)[0]

    return jax.value_and_grad(value, (0, 1))(query, key)


def assert_close(got, want, relative=RELATIVE):
    got, want = np.asarray(got), np.asarray(want).reshape(np.shape(got))
    assert np.abs(got - want).max() <= relative * np.abs(want).max()


def reference_config(config):
    names = [
        "contrastive_weight",
        "distill_weight",
        "cos_temperature",
        "teacher_temperature",
        "student_temperature",
        "stable_distill",
    ]
    loss = LossConfig(**{name: config[name] for name in names if name in config})
    if config.get("stable_distill"):
        # The reference ignores both temperatures here; ours are 1 for the same numbers.
        loss = replace(loss, teacher_temperature=1.0, student_temperature=1.0)
    return loss if config["teacher"] else replace(loss, distill_weight=0.0)


@pytest.mark.parametrize("config", CONFIGS, ids=[c["key"] for c in CONFIGS])
def test_reference_numbers(config):
    kind = "cos" if config["dense_metric"] == "cos" else "raw"
    query = VALUES[f"inputs/q_{kind}"].reshape(-1, 16)
    key = VALUES[f"inputs/k_{kind}"].reshape(-1, 16)
    teacher = VALUES[f"inputs/{config['teacher'] or 't'}"].reshape(len(query), -1)
    has_scores = np.full(len(query), config["teacher"] is not None)
    hashes = different_keys(len(query), len(key))
    loss = reference_config(config)
    value, (query_grad, key_grad) = value_and_grads(
        query, key, teacher, has_scores, *hashes, loss, config["dense_metric"]
    )
    assert_close(value, VALUES[f"{config['key']}/loss"])
    assert_close(query_grad, VALUES[f"{config['key']}/gq"])
    assert_close(key_grad, VALUES[f"{config['key']}/gk"])


def torch_loss(query, key, teacher, has_scores, names, positives, loss):
    """The definitions, row by row and in plain loops; `names` are the keys' identities."""
    scores = query @ key.T / loss.cos_temperature
    group = teacher.shape[1]
    contrastive, distill = [], []
    for b in range(len(query)):
        own = list(range(b * group, b * group + group))
        kept = [m for m in range(len(key)) if m == own[0] or names[m] not in positives[b]]
        row = scores[b, kept]
        contrastive.append(F.cross_entropy(row[None], torch.tensor([kept.index(own[0])])))
        if not has_scores[b]:
            continue
        soft = F.softmax(teacher[b] / loss.teacher_temperature, -1)
        student = scores[b] / loss.student_temperature
        if not loss.stable_distill:
            log_student = F.log_softmax(student[own], -1)
            distill.append(F.kl_div(log_student, soft, reduction="sum"))
            continue
        terms = 0.0
        for i, target in enumerate(own):
            kept = [
                m
                for m in range(len(key))
                if m == target or (m not in own[:i] and names[m] != names[target])
            ]
            ce = F.cross_entropy(student[kept][None], torch.tensor([kept.index(target)]))
            terms = terms + soft[i] * ce
        distill.append(terms)
    contrastive = torch.stack(contrastive).mean()
    distill = torch.stack(distill).mean()
    return loss.contrastive_weight * contrastive + loss.distill_weight * distill


@pytest.mark.parametrize("stable", [False, True], ids=["kl", "stable"])
def test_false_negatives_and_rows_without_scores(stable):
    generator = np.random.default_rng(0)
    num_queries, group, width = 6, 4, 8
    loss = LossConfig(
        contrastive_weight=0.3,
        distill_weight=0.9,
        cos_temperature=0.1,
        teacher_temperature=0.5,
        student_temperature=2.0,
        stable_distill=stable,
    )
    query = generator.normal(size=(num_queries, width)).astype(np.float32)
    key = generator.normal(size=(num_queries * group, width)).astype(np.float32)
    teacher = generator.normal(size=(num_queries, group)).astype(np.float32)
    has_scores = np.array([1, 0, 1, 1, 0, 1], bool)
    # Few names, so that keys are copies of others, of positives too.
    names = generator.integers(0, 12, num_queries * group)
    # A second positive of query 1 that is another query's key, and padding for the rest.
    extra = np.array([names[0], names[10], names[8], names[12], names[16], names[20]])
    positives = [{names[b * group], extra[b]} for b in range(num_queries)]
    key_hash = np.stack([names, names + 100], 1).astype(np.uint32)
    positive_hash = np.stack([key_hash[::group], np.stack([extra, extra + 100], 1)], 1)

    want_query = torch.tensor(query, dtype=torch.float64, requires_grad=True)
    want_key = torch.tensor(key, dtype=torch.float64, requires_grad=True)
    want = torch_loss(
        want_query, want_key, torch.tensor(teacher).double(), has_scores, names, positives, loss
    )
    want.backward()
    value, (query_grad, key_grad) = value_and_grads(
        query,
        key,
        np.where(has_scores[:, None], teacher, 0),
        has_scores,
        key_hash,
        positive_hash.astype(np.uint32),
        loss,
        "cos",
    )
    assert_close(value, want.detach())
    assert_close(query_grad, want_query.grad)
    assert_close(key_grad, want_key.grad)


def test_masking_can_be_switched_off():
    query = np.eye(2, 4, dtype=np.float32)
    key = np.eye(4, dtype=np.float32)
    copies = np.zeros((4, 2), np.uint32)  # all keys are the same text
    teacher, no_scores = np.zeros((2, 2), np.float32), np.zeros(2, bool)
    arguments = (query, key, teacher, no_scores, copies, copies.reshape(2, 2, 2)[:, :1])

    def value(loss):
        return value_and_grads(*arguments, loss, "cos")[0]

    loss = LossConfig(contrastive_weight=1.0, distill_weight=0.0, cos_temperature=1.0)
    assert value(loss) == 0  # nothing is left to contrast with
    assert value(replace(loss, mask_false_negatives=False)) > 0.5


def test_a_batch_without_any_scores_has_no_distillation_loss():
    query, key = np.ones((2, 4), np.float32), np.ones((4, 4), np.float32)
    hashes = different_keys(2, 4)
    loss = LossConfig(contrastive_weight=0.0, distill_weight=1.0)
    teacher, no_scores = np.zeros((2, 2), np.float32), np.zeros(2, bool)
    value, grads = value_and_grads(query, key, teacher, no_scores, *hashes, loss, "ip")
    assert value == 0 and all(np.all(np.asarray(g) == 0) for g in grads)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_masked_keys_have_the_lowest_score_of_float32(stable, temperature):
    """As torch computes it: they weigh nothing. A row of nothing else has equal weights."""
    lowest = torch.finfo(torch.float32).min
    teacher = np.array([[0.9, 0.1, lowest], [0.5, lowest, lowest], [lowest] * 3], np.float32)
    query, key = (np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32) for n in (3, 9))
    loss = LossConfig(
        contrastive_weight=0.0,
        cos_temperature=1.0,
        stable_distill=stable,
        teacher_temperature=temperature,
    )
    hashes = different_keys(3, 9)
    has_scores = np.full(3, True)
    value, grads = value_and_grads(query, key, teacher, has_scores, *hashes, loss, "ip")
    tensors = [torch.tensor(x, requires_grad=True) for x in (query, key)]
    usual = np.where(teacher == lowest, -1e4, teacher)
    names, positives = range(9), [[0], [3], [6]]
    arguments = *tensors, torch.tensor(usual), has_scores, names, positives
    want = torch_loss(*arguments, replace(loss, distill_weight=1.0))
    want.backward()
    assert_close(value, want.detach())
    for got, tensor in zip(grads, tensors, strict=True):
        assert_close(got, tensor.grad)
