"""Pairs to scores, and training steps on them, by llme_jax and by sentence-transformers.

    python benchmarks/rank.py              # MiniLM's shape on CPU, BERT-base's on GPU
    python benchmarks/rank.py --model BAAI/bge-reranker-base --queries 1000

Both get the same weights and the same pairs, whose keys are as long as passages are (log-normal, 60
tokens in the middle). Reranking: both tokenise, sort by length and give raw scores to the host, in
the same precision (fp32 on CPU, bf16 on GPU). Training: forward, backward and update of the
cross-entropy over each query's own keys; theirs is a plain torch loop over the model that
CrossEncoder opens, with pairs padded to the longest of a batch, as its trainer does. Runs
alternate; the table gives the medians and the ratio pair by pair.
"""

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder
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

from llme_jax.config import RankConfig, RankDataConfig, RankLossConfig
from llme_jax.data.batch import Batch, pack_padded, work_of
from llme_jax.data.candidates import CandidateRow, parse_candidates
from llme_jax.data.pairs import pair_layout
from llme_jax.devices import sharding
from llme_jax.models.cross_encoder import load_cross_encoder, save_cross_encoder
from llme_jax.rerank.cross_scorer import CrossScorer
from llme_jax.training.cross import CrossTask


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    add_model(parser, gpu=gpu)
    parser.add_argument("--queries", type=int, default=500 if gpu else 10)
    parser.add_argument("--candidates", type=int, default=100 if gpu else 50)
    parser.add_argument("--max_length", type=int, default=192)
    parser.add_argument("--their_batch_size", type=int, default=256 if gpu else 32)
    parser.add_argument("--train_queries", type=int, default=32 if gpu else 4)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10 if gpu else 1, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    args.dropout = 0.0
    with TemporaryDirectory() as folder:
        opened = open_model(args, Path(folder))
        rows = make_rows(args.queries, args.candidates)
        numbers = {
            "device": device_name(),
            "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
            "arguments": vars(args),
            "reranking": rerank(args, opened, rows),
            "training": train(args, opened, make_rows(args.train_queries, args.group)),
        }
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


def open_model(args, folder: Path):
    """Ours, and the folder that holds the same with its head."""
    how = {"dtype": "auto", "cache_dir": None}
    encoder, params, tokenizer = load_cross_encoder(save_model(args, folder / "model"), **how)
    save_cross_encoder(folder, encoder, params, tokenizer, max_length=args.max_length)
    return encoder, params, tokenizer, str(folder / "ranker")


def make_rows(queries: int, candidates: int) -> list[CandidateRow]:
    rng = np.random.default_rng(0)

    def text(tokens: float) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 20_000, max(int(tokens), 1)))

    def row() -> CandidateRow:
        keys = [text(n) for n in np.clip(rng.lognormal(np.log(60), 0.6, candidates), 4, 400)]
        record = {"query": text(rng.integers(4, 15)), "key": keys}
        return parse_candidates(record, 0, metrics=())

    return [row() for _ in range(queries)]


def rerank(args, opened, rows: list[CandidateRow]) -> dict:
    encoder, params, tokenizer, folder = opened
    mesh, layout = sharding.make_mesh(), pair_layout(tokenizer, args.max_length, "right")
    scorer = CrossScorer(RankDataConfig(), encoder, tokenizer, layout, mesh, 1000)
    score = scorer.bound(params)
    theirs = open_theirs(folder)
    pairs = [(row.query, key) for row in rows for key in row.keys]
    runs = {
        "llme_jax": lambda: score(scorer.tokens(rows), lambda *_: None),
        "sentence-transformers": lambda: theirs.predict(
            pairs, batch_size=args.their_batch_size, show_progress_bar=False
        ),
    }
    ours, other = (np.asarray(run(), np.float32) for run in runs.values())  # compiles, warms up
    tokens = scorer.tokens(rows)[0].lengths
    task = CrossTask(RankConfig(), encoder, tokenizer, layout)
    flops = task.forward_flops(params, {"pairs": work_of(tokens)})
    print(f"{device_name()}, jax {jax.__version__}, torch {torch.__version__}; {args.model}")
    print(f"reranking {len(pairs)} pairs, {tokens.sum()} tokens; largest difference of two scores "
          f"{np.abs(ours - other).max():.1g}")  # fmt: skip
    return report(alternate(runs, args.rounds), len(pairs), int(tokens.sum()), flops)


def open_theirs(folder: str) -> CrossEncoder:
    gpu = torch.cuda.is_available()
    theirs = CrossEncoder(folder, device="cuda" if gpu else "cpu")
    if gpu:
        theirs.model.bfloat16()
    return theirs


def train(args, opened, rows: list[CandidateRow]) -> dict:
    encoder, params, tokenizer, folder = opened
    mesh, layout = sharding.make_mesh(), pair_layout(tokenizer, args.max_length, "right")
    scorer = CrossScorer(RankDataConfig(), encoder, tokenizer, layout, mesh, 1000)
    pairs, _ = scorer.tokens(rows)
    ids, lengths, second = pairs.padded(np.arange(len(pairs)), int(pairs.lengths.max()), 0)
    task = CrossTask(RankConfig(), encoder, tokenizer, layout)
    ours = our_step(task, params, mesh, ids, lengths, second, args)
    runs = {
        "llme_jax": ours,
        "torch": torch_step(folder, ids, lengths, second, args),
    }
    for run in runs.values():  # compiles, warms up
        run()
    flops = 3 * task.forward_flops(params, {"pairs": work_of(lengths)})
    print(f"training on {args.train_queries} queries x {args.group} keys, {lengths.sum()} tokens")
    seconds = alternate(runs, args.rounds)
    steps = args.steps
    return report(seconds, steps * len(pairs), steps * int(lengths.sum()), steps * flops)


def our_step(task: CrossTask, params, mesh, ids, lengths, second, args):
    step, state = start_step(task, params, mesh)
    loss = RankLossConfig(contrastive_weight=1.0, distill_weight=0.0)
    count = args.train_queries
    batch = Batch(
        {"pairs": pack_padded({"pair": [ids, lengths, second]}, mesh.size)},
        np.zeros((count, args.group), np.float32),
        np.zeros(count, bool),
        np.zeros((len(ids), 2), np.uint32),
        np.zeros((count, 1, 2), np.uint32),
    )
    on_mesh, holder = sharding.batch_to_mesh(mesh, batch), {"state": state}

    def run() -> None:
        for _ in range(args.steps):
            holder["state"], metrics = step(holder["state"], [on_mesh], [loss])
        jax.block_until_ready(metrics)

    return run


def torch_step(folder: str, ids, lengths, second, args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CrossEncoder(folder, device=device).model.train()
    optimizer = torch_adamw(model, device)
    column = np.arange(ids.shape[1])
    arrays = {
        "input_ids": ids,
        "attention_mask": column < lengths[:, None],
        "token_type_ids": (column >= second[:, None]) & (column < lengths[:, None]),
    }
    inputs = {k: torch.tensor(v, dtype=torch.long, device=device) for k, v in arrays.items()}
    target = torch.zeros(args.train_queries, dtype=torch.long, device=device)

    def run() -> None:
        for _ in range(args.steps):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                scores = model(**inputs).logits.view(args.train_queries, args.group)
            loss = torch.nn.functional.cross_entropy(scores.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def report(seconds: dict[str, list[float]], pairs: int, tokens: int, flops: float) -> dict:
    peak = peak_flops()
    print(f"{'':22}{'seconds':>9}{'pairs/s':>10}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}")
    for name, times in seconds.items():
        median = statistics.median(times)
        mfu = f"{flops / median / peak:.1%}" if peak else "-"
        print(f"{name:22}{median:9.2f}{pairs / median:10.1f}{tokens / median:11.0f}"
              f"{flops / median / 1e12:9.3f}{mfu:>7}")  # fmt: skip
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"speed of llme_jax over {[*seconds][1]}: {statistics.median(ratios):.2f} "
          f"(pairs of runs {min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": seconds, "pairs_per_second": {n: pairs / t for n, t in median.items()},
            "ratio": statistics.median(ratios)}  # fmt: skip


if __name__ == "__main__":
    main()
