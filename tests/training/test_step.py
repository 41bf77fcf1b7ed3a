"""The train step: the same on any number of devices, GradCache, accumulation, fsdp."""

import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llme_jax.config import Config, EncoderConfig, LossConfig, TrainConfig
from llme_jax.config.training import DIRECTIONS
from llme_jax.devices import sharding
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training.chunks import Chunk, over_texts
from llme_jax.training.dual import DualTask
from llme_jax.training.optim import make_optimizer, schedule
from llme_jax.training.step import Step, TrainState, init_state

CONTRASTIVE = LossConfig(contrastive_weight=1.0, distill_weight=0.0, cos_temperature=0.1)
RECIPES = {
    "contrastive": CONTRASTIVE,
    "kl": replace(CONTRASTIVE, contrastive_weight=0.0, distill_weight=1.0),
    "stable": replace(CONTRASTIVE, distill_weight=0.7, stable_distill=True),
    "margin_mse": replace(CONTRASTIVE, distill_weight=0.5, distill_loss="margin_mse"),
    "directions": replace(
        CONTRASTIVE,
        contrastive_directions=[*DIRECTIONS],
        spread_weight=0.3,
        teacher_encoder="teacher",
        embedding_weight=10.0,
    ),
    "hardness": replace(
        CONTRASTIVE,
        hardness_mode="all_negatives",
        hardness_strength=5.0,
        false_negative_margin=-0.1,
    ),
    "matryoshka": replace(
        CONTRASTIVE,
        distill_weight=0.7,
        stable_distill=True,
        matryoshka_dims=[8, 32],
        matryoshka_weights=[0.5, 2.0],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def on_one_device(folder):
    """Loss and gradient of each recipe for one batch, plainly computed."""
    encoder, params, _ = load(folder)
    batch = tiny.random_batch(16, 4)
    return {
        name: loss_and_gradient(encoder, params, batch, recipe, devices=1)
        for name, recipe in RECIPES.items()
    }


def load(folder, **settings):
    return load_dual_encoder(EncoderConfig(query_encoder=str(folder), dtype="fp32", **settings))


def task(encoder) -> DualTask:
    return DualTask(Config(), encoder, None)


def loss_and_gradient(encoder, params, batch, recipe, *, devices, fsdp=1, chunk=None, seed=0):
    mesh = sharding.make_mesh(fsdp, devices=jax.devices()[:devices])
    shardings = sharding.state_sharding(mesh, params)
    step = Step(
        *(task(encoder), optax.identity()),
        mesh=mesh,
        chunk=chunk,
        seed=seed,
        shardings=TrainState(sharding.replicated(mesh), shardings, ()),
    )
    on_mesh, inputs = sharding.to_mesh(params, shardings), sharding.batch_to_mesh(mesh, batch)
    (value, _), grads = step.gradient(on_mesh, {}, inputs, 0, recipe=recipe)
    return float(value), jax.tree.map(np.asarray, grads)


def assert_same_gradient(got, want, relative):
    """Each parameter's largest difference, relative to the largest gradient of all."""
    largest = max(np.abs(g).max() for g in jax.tree.leaves(want))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.abs(a - b).max() <= relative * largest, sharding.path_name(path)


# The other recipes in other shapes are slow: what is summed is the same.
MESHES = [
    pytest.param(
        *(devices, fsdp, recipe),
        marks=[] if recipe == "stable" or fsdp > 1 else pytest.mark.slow,
    )
    for devices, fsdp in ((2, 1), (8, 1), (8, 4))
    for recipe in RECIPES
]


@pytest.mark.parametrize(("devices", "fsdp", "recipe"), MESHES)
def test_loss_and_gradient_do_not_depend_on_the_devices(
    folder, on_one_device, recipe, devices, fsdp
):
    encoder, params, _ = load(folder)
    batch, want = tiny.random_batch(16, 4, devices=devices), on_one_device[recipe]
    got = loss_and_gradient(encoder, params, batch, RECIPES[recipe], devices=devices, fsdp=fsdp)
    # fp32 sums in another order; the largest differences seen are 2e-7 and 2e-6.
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert_same_gradient(got[1], want[1], 1e-5)


def test_dropout_does_not_depend_on_the_devices(tmp_path):
    encoder, params, _ = load(tiny.save_bert(tmp_path / "bert", dropout=0.3, layers=1))
    without, _, _ = load(tiny.save_bert(tmp_path / "without", layers=1))

    def gradient(encoder, *, blocks=False, **how):
        batch = tiny.random_batch(
            16, 4, key_length=40, devices=how.setdefault("devices", 1), blocks=blocks
        )
        assert (len(batch.texts["texts"].widths) > 1) == blocks
        return loss_and_gradient(encoder, params, batch, CONTRASTIVE, seed=3, **how)

    want = gradient(encoder)
    assert abs(want[0] - gradient(without)[0]) > 0.01  # something was dropped
    for how in (
        {"devices": 8},
        {"devices": 2, "blocks": True},  # nor on blocks
        {"chunk": Chunk(100, tokens=True), "blocks": True},  # nor on sub-batches
    ):
        got = gradient(encoder, **how)
        assert got[0] == pytest.approx(want[0], rel=1e-6)
        assert_same_gradient(got[1], want[1], 1e-5)


@pytest.mark.parametrize(
    ("devices", "chunk", "recipe"),
    [
        (1, Chunk(4), "stable"),
        (1, Chunk(100, tokens=True), "stable"),
        (2, Chunk(100, tokens=True), "stable"),
        (8, Chunk(16, tokens=True), "stable"),
        *((8, Chunk(3), name) for name in RECIPES),
    ],
)
def test_sub_batches_give_the_gradient_of_the_whole_batch(
    folder, on_one_device, devices, chunk, recipe
):
    encoder, params, _ = load(folder)
    batch, want = tiny.random_batch(16, 4, devices=devices), on_one_device[recipe]
    got = loss_and_gradient(encoder, params, batch, RECIPES[recipe], devices=devices, chunk=chunk)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert_same_gradient(got[1], want[1], 1e-5)


def test_sub_batches_take_less_memory(folder):
    encoder, params, _ = load(folder)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def bytes_needed(chunk, **how):
        batch = jax.tree.map(jnp.asarray, tiny.random_batch(64, 8, **how))
        step = Step(task(encoder), optax.identity(), mesh=mesh, chunk=chunk, seed=0)
        program = step.gradient.lower(params, {}, batch, 0, recipe=CONTRASTIVE).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert bytes_needed(Chunk(16)) < bytes_needed(None) / 4
    # Every block would fit into a turn; it takes two, or all activations were kept.
    blocks = {"key_length": 60, "blocks": True}
    assert bytes_needed(Chunk(560), **blocks) < bytes_needed(None, **blocks) / 2


@pytest.mark.parametrize("tokens", [64, 100, 500, 10_000])
def test_sub_batches_have_so_many_tokens_at_most(tokens):
    texts = tiny.random_batch(16, 4, key_length=60, blocks=True).texts["texts"]
    seen = []  # tokens, and those of the blocks they attend in, of each program

    def compute(ids, packing, *, dropout_key):
        blocks = zip(packing.lengths, packing.widths, strict=True)
        seen.append((len(ids), sum(len(n) * width for n, width in blocks)))
        return packing.starts

    chunk = Chunk(tokens, tokens=True)
    jax.eval_shape(partial(over_texts, compute, dropout_key=None, chunk=chunk), texts)
    assert np.max(seen) <= tokens
    assert len(seen) == (1 if tokens == 10_000 else len(texts.widths))  # else all at once


def test_without_negatives_across_devices_each_device_is_a_batch(folder):
    encoder, params, _ = load(folder)
    recipe = replace(CONTRASTIVE, negative_cross_device=False)
    batch = tiny.random_batch(16, 4, devices=4)
    got = loss_and_gradient(encoder, params, batch, recipe, devices=4)
    parts = []
    for device in range(4):
        part = tiny.random_batch(16, 4, rows=slice(4 * device, 4 * device + 4))
        parts.append(loss_and_gradient(encoder, params, part, CONTRASTIVE, devices=1))
    assert got[0] == pytest.approx(np.mean([value for value, _ in parts]), rel=1e-6)
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *(grads for _, grads in parts))
    assert_same_gradient(got[1], mean, 1e-5)


def test_fsdp_spreads_parameters_and_moments(folder):
    _, params, _ = load(folder)
    mesh = sharding.make_mesh(4)
    optimizer = make_optimizer(TrainConfig(), 10)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.state_sharding(mesh, abstract)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(params)
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = sharding.path_name(path)
        if name.endswith("kernel"):
            kernels += 1
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size, name
    assert kernels == 3 * 2 * 6  # parameter and two moments, 2 layers of 6 linear maps


def alone(collective: str) -> bool:
    """Whether every device is a group of its own."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", collective):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return all(sizes[name] == "1" for name in re.findall(r"'(\w+)'", mesh[2]))
    return bool(re.search(r"replica_groups=(\{\{\d\}|\[8,1\])", collective))


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_devices_exchange_the_least_there_is(tmp_path, fsdp):
    """Every gradient once, with fsdp every weight once besides, embeddings, and no texts."""
    encoder, params, _ = load(tiny.save_bert(tmp_path / "bert", width=256))
    optimizer = make_optimizer(TrainConfig(), 10)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    mesh = sharding.make_mesh(fsdp)
    shardings = sharding.state_sharding(mesh, abstract)
    step = Step(task(encoder), optimizer, mesh=mesh, chunk=None, seed=0, shardings=shardings)

    def exchanged(length: int) -> Counter:
        """Bytes of what comes out of each kind of collective; those of one device are none."""
        batch = tiny.random_batch(16, 4, key_length=length, devices=8, blocks=True)
        batch = sharding.abstract(batch, sharding.batch_sharding(mesh))
        state = sharding.abstract(abstract, shardings)
        program = step.lower(state, batch, CONTRASTIVE, accumulating=False)
        kinds = r" = (.*) (all-\w+|reduce-scatter|collective-permute)\("
        found = Counter()
        for line in program.compile().as_text().splitlines():
            match = re.search(kinds, line)
            if match and not alone(line):
                for shape in re.findall(r"\w\[([\d,]*)\]", match[1]):
                    found[match[2]] += 4 * math.prod(int(n) for n in shape.split(",") if n)
        return found

    found = exchanged(16)
    assert exchanged(64) == found
    kernels, vectors, queries = 0, 0, 4 * 16 * 256  # bytes, all are float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if sharding.path_name(path).endswith(("kernel", "embedding")):
            kernels += 4 * leaf.size
        else:
            vectors += 4 * leaf.size
    # Queries are gathered, and so are their gradients: the keys stay where they are.
    few = 1000  # bytes: the loss, the norm of the gradient, maxima and sums of the softmax
    if fsdp == 1:
        least = {"all-reduce": kernels + vectors + queries, "all-gather": queries}
    else:
        least = {"all-gather": kernels + queries, "reduce-scatter": kernels // fsdp}
        least["all-reduce"] = vectors + queries + (kernels // fsdp if fsdp < 8 else 0)
    assert found.keys() == least.keys()
    for kind, size in least.items():
        assert size <= found[kind] < size + few, kind


@pytest.mark.filterwarnings("error:optax")
def test_gradient_accumulation_is_the_mean_of_its_batches(tmp_path):
    encoder, params, _ = load(tiny.save_bert(tmp_path / "bert", layers=1))
    optimizer = make_optimizer(TrainConfig(lr_scheduler_type="constant", learning_rate=1e-3), 10)
    batches = [tiny.random_batch(8, 4, seed=i) for i in range(3)]
    recipes = [RECIPES[name] for name in ("contrastive", "kl", "stable")]  # each batch has its own
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = Step(task(encoder), optimizer, mesh=mesh, chunk=None, seed=0)

    def first_step(batches, recipes):
        return step(init_state(jax.tree.map(jnp.array, params), optimizer), batches, recipes)

    state, metrics = first_step(batches, recipes)
    each = [
        loss_and_gradient(encoder, params, batch, recipe, devices=1)
        for batch, recipe in zip(batches, recipes, strict=True)
    ]
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *(grads for _, grads in each))
    assert float(metrics.loss) == pytest.approx(np.mean([value for value, _ in each]), rel=1e-6)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(mean)))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1
    # A part counts where it is one of the loss: the recipes are contrastive, distillation or both.
    alone = [first_step([b], [r])[1].parts for b, r in zip(batches, recipes, strict=True)]
    assert [len(parts) for parts in alone] == [1, 1, 2]
    for name in ("contrastive", "distill"):
        those = [float(parts[name]) for parts in alone if name in parts]
        assert float(metrics.parts[name]) == pytest.approx(np.mean(those), rel=1e-6)


def test_schedules():
    linear = schedule(TrainConfig(learning_rate=1.0, warmup_ratio=0.1), 25)  # 3 steps of warm-up
    rates = [float(linear(n)) for n in range(26)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rates[14] == pytest.approx(11 / 22)
    assert rates[25] == 0
    constant = TrainConfig(learning_rate=2.0, lr_scheduler_type="constant")
    assert float(schedule(constant, 10)(0)) == 2.0
    warm = replace(constant, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.5)
    assert [float(schedule(warm, 4)(n)) for n in range(4)] == [0, 1, 2, 2]
    cosine = replace(constant, lr_scheduler_type="cosine", warmup_ratio=0.0)
    assert float(schedule(cosine, 10)(5)) == pytest.approx(1.0)


def test_a_mesh_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="--fsdp 3: 3 does not divide the 8 devices"):
        sharding.make_mesh(3)
