"""Memory of a dense retrieval as the corpus grows.

    python benchmarks/memory.py            # 10,000, 100,000 and 1,000,000 passages

Runs the retrieve command as users do (tokenise, encode, search, metrics, mined file) with an
encoder of one layer, so that the time goes into data, and samples the process. Anonymous memory
is what it holds; the pages of its memory-mapped files, which the kernel takes back when it needs
them, are not in it.
"""

import json
import random
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from side_by_side import device_name, make_parser, save_model

QUERIES = 1000


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--passages", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    args = parser.parse_args()
    print(f"{device_name()}: {QUERIES} queries, 128 numbers a passage")
    print(f"{'passages':>10}{'corpus':>10}{'vectors':>10}{'anonymous memory':>18}{'seconds':>9}")
    for passages in args.passages:
        with TemporaryDirectory() as folder:
            measure(passages, Path(folder))


def measure(passages: int, folder: Path) -> None:
    model = save_model(Namespace(model="one-layer", dropout=0.0), folder / "model")
    size = write_data(passages, folder)
    words = f"--query_encoder {model} --eval_data {folder}/eval.json --corpus {folder}/corpus.json "
    words += (
        f"--output_dir {folder}/out --log_path {folder}/log --dataset_cache_dir {folder}/cache "
    )
    words += "--key_template {text} --add_instruction false --metrics mrr collate_neg --save_encode"
    started = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, "-m", "llme_jax.retrieve", *words.split()]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit((folder / "log.txt").read_text()[-2000:])
    vectors = sum(path.stat().st_size for path in folder.glob("out/embeddings/*/*.npy"))
    print(f"{passages:10}{size >> 20:7} MB{vectors >> 20:7} MB{peak >> 10:15} MB"
          f"{time.perf_counter() - started:9.0f}", flush=True)  # fmt: skip


def write_data(passages: int, folder: Path) -> int:
    """Passages of 5 to 60 random words, and queries that repeat words of one; the corpus' bytes."""
    rng = random.Random(0)
    with open(folder / "corpus.json", "w") as corpus, open(folder / "eval.json", "w") as queries:
        for i in range(passages):
            words = [f"w{rng.randrange(20_000)}" for _ in range(rng.randint(5, 60))]
            corpus.write(json.dumps({"text": " ".join(words)}) + "\n")
            if i < QUERIES:
                row = {"query": " ".join(words[:5]), "pos": [" ".join(words)], "pos_index": [i]}
                queries.write(json.dumps(row) + "\n")
    return (folder / "corpus.json").stat().st_size


def anonymous(pid: int) -> int:
    """KiB that a process holds without a file behind them."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(li.split()[1]) for li in status.splitlines() if li.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
