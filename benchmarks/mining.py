"""What mined negatives are worth: the retrieve command mines, the train command trains.

    python benchmarks/mining.py            # in 2 CPU cores' time about an hour

The corpus are the documented operations of botocore (Apache-2.0, one PyPI package), a query is the
description of one of its examples, its positive the operation shown. No operation is a positive
of both training and test queries. all-MiniLM-L6-v2 is trained with random negatives and with those
that BM25 and MiniLM itself find, for several seeds, and evaluated on the test queries.
"""

import gzip
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart

PACKAGE = "botocore==1.44.5"
RANDOM_NEGATIVES = 30
TRAIN = (
    "--max_steps 60 --per_device_train_batch_size 16 --train_group_size 4 --learning_rate 5e-5 "
    "--contrastive_weight 1 --cos_temperature 0.05 --save_steps 1000 --logging_steps 10"
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/mining"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = parser.parse_args()
    folder = args.folder
    if not (folder / "test.json").exists():
        write_data(folder)
    model = quickstart.prepare(cache_dir(None)).model
    words = f"--query_encoder {model} --pooling_method mean --add_instruction false "
    words += f"--query_max_length 48 --key_max_length 48 --corpus {folder}/corpus.json "
    words += f"--log_path {folder}/log "
    for method in ("bm25", "dense"):
        if not (folder / f"train.neg.{method}.json").exists():
            run("retrieve", f"{words} --retrieval_method {method} --save_name {method} "
                f"--eval_data {folder}/train.json --metrics mrr collate_neg --max_neg_num 30 "
                f"--output_dir {folder}/mined --save_encode")  # fmt: skip
    test = f"--eval_data {folder}/test.json --metrics ndcg recall"
    run("retrieve", f"{words} {test} --output_dir {folder}/mined --save_name untrained")
    metrics = folder / "mined/test.metrics.untrained.json"
    report("untrained", "", json.loads(metrics.read_text()))
    for seed in args.seeds:
        for name in ("train", "train.neg.bm25", "train.neg.dense"):
            out = folder / f"{name}-{seed}"
            run("train", f"{words} {test} {TRAIN} --train_data {folder}/{name}.json "
                f"--output_dir {out} --seed {seed}")  # fmt: skip
            lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
            last = next(line for line in reversed(lines) if "eval_ndcg@10" in line)
            report(name, seed, {key.removeprefix("eval_"): last[key] for key in last})


def run(command: str, words: str) -> None:
    subprocess.run([sys.executable, "-m", f"llme_jax.{command}", *words.split()], check=True)


def report(name: str, seed, metrics: dict) -> None:
    print(f"{name:18}{seed:>4}  ndcg@10 {metrics['ndcg@10']:.4f}  recall@1 "
          f"{metrics['recall@1']:.4f}", flush=True)  # fmt: skip


class Service(NamedTuple):
    """What botocore says of a service.

    Attributes:
        name: as people call it.
        operations: documentation without tags, by operation.
        examples: descriptions of examples, by operation.
    """

    name: str
    operations: dict[str, str]
    examples: dict[str, list[str]]


def read_services(folder: Path) -> dict[str, Service]:
    """All of them, from the wheel that pip downloads into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    subprocess.run(command, check=True)
    services = {}
    with zipfile.ZipFile(next(folder.glob("botocore*.whl"))) as wheel:
        names = {*wheel.namelist()}
        # The last is the newest of the versions of a service.
        for name in sorted(name for name in names if name.endswith("service-2.json.gz")):
            content = json.loads(gzip.decompress(wheel.read(name)))
            operations = {}
            for operation, described in content["operations"].items():
                text = re.sub(r"<[^>]*>|\s+", " ", described.get("documentation", "")).strip()
                if text:
                    operations[operation] = text
            shown = name.replace("service-2.json.gz", "examples-1.json")
            examples = json.loads(wheel.read(shown))["examples"] if shown in names else {}
            said = {
                operation: sorted({e.get("description") or e.get("title", "") for e in of} - {""})
                for operation, of in examples.items()
            }
            about = content["metadata"]
            called = about.get("serviceAbbreviation") or about["serviceFullName"]
            services[name.split("/")[2]] = Service(called, operations, said)
    return services


def write_data(folder: Path) -> None:
    """train.json, test.json and corpus.json."""
    corpus, index, queries = [], {}, []
    services = read_services(folder)
    for service, of in services.items():
        for operation, text in of.operations.items():
            index[service, operation] = len(corpus)
            corpus.append({"title": f"{service} {operation}", "text": text})
    for service, of in services.items():
        for operation, said in of.examples.items():
            if (service, operation) in index:
                queries += [(text, index[service, operation]) for text in said]
    rng = random.Random(42)
    held_out = sorted({positive for _, positive in queries})
    rng.shuffle(held_out)
    held_out = set(held_out[: len(held_out) // 3])
    rest = [i for i in range(len(corpus)) if i not in held_out]
    files = {"train": [], "test": []}
    for text, positive in queries:
        row = {"query": text, "pos_index": [positive], "task": "tool"}
        if positive not in held_out:
            negatives = [i for i in rng.sample(rest, RANDOM_NEGATIVES) if i != positive]
            keys = ["{title} {text}".format(**corpus[i]) for i in (positive, *negatives)]
            row |= {"pos": keys[:1], "neg": keys[1:], "neg_index": negatives}
        files["test" if positive in held_out else "train"].append(row)
    for name, rows in (*files.items(), ("corpus", corpus)):
        print(f"{name}: {len(rows)} rows")
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json").write_text("".join(lines))


if __name__ == "__main__":
    main()
