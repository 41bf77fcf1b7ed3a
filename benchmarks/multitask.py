"""One model for three tasks against three models: scoring, training with recipes, evaluation.

    python benchmarks/multitask.py         # half an hour of 2 CPU cores a seed

- tool: the quickstart's requests and functions (Berkeley Function Calling Leaderboard, Apache-2.0);
- chat: the leaderboard's memory questions, whose evidence is one turn of long conversations (the
  scenario stands in front of both, as several users say how old they are);
- qa: the questions and answers of Perl's and Python's FAQ (Debian's perl-doc and python3.11-doc,
  downloaded with apt-get, unpacked with dpkg).

SmolLM2-135M-Instruct scores the candidates of chat and qa. all-MiniLM-L6-v2 is then trained with
the recipes of `--version llm-embedder`: once on all files, every batch from one of them, and once a
file, for as many batches as the file had in the joint run. No test query shares its evidence
with a training query.
"""

import itertools
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from side_by_side import make_parser

from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart
from llme_jax.quickstart import teacher as quickstart_teacher

DEBIAN = {
    "perl-doc": "usr/share/perl/*/pod/perlfaq[1-9].pod",
    "python3.11-doc": "usr/share/doc/python3.11/html/_sources/faq/*.rst.txt",
}
TASKS = {"tool": 1, "chat": 4, "qa": 2}  # how often a file is listed: the small ones repeat
CANDIDATES = 12  # that the language model scores for a query
TEXTS = (
    "--pooling_method mean --version llm-embedder --query_max_length 64 --key_max_length 96 "
    "--key_template {text}"
)
TRAIN = (
    "--use_train_config --inbatch_same_dataset epoch --train_group_size 4 "
    "--per_device_train_batch_size 16 --learning_rate 5e-5 --cos_temperature 0.05 "
    "--logging_steps 10 --save_steps 10000"
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/multitask"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    args = parser.parse_args()
    folder = args.folder
    for task in TASKS:
        if not (folder / task / "test.json").exists():
            write_data(folder, task)
    teacher = quickstart_teacher.prepare_teacher(cache_dir(None))
    for task in ("chat", "qa"):
        if not scored(folder, task).exists():
            run("score", f"--eval_data {folder}/{task}/train.json --model_name_or_path {teacher} "
                "--save_name smollm2 --key_max_length 128")  # fmt: skip
    model = quickstart.prepare(cache_dir(None)).model
    table = {"untrained": evaluate(folder, model, "untrained", "--add_instruction false")}
    table["untrained, with instructions"] = evaluate(folder, model, "untrained-instructed")
    for seed in args.seeds:
        joint = folder / f"joint-{seed}"
        files = [scored(folder, task) for task, times in TASKS.items() for _ in range(times)]
        train(model, files, joint, args.steps, seed)
        table[f"one model, seed {seed}"] = evaluate(folder, encoder(joint), f"joint-{seed}")
        single = {}
        for task, steps in batches(joint).items():
            out = folder / f"{task}-{seed}"
            train(model, [scored(folder, task)], out, steps, seed)
            single |= evaluate(folder, encoder(out), f"{task}-{seed}", tasks=[task])
        table[f"one model a task, seed {seed}"] = single
    for name, metrics in table.items():
        print(f"{name:32}" + "  ".join(f"{task} {metrics[task]:.4f}" for task in TASKS))


def run(command: str, words: str) -> None:
    subprocess.run([sys.executable, "-m", f"llme_jax.{command}", *words.split()], check=True)


def train(model: Path, files: list[Path], out: Path, steps: int, seed: int) -> None:
    run("train", f"--query_encoder {model} {TEXTS} {TRAIN} --max_steps {steps} --seed {seed} "
        f"--train_data {' '.join(map(str, files))} --output_dir {out}")  # fmt: skip


def evaluate(folder: Path, model: Path, name: str, more: str = "", tasks=TASKS) -> dict:
    """ndcg@10 of a model on the test queries of each task."""
    found = {}
    for task in tasks:
        files = f"--eval_data {folder}/{task}/test.json --corpus {folder}/{task}/corpus.json"
        run("retrieve", f"--query_encoder {model} {TEXTS} {files} --metrics ndcg recall "
            f"--output_dir {folder}/results/{task} --save_name {name} "
            f"--log_path {folder}/log {more}")  # fmt: skip
        metrics = folder / f"results/{task}/test.metrics.{name}.json"
        found[task] = json.loads(metrics.read_text())["ndcg@10"]
    return found


def encoder(out: Path) -> Path:
    return max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])) / "encoder"


def scored(folder: Path, task: str) -> Path:
    suffix = "" if task == "tool" else ".scored.smollm2"
    return folder / task / f"train{suffix}.json"


def batches(out: Path) -> dict[str, int]:
    """How many batches of a run each task had."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    counts = dict.fromkeys(TASKS, 0)
    for line, task in itertools.product(lines, TASKS):
        counts[task] += line.get(f"{task}/batches", 0)
    return counts


def write_data(folder: Path, task: str) -> None:
    """train.json, test.json and corpus.json of a task."""
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    if task == "tool":
        files = quickstart.prepare(cache_dir(None))
        corpus = [json.loads(line) for line in files.corpus.open()]
        keys = ["{title} {text}".format(**passage) for passage in corpus]
        rows = {name: [json.loads(line) for line in getattr(files, name).open()]
                for name in ("train", "test")}  # fmt: skip
    else:
        questions, keys = memory_questions() if task == "chat" else faq(folder)
        rows = split(questions, keys, task)
    rows["corpus"] = [{"text": key} for key in keys]
    for name, content in rows.items():
        print(f"{task}/{name}: {len(content)} rows")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (target / f"{name}.json").write_text("".join(lines))


def split(questions: list[tuple[str, str, int, range]], keys: list[str], task: str) -> dict:
    """Training and test rows of (query, answer, passage with the evidence, passages to offer)."""
    rng = random.Random(42)
    evidence = sorted({positive for _, _, positive, _ in questions})
    held_out = set(rng.sample(evidence, int(0.4 * len(evidence))))
    rows = {"train": [], "test": []}
    for query, answer, positive, offered in questions:
        row = {"query": query, "answers": [answer], "task": task, "pos_index": [positive]}
        if positive in held_out:
            rows["test"].append(row)
            continue
        others = [i for i in offered if i != positive and i not in held_out]
        others = rng.sample(others, min(CANDIDATES - 1, len(others)))
        if task == "chat":  # nobody has marked a turn: the language model has to find it
            del row["pos_index"]
            history = sorted([positive, *others])
            row["history"] = [keys[i] for i in history]
        else:
            row |= {"pos": [keys[positive]], "neg": [keys[i] for i in others]}
        rows["train"].append(row)
    return rows


def memory_questions() -> tuple[list, list[str]]:
    """The leaderboard's memory questions and all turns of their conversations."""
    wheel = quickstart.download_wheel(quickstart.DATA_WHEEL, cache_dir(None) / "wheels")
    with zipfile.ZipFile(wheel) as archive:

        def lines(name: str) -> list[dict]:
            text = archive.read(f"bfcl_eval/data/{name}.json")
            return [json.loads(line) for line in text.splitlines()]

        answers = {row["id"]: row for row in lines("possible_answer/BFCL_v4_memory")}
        turns, of_scenario, questions = [], {}, []
        for row in lines("BFCL_v4_memory"):
            scenario, truth = row["scenario"], answers[row["id"]]
            if scenario not in of_scenario:
                start = len(turns)
                for session in lines(f"memory_prereq_conversation/memory_{scenario}"):
                    turns += [f"{scenario}: {turn['content']}" for (turn,) in session["question"]]
                of_scenario[scenario] = range(start, len(turns))
            quoted = [i for i in of_scenario[scenario] if locate(truth["source"], turns[i])]
            if len(quoted) == 1:
                said = f"{scenario}: {row['question'][0][0]['content']}"
                answer = str(truth["ground_truth"][0])
                questions.append((said, answer, quoted[0], of_scenario[scenario]))
    return questions, turns


def locate(source: str, turn: str) -> bool:
    """Whether a turn holds the quoted evidence, apart from dashes, quotes and dots."""
    quote, text = (re.sub(r"\W+", " ", s).strip().lower() for s in (source, turn))
    return bool(quote) and quote in text


def faq(folder: Path) -> tuple[list, list[str]]:
    """Question, first paragraph and whole text of the answer of two FAQs."""
    pairs = []
    for package, pattern in DEBIAN.items():
        unpacked = folder / package
        if not unpacked.is_dir():
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            (archive,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        for path in sorted(unpacked.glob(pattern)):
            pairs += (perl_faq if path.suffix == ".pod" else python_faq)(path.read_text())
    keys = [text for _, text in pairs]
    everything = range(len(keys))
    return [(q, text.split("\n")[0], i, everything) for i, (q, text) in enumerate(pairs)], keys


def perl_faq(text: str) -> Iterator[tuple[str, str]]:
    for section in re.split(r"^=head2 ", text, flags=re.MULTILINE)[1:]:
        question, _, answer = re.split(r"^=head1 ", section, flags=re.MULTILINE)[0].partition("\n")
        answer = re.sub(r"[A-Z]<+\s?([^<>]*?)\s?>+", r"\1", answer)
        yield from cleaned(re.sub(r"[A-Z]<([^<>]*)>", r"\1", question), answer)


def python_faq(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^(.+\?)\n[-=]+$", text, flags=re.MULTILINE)
    for question, answer in zip(parts[1::2], parts[2::2], strict=True):
        yield from cleaned(question, re.sub(r"^\.\. .*$", "", answer, flags=re.MULTILINE))


def cleaned(question: str, answer: str) -> Iterator[tuple[str, str]]:
    """The pair with one paragraph a line, when there is an answer."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", answer)]
    kept = [p for p in paragraphs if len(p.split()) > 5 and not p.startswith("(contributed")]
    if kept:
        yield " ".join(question.split()), "\n".join(kept)


if __name__ == "__main__":
    main()
