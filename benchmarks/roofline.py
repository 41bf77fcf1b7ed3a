"""What TPUs would do at most, by their compiler: no chip is needed, only its compiler.

    pip install -e '.[test,plan-tpu]'
    python benchmarks/roofline.py                       # all programs, v5e, v5p and v6e, an hour
    python benchmarks/roofline.py --programs train encode --topologies v5e:2x4
    python benchmarks/roofline.py --programs train --topologies v5e:2x4 v5e:4x8 v5e:16x16

Models of two and three layers are compiled in bf16; what the third adds is taken as often as the
whole model has more. The time is the compiler's estimate of everything but
collectives, gathers and sorts, so the share of the peak (MFU) is an upper bound. It counts the
operations of the model's matrix products, see `forward_flops`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llme_jax.config import Config, LossConfig, TrainConfig
from llme_jax.data.batch import Batch, Order, pack_texts, work
from llme_jax.data.widths import usual_width
from llme_jax.devices import sharding, topology
from llme_jax.devices.memory import needs
from llme_jax.lm import likelihood
from llme_jax.models.bert import BertConfig, abstract_params
from llme_jax.models.causal_lm import CausalLM, sharded_shapes
from llme_jax.models.cross_encoder import CrossEncoder
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.models.llama import LlamaConfig
from llme_jax.models.rope import Rope
from llme_jax.rerank import cross_scorer
from llme_jax.retrieval import encode, exact
from llme_jax.training.dual import DualTask
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, init_state

LENGTH = 256
# Tokens a device encodes at a time on TPU (inference/over_store.py).
ROWS = (1 << 16) // LENGTH


def bert(layers: int) -> BertConfig:
    return BertConfig(
        model_type="bert", vocab_size=30522, hidden_size=768, num_hidden_layers=layers,
        num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
        max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, first_position=0,
        embedding_size=768, source="{}",
    )  # fmt: skip


def llama(layers: int) -> LlamaConfig:
    """Llama-2-7B's."""
    return LlamaConfig(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=layers, num_attention_heads=32, max_position_embeddings=4096,
        num_key_value_heads=32, head_dim=128, rotary_width=128, hidden_act="silu",
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope=Rope(1e4), qkv_bias=False,
        output_bias=False, mlp_bias=False, qk_norm=False, windows=(None,) * layers,
    )  # fmt: skip


def dual_encoder(layers: int, pooling: str) -> DualEncoder:
    return DualEncoder(
        query_config=bert(layers), key_config=bert(layers), tied=True, pooling=pooling, dense=(),
        metric="cos", normalizes=True, dtype="bfloat16", remat=False,
    )  # fmt: skip


def train(devices: list, layers: int, *, natural: bool = False, fsdp: int = 1):
    """A step of 16 queries with 8 keys a device, dropout 0.1, texts of 256 tokens or of natural
    length: log-normal, 115 in the middle, at most 256."""
    rng, n = np.random.default_rng(0), len(devices)

    def texts(count):
        if natural:
            lengths = np.clip(rng.lognormal(np.log(0.45 * LENGTH), 0.45, (n, count)), 8, LENGTH)
        else:
            lengths = np.full((n, count), LENGTH)
        return np.ones((n, count, LENGTH), np.int32), lengths.astype(int)

    fields = {"query": texts(16), "key": texts(16 * 8)}
    order = Order(np.concatenate([lengths for _, lengths in fields.values()], 1))
    widths = [usual_width(longest, LENGTH) for longest in order.longest]
    shape = order.shape(widths, -(-order.tokens // 128) * 128)
    hashes = np.zeros((n * 16, 8, 2), np.uint32)
    batch = Batch(
        {"texts": pack_texts(fields, order.rows, shape)}, np.zeros((n * 16, 8), np.float32),
        np.zeros(n * 16, bool), hashes.reshape(-1, 2), hashes[:, :1],
    )  # fmt: skip
    encoder, params = dual_encoder(layers, "cls"), {"encoder": abstract_params(bert(layers))}
    task, optimizer = DualTask(Config(), encoder, None), make_optimizer(TrainConfig(), 100)
    mesh = sharding.make_mesh(fsdp, devices=devices)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    placed = sharding.state_sharding(mesh, state)
    step = Step(task, optimizer, mesh=mesh, chunk=None, seed=0, shardings=placed)
    lowered = step.lower(
        sharding.abstract(state, placed), sharding.abstract(batch, sharding.batch_sharding(mesh)),
        LossConfig(contrastive_weight=1.0, distill_weight=0.0), accumulating=False,
    )  # fmt: skip
    return needs(lowered), 3 * task.forward_flops(params, work(batch)) / n


def encode_texts(devices: list, layers: int):
    """As many texts of 256 tokens as a TPU encodes at a time, mean pooling."""
    mesh = sharding.make_mesh(devices=devices)
    encoder, params = dual_encoder(layers, "mean"), {"encoder": abstract_params(bert(layers))}
    needed = encode.analyse(encoder, params, mesh, "key", ROWS * mesh.size, LENGTH)
    return needed, encoder.flops(params, "key", ROWS * LENGTH, ROWS * LENGTH**2)


def rerank(devices: list, layers: int):
    """As many pairs of 256 tokens, by a BERT with its pooler and a head."""
    mesh = sharding.make_mesh(devices=devices)
    encoder = CrossEncoder(bert(layers), "bfloat16", False, (0.0, 0.0), "cls", typed=True)
    linear = {"kernel": (768, 768), "bias": (768,)}, {"kernel": (768, 1), "bias": (1,)}
    pooler, head = (
        {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        for shapes in linear
    )
    params = {"bert": abstract_params(bert(layers)) | {"pooler": {"dense": pooler}}}
    params |= {"classifier": head}
    needed = cross_scorer.analyse(encoder, params, mesh, ROWS * mesh.size, LENGTH)
    return needed, encoder.flops(params, ROWS * LENGTH, ROWS * LENGTH**2)


def score(devices: list, layers: int, *, fsdp: int, tensor: int):
    """Four prompts of 1,024 tokens for each device that shares a batch, by a Llama of 7B's size."""
    mesh = sharding.make_mesh(fsdp, tensor, devices=devices)
    lm = CausalLM(llama(layers), "bfloat16")
    needed = likelihood.analyse(lm, sharded_shapes(lm, mesh), mesh, 4, 1024)
    prompts = 4 * len(devices) // tensor
    return needed, lm.flops(prompts * 1024, prompts * 1024**2) / len(devices)


def search(devices: list, layers: int):
    """1,000 queries among 4,096 keys a device, of which a search has many: 200 hits, fp32, which is
    6 products in bf16."""
    mesh = sharding.make_mesh(devices=devices)
    needed = exact.analyse(mesh, 1000, 4096 * mesh.size, 768, 200, "cos", 1000)
    return needed, 6 * 2 * 1000 * 4096 * 768


# Each with the layers of the whole model.
PROGRAMS: dict[str, tuple[int, Callable]] = {
    "train": (12, train),
    "train, natural lengths": (12, lambda *a: train(*a, natural=True)),
    "train, --fsdp 8": (12, lambda *a: train(*a, fsdp=8)),
    "encode": (12, encode_texts),
    "rank": (12, rerank),
    "score, --fsdp 8": (32, lambda *a: score(*a, fsdp=8, tensor=1)),
    "score, --fsdp 2 --tensor 4": (32, lambda *a: score(*a, fsdp=2, tensor=4)),
    "score, --tensor 8": (32, lambda *a: score(*a, fsdp=1, tensor=8)),
    "search": (1, search),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    if topology.compiles_for():
        return _compile(args.topologies[0], args.programs[0])
    print("| program | devices | ms at the peak | estimate | MFU at most | exchanged |")
    print("|---|---|---|---|---|---|")
    results = []
    for name in args.topologies:
        for program in args.programs:
            command = [sys.executable, __file__, "--programs", program, "--topologies", name]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE,
                env=os.environ | topology.environment(name), text=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            results.append(found)
            print(_line(found), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def _compile(name: str, program: str) -> None:
    """Prints what one program takes on one device, as JSON."""
    devices, of = topology.devices(name), topology.chip(name)
    depth, analyse = PROGRAMS[program]
    # The first two layers and one more.
    steps = [_measured(analyse, devices, layers, of) for layers in ([2, 3] if depth > 1 else [1])]
    more = depth - 2 if depth > 1 else 0
    whole = [a + more * (b - a) for a, b in zip(steps[0], steps[-1], strict=True)]
    ideal, seconds, exchanged = whole
    print(json.dumps({
        "program": program, "topology": name, "devices": len(devices), "ideal_ms": ideal * 1e3,
        "estimated_ms": seconds * 1e3, "mfu_bound": ideal / seconds, "exchanged_mib": exchanged,
    }))  # fmt: skip


def _measured(analyse, devices, layers, of) -> tuple[float, ...]:
    needed, operations = analyse(devices, layers)
    found = topology.estimate(needed.compiled.as_text(), of)
    exchanged = sum(found.exchanged.values()) / 2**20
    return operations / of.flops, sum(found.seconds.values()), exchanged


def _line(found: dict) -> str:
    return (
        f"| {found['program']} | {found['devices']} ({found['topology']}) "
        f"| {found['ideal_ms']:.1f} | {found['estimated_ms']:.1f} | {found['mfu_bound']:.0%} "
        f"| {found['exchanged_mib']:,.0f} MiB |"
    )


if __name__ == "__main__":
    main()
