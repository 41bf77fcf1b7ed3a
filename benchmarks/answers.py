"""What retrieval is worth to a language model: calls of functions that it has never seen.

    python benchmarks/answers.py           # half an hour of 2 CPU cores, a third of it training

The quickstart's held-out requests and functions (Berkeley Function Calling Leaderboard,
Apache-2.0). SmolLM2-135M-Instruct writes the call of each request (`--task qa`: four solved
requests as demonstrations, which name functions that no held-out request needs), and is measured
on the right call's likelihood (`--task msc`, with the first hit as the earlier turn). It reads
nothing, or what BM25, all-MiniLM-L6-v2 as it is, or the quickstart's trained encoder has found, or
the right functions.
"""

import json
import subprocess
import sys
from pathlib import Path

from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart
from llme_jax.quickstart import teacher as quickstart_teacher
from llme_jax.reports.answers import compare, read_answers
from llme_jax.reports.blocks import to_markdown

FOUND = ("bm25", "untrained", "trained")
METHODS = ("nothing", *FOUND, "right")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/answers"))
    parser.add_argument("--every", type=int, default=4, help="every n-th request is answered")
    parser.add_argument("--seed", type=int, default=42, help="of the quickstart's training")
    args = parser.parse_args()
    files, folder = quickstart.prepare(cache_dir(None)), args.folder
    trained = folder / f"trained-{args.seed}"
    words = f"--seed {args.seed} --output_dir {trained} --log_path {folder}/log"
    run("train", f"--config quickstart.py {words}")
    encoders = {"untrained": files.model, "trained": trained / "best/encoder"}
    rows, corpus = read(files.test), read(files.corpus)
    texts = [f"{line['title']} {line['text']}" for line in corpus]
    write(folder / "requests.json", rows[:: args.every])
    right = [row | {"key": [texts[i] for i in row["pos_index"]]} for row in rows]
    write(folder / "right.json", right[:: args.every])

    teacher = quickstart_teacher.prepare_teacher(cache_dir(None))
    common = f"--model_name_or_path {teacher} --log_path {folder}/log"
    outputs: dict[str, dict[str, Path]] = {"qa": {}, "msc": {}}
    for method in METHODS:
        out = folder / (method if method != "trained" else f"trained-{args.seed}-keys")
        asked = folder / ("right.json" if method == "right" else "requests.json")
        how = (
            f"--eval_data {asked} --train_data {files.train} --few_shot 4 --context_max_length 2048"
        )
        how += " --max_new_tokens 48"
        if method in FOUND:
            how += f" --corpus {files.corpus} --add_instruction false --query_max_length 64"
            how += " --metrics ndcg recall collate_key"
            how += f" --retrieval_method {'bm25' if method == 'bm25' else 'dense'}"
            if method in encoders:
                how += f" --query_encoder {encoders[method]}"
        else:
            how += " --retrieval_method no"
        run("evaluate", f"--task qa --output_dir {out} {common} {how}")
        (outputs["qa"][method],) = out.glob("*/*.output.*.json")

        # The same requests, after the first key alone.
        (found,) = out.glob("*/requests.key.json") if method in FOUND else [asked]
        turns = [row | {"key": row.get("key", [])[:1]} for row in read(found)]
        write(out / "turns.json", turns)
        how = f"--eval_data {out}/turns.json --retrieval_method no --context_max_length 2048"
        run("evaluate", f"--task msc --output_dir {out}/turns {common} {how}")
        (outputs["msc"][method],) = (out / "turns").glob("*/*.output.*.json")

    for task, of_methods in outputs.items():
        for before, after in (
            *(("nothing", method) for method in METHODS[1:]),
            ("bm25", "trained"),
            ("untrained", "trained"),
        ):
            answers = [read_answers(of_methods[name], name) for name in (before, after)]
            print(to_markdown(f"{task}: {after} against {before}", compare(*answers)[:1]))


def run(command: str, words: str) -> None:
    subprocess.run([sys.executable, "-m", f"llme_jax.{command}", *words.split()], check=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
