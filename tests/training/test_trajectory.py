"""Thirty steps of ours and of a plain torch loop: losses, gradient norms, final weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch
from samples import torch_loss
from transformers import AutoModel

from llme_jax.config import Config, EncoderConfig, LossConfig, TrainConfig
from llme_jax.devices.sharding import make_mesh
from llme_jax.models.dual_encoder import load_dual_encoder, save_dual_encoder
from llme_jax.training.dual import DualTask
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, init_state

CONTRASTIVE = LossConfig(contrastive_weight=1.0, distill_weight=0.0, cos_temperature=0.1)


def test_thirty_steps_follow_torch(tmp_path):
    folder = tiny.save_bert(tmp_path / "bert")
    config = EncoderConfig(query_encoder=str(folder), dtype="fp32")
    encoder, params, tokenizer = load_dual_encoder(config)
    steps = 30
    settings = TrainConfig(learning_rate=1e-3, warmup_ratio=0.1)
    recipes = [
        replace(CONTRASTIVE, mask_false_negatives=False),
        replace(
            CONTRASTIVE, contrastive_weight=0.3, distill_weight=0.7, mask_false_negatives=False
        ),
    ]
    batches = [tiny.random_batch(8, 4, seed=i) for i in range(steps)]

    optimizer = make_optimizer(settings, steps)
    mesh = make_mesh(devices=jax.devices()[:1])
    step = Step(DualTask(Config(), encoder, tokenizer), optimizer, mesh=mesh, chunk=None, seed=0)
    state = init_state(jax.tree.map(jnp.asarray, params), optimizer)
    ours = []
    for i, batch in enumerate(batches):
        state, metrics = step(state, [batch], [recipes[i % 2]])
        ours.append((float(metrics.loss), float(metrics.grad_norm)))

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).train()
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or "LayerNorm" in name else decay).append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    warmup = 3
    linear = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda n: n / warmup if n < warmup else (steps - n) / (steps - warmup)
    )
    theirs = []
    for i, batch in enumerate(batches):
        loss = torch_loss(model, batch, recipes[i % 2])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        linear.step()
        theirs.append((float(loss), float(norm)))

    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1][0] < ours[0][0]
    host = jax.tree.map(np.asarray, state.params)
    save_dual_encoder(
        tmp_path,
        encoder,
        host,
        tokenizer,
        query_max_length=16,
        key_max_length=16,
        prompts={},
    )
    trained = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    start = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    moved = 0
    for (name, a), b, c in zip(
        trained.named_parameters(), model.parameters(), start.parameters(), strict=True
    ):
        if name.endswith("self.key.bias"):
            continue  # its true gradient is 0, AdamW scales up what rounding leaves of it
        assert (a - b).abs().max() <= 1e-4 * b.abs().max(), name
        moved = max(moved, float((a - c).abs().max()))
    assert moved > 0.005  # 100 times the tolerance on a weight of 0.5
