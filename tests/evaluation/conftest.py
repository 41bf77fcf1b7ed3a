"""Rows of every task of llme_jax.evaluate, small models, and the command's flags for them."""

import numpy as np
import pytest
import tiny
from commands import flags
from tiny import write_lines

SUBJECTS = ("anatomy", "astronomy", "my_own_subject")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of every task, a corpus, demonstrations."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def text(least=2, most=8):
        return tiny.text(rng, least, most)

    corpus = [{"title": text(1, 2), "text": text(), "contents": text()} for _ in range(30)]
    for i, line in enumerate(corpus):
        line["task_name"] = ("rte", "multirc", "squad_v1")[i % 3]
    questions = [
        {"query": text(), "choices": [text(1, 3) for _ in range(4)], "answer": i % 4,
         "subject": SUBJECTS[i % 3]}
        for i in range(14)
    ]  # fmt: skip
    icl = [
        {"query": f"{text()}  x", "task_name": name, "answers": ["1"], "options": options}
        for name, options in (("rte", [text(1, 1), text(1, 2)]), ("multirc", ["no", "yes"]))
        for _ in range(4)
    ]
    icl += [{"query": text(), "task_name": "squad_v1", "answers": [text(1, 1)]} for _ in range(3)]
    rows = {
        "mmlu": questions[:8],
        "dev": questions[8:],
        "popqa": [
            {"query": text(), "prop_id": i % 4, "obj": text(1, 1), "possible_answers": '["a", "b"]'}
            for i in range(9)
        ],
        "qa": [{"query": text(), "answers": [text(1, 2), "b"]} for _ in range(9)],
        "qrecc": [{"query": text(), "answers": [text()], "pos_index": [i]} for i in range(5)],
        "icl": icl,
        "msc": [
            {"query": text(), "answers": [text()], "history": [text() for _ in range(i % 5)]}
            for i in range(7)
        ],
        "lrlm": [{"text": text(n, n)} for n in (90, 40, 16, 2)],
        "corpus": corpus,
    }
    for name, lines in rows.items():
        write_lines(folder / f"{name}.json", lines)
    return folder


@pytest.fixture
def arguments(files, llama, bert, tmp_path):
    def of(task, **settings):
        given = {
            "task": task,
            "eval_data": files / f"{task}.json",
            "model_name_or_path": llama,
            "query_encoder": bert,
            "output_dir": tmp_path / "out",
            "log_path": tmp_path / "log",
            "dataset_cache_dir": tmp_path / "cache",
            "query_max_length": 32,
            "key_max_length": 32,
        }
        if task not in ("msc", "lrlm"):
            given |= {"corpus": files / "corpus.json", "context_max_length": 700}
        else:
            given |= {"context_max_length": 700} if task == "msc" else {}
        if task in ("mmlu", "qa"):
            given["train_data"] = files / ("dev.json" if task == "mmlu" else "qa.json")
        return flags(given | settings)

    return of
