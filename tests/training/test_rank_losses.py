"""The losses of a reranker against torch and sentence-transformers, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.cross_encoder import losses as st_losses

from llme_jax.config import RankLossConfig
from llme_jax.training import rank_losses

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0, 2, (6, 5)).astype(np.float32)
TEACHER = RNG.normal(0, 3, (6, 5)).astype(np.float32)
HAS = np.array([True, True, False, True, True, False])


def total(scores, loss: RankLossConfig, has=HAS):
    return rank_losses.total(*map(jnp.asarray, (scores, TEACHER, has)), loss)


def assert_same(loss: RankLossConfig, theirs):
    scores = torch.tensor(SCORES, requires_grad=True)
    want = theirs(scores)
    want.backward()
    value, gradient = jax.value_and_grad(lambda s: total(s, loss)[0])(jnp.asarray(SCORES))
    assert float(value) == pytest.approx(want.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, scores.grad, atol=1e-6)


def cross_entropy(scores):
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


def kl(scores, teacher=2.0, student=0.5):
    target = torch.tensor(TEACHER[HAS] / teacher).softmax(-1)
    return F.kl_div((scores[HAS] / student).log_softmax(-1), target, reduction="batchmean")


def margin_mse(scores, teacher=2.0, student=0.5):
    own, wanted = scores[HAS] / student, torch.tensor(TEACHER[HAS] / teacher)
    return F.mse_loss(own[:, :1] - own[:, 1:], wanted[:, :1] - wanted[:, 1:])


def stable(scores, teacher=2.0, student=0.5):
    """Term i contrasts key i with itself and the keys behind it."""
    weights = torch.tensor(TEACHER / teacher).softmax(-1)
    rows = []
    for row in np.flatnonzero(HAS):
        s = scores[row] / student
        terms = [weights[row, i] * (s[i:].logsumexp(0) - s[i]) for i in range(len(s))]
        rows.append(sum(terms))
    return torch.stack(rows).mean()


TEMPERATURES = {"teacher_temperature": 2.0, "student_temperature": 0.5}


@pytest.mark.parametrize("name", ["ce", "kl", "both", "stable", "margin_mse"])
def test_values_and_gradients(name):
    weights = {"ce": (1.0, 0.0), "both": (0.2, 0.7)}.get(name, (0.0, 1.0))
    loss = RankLossConfig(
        contrastive_weight=weights[0],
        distill_weight=weights[1],
        stable_distill=name == "stable",
        distill_loss="margin_mse" if name == "margin_mse" else "kl",
        **TEMPERATURES,
    )
    theirs = {
        "ce": cross_entropy,
        "kl": kl,
        "both": lambda s: 0.2 * cross_entropy(s) + 0.7 * kl(s),
        "stable": stable,
        "margin_mse": margin_mse,
    }
    assert_same(loss, theirs[name])


class Scores(torch.nn.Module):
    """Stands for a CrossEncoder that has the scores already."""

    num_labels, device = 1, "cpu"

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs, **_):
        return {"numbers": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, tokens):
        return {"scores": self.scores.reshape(-1)[tokens["numbers"]]}


@pytest.mark.parametrize(
    ("name", "kind"), [("ranknet", "RankNetLoss"), ("lambdaloss", "LambdaLoss")]
)
def test_pairwise_losses_are_those_of_sentence_transformers(name, kind):
    """Of the rows with scores, whose grades are the teacher's softmax."""
    grades = torch.tensor(TEACHER[HAS]).softmax(-1)

    def theirs(scores):
        loss = getattr(st_losses, kind)(Scores(scores[torch.tensor(HAS)]))
        documents = np.arange(grades.numel()).reshape(grades.shape).astype(str).tolist()
        return loss([["q"] * len(grades), documents], [*grades])

    assert_same(RankLossConfig(contrastive_weight=0, distill_loss=name), theirs)


def test_pairs_far_below_the_best_key_are_compared():
    """Their softmax is 0 in fp32: 30 apart at a temperature of 0.1."""
    far = np.array([[0.0, -30, -31, -40, -40]], np.float32)
    scores = np.array([[2.0, 0.5, 1, -1, 0]], np.float32)
    loss = RankLossConfig(contrastive_weight=0, distill_loss="ranknet", teacher_temperature=0.1)
    value, _ = rank_losses.total(*map(jnp.asarray, (scores, far, np.array([True]))), loss)
    pairs = [(i, j) for i in range(5) for j in range(5) if far[0, i] > far[0, j]]
    assert len(pairs) == 9  # of 10: the last two are equal
    want = np.mean([np.log2(1 + np.exp(scores[0, j] - scores[0, i])) for i, j in pairs])
    assert float(value) == pytest.approx(want, rel=1e-6)


def test_no_row_with_scores_teaches_nothing():
    loss = RankLossConfig(contrastive_weight=0.2)
    value, parts = total(SCORES, loss, np.zeros(6, bool))
    assert float(parts["distill"]) == 0
    assert float(value) == pytest.approx(0.2 * cross_entropy(torch.tensor(SCORES)).item(), rel=1e-6)
