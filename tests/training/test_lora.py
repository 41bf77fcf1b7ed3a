"""Adapters: thirty steps against peft, what is trained, folders that others open, devices."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from commands import finish, start
from peft import PeftModel
from safetensors.numpy import load_file
from samples import torch_loss
from sentence_transformers import CrossEncoder, SentenceTransformer
from small_run import STEPS, arguments, write_data

from llme_jax import rank, train
from llme_jax.config import Config, DataConfig, EncoderConfig, LossConfig, TrainConfig
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.models.cross_encoder import HEADS
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.models.lora import Lora, new_adapters
from llme_jax.sources.resolve import Files
from llme_jax.training.dual import open_dual
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, init_state

LOSS = LossConfig(
    contrastive_weight=1.0, distill_weight=0.0, cos_temperature=0.1, mask_false_negatives=False
)
SHORT = DataConfig(query_max_length=16, key_max_length=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, pooling, target",
    [
        (tiny.save_bert, "cls", None),
        (
            partial(tiny.save_encoder, model_type="llama", num_key_value_heads=2),
            "last_token",
            ["q_proj", "v_proj"],
        ),
    ],
)
def test_thirty_steps_follow_peft(tmp_path, make, pooling, target):
    folder, steps = make(tmp_path / "base"), 30
    settings = TrainConfig(
        learning_rate=1e-2, warmup_ratio=0.0, lr_scheduler_type="constant",
        lora_rank=4, lora_alpha=6.0, lora_target=target,
    )  # fmt: skip
    encoder_config = EncoderConfig(
        query_encoder=str(folder), dtype="fp32", pooling_method=[pooling], dense_metric="cos"
    )
    config = Config(data=SHORT, encoder=encoder_config, loss=LOSS, training=settings)
    task, params, frozen = open_dual(config, Files({}))
    optimizer = make_optimizer(settings, steps)
    mesh = make_mesh(devices=jax.devices()[:1])
    frozen = jax.tree.map(jnp.asarray, frozen)
    step = Step(task, optimizer, mesh=mesh, chunk=None, seed=0, frozen=frozen)
    state = init_state(jax.tree.map(jnp.asarray, params), optimizer)
    assert {*jax.tree.leaves(jax.tree.map(lambda x: x.dtype, params))} == {np.dtype("float32")}
    task.exporter(jax.tree.map(np.asarray, params | frozen), [""])(tmp_path / "start")

    base = transformers.AutoModel.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "start/adapter", is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(x.size for x in jax.tree.leaves(params))
    adamw = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    for i in range(steps):
        batch = tiny.random_batch(8, 4, seed=i)
        state, metrics = step(state, [batch], [LOSS])
        loss = torch_loss(model, batch, LOSS, pooling)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        found, wanted = (float(metrics.loss), float(metrics.grad_norm)), (float(loss), float(norm))
        # 30 steps of AdamW, which divides by the root of squares: rounding grows to 1e-5
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=str(i))

    task.exporter(jax.tree.map(np.asarray, state.params | frozen), [""])(tmp_path / "end")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("end/adapter", "theirs")
    )
    assert ours.keys() == theirs.keys()
    start = load_file(tmp_path / "start/adapter/adapter_model.safetensors")
    for name in ours:
        assert np.abs(ours[name] - theirs[name]).max() < 1e-4, name
        assert np.abs(ours[name] - start[name]).max() > 0.05, name

    # The merged folder is the base with its adapters.
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    both = SentenceTransformer(str(tmp_path / "end/encoder"), device="cpu")
    apart = SentenceTransformer(str(tmp_path / "end/encoder"), device="cpu")
    whole = transformers.AutoModel.from_pretrained(folder)
    apart[0].model = PeftModel.from_pretrained(whole, tmp_path / "end/adapter").eval()
    np.testing.assert_allclose(both.encode(texts), apart.encode(texts), atol=1e-5)


def test_targets_are_ends_of_names(tmp_path):
    folder = tiny.save_bert(tmp_path / "bert")
    config = read_config(folder, ENCODERS)
    shapes = ENCODERS["bert"].abstract_params(config)

    def adapters(*target):
        return new_adapters(shapes, config.names, Lora(2, 4.0, target or None), seed=0)

    of_layer = adapters("query", "attention.output.dense")["encoder"]["layer"]["0"]
    assert of_layer.keys() == {"attention"}
    assert of_layer["attention"].keys() == {"self", "output"}
    assert of_layer["attention"]["self"].keys() == {"query"}
    assert len(jax.tree.leaves(adapters())) == 2 * 2 * 6  # A and B, 2 layers, 6 linear maps
    with pytest.raises(InputError, match=r"--lora_target wqkv: .* give names as dense, key, query"):
        adapters("wqkv")
    with pytest.raises(InputError, match=r"--lora_rank 33: .* is 32 x 32; give 32 or less"):
        new_adapters(shapes, config.names, Lora(33, 4.0), seed=0)


SMALL = {
    "xlm-roberta": {"max_position_embeddings": 80},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
}
LORA = ["--lora_rank", "2", "--learning_rate", "0.02", "--save_steps", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data):
    """A run on one device, with what it said."""
    argv = arguments(data, data / "out", *LORA, "--per_device_train_batch_size", "8")
    return data / "out", finish(start(argv, devices=1))


def _adapter(out, step=STEPS):
    return load_file(out / f"checkpoint-{step}/adapter/adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(data, run, tmp_path):
    """Killed halfway, continued on 4 devices with fsdp and GradCache: the same adapters."""
    out, _ = run
    argv = arguments(data, tmp_path / "out", *LORA, "--per_device_train_batch_size", "2")
    finish(start([*argv, "--early_exit_steps", "4"], devices=4))
    finish(start([*argv, "--fsdp", "2", "--sub_batch_size", "3"], devices=4))
    ours, want = _adapter(tmp_path / "out"), _adapter(out)
    assert ours.keys() == want.keys()
    for name in want:
        # At a rate of 0.02 the steps move a number by up to 0.1, rounding by under 1e-4.
        np.testing.assert_allclose(ours[name], want[name], atol=1e-4, err_msg=name)


def test_only_adapters_are_trained_and_kept(data, run, capsys):
    out, _ = run
    base = load_file(data / "bert/model.safetensors")
    merged = load_file(out / f"checkpoint-{STEPS}/encoder/model.safetensors")
    changed = {n for n in merged if not np.array_equal(merged[n], base[n])}
    linear = {n for n in base if n.endswith(("query.weight", "key.weight", "value.weight"))}
    linear |= {n for n in base if n.endswith("dense.weight")}
    assert changed == linear
    config = json.loads((out / f"checkpoint-{STEPS}/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(data / "bert") and config["r"] == 2
    train.main(arguments(data, data / "planned", *LORA, "--plan"))
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("main", [train.main, rank.main])
def test_a_plan_needs_no_weights(data, tmp_path, capsys, main):
    bare = shutil.copytree(data / "bert", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    said = []
    for model in (data / "bert", bare):
        argv = arguments(data, tmp_path / "out", *LORA, "--plan")
        argv[argv.index("--query_encoder") + 1] = str(model)
        if main is rank.main:
            argv[argv.index("--query_encoder")] = "--ranker"
        assert main(argv) == 0
        said.append(capsys.readouterr().out)
    assert "GiB of a device" in said[0] and said[0] == said[1]


def test_a_run_is_not_continued_with_another_rank(data, run):
    out, _ = run
    argv = arguments(data, out, *LORA[2:], "--lora_rank", "4", "--per_device_train_batch_size", "8")
    assert "lora_rank" in finish(start(argv, devices=1), code=2)


@pytest.mark.parametrize(
    "model_type",
    ["bert", "modernbert", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL)],
)
def test_a_reranker_of_adapters(data, tmp_path, model_type):
    """The merged folder is the base with the adapters and the head that peft reads."""
    base = data / "bert"
    if model_type != "bert":
        base = tiny.save_encoder(tmp_path / "base", model_type, **SMALL.get(model_type, {}))
    argv = arguments(data, tmp_path / "out", *LORA, "--max_steps", "4", "--lora_alpha", "6")
    place = argv.index("--query_encoder")
    argv[place : place + 2] = ["--ranker", str(base)]
    assert rank.main(argv) == 0
    ranker, adapter = (tmp_path / "out/checkpoint-4" / name for name in ("ranker", "adapter"))

    rng = np.random.default_rng(0)
    pairs = [(tiny.text(rng), tiny.text(rng)) for _ in range(8)]
    merged, apart = (CrossEncoder(str(ranker), device="cpu") for _ in range(2))
    classifier = transformers.AutoModelForSequenceClassification
    model = PeftModel.from_pretrained(classifier.from_pretrained(base, num_labels=1), adapter)
    apart.model.load_state_dict(model.merge_and_unload().state_dict())
    scores = merged.predict(pairs)
    assert np.ptp(scores) > 0.01
    np.testing.assert_allclose(apart.predict(pairs), scores, atol=1e-5)

    # Of the encoder nothing else has changed.
    before, after = (load_file(folder / "model.safetensors") for folder in (base, ranker))
    before = {f"{HEADS[model_type].prefix}.{name}": tensor for name, tensor in before.items()}
    changed = [n for n in before if n in after and not np.array_equal(before[n], after[n])]
    adapters = load_file(adapter / "adapter_model.safetensors")
    names = [n.removeprefix("base_model.model.") for n in adapters if "lora_A" in n]
    assert sorted(changed) == sorted(n.replace("lora_A.", "") for n in names)
