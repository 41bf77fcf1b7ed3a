"""Tokens that llme_jax and transformers' generate read and write a second, side by side.

    python benchmarks/generate.py          # SmolLM2-135M's shape on CPU, Llama-2-7B's on GPU
    python benchmarks/generate.py --model meta-llama/Llama-2-7b-chat-hf --prompts 500

Both get the same weights (random ones for a shape) and the same prompts as token ids (log-normal,
300 tokens in the middle, as of three passages and a question), longest first, in batches of the
same number of prompts, and write greedily to the last token, with no end of text. transformers pads
on the left and has its fused attention and its dynamic cache. Precision is fp32 on CPU and bf16 on
GPU. Reading is the time to the first token; writing is what --new tokens take beyond it. Runs
alternate; the table gives the medians.
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
from score import add_language_model, open_theirs, save
from side_by_side import alternate, device_name, make_parser

from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import batches_by_length, choose_widths
from llme_jax.devices.sharding import make_mesh
from llme_jax.lm.generation import Generator
from llme_jax.models.causal_lm import CausalLM, load_causal_lm
from llme_jax.models.llama import LlamaConfig
from llme_jax.models.platform import compute_dtype

WIDTHS = 4


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    add_language_model(parser, gpu=gpu)
    parser.add_argument("--prompts", type=int, default=256 if gpu else 16)
    parser.add_argument("--batch_size", type=int, default=32 if gpu else 8)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64 if gpu else 32, help="tokens a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()

    with TemporaryDirectory() as temporary:
        folder = Path(save(args.model, Path(temporary)))
        config = LlamaConfig.read(folder / "config.json")
        prompts = make_prompts(args, config.vocab_size)
        theirs = open_theirs(folder, gpu=gpu)
        ours = partial(llme_jax, folder, config, prompts, args)
        runs = {
            "llme_jax": [ours(1), ours(args.new)],
            "transformers": [partial(generate, theirs, prompts, args, n) for n in (1, args.new)],
        }
        written = {name: both[1]() for name, both in runs.items()}  # compiles, warms up
        for reading, _ in runs.values():
            reading()
        turns = {(name, i): run for name, both in runs.items() for i, run in enumerate(both)}
        report(args, prompts, written, alternate(turns, args.rounds))


def make_prompts(args, vocabulary: int) -> TokenStore:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(300), 0.4, args.prompts).astype(int).clip(40, args.longest)
    ids = rng.integers(3, vocabulary, lengths.sum()).astype(np.uint32)
    return TokenStore.of(np.split(ids, np.cumsum(lengths)[:-1]))


def llme_jax(folder: Path, config: LlamaConfig, prompts: TokenStore, args, new: int):
    mesh = make_mesh()
    lm = CausalLM(config, compute_dtype("auto"))
    widths = choose_widths(prompts.lengths, args.longest, WIDTHS)
    params = load_causal_lm(lm, folder, mesh)
    stops = np.zeros(config.vocab_size, bool)
    write = Generator(lm, params, mesh, widths, args.batch_size, new=new, stops=stops)
    return lambda: write(prompts, lambda texts, tokens: None)


@torch.no_grad()
def generate(model, prompts: TokenStore, args, new: int) -> list[np.ndarray]:
    written: list[np.ndarray] = [None] * len(prompts)
    sizes = prompts.lengths, lambda n: n, lambda _: args.batch_size
    for texts, _, width in batches_by_length(*sizes):
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(texts):
            tokens = torch.from_numpy(prompts[i].astype(np.int64))
            ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        for row, i in enumerate(texts):
            written[i] = out[row, width:].cpu().numpy()
    return written


def report(args, prompts: TokenStore, written: dict, seconds: dict) -> None:
    read, new = int(prompts.lengths.sum()), len(prompts) * (args.new - 1)
    same = sum(np.array_equal(*both) for both in zip(*written.values(), strict=True))
    print(f"{device_name()}, jax {jax.__version__}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; {args.model}: {len(prompts)} prompts of {read} tokens, "
          f"{args.batch_size} at a time, {args.new} new tokens each; {same} texts are the "
          "same")  # fmt: skip
    print(f"{'':14}{'read':>9}{'tokens/s':>10}{'ratio':>7}{'write':>9}{'tokens/s':>10}{'ratio':>7}")
    times = {}
    for name in written:
        reading, all_ = seconds[name, 0], seconds[name, 1]
        times[name] = reading, [b - a for a, b in zip(reading, all_, strict=True)]
    for name, parts in times.items():
        line = f"{name:14}"
        for tokens, part, ours in zip((read, new), parts, times["llme_jax"], strict=True):
            median = statistics.median(part)
            ratio = statistics.median(a / b for a, b in zip(part, ours, strict=True))
            line += f"{median:8.2f}s{tokens / median:10.0f}{ratio:7.2f}"
        print(line)
    print("ratio: how many times as long as llme_jax takes, the median of the rounds")
    if args.json:
        numbers = {"device": device_name(), "arguments": vars(args), "seconds": times}
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
