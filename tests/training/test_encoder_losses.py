"""The dual encoder's losses against sentence-transformers', values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as st_losses

from llme_jax.config import LossConfig
from llme_jax.config.training import DIRECTIONS
from llme_jax.models.pooling import normalize
from llme_jax.training import losses

B, N, D = 6, 4, 16
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, D)).astype(np.float32)
KEY = RNG.normal(size=(B, N, D)).astype(np.float32)
TEACHER = RNG.normal(0, 3, (B, N)).astype(np.float32)
HAS = np.array([True, True, False, True, True, False])
ALL = np.full(B, True)
# Every text is another one, and each query has one positive.
KEY_HASH = np.arange(2 * B * N, dtype=np.uint32).reshape(-1, 2)
POSITIVE_HASH = KEY_HASH.reshape(B, N, 2)[:, :1]


def total(
    query,
    key,
    loss,
    metric,
    has=ALL,
    teacher=TEACHER,
    hashes=(KEY_HASH, POSITIVE_HASH),
    vectors=None,
):
    """Of vectors as they come: [B, D] and [B, N, D]."""
    unit = normalize if metric == "cos" else lambda x: x
    batch = query, key.reshape(-1, D), teacher, has, *hashes, vectors
    query, key, *rest = jax.tree.map(jnp.asarray, batch)
    return losses.total(unit(query), unit(key), *rest, loss, metric)


def assert_same(loss: LossConfig, theirs, metric: str = "cos", *, keys=KEY, **batch):
    """
    Args:
        theirs: columns of vectors, the queries' and each key's [B, D], in fp64 -> the loss.
    """
    value, gradients = jax.value_and_grad(
        lambda q, k: total(q, k, loss, metric, **batch)[0], argnums=(0, 1)
    )(jnp.asarray(QUERY), jnp.asarray(keys))
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (QUERY, keys)]
    query, key = (F.normalize(x, dim=-1) if metric == "cos" else x for x in tensors)
    want = theirs([query, *key.unbind(1)])
    want.backward()
    assert float(value) == pytest.approx(want.item(), rel=1e-6)
    for got, tensor in zip(gradients, tensors, strict=True):
        # fp32 sums, of scores that a temperature makes large: relative to the largest entry.
        largest = tensor.grad.abs().max().item()
        np.testing.assert_allclose(got, tensor.grad, rtol=0, atol=1e-6 * max(largest, 1))


def margin_mse(columns, rows=ALL, scale=1.0):
    loss, rows = st_losses.MarginMSELoss(None), torch.tensor(rows)
    labels = torch.tensor(TEACHER, dtype=torch.float64)[rows] * scale
    return loss.compute_loss_from_embeddings([x[rows] for x in columns], labels)


MARGIN_MSE = {"contrastive_weight": 0.0, "distill_loss": "margin_mse"}


@pytest.mark.parametrize("metric", ["cos", "ip"])
@pytest.mark.parametrize("has", [ALL, HAS], ids=["all", "some"])
def test_margin_mse(metric, has):
    loss = LossConfig(**MARGIN_MSE)  # cos_temperature is not 1, and does not count
    assert_same(loss, lambda columns: margin_mse(columns, has), metric, has=has)


def test_margin_mse_knows_both_temperatures():
    loss = LossConfig(**MARGIN_MSE, teacher_temperature=10.0, student_temperature=0.5)

    def theirs(columns):
        return margin_mse([columns[0] / 0.5, *columns[1:]], scale=0.1)

    assert_same(loss, theirs)


def test_margin_mse_leaves_masked_keys_out():
    """They have the lowest score of float32; a row of nothing else has no margin."""
    lowest = np.finfo(np.float32).min
    teacher = TEACHER.copy()
    teacher[0, 2] = teacher[1, 1:] = teacher[2] = lowest
    margins = np.ones((B, N - 1), bool)
    margins[0, 1] = margins[1] = False
    teacher_margins = torch.tensor(TEACHER[:, :1] - TEACHER[:, 1:])
    teacher_margins[2] = 0

    def theirs(columns):
        positive, *negatives = [(columns[0] * key).sum(1) for key in columns[1:]]
        own = positive[:, None] - torch.stack(negatives, 1)
        return F.mse_loss(own[margins], teacher_margins[margins].double())

    assert_same(LossConfig(**MARGIN_MSE), theirs, teacher=teacher)


class Vectors(torch.nn.Module):
    """Stands for a SentenceTransformer that has the vectors of all columns already."""

    tokenizer, max_seq_length = tiny.letter_tokenizer(), 512

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def get_embedding_dimension(self):
        return D

    def forward(self, features):
        return {"sentence_embedding": self.columns[features["column"]]}


def matryoshka(loss, columns, labels=None, weights=None):
    """`MatryoshkaLoss` of a loss of sentence-transformers."""
    loss.model = Vectors(columns)
    whole = st_losses.MatryoshkaLoss(loss.model, loss, [16, 3, 8], weights)
    return whole([{"column": i} for i in range(len(columns))], labels)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("name", ["contrastive", "margin_mse", "kl", "both"])
def test_matryoshka(name, weights):
    """Of any loss, and of a weighted sum of two."""
    labels = torch.tensor(TEACHER, dtype=torch.float64)
    theirs = {
        "contrastive": lambda: st_losses.MultipleNegativesRankingLoss(None, scale=10.0),
        "margin_mse": lambda: st_losses.MarginMSELoss(None),
        "kl": lambda: st_losses.DistillKLDivLoss(
            None, similarity_fct=lambda a, b: 10.0 * (a * b).sum(1), temperature=1.0
        ),
    }

    def both(columns):
        if name != "both":
            return matryoshka(theirs[name](), columns, labels, weights)
        contrastive = matryoshka(theirs["contrastive"](), columns, None, weights)
        return 0.3 * contrastive + 0.7 * matryoshka(theirs["kl"](), columns, labels, weights)

    loss = LossConfig(
        contrastive_weight={"contrastive": 1.0, "both": 0.3}.get(name, 0.0),
        distill_weight=0.0 if name == "contrastive" else 0.7,
        distill_loss="margin_mse" if name == "margin_mse" else "kl",
        cos_temperature=0.1,
        matryoshka_dims=[16, 3, 8],
        matryoshka_weights=weights,
    )
    assert_same(loss, both)


SCALE = 10.0
CONTRASTIVE = {"contrastive_weight": 1.0, "distill_weight": 0.0, "cos_temperature": 1 / SCALE}
SYMMETRIC = ["query_to_doc", "doc_to_query"]


@pytest.mark.parametrize(
    ("wanted", "mode"),
    [
        (["query_to_doc"], "joint"),
        (SYMMETRIC, "joint"),
        (SYMMETRIC, "per_direction"),
        (["query_to_query", "query_to_doc"], "joint"),
        (["query_to_doc", "doc_to_doc"], "joint"),
        ([*DIRECTIONS], "joint"),
    ],
)
@pytest.mark.parametrize("masking", [True, False])
def test_directions(wanted, mode, masking):
    theirs = st_losses.MultipleNegativesRankingLoss(
        None, scale=SCALE, directions=tuple(wanted), partition_mode=mode
    )
    how = {"partition_mode": mode, "mask_false_negatives": masking}  # there are none
    loss = LossConfig(**CONTRASTIVE, contrastive_directions=wanted, **how)
    assert_same(loss, lambda columns: theirs.compute_loss_from_embeddings(columns, None))


def test_directions_leave_known_positives_out():
    """Copies of keys, and a second positive of each query; row by row."""
    rng = np.random.default_rng(1)
    names = rng.integers(0, 14, (B, N))
    known = np.stack([names[:, 0], rng.integers(0, 14, B)], 1)
    hashes = [np.stack([x, x + 100], -1).astype(np.uint32) for x in (names.reshape(-1), known)]
    left_out = []

    def theirs(columns):
        query, key = columns[0], torch.stack(columns[1:], 1)
        rows = []
        for b in range(B):
            logits = []
            for c in range(B):
                related = c != b and (names[c, 0] in known[b], names[b, 0] in known[c])
                if c != b and not any(related):
                    logits.append(query[b] @ query[c])
                if c == b or not related[1]:
                    logits.append(key[b, 0] @ query[c])
                for n in range(N):
                    if (c, n) == (b, 0) or names[c, n] not in known[b]:
                        logits.append(query[b] @ key[c, n])
                    if c != b and names[c, n] not in known[b]:
                        logits.append(key[b, 0] @ key[c, n])
            left_out.append(2 * B + 2 * B * N - 1 - N - len(logits))
            logits = torch.stack(logits) * SCALE
            rows.append(logits.logsumexp(0) - SCALE * query[b] @ key[b, 0])
        return torch.stack(rows).mean()

    loss = LossConfig(**CONTRASTIVE, contrastive_directions=[*DIRECTIONS])
    assert_same(loss, theirs, hashes=hashes)
    assert min(left_out) >= 0 and sum(left_out) > 20


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.7)], ids=["one loss", "two losses"])
@pytest.mark.parametrize("dims", [None, [16, 3, 8]])
def test_vectors_are_spread_out(weights, dims):
    """The weight counts also beside a single loss, whose own does not."""
    loss = LossConfig(
        contrastive_weight=weights[0],
        distill_weight=weights[1],
        distill_loss="margin_mse",
        cos_temperature=1 / SCALE,
        spread_weight=0.4,
        matryoshka_dims=dims,
    )

    def theirs(columns):
        whole = 0.0
        for dim in dims or [D]:
            cut = [F.normalize(x[:, :dim], dim=-1) for x in columns]
            contrastive = st_losses.MultipleNegativesRankingLoss(None, scale=SCALE)
            whole += weights[0] * contrastive.compute_loss_from_embeddings(cut, None)
            whole += weights[1] * margin_mse(cut)
            spread = st_losses.GlobalOrthogonalRegularizationLoss(None)
            whole += 0.4 * sum(spread.compute_loss_from_embeddings(cut).values())
        return whole

    assert_same(loss, theirs)


@pytest.mark.parametrize(("metric", "contrastive"), [("cos", 0.0), ("ip", 0.0), ("cos", 0.3)])
@pytest.mark.parametrize("dims", [None, [12, 3]])
def test_vectors_of_a_teacher(metric, contrastive, dims):
    """With Matryoshka widths the teacher's are cut as the student's; it may have more numbers."""
    loss = LossConfig(
        **CONTRASTIVE | {"contrastive_weight": contrastive},
        teacher_encoder="teacher",
        embedding_weight=50.0,
        matryoshka_dims=dims,
    )
    vectors = RNG.normal(size=(B, 1 + N, 20 if dims else D)).astype(np.float32)

    def theirs(columns):
        whole = 0.0
        for dim in dims or [D]:
            wanted = torch.tensor(vectors, dtype=torch.float64)[..., :dim]
            cut = [x[:, :dim] for x in columns]
            if dims and metric == "cos":
                wanted, *cut = (F.normalize(x, dim=-1) for x in (wanted, *cut))
            mse = st_losses.MSELoss(None)
            whole += 50 * mse.compute_loss_from_embeddings(cut, [*wanted.unbind(1)])
            if contrastive:
                mnrl = st_losses.MultipleNegativesRankingLoss(None, scale=SCALE)
                whole += mnrl.compute_loss_from_embeddings(cut, None)
        return whole

    assert_same(loss, theirs, metric, vectors=vectors)


@pytest.mark.parametrize("wanted", [["query_to_doc"], [*DIRECTIONS]], ids=["one", "all"])
@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness(mode, wanted):
    how = {"hardness_mode": mode, "hardness_strength": 5.0}
    theirs = st_losses.MultipleNegativesRankingLoss(
        None, scale=SCALE, directions=tuple(wanted), **how
    )
    loss = LossConfig(**CONTRASTIVE, **how, contrastive_directions=wanted)
    assert_same(loss, lambda columns: theirs.compute_loss_from_embeddings(columns, None))


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.3])
def test_false_negative_margin(margin):
    """GISTEmbedLoss whose guide is the model itself; it takes one negative a query."""

    def theirs(columns):
        model = Vectors(columns)
        loss = st_losses.GISTEmbedLoss(
            *(model, model, 1 / SCALE), margin=margin, contrast_anchors=False,
            contrast_positives=False,
        )  # fmt: skip
        return loss([{"column": i} for i in range(3)], None)

    loss = LossConfig(**CONTRASTIVE, false_negative_margin=margin)
    few = {"teacher": TEACHER[:, :2], "hashes": (KEY_HASH[: 2 * B], KEY_HASH[: 2 * B : 2, None])}
    assert_same(loss, theirs, keys=KEY[:, :2], **few)
    without = total(QUERY, KEY[:, :2], replace(loss, false_negative_margin=None), "cos", **few)
    assert abs(total(QUERY, KEY[:, :2], loss, "cos", **few)[0] - without[0]) > 0.01
