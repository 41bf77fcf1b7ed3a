"""What a reranker is worth: it reorders its retriever's hits, and teaches the next retriever.

    python benchmarks/distil.py            # in 2 CPU cores' time about 20 minutes a seed

The data is that of mining.py (operations of botocore, and queries that describe examples of them),
with fewer passages; or, with `--queries names`, many more queries: the name of an operation asks
for its documentation. Every step is a command that a person could type: a retriever is trained from
MiniLM; it mines hard negatives; a reranker trains on them, from the same MiniLM; it reorders the
retriever's hits of the test queries; it scores the mined rows; retrievers train on these rows from
MiniLM, with the same steps: one contrastively, the others from the scores. No operation is a
positive of both training and test queries, and negatives are mined among passages that no test
query asks for, or the reranker would learn that these are never right.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from mining import read_services, write_data
from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart

LENGTHS = "--query_max_length 32 --key_max_length 48"
RETRIEVER = (
    "--per_device_train_batch_size 16 --learning_rate 5e-5 "
    "--cos_temperature 0.05 --save_steps 1000 --logging_steps 5"
)
TESTED = 500  # names that are held out
RANDOM_NEGATIVES = 12  # of a name


LOSSES = {  # of retriever 2
    "contrastive": "--contrastive_weight 1 --distill_weight 0",
    "kl": "{both} --teacher_temperature {args.teacher_temperature}",
    "margin_mse": "--contrastive_weight 0 {margin}",
    "margin_mse+": "{both} {margin}",
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/distil"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--one_teacher", action="store_true", help="the first seed's, for all")
    parser.add_argument("--queries", choices=("examples", "names"), default="examples")
    parser.add_argument("--passages", type=int, default=4000)
    parser.add_argument("--group", type=int, default=4, help="keys of a retriever's query")
    parser.add_argument("--steps", type=int, default=60, help="of a retriever")
    parser.add_argument("--rank_steps", type=int, default=120)
    parser.add_argument("--rank_rate", type=float, default=1e-4)
    parser.add_argument("--rank_group", type=int, default=6)
    parser.add_argument("--hits", type=int, default=20, help="of a test query that are reranked")
    parser.add_argument("--retriever_weight", type=float, default=0.5, help="of both together")
    parser.add_argument("--negatives", type=int, default=9, help="mined, and scored")
    parser.add_argument("--scored", type=int, help="rows that the reranker scores [all]")
    parser.add_argument("--teacher_temperature", type=float, default=1.0)
    parser.add_argument("--distilled_weight", type=float, default=0.2, help="contrastive")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=LOSSES)
    parser.add_argument("--margin_temperature", type=float, default=10, help="of the teacher")
    args = parser.parse_args()
    {"examples": write_small, "names": write_names}[args.queries](args.folder, args.passages)
    for number, seed in enumerate(args.seeds):
        if number == 0 or not args.one_teacher:
            scored = teacher(args, seed, args.folder / str(seed))
        students(args, seed, args.folder / str(seed), scored)


def write_small(folder: Path, passages: int) -> None:
    """The queries of mining.py, with their operations and others, so many in all."""
    out = folder / "small"
    if (out / "mining_train.json").exists():
        return
    if not (folder / "whole/test.json").exists():
        write_data(folder / "whole")
    out.mkdir(exist_ok=True)
    train, test, corpus = (read(folder / f"whole/{n}.json") for n in ("train", "test", "corpus"))
    asked = {i for row in test for i in row["pos_index"]}
    kept = asked | {i for row in train for i in row["pos_index"] + row["neg_index"]}
    rest = [i for i in range(len(corpus)) if i not in kept]
    random.Random(0).shuffle(rest)
    needed = asked | {i for row in train for i in row["pos_index"]}
    order = [*needed, *(kept - needed), *rest][:passages]
    for name, ids in (("", order), ("mining_", [i for i in order if i not in asked])):
        number = {old: new for new, old in enumerate(ids)}
        write(out / f"{name}corpus.json", [corpus[i] for i in ids])
        for rows, of in ((train, "train"), (test, "test")):
            if of == "train" or not name:
                write(out / f"{name}{of}.json", [renumbered(row, number) for row in rows])


def write_names(folder: Path, passages: int) -> None:
    """Names of operations as queries, for about so many operations of whole services.

    Those of the test come last, so that the passages that are mined begin all passages.
    """
    out = folder / "small"
    if (out / "mining_train.json").exists():
        return
    services = [*read_services(folder / "whole").values()]
    rng = random.Random(0)
    rng.shuffle(services)
    names: dict[str, str] = {}  # by documentation: what is said twice has no one answer
    for service in services:
        for operation, text in service.operations.items():
            apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", operation)
            names.setdefault(text[:400], f"{service.name}: {apart.lower()}")
        if len(names) >= passages:
            break
    texts = [*names]
    rng.shuffle(texts)
    out.mkdir(exist_ok=True)
    rows = []
    for i, text in enumerate(texts):
        row = {"query": names[text], "pos": [text], "pos_index": [i], "task": "tool"}
        others = rng.sample(range(len(texts) - TESTED), RANDOM_NEGATIVES)
        row["neg_index"] = [j for j in others if j != i]
        row["neg"] = [texts[j] for j in row["neg_index"]]
        rows.append(row)
    corpus = [{"title": "", "text": text} for text in texts]
    write(out / "corpus.json", corpus)
    write(out / "mining_corpus.json", corpus[:-TESTED])
    write(out / "test.json", rows[-TESTED:])
    for name in ("train", "mining_train"):
        write(out / f"{name}.json", rows[:-TESTED])


def renumbered(row: dict, number: dict[int, int]) -> dict:
    row = row | {"pos_index": [number[i] for i in row["pos_index"]]}
    if "neg" in row:
        pairs = zip(row["neg"], row["neg_index"], strict=True)
        row["neg"] = [text for text, i in pairs if i in number]
        row["neg_index"] = [number[i] for i in row["neg_index"] if i in number]
    return row


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(args, seed: int, out: Path) -> tuple[str, str, str]:
    """Those of every search, of its test, and of training."""
    data, model = args.folder / "small", quickstart.prepare(cache_dir(None)).model
    base = f"--pooling_method mean --add_instruction false {LENGTHS} --log_path {out}/log"
    base += f" {template(args)}"
    test = f"--eval_data {data}/test.json --corpus {data}/corpus.json --metrics ndcg recall mrr"
    train = f"{base} {test} --query_encoder {model} --train_group_size {args.group} {RETRIEVER}"
    return base, test, f"{train} --max_steps {args.steps} --seed {seed}"


def template(args) -> str:
    return "--key_template {text}" if args.queries == "names" else ""


def teacher(args, seed: int, out: Path) -> Path:
    """A retriever's rows with mined negatives, and a reranker's scores of their keys."""
    base, test, train = flags(args, seed, out)
    data, model = args.folder / "small", quickstart.prepare(cache_dir(None)).model
    first = retriever(f"{train} --train_data {data}/train.json --contrastive_weight 1",
                      out / "first")  # fmt: skip
    report(seed, "retriever 1", first)
    encoder = f"--query_encoder {out}/first/checkpoint-{args.steps}/encoder --output_dir {out}"
    run("retrieve", f"{base} {encoder} {test} --hits {args.hits} --save_name hits")
    run("retrieve", f"{base} {encoder} --corpus {data}/mining_corpus.json --hits 30 "
        f"--eval_data {data}/mining_train.json --metrics mrr collate_neg --save_to_output "
        f"--max_neg_num {args.negatives} --save_name mined")  # fmt: skip
    mined = out / "mining_train.neg.mined.json"

    pairs = f"{LENGTHS} {template(args)} --log_path {out}/log --output_dir {out}"
    run("rank", f"{pairs}/ranker --ranker {model} --train_data {mined} --seed {seed} "
        f"--contrastive_weight 1 --train_group_size {args.rank_group} "
        f"--per_device_train_batch_size 12 --learning_rate {args.rank_rate} --logging_steps 10 "
        f"--max_steps {args.rank_steps} --save_steps 1000")  # fmt: skip
    reranked(args, seed, out, "reranker", "hits")
    some = out / "some.json"
    write(some, read(mined)[: args.scored])
    run("rank", f"{pairs} {ranker(args, out)} --eval_data {some} --metrics mrr collate_score "
        "--save_to_output --save_name teacher")  # fmt: skip
    return out / "some.scored.teacher.json"


def ranker(args, out: Path) -> str:
    return f"--ranker {out}/ranker/checkpoint-{args.rank_steps}/ranker"


def reranked(args, seed: int, out: Path, name: str, hits: str) -> None:
    """The reranker's order of a retriever's hits of the test queries, and that of both."""
    _, test, _ = flags(args, seed, out)
    for label, weight in ((name, 0.0), (f"{name} + hits", args.retriever_weight)):
        run("rank", f"{LENGTHS} {template(args)} --log_path {out}/log --output_dir {out} {test} "
            f"{ranker(args, out)} --load_result {out}/test.result.{hits}.json "
            f"--retriever_weight {weight} --save_name {name}")  # fmt: skip
        report(seed, label, json.loads((out / f"test.metrics.{name}.json").read_text()))


def students(args, seed: int, out: Path, scored: Path) -> None:
    """The same retriever from the same rows, by its losses; the reranker orders the hits of the
    one that learnt from no teacher."""
    base, test, train = flags(args, seed, out)
    words = {
        "args": args,
        "both": f"--contrastive_weight {args.distilled_weight} --distill_weight 1",
        "margin": f"--distill_loss margin_mse --teacher_temperature {args.margin_temperature}",
    }
    for name in args.losses:
        loss = LOSSES[name].format(**words)
        found = retriever(f"{train} --train_data {scored} {loss}", out / name)
        report(seed, f"{name} 2", found)
        if name == "contrastive" and (out / "ranker").exists():
            encoder = f"--query_encoder {out}/{name}/checkpoint-{args.steps}/encoder"
            run("retrieve", f"{base} {encoder} {test} --hits {args.hits} --output_dir {out} "
                "--save_name hits2")  # fmt: skip
            reranked(args, seed, out, "reranker-2", "hits2")


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
