"""Teacher scores by llme_jax, by the reference's loop and by a well-made torch loop, side by side.

    python benchmarks/score.py             # SmolLM2-135M's shape on CPU, Llama-2-7B's on GPU
    python benchmarks/score.py --model meta-llama/Llama-2-7b-chat-hf --pairs 20000

All get the same weights (random ones for a shape) and the same prompts as token ids, whose lengths
are spread as those of question, passage and answer are (log-normal, 170 tokens in the middle,
answers of 1 to 30). The reference's loop takes them as they come, 4 at a time, pads on the left and
computes all logits. The well-made one sorts by length, fills batches of as many tokens as ours, and
computes logits at the answers only; both use torch's fused attention. Precision is fp32 on CPU and
bf16 on GPU. Runs alternate; the table gives the medians.
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
from side_by_side import alternate, device_name, make_parser, peak_flops

from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import batches_by_length, choose_widths
from llme_jax.devices.sharding import make_mesh
from llme_jax.inference.over_store import TOKENS as A_DEVICE
from llme_jax.lm.batch_rows import TOKENS
from llme_jax.lm.likelihood import Scorer
from llme_jax.lm.prompts import Prompts
from llme_jax.lm.scoring import WIDTHS
from llme_jax.models.causal_lm import CausalLM, load_causal_lm
from llme_jax.models.llama import LlamaConfig
from llme_jax.models.platform import compute_dtype

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip


def main() -> None:
    parser, gpu = make_parser(__doc__), jax.default_backend() == "gpu"
    add_language_model(parser, gpu=gpu)
    parser.add_argument("--pairs", type=int, default=4000 if gpu else 128)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3 if gpu else 2)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()  # fmt: skip

    with TemporaryDirectory() as temporary:
        folder = Path(save(args.model, Path(temporary)))
        config = LlamaConfig.read(folder / "config.json")
        prompts = make_prompts(args, config.vocab_size)
        theirs = open_theirs(folder, gpu=gpu)
        runs = {
            "llme_jax": llme_jax(folder, config, prompts, args),
            "torch, as the reference": partial(as_the_reference, theirs, prompts),
            "torch, well made": partial(well_made, theirs, prompts),
        }
        scores = {name: run() for name, run in runs.items()}  # compiles, warms up
        seconds = alternate(runs, args.rounds)
        report(args, config, prompts, scores, seconds)


def add_language_model(parser, *, gpu: bool) -> None:
    parser.add_argument(
        "--model",
        default="llama-2-7b" if gpu else "smollm2-135m",
        help=f"{', '.join(SHAPES)} with random weights, or a folder",
    )


def open_theirs(folder: Path, *, gpu: bool):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if gpu else torch.float32
    )
    return theirs.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save(model: str, folder: Path) -> str:
    if model not in SHAPES:
        return model
    config = transformers.LlamaConfig(**SHAPES[model], max_position_embeddings=4096)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
    made.save_pretrained(folder)
    return str(folder)


def make_prompts(args, vocabulary: int) -> Prompts:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(170), 0.4, args.pairs).astype(int).clip(40, args.longest)
    ids = rng.integers(3, vocabulary, lengths.sum()).astype(np.uint32)
    store = TokenStore.of(np.split(ids, np.cumsum(lengths)[:-1]))
    return Prompts(store, rng.integers(1, 31, args.pairs).astype(np.int32))


def llme_jax(folder: Path, config: LlamaConfig, prompts: Prompts, args):
    mesh = make_mesh()
    lm = CausalLM(config, compute_dtype("auto"))
    widths = choose_widths(prompts.store.lengths, args.longest, WIDTHS)
    scorer = Scorer(lm, load_causal_lm(lm, folder, mesh), mesh, widths, None)
    return lambda: scorer(prompts, lambda pairs, tokens: None)


@torch.no_grad()
def as_the_reference(model, prompts: Prompts) -> np.ndarray:
    scores, (store, answers) = [], prompts
    for start in range(0, len(store), 4):
        texts = range(start, min(start + 4, len(store)))
        width = max(len(store[i]) for i in texts)
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, i in enumerate(texts):
            tokens = torch.from_numpy(store[i].astype(np.int64))
            ids[row, width - len(tokens) :] = tokens
            mask[row, width - len(tokens) :] = 1
            labels[row, width - int(answers[i]) :] = tokens[-int(answers[i]) :]
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(model.device),
            reduction="none",
        ).view(len(texts), -1)  # fmt: skip
        scores.append((-loss.sum(1).cpu() / torch.tensor([int(answers[i]) for i in texts])).numpy())
    return np.concatenate(scores)


@torch.no_grad()
def well_made(model, prompts: Prompts) -> np.ndarray:
    store, answers = prompts
    scores, pending = np.empty(len(store), np.float32), []
    tokens = min(TOKENS, A_DEVICE["gpu" if model.device.type == "cuda" else "cpu"])
    for texts, _, width in batches_by_length(
        store.lengths, lambda n: n, lambda width: max(tokens // width, 1)
    ):
        ids, lengths = store.padded(texts, width, 0)
        hidden = model.model(torch.from_numpy(ids).long().to(model.device)).last_hidden_state
        counts = answers[texts]
        row = np.repeat(np.arange(len(texts)), counts)
        column = np.concatenate([np.arange(n - a, n) for n, a in zip(lengths, counts, strict=True)])
        logits = model.lm_head(hidden[row, column - 1]).float()
        right = torch.from_numpy(ids[row, column]).long().to(model.device)
        logs = logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
        total = torch.zeros(len(texts), device=model.device)
        total.index_add_(0, torch.from_numpy(row).to(model.device), logs)
        pending.append((texts, total))
    for texts, total in pending:
        scores[texts] = total.cpu().numpy() / answers[texts]
    return scores


def report(args, config: LlamaConfig, prompts: Prompts, scores: dict, seconds: dict) -> None:
    lengths = prompts.store.lengths.astype(float)
    heads, keys, width = (
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    )  # fmt: skip
    layer = 2 * width * (heads + keys) * config.head_dim + 3 * width * config.intermediate_size
    linear = config.num_hidden_layers * layer * lengths.sum()
    head = width * config.vocab_size * prompts.answer_lengths.sum()
    # Of attention, the half below the diagonal: q k and weights v, 2 operations a product each.
    attention = config.num_hidden_layers * 2 * heads * config.head_dim * (lengths**2).sum()
    flops = 2 * (linear + head) + attention
    peak = peak_flops()
    difference = max(np.abs(s - scores["llme_jax"]).max() for s in scores.values())
    print(f"{device_name()}, jax {jax.__version__}, torch {torch.__version__}; {args.model}: "
          f"{args.pairs} pairs, {lengths.sum():.0f} tokens; scores differ by {difference:.1e} at "
          "most")  # fmt: skip
    print(
        f"{'':24}{'seconds':>9}{'pairs/s':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'ratio':>7}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        mfu = f"{flops / median / peak:.1%}" if peak else "-"
        rounds = zip(times, seconds["llme_jax"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in rounds)
        print(f"{name:24}{median:9.2f}{args.pairs / median:9.2f}{lengths.sum() / median:10.0f}"
              f"{flops / median / 1e12:9.3f}{mfu:>7}{ratio:7.2f}")  # fmt: skip
    print("ratio: how many times as long as llme_jax takes, the median of the rounds")
    memory = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        print(f"peak memory of llme_jax: {memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
    if args.json:
        numbers = {"device": device_name(), "arguments": vars(args), "seconds": seconds}
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
