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
    return folder
