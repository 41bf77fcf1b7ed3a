"""What retrieval is worth to a language model, and what training the retriever is worth to it.

    python benchmarks/answers.py           # 10 to 40 minutes of 2 CPU cores

SmolLM2-135M-Instruct reads nothing, or what BM25, all-MiniLM-L6-v2 as it is, or the quickstart's
trained encoder has found, or what is right:

- calls: how likely it finds the right call of a function (`--task msc`) after the first function
  that was found. Every fourth of the quickstart's held-out requests (Berkeley Function Calling
  Leaderboard, Apache-2.0), which need functions that the encoder has not been trained on;
- memory: what it answers to the leaderboard's questions about long conversations (`--task qa`)
  after two turns that were found among all of them.
"""

import json
import subprocess
import sys
from pathlib import Path

from multitask import memory_questions
from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart
from llme_jax.quickstart import teacher as quickstart_teacher
from llme_jax.reports.answers import compare, read_answers
from llme_jax.reports.blocks import to_markdown

TEXTS = "--add_instruction false --query_max_length 64 --key_max_length 256"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/answers"))
    parser.add_argument("--every", type=int, default=4, help="every n-th request is asked")
    parser.add_argument("--seed", type=int, default=42, help="of the quickstart's training")
    args = parser.parse_args()
    files, folder = quickstart.prepare(cache_dir(None)), args.folder
    trained = folder / f"trained-{args.seed}"
    run("train", f"--config quickstart.py --seed {args.seed} --output_dir {trained}")
    teacher = quickstart_teacher.prepare_teacher(cache_dir(None))
    finding = {
        "bm25": "--retrieval_method bm25",
        "untrained": f"--query_encoder {files.model}",
        "trained": f"--query_encoder {trained}/best/encoder",
    }
    lm = f"--model_name_or_path {teacher} --context_max_length 2048 --log_path {folder}/log"
    calls(folder / "calls", files, args.every, finding, lm)
    del finding["trained"]  # for requests
    memory(folder / "memory", finding, lm)


def calls(folder: Path, files, every: int, finding: dict[str, str], lm: str) -> None:
    rows, corpus = read(files.test)[::every], read(files.corpus)
    texts = [f"{line['title']} {line['text']}" for line in corpus]
    write(folder / "requests.json", rows)
    keys = {"nothing": rows, "right": [row | {"key": [texts[row["pos_index"][0]]]} for row in rows]}
    for name, how in finding.items():
        run("retrieve", f"--eval_data {folder}/requests.json --corpus {files.corpus} {TEXTS} "
            f"{how} --metrics ndcg collate_key --save_to_output --output_dir {folder}/{name} "
            f"--log_path {folder}/log")  # fmt: skip
        keys[name] = read(folder / name / "requests.key.json")
    outputs = {}
    for name in ("nothing", *finding, "right"):
        asked, out = folder / name / "turns.json", folder / name / "out"
        write(asked, [row | {"key": row.get("key", [])[:1]} for row in keys[name]])
        run("evaluate", f"--task msc --eval_data {asked} --retrieval_method no {lm} "
            f"--output_dir {out}")  # fmt: skip
        (outputs[name],) = out.glob("*/*.output.*.json")
    show(outputs, ("untrained", "trained"))


def memory(folder: Path, finding: dict[str, str], lm: str) -> None:
    questions, turns = memory_questions()
    rows = [
        {"query": query, "answers": [answer], "pos_index": [right]}
        for query, answer, right, _ in questions
    ]
    write(folder / "corpus.json", [{"text": turn} for turn in turns])
    write(folder / "questions.json", rows)
    right = [row | {"key": [turns[row["pos_index"][0]]]} for row in rows]
    write(folder / "right.json", right)
    finding = {"nothing": "--retrieval_method no", **finding, "right": "--retrieval_method no"}
    outputs = {}
    for name, how in finding.items():
        asked = folder / ("right.json" if name == "right" else "questions.json")
        run("evaluate", f"--task qa --eval_data {asked} --corpus {folder}/corpus.json {TEXTS} "
            f"{how} --key_template {{text}} --few_shot 0 --key_num 2 --max_new_tokens 16 {lm} "
            f"--output_dir {folder}/{name}")  # fmt: skip
        (outputs[name],) = (folder / name).glob("*/*.output.*.json")
    show(outputs)


def show(outputs: dict[str, Path], *more: tuple[str, str]) -> None:
    """Everything against nothing, and what more is to be compared."""
    for before, after in (*(("nothing", name) for name in outputs if name != "nothing"), *more):
        answers = [read_answers(outputs[name], name) for name in (before, after)]
        print(to_markdown(f"{after} against {before}", compare(*answers)[:1]))


def run(command: str, words: str) -> None:
    subprocess.run([sys.executable, "-m", f"llme_jax.{command}", *words.split()], check=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
