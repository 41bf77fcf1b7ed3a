"""What a reranker is worth: it reorders its retriever's hits, and teaches the next retriever.

    python benchmarks/distil.py            # in 2 CPU cores' time about a quarter of an hour a seed

On the quickstart's data and model, every step a command that a person could type: a retriever is
trained; it mines hard negatives; a reranker trains on them, from the same MiniLM; it reorders the
retriever's hits of the test queries; it scores the mined rows; two retrievers train on these rows
from MiniLM, with the same steps: one contrastively, one distilled from the scores. No test query
asks for a function that training has seen.
"""

import json
import subprocess
import sys
from pathlib import Path

from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart

LENGTHS = "--query_max_length 64 --key_max_length 64"
PAIRS = "--query_max_length 40 --key_max_length 40"
RETRIEVER = (
    "--per_device_train_batch_size 16 --train_group_size 4 --learning_rate 5e-5 "
    "--cos_temperature 0.05 --save_steps 1000 --logging_steps 5"
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/distil"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--steps", type=int, default=50, help="of a retriever")
    parser.add_argument("--rank_steps", type=int, default=200)
    parser.add_argument("--rank_rate", type=float, default=1e-4)
    parser.add_argument("--rank_group", type=int, default=6)
    parser.add_argument("--hits", type=int, default=20, help="of a test query that are reranked")
    parser.add_argument("--negatives", type=int, default=15, help="mined, and scored")
    parser.add_argument("--teacher_temperature", type=float, default=1.0)
    parser.add_argument("--student_temperature", type=float, default=1.0)
    parser.add_argument("--distilled_weight", type=float, default=0.2, help="contrastive")
    args = parser.parse_args()
    for seed in args.seeds:
        one_seed(args, seed, args.folder / str(seed))


def one_seed(args, seed: int, out: Path) -> None:
    files = quickstart.prepare(cache_dir(None))
    base = f"--query_encoder {files.model} --pooling_method mean --add_instruction false {LENGTHS} "
    base += f"--corpus {files.corpus} --log_path {out}/log"
    test = f"--eval_data {files.test} --metrics ndcg recall mrr"
    train = f"{RETRIEVER} --max_steps {args.steps} --seed {seed}"

    first = retriever(f"{base} {test} {train} --train_data {files.train} --contrastive_weight 1",
                      out / "first")  # fmt: skip
    report(seed, "retriever 1", first)
    found = base.replace(str(files.model), f"{out}/first/checkpoint-{args.steps}/encoder")
    run("retrieve", f"{found} {test} --hits {args.hits} --output_dir {out} --save_name hits")
    rows, corpus = quickstart.prepare_mining(cache_dir(None))
    found = found.replace(str(files.corpus), str(corpus))
    mined = f"{out}/{rows.stem}.neg.mined.json"
    run("retrieve", f"{found} --eval_data {rows} --metrics mrr collate_neg --hits 30 "
        f"--max_neg_num {args.negatives} --output_dir {out} --save_to_output --save_name mined"
        )  # fmt: skip

    pairs = f"{PAIRS} --log_path {out}/log --output_dir {out}"
    run("rank", f"{pairs}/ranker --ranker {files.model} --train_data {mined} --seed {seed} "
        f"--contrastive_weight 1 --train_group_size {args.rank_group} --select_negative random "
        f"--per_device_train_batch_size 12 --learning_rate {args.rank_rate} --logging_steps 10 "
        f"--max_steps {args.rank_steps} --save_steps 1000")  # fmt: skip
    ranker = f"--ranker {out}/ranker/checkpoint-{args.rank_steps}/ranker"
    run("rank", f"{pairs} {ranker} {test} --load_result {out}/test.result.hits.json "
        f"--corpus {files.corpus} --save_name reranked")  # fmt: skip
    report(seed, "reranker", json.loads((out / "test.metrics.reranked.json").read_text()))

    run("rank", f"{pairs} {ranker} --eval_data {mined} --metrics mrr collate_score "
        "--save_to_output --save_name teacher")  # fmt: skip
    scored = f"{out}/{Path(mined).stem}.scored.teacher.json"
    losses = {
        "contrastive": "--contrastive_weight 1 --distill_weight 0",
        "distilled": f"--contrastive_weight {args.distilled_weight} --distill_weight 1 "
        f"--teacher_temperature {args.teacher_temperature} "
        f"--student_temperature {args.student_temperature}",
    }
    for name, loss in losses.items():
        words = f"{base} {test} {train} --train_data {scored} {loss}"
        report(seed, f"{name} 2", retriever(words, out / name))


def retriever(words: str, out: Path) -> dict[str, float]:
    """Trains one; the metrics of its last step."""
    run("train", f"{words} --output_dir {out}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    last = next(line for line in reversed(lines) if "eval_ndcg@10" in line)
    return {name.removeprefix("eval_"): value for name, value in last.items()}


def run(command: str, words: str) -> None:
    argv = [sys.executable, "-m", f"llme_jax.{command}", *words.split()]
    subprocess.run(argv, check=True, stdout=2)


def report(seed: int, name: str, metrics: dict[str, float]) -> None:
    print(f"{seed:>4}  {name:14} ndcg@10 {metrics['ndcg@10']:.4f}  recall@1 "
          f"{metrics['recall@1']:.4f}  mrr@10 {metrics['mrr@10']:.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
