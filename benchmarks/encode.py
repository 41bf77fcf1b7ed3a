"""Texts to vectors by llme_jax and by sentence-transformers, side by side in one run.

    python benchmarks/encode.py            # MiniLM's shape on CPU, BERT-base's on GPU
    python benchmarks/encode.py --model BAAI/bge-base-en --texts 100000

Both get the same weights and the same texts, whose lengths are spread as those of passages are
(log-normal, 70 tokens in the middle), tokenise them and give normalised vectors to the host, in
the same precision (fp32 on CPU, bf16 on GPU). Runs alternate, so that a drifting machine is fair
to both; the table gives the medians and the ratio pair by pair.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from side_by_side import add_model, alternate, device_name, make_parser, peak_flops, save_model

from llme_jax.config import EncoderConfig
from llme_jax.data.tokens import TokenStore, TokenWriter
from llme_jax.devices import sharding
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.retrieval.encode import encode, on_every_device


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    add_model(parser, gpu=gpu)
    parser.add_argument("--texts", type=int, default=50_000 if gpu else 500)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1000, help="ours")
    parser.add_argument("--their_batch_size", type=int, default=256 if gpu else 32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()  # fmt: skip
    args.dropout = 0.0

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(70), 0.6, args.texts), 4, 400).astype(int)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 20_000, n)) for n in lengths]
    with TemporaryDirectory() as folder:
        model = save_model(args, Path(folder) / "model")
        runs = {
            "llme_jax": llme_jax(model, args, Path(folder)),
            "sentence-transformers": sentence_transformers(model, args),
        }
        vectors = {name: run(texts) for name, run in runs.items()}  # compiles, warms up
        seconds = alternate({name: partial(run, texts) for name, run in runs.items()}, args.rounds)
        report(args, model, np.minimum(lengths + 2, args.max_length), vectors, seconds)


def llme_jax(model: str, args, folder: Path):
    encoder, params, tokenizer = load_dual_encoder(EncoderConfig(query_encoder=model))
    mesh = sharding.make_mesh()
    params = on_every_device(params, mesh)

    def run(texts):
        tokens = folder / "tokens"
        settings = {"max_length": args.max_length, "truncation_side": "right"}
        with TokenWriter(tokens, tokenizer, **settings) as writer:
            for text in texts:
                writer.append(text)
        store, size = TokenStore(tokens), args.batch_size
        return encode(encoder, params, store, field="key", batch_size=size, pad_id=0, mesh=mesh)

    return run


def sentence_transformers(model: str, args):
    gpu = torch.cuda.is_available()
    bert = Transformer(model, max_seq_length=args.max_length)
    pooling = Pooling(bert.get_embedding_dimension(), "cls")
    theirs = SentenceTransformer(
        modules=[bert, pooling, Normalize()], device="cuda" if gpu else "cpu"
    )
    if gpu:
        theirs = theirs.bfloat16()

    def run(texts):
        vectors = theirs.encode(texts, batch_size=args.their_batch_size, convert_to_tensor=True)
        return vectors.float().cpu().numpy()

    return run


def report(args, model: str, lengths: np.ndarray, vectors: dict, seconds: dict) -> None:
    config = read_config(Path(model), ENCODERS) if Path(model).is_dir() else None
    ours, theirs = vectors.values()
    cosine = float((ours * theirs).sum(1).min())
    flops = None
    if config:  # forward: 2 a weight and token in linear layers, 4 D a pair of tokens in attention
        width, layers = config.hidden_size, config.num_hidden_layers
        linear = layers * (4 * width**2 + 2 * width * config.intermediate_size)
        squares = (lengths.astype(float) ** 2).sum()
        flops = 2 * linear * lengths.sum() + 4 * width * layers * squares
    peak = peak_flops()
    print(f"{device_name()}, jax {jax.__version__}, torch {torch.__version__}; {args.model}: "
          f"{args.texts} texts, {lengths.sum()} tokens; least cosine {cosine:.6f}")  # fmt: skip
    print(f"{'':22}{'seconds':>9}{'texts/s':>10}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = f"{flops / median / 1e12:9.3f}" if flops else " " * 9
        mfu = f"{flops / median / peak:.1%}" if flops and peak else "-"
        print(f"{name:22}{median:9.2f}{args.texts / median:10.1f}{lengths.sum() / median:11.0f}"
              f"{rate}{mfu:>7}")  # fmt: skip
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"speed of llme_jax over sentence-transformers: {statistics.median(ratios):.2f} "
          f"(pairs {min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    if args.json:
        numbers = {"device": device_name(), "arguments": vars(args), "seconds": seconds}
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
