"""One training step of llme_jax and of torch + transformers, side by side in one run.

    python benchmarks/train_step.py            # MiniLM's shape on CPU, BERT-base's on GPU
    python benchmarks/train_step.py --model BAAI/bge-base-en --queries 64

Both get the same weights, the same texts and the same loss (contrastive over B x N keys); torch
gets them padded to the longest, as the reference's collator does, ours are packed, as in training.
Both compute in the same precision (fp32 on CPU; bf16 with fp32 weights on GPU), clip at 1.0 and
apply AdamW. Runs of some steps alternate, A B A B, so that a drifting machine is fair to both; the
table gives the medians and the ratio pair by pair.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import torch
import transformers
from side_by_side import (
    add_model,
    alternate,
    device_name,
    make_parser,
    peak_flops,
    save_model,
    start_step,
    torch_adamw,
)

from llme_jax.config import Config, EncoderConfig, LossConfig
from llme_jax.data.batch import Batch, pack_padded, work
from llme_jax.devices import sharding
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.training.dual import DualTask


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    add_model(parser, gpu=gpu)
    parser.add_argument("--queries", type=int, default=128 if gpu else 8)
    parser.add_argument("--group", type=int, default=8, help="keys a query")
    parser.add_argument("--query_length", type=int, default=32)
    parser.add_argument("--key_length", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3, help="steps a block")
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()  # fmt: skip

    texts = make_texts(args)
    with TemporaryDirectory() as folder:
        model = save_model(args, Path(folder))
        ours, flops = jax_step(model, texts, args)
        theirs = torch_step(model, texts, args)
        runs = {
            "llme_jax": partial(run_block, ours, args),
            "torch": partial(run_block, theirs, args),
        }
        blocks = alternate(runs, args.blocks)
        blocks = {name: [t / args.steps for t in times] for name, times in blocks.items()}
    report(args, texts, blocks, flops)


def run_block(step: "Step", args) -> None:
    for _ in range(args.steps):
        step()
    step.wait()


def make_texts(args) -> dict[str, list[np.ndarray]]:
    """Random tokens; text lengths spread evenly between a quarter of the width and all of it."""
    rng = np.random.default_rng(0)

    def texts(count, width):
        ids = rng.integers(1000, 30000, (count, width), dtype=np.int32)
        lengths = rng.integers(width // 4, width + 1, count, dtype=np.int32)
        return [np.where(np.arange(width) < lengths[:, None], ids, 0), lengths]

    return {
        "query": texts(args.queries, args.query_length),
        "key": texts(args.queries * args.group, args.key_length),
    }


def make_batch(texts: dict, args, devices: int) -> Batch:
    """Without teacher scores; no key repeats."""
    hashes = np.arange(2 * args.queries * args.group, dtype=np.uint32).reshape(-1, 2)
    return Batch(
        {"texts": pack_padded(texts, devices)},
        np.zeros((args.queries, args.group), np.float32),
        np.zeros(args.queries, bool),
        hashes,
        hashes.reshape(args.queries, args.group, 2)[:, :1],
    )


class Step:
    """A step that can be called again and again, and waited for."""

    def __init__(self, run, wait):
        self._run, self.wait = run, wait
        for _ in range(2):  # compile, warm up
            run()
        wait()

    def __call__(self):
        self._run()


def jax_step(model: str, texts: dict, args) -> tuple[Step, float]:
    """Our step, and the model's operations in it, counted on real tokens."""
    encoder, params, _ = load_dual_encoder(EncoderConfig(query_encoder=model))
    mesh = sharding.make_mesh()
    task = DualTask(Config(), encoder, None)
    step, state = start_step(task, params, mesh)
    batch = make_batch(texts, args, mesh.size)
    on_mesh = sharding.batch_to_mesh(mesh, batch)
    loss = LossConfig(contrastive_weight=1.0, distill_weight=0.0)
    holder = {"state": state}

    def run():
        holder["state"], holder["metrics"] = step(holder["state"], [on_mesh], [loss])

    # Operations of the model, not of the program: forward and twice that backward.
    flops = 3 * task.forward_flops(params, work(batch))
    return Step(run, lambda: jax.block_until_ready(holder["metrics"])), flops


def torch_step(model: str, texts: dict, args) -> Step:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = transformers.AutoModel.from_pretrained(model, attn_implementation="sdpa")
    encoder.pooler = None
    encoder.to(device, torch.float32).train()
    optimizer = torch_adamw(encoder, device)

    def inputs(ids, lengths):
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
            "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
        }

    query, key = (inputs(*of_field) for of_field in texts.values())
    target = torch.arange(args.queries, device=device) * args.group

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            q = torch.nn.functional.normalize(encoder(**query).last_hidden_state[:, 0].float())
            k = torch.nn.functional.normalize(encoder(**key).last_hidden_state[:, 0].float())
        loss = torch.nn.functional.cross_entropy(q.float() @ k.float().T / 0.01, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()

    return Step(run, torch.cuda.synchronize if device == "cuda" else lambda: None)


def report(args, texts: dict, blocks: dict[str, list[float]], flops: float) -> None:
    tokens = sum(int(lengths.sum()) for _, lengths in texts.values())
    slots = sum(ids.size for ids, _ in texts.values())
    peak = peak_flops()
    ratios = [b / a for a, b in zip(blocks["llme_jax"], blocks["torch"], strict=True)]
    numbers = {
        "device": device_name(),
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "arguments": vars(args),
        "padding": 1 - tokens / slots,
        "seconds": blocks,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(f"{numbers['device']}, {numbers['versions']}")
    print(f"{args.model}: {args.queries} queries x {args.group} keys, {tokens} tokens, "
          f"{numbers['padding']:.0%} padding, {flops / 1e12:.2f} TFLOP a step")  # fmt: skip
    print(f"{'':10}{'ms/step':>10}{'queries/s':>11}{'tokens/s':>12}{'TFLOP/s':>9}{'MFU':>7}")
    for name, seconds in blocks.items():
        median = statistics.median(seconds)
        mfu = f"{flops / median / peak:.1%}" if peak else "-"
        print(f"{name:10}{median * 1e3:10.1f}{args.queries / median:11.1f}{tokens / median:12.0f}"
              f"{flops / median / 1e12:9.3f}{mfu:>7}")  # fmt: skip
    print("speed of llme_jax over torch: {median:.2f} (pairs {min:.2f} to {max:.2f})".format(
        **numbers["ratio"]))  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
