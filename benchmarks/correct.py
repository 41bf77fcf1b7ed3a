"""Does this device compute what a CPU computes? Loss, gradient and attention, in a table.

    python benchmarks/correct.py

A training step of a BERT with dropout, and every kernel of attention that works here. The CPU's are
in fp32 and by the plain path. It exits with 1 where something is further off than it may be.
"""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import add_model, device_name, make_parser, save_model
from train_step import make_batch, make_texts

from llme_jax.config import Config, EncoderConfig, LossConfig
from llme_jax.devices import sharding
from llme_jax.errors import InputError
from llme_jax.models.attention import causal_attention
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training.dual import DualTask
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step

# What a number may differ by, as a share: fp32 sums in another order; bf16 has 8 bits, and a
# gradient goes through all layers twice.
LOSS = {"fp32": 1e-5, "bf16": 2e-2}
GRADIENT = {"fp32": 1e-4, "bf16": 8e-2}


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser, gpu=False)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--query_length", type=int, default=32)
    parser.add_argument("--key_length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()

    with TemporaryDirectory() as folder:
        model = save_model(args, Path(folder))
        rows = list(training(model, args)) + list(causal())
    print(f"{device_name()}, jax {jax.__version__}")
    print(f"{'':32}{'off by':>10}{'may be':>10}")
    for name, off, limit in rows:
        print(f"{name:32}{off:10.1e}{limit:10.0e}{'' if off <= limit else '   WRONG'}")
    if args.json:
        numbers = [dict(zip(("what", "off", "limit"), row, strict=True)) for row in rows]
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
    raise SystemExit(any(not off <= limit for _, off, limit in rows))


def training(model: str, args):
    """Loss and gradient of a step, with dropout and without."""
    for drops in (True, False):
        how = {"model": model, "args": args, "drops": drops}
        with jax.default_device(jax.devices("cpu")[0]):
            devices = jax.devices("cpu")[:1]
            loss, gradient = loss_and_gradient(devices, "fp32", "plain", **how)
        norm = _norm(gradient)
        for dtype in ("fp32", "bf16"):
            for kernel in ("plain", "cudnn", "flash"):
                try:
                    ours, other = loss_and_gradient(jax.devices()[:1], dtype, kernel, **how)
                except InputError:
                    continue  # this kernel does not work here
                name = f"{dtype}, {kernel}{', dropout' if drops else ''}"
                yield f"loss, {name}", float(abs(ours - loss) / abs(loss)), LOSS[dtype]
                off = _norm(jax.tree.map(np.subtract, other, gradient))
                yield f"gradient, {name}", off / norm, GRADIENT[dtype]


def loss_and_gradient(devices, dtype, kernel, *, model, args, drops):
    encoder, params, _ = load_dual_encoder(
        EncoderConfig(query_encoder=model, dtype=dtype, attention=kernel)
    )
    if not drops:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = dataclasses.replace(encoder.query_config, **quiet)
        encoder = dataclasses.replace(encoder, query_config=config, key_config=config)
    mesh = sharding.make_mesh(devices=devices)
    task = DualTask(Config(), encoder, None)
    step = Step(task, make_optimizer(Config().training, 1), mesh=mesh, chunk=None, seed=0)
    batch = sharding.batch_to_mesh(mesh, make_batch(make_texts(args), args, 1))
    params = sharding.to_mesh(params, jax.tree.map(lambda _: sharding.replicated(mesh), params))
    recipe = LossConfig(contrastive_weight=1.0, distill_weight=0.0)
    (loss, _), gradient = step.gradient(params, {}, batch, 0, recipe=recipe)
    return np.asarray(loss), jax.tree.map(np.asarray, gradient)


def causal():
    """A language model's attention, bf16, grouped heads, with and without a window."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 512, heads, 128)), jnp.bfloat16) for heads in (8, 2, 2)
    )
    for window in (None, 100):
        ours = causal_attention(q, k, v, window=window)
        want = by_definition(q, k, v, window)
        name = f"causal attention, window {window}" if window else "causal attention"
        yield name, _norm(np.asarray(ours, np.float32) - want) / _norm(want), 1e-2


def by_definition(q, k, v, window):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[3] ** 0.5
    behind = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    seen = (behind >= 0) & (behind < (window or q.shape[1]))
    weights = np.exp(np.where(seen, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def _norm(tree) -> float:
    return float(
        np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
    )


if __name__ == "__main__":
    main()
