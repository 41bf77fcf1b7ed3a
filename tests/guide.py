"""The commands of the fine-tuning guide, and a data root on which they run."""

import shlex
from pathlib import Path

import numpy as np
import tiny
from tiny import write_lines

from llme_jax import retrieve, score, train

COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for command in (Path(__file__).parent / "guide.sh").read_text().strip().split("\n\n")[1:]
]
LAUNCHERS = {
    "run_dense.py": train.main,
    "evaluation.eval_retrieval": retrieve.main,
    "run_lm_score.py": score.main,
}


def launched(words: list[str]) -> tuple[str, list[str]]:
    """The program that the launcher starts, and its arguments."""
    program = next(i for i, word in enumerate(words) if word in LAUNCHERS)
    return words[program], words[program + 1 :]


def write_data_root(folder: Path) -> Path:
    """Small files of every task's format where guide and scripts look, and small models."""
    tiny.save_bert(folder / "bert", positions=256, layers=1)
    tiny.save_llama(folder / "llama")
    rng = np.random.default_rng(0)
    corpus = [{"title": f"w{i}", "text": tiny.text(rng)} for i in range(40)]
    keys = ["{title} {text}".format(**passage) for passage in corpus]

    def row(task: str, i: int) -> dict:
        answer = tiny.text(rng, 1, 3)
        row = {"query": tiny.text(rng, 1, 5), "query_id": i, "answers": [answer], "task": task}
        positive, *negatives = rng.permutation(40)[:7].tolist()
        if task == "chat":
            row["history"] = [keys[i] for i in (positive, *negatives)]
        else:
            row |= {"pos": [keys[positive]], "neg": [keys[n] for n in negatives]}
        if task in ("qa", "convsearch", "tool"):
            row |= {"pos_index": [positive], "neg_index": negatives}
        if task in ("qa", "chat", "lrlm", "icl"):
            row["teacher_scores"] = rng.normal(size=7).round(3).tolist()
        return row

    paths = {
        "qa": "qa/nq/train qa/msmarco/train qa/nq/test qa/msmarco/dev",
        "icl": "icl/icl/train.scored.llama2-chat.top20 icl/icl/train",
        "lrlm": " ".join(
            f"lrlm/{name}/train{scored}"
            for name in ("books3", "arxiv", "codeparrot")
            for scored in (".128tok.scored.llama2-7b-chat", "")
        ),
        "chat": "chat/msc/train.scored.llama2-7b-chat chat/msc/train",
        "tool": "tool/toolbench/train.hardneg tool/toolbench/train tool/toolbench/test",
        "convsearch": "conversation/qrecc/train.concat.neg.bm25-from-human "
        "convsearch/qrecc/train.concat convsearch/qrecc/test.concat",
    }
    for task, names in paths.items():
        for name in names.split():
            path = folder / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, [row(task, i) for i in range(20)])
            if name.endswith(("test", "test.concat", "dev")):
                write_lines(path.with_name("corpus.json"), corpus)
    _write_evaluations(folder, rng)
    return folder


def _write_evaluations(folder: Path, rng: np.random.Generator) -> None:
    """The files of evaluations with a language model, where they look for them."""

    def text(least: int = 1, most: int = 4) -> str:
        return tiny.text(rng, least, most)

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, rows)

    def choice(i: int) -> dict:
        choices = [text(1, 2) for _ in range(4)]
        subject = ("anatomy", "philosophy")[i % 2]
        return {"query": text(), "choices": choices, "answer": i % 4, "subject": subject}

    for name in ("test", "dev"):
        write(f"qa/mmlu/{name}.json", [choice(i) | {"task": "qa"} for i in range(4)])
    fact = {"obj": "an", "possible_answers": ["an", "no"], "task": "qa"}
    rows = [{"query": text(), "prop_id": i % 3, **fact} for i in range(6)]
    write("qa/popqa/test.json", rows)
    rows = [{"query": text(), "answers": [text()], "task": "qa"} for _ in range(12)]
    write("qa/nq/dev.json", rows)
    example = {"task_name": "rte", "options": ["no", "yes"], "answers": ["1"], "task": "icl"}
    write("icl/icl/test.json", [{"query": text(), **example} for _ in range(4)])
    write("icl/icl/corpus.json", [{"contents": text(), "task_name": "rte"} for _ in range(20)])
    chat = [{"query": text(), "answers": [text()], "history": [text(), text()]} for _ in range(4)]
    write("chat/msc/test.json", [row | {"task": "chat"} for row in chat])
    for name in ("books3", "arxiv", "codeparrot", "pg19"):
        write(f"lrlm/{name}/test.json", [{"text": text(90, 120)} for _ in range(2)])
