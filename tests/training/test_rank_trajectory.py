"""Thirty steps of a reranker and of a plain torch loop; devices and chunks change nothing."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForSequenceClassification

from llme_jax.config import RankConfig, TrainConfig
from llme_jax.data.rows import BadRows
from llme_jax.data.train_data import prepare
from llme_jax.devices import sharding
from llme_jax.sources.resolve import Files
from llme_jax.training.chunks import Chunk
from llme_jax.training.cross import open_cross
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, init_state

STEPS, BATCH, GROUP, LIMIT = 30, 8, 4, 24
SETTINGS = TrainConfig(learning_rate=1e-3, warmup_ratio=0.1)
# No loss depends on them: AdamW scales up what rounding leaves of a gradient of 0.
ARBITRARY = ("self.key.bias", "classifier.bias")
LOSSES = {
    "cross-entropy": {"contrastive_weight": 1.0, "distill_weight": 0.0},
    "kl": {"contrastive_weight": 0.0, "distill_weight": 1.0, "teacher_temperature": 2.0},
    "both": {"contrastive_weight": 0.3, "distill_weight": 0.7, "student_temperature": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT with a head, and rows of all lengths: some have scores, some pairs are cut."""
    folder = tmp_path_factory.mktemp("rank")
    model = tiny.save_bert(folder / "bert")
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(model, num_labels=1)
    classifier = transformers.BertForSequenceClassification(config)
    for parameter in classifier.parameters():  # so large that gradients are no rounding
        parameter.data += 0.1 * torch.randn_like(parameter)
    classifier.save_pretrained(model)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(STEPS * BATCH):
        keys = [tiny.text(rng, 1, 25) for _ in range(GROUP)]
        row = {"query": tiny.text(rng, 1, 14), "pos": keys[:1], "neg": keys[1:]}
        rows.append(row | ({"teacher_scores": rng.normal(size=GROUP).tolist()} if i % 4 else {}))
    tiny.write_lines(folder / "train.json", rows)
    return folder


def opened(folder, loss: dict):
    config = RankConfig()
    config.data.train_data = [str(folder / "train.json")]
    config.data.dataset_cache_dir = str(folder / "cache")
    config.data.train_group_size, config.data.select_negative = GROUP, "first"
    config.data.query_max_length, config.data.key_max_length = 8, LIMIT - 8
    config.ranker.ranker, config.ranker.dtype = str(folder / "bert"), "fp32"
    for name, value in loss.items():
        setattr(config.loss, name, value)
    files = Files(config.flat())
    task, params, _ = open_cross(config, files)
    read = files.training, files.cache, task.config.data, config.loss, task.tokenizer
    data = prepare(*read, seed=0, bad_rows=BadRows(), layout=task.layout, streams=task.streams)
    return task, params, data


def run(task, params, data, devices: int, steps: int = STEPS, fsdp: int = 1, **step):
    """Losses, gradient norms, and the parameters at the end."""
    optimizer = make_optimizer(SETTINGS, STEPS)
    mesh = sharding.make_mesh(fsdp, devices=jax.devices()[:devices])
    plan = data.plan(BATCH)
    data.settle_shapes(plan, devices)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.state_sharding(mesh, abstract, task.rules)
    how = {"mesh": mesh, "chunk": None, "seed": 0, "shardings": shardings} | step
    step_fn = Step(task, optimizer, **how)
    on_mesh = sharding.to_mesh(params, shardings.params)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(on_mesh)
    found = []
    for i in range(steps):
        batch = sharding.batch_to_mesh(mesh, data.assemble(plan(i), devices))
        state, metrics = step_fn(state, [batch], [data.recipe(None)])
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    return found, jax.tree.map(np.asarray, state.params)


def torch_loss(model, tokenizer, rows, weights) -> torch.Tensor:
    pairs = [(row["query"], key) for row in rows for key in row["pos"] + row["neg"]]
    first, second = map(list, zip(*pairs, strict=True))
    inputs = tokenizer(first, second, truncation=True, max_length=LIMIT, padding=True,
                       return_tensors="pt")  # fmt: skip
    scores = model(**inputs).logits.view(len(rows), GROUP)
    ce = F.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long))
    has = [i for i, row in enumerate(rows) if "teacher_scores" in row]
    teacher = torch.tensor([rows[i]["teacher_scores"] for i in has])
    target = (teacher / weights.get("teacher_temperature", 1.0)).softmax(-1)
    own = (scores[has] / weights.get("student_temperature", 1.0)).log_softmax(-1)
    kl = F.kl_div(own, target, reduction="batchmean")
    total = weights["contrastive_weight"] * ce + weights["distill_weight"] * kl
    return total


@pytest.mark.parametrize("name", LOSSES)
def test_thirty_steps_follow_torch(folder, name):
    task, params, data = opened(folder, LOSSES[name])
    ours, final = run(task, params, data, devices=8)

    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "bert", dtype=torch.float32
    ).train()
    decay, plain = [], []
    for parameter_name, parameter in model.named_parameters():
        no_decay = parameter_name.endswith("bias") or "LayerNorm" in parameter_name
        (plain if no_decay else decay).append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=SETTINGS.learning_rate,
    )
    linear = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda n: n / 3 if n < 3 else (STEPS - n) / (STEPS - 3)
    )
    lines = [json.loads(line) for line in (folder / "train.json").read_text().splitlines()]
    plan, theirs = data.plan(BATCH), []
    for i in range(STEPS):
        rows = [lines[j] for j in plan(i).rows]
        loss = torch_loss(model, task.tokenizer, rows, LOSSES[name])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        linear.step()
        theirs.append((loss.item(), norm.item()))
    # fp32, sums in another order.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    names, moved = dict(model.named_parameters()), 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(final):
        *steps, kind = (step.key for step in path)
        parameter = ".".join([*steps, "bias" if kind == "bias" else "weight"])
        if parameter.endswith(ARBITRARY):
            continue
        want = names[parameter].detach().numpy()
        want = want.T if kind == "kernel" else want
        np.testing.assert_allclose(leaf, want, atol=1e-4, err_msg=parameter)
        moved = max(moved, float(np.abs(leaf - _at(params, path)).max()))
    assert moved > 0.005  # 50 times the tolerance


def _at(tree, path):
    for step in path:
        tree = tree[step.key]
    return tree


@pytest.mark.parametrize(
    "how",
    [
        {"devices": 1},
        {"devices": 2},
        {"devices": 8, "fsdp": 4},
        {"devices": 8, "chunk": Chunk(1)},
        {"devices": 4, "chunk": Chunk(64, tokens=True), "fsdp": 2},
    ],
    ids=str,
)
def test_devices_and_chunks_change_nothing(folder, how):
    """Losses and gradients to rounding, parameters after a few steps."""
    task, params, data = opened(folder, LOSSES["both"])
    few = partial(run, task, params, data, steps=4)
    want, parameters = few(devices=8)
    found, others = few(**how)
    np.testing.assert_allclose(found, want, rtol=2e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(others), strict=True
    ):
        name = sharding.path_name(path).replace("/", ".")
        if not name.endswith(ARBITRARY):  # a rate of 1e-3 moves a weight by up to 4e-3
            np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)
