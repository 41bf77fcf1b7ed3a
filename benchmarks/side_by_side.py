"""What the benchmarks share: models, devices, and runs that take turns."""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import torch
import transformers

from llme_jax.config import TrainConfig
from llme_jax.devices import sharding
from llme_jax.training.optim import make_optimizer
from llme_jax.training.step import Step, TrainState, init_state

SHAPES = {
    "one-layer": {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
# Dense bf16 with fp32 sums, from the vendor's datasheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model(parser: argparse.ArgumentParser, *, gpu: bool) -> None:
    parser.add_argument(
        "--model",
        default="bert-base" if gpu else "minilm",
        help=f"{', '.join(SHAPES)} with random weights, a folder or a hub name",
    )


def save_model(args, folder: Path) -> str:
    if args.model not in SHAPES:
        return args.model
    shape = SHAPES[args.model]
    config = transformers.BertConfig(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{i}" for i in range(config.vocab_size - len(words))]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def start_step(task, params, mesh) -> tuple[Step, TrainState]:
    """Our train step, and the state before the first one, on the mesh."""
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-5), 1000)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.state_sharding(mesh, abstract, task.rules)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(params)
    return Step(task, optimizer, mesh=mesh, chunk=None, seed=0, shardings=shardings), state


def torch_adamw(model: torch.nn.Module, device: str) -> torch.optim.AdamW:
    """The same optimizer for a torch model."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if "bias" in name or "LayerNorm" in name else decay).append(parameter)
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-5,
        fused=device == "cuda",
    )


def device_name() -> str:
    kind = jax.devices()[0].device_kind
    return kind if jax.default_backend() == "gpu" else f"{platform.machine()} CPU"


def peak_flops() -> float | None:
    """Of the device, where it is known."""
    kind = jax.devices()[0].device_kind
    return next((value for name, value in PEAK_FLOPS.items() if name in kind), None)


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run: A B A B, so that a drifting machine is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds
