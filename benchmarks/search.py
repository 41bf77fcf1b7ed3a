"""Exact search by llme_jax, by torch (matmul + topk) and by faiss Flat, side by side in one run.

    python benchmarks/search.py            # 100,000 keys of 384 numbers on CPU
    python benchmarks/search.py --keys 5000000 --width 768 --queries 4096

All search the same random vectors in fp32 from host memory: what it takes to bring the keys to the
device is part of a search, as it is in use. torch runs on the GPU when there is one, faiss on the
CPU. Runs alternate, A B C A B C, so that a drifting machine is fair to all; the table gives the
medians, the ratios are taken round by round.
"""

import json
import statistics
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
from side_by_side import alternate, device_name, make_parser

from llme_jax.devices.sharding import make_mesh
from llme_jax.retrieval.exact import search


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    parser.add_argument("--keys", type=int, default=5_000_000 if gpu else 100_000)
    parser.add_argument("--width", type=int, default=768 if gpu else 384)
    parser.add_argument("--queries", type=int, default=4096 if gpu else 1000)
    parser.add_argument("--hits", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()  # fmt: skip

    rng = np.random.default_rng(0)
    queries, keys = (
        rng.standard_normal((n, args.width), np.float32) for n in (args.queries, args.keys)
    )
    runs = {"llme_jax": llme_jax(args), "torch": torch_topk(args), **faiss_flat(args)}
    found = {name: run(queries, keys) for name, run in runs.items()}  # compiles, warms up
    overlap = {name: share_found(ids, found["torch"]) for name, ids in found.items()}
    timed = {name: partial(run, queries, keys) for name, run in runs.items()}
    seconds = alternate(timed, args.rounds)
    report(args, seconds, overlap)


def llme_jax(args):
    mesh = make_mesh()

    def run(queries, keys):
        return search(queries, keys, args.hits, "ip", batch_size=args.batch_size, mesh=mesh)[1]

    return run


def torch_topk(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False

    def run(queries, keys):
        keys, out = torch.from_numpy(keys).to(device), []
        for start in range(0, len(queries), args.batch_size):
            batch = torch.from_numpy(queries[start : start + args.batch_size]).to(device)
            out.append((batch @ keys.T).topk(args.hits).indices.cpu().numpy())
        return np.concatenate(out)

    return run


def faiss_flat(args) -> dict:
    try:
        import faiss
    except ImportError:
        return {}

    def run(queries, keys):
        index = faiss.IndexFlatIP(keys.shape[1])
        index.add(keys)
        return index.search(queries, args.hits)[1]

    return {"faiss": run}


def share_found(ids: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the wanted hits that were found, over all queries."""
    rows = zip(ids, wanted, strict=True)
    return float(np.mean([np.isin(b, a).mean() for a, b in rows]))


def report(args, seconds: dict[str, list[float]], overlap: dict[str, float]) -> None:
    device = device_name()
    flops = 2 * args.queries * args.keys * args.width
    print(f"{device}, jax {jax.__version__}, torch {torch.__version__}: {args.queries} queries, "
          f"{args.keys} keys of {args.width}, {args.hits} hits")  # fmt: skip
    print(f"{'':10}{'seconds':>9}{'queries/s':>11}{'GFLOP/s':>9}{'ratio':>7}  same hits as torch")
    ratios = {}
    for name, times in seconds.items():
        rounds = zip(times, seconds["llme_jax"], strict=True)
        ratios[name] = statistics.median(theirs / ours for theirs, ours in rounds)
        median = statistics.median(times)
        print(f"{name:10}{median:9.2f}{args.queries / median:11.1f}{flops / median / 1e9:9.1f}"
              f"{ratios[name]:7.2f}  {overlap[name]:.2%}")  # fmt: skip
    print("ratio: how many times as long as llme_jax takes, the median of the rounds")
    if args.json:
        numbers = {"device": device, "arguments": vars(args), "seconds": seconds, "ratio": ratios}
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
