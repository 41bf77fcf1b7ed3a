"""The situations of campaign.py: what files, folders and flags may hold, and why it is right."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tiny

LONG = "w1 " * 3000
VALUES = {
    "absent": ...,
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "fraction": 1.5,
    "huge": 10**30,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "empty text": "",
    "text": "w1 w2",
    "long text": LONG,
    "line separator": "w1\u2028w2",
    "half a pair": "\ud800",
    "empty list": [],
    "list of text": ["w1 w2"],
    "list of empty": [""],
    "list of null": [None],
    "list of 0": [0],
    "list of negative": [-1],
    "list of NaN": [float("nan")],
    "list of lists": [["w1"]],
    "object": {"a": 1},
    "list of object": [{"text": "w1"}],
}


class Situation(NamedTuple):
    name: str
    command: str
    spoil: Callable[[Path], list[str]]  # changes the folder; more flags
    right: str | None  # why it may be accepted; None: it has to be refused


# ------------------------------------------------------------------------- rows: what is right, why


def is_text(value) -> bool:
    return isinstance(value, str) and value != "\ud800"


def of(kind: str, value) -> bool:
    """Whether a value is of a kind; the rules that the docs give, written down once more."""
    if kind == "text":
        return is_text(value)
    if kind == "texts":
        return isinstance(value, list) and all(map(is_text, value))
    if kind == "numbers":
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 12 for v in value)
    if kind == "id":
        return type(value) is int or is_text(value)
    raise ValueError(kind)


def why(command: str, file: str, field: str, value) -> str | None:
    """Why a row with this value may be accepted; None: it has to be refused."""
    if command == "doctor":
        return "the doctor reports what is wrong"
    if value == "\ud800":
        return None  # no text can be written with it
    if file == "corpus.json" and field not in ("title", "text"):
        return "is not read"
    missing = value is ... or value is None
    if file == "corpus.json":
        return "a text" if of("text", value) and not missing else None
    reads = READS[command]
    if field not in reads:
        return f"{command} does not read {field}"
    kind, needed = reads[field]
    if missing:
        return None if needed else f"{field} may be left out"
    if kind == "scores":
        right = isinstance(value, list) and len(value) == 4
        return "a score a key" if right else None
    if value == [] and needed:
        return None
    return f"{field} is {kind}" if of(kind, value) else None


TRAINING = {
    "query": ("text", True), "pos": ("texts", False), "neg": ("texts", False),
    "teacher_scores": ("scores", False), "task": ("text", False), "prompt": ("text", False),
}  # fmt: skip
EVALUATION = {
    "query": ("text", True), "pos_index": ("numbers", True), "query_id": ("id", False),
    "task": ("text", False), "prompt": ("text", False),
}  # fmt: skip
NUMBERED = {"pos_index": ("numbers", False), "neg_index": ("numbers", False)}
READS = {
    "train": TRAINING,
    "rank train": TRAINING,
    "train+eval": EVALUATION,
    "retrieve": EVALUATION | {"pos": ("texts", False), "answers": ("texts", False)},
    "rank": EVALUATION | {"pos": ("texts", False), "neg": ("texts", False)} | NUMBERED,
    "score": {"query": ("text", True), "pos": ("texts", False), "neg": ("texts", False),
              "answers": ("texts", True), "task": ("text", True)},
}  # fmt: skip
FILES = {
    "train": ["train.json"],
    "train+eval": ["test.json", "corpus.json"],
    "retrieve": ["test.json", "corpus.json"],
    "rank": ["test.json"],
    "rank train": ["train.json"],
    "score": ["test.json"],
    "doctor": ["train.json", "test.json", "corpus.json"],
}
ROW = ("query", "pos", "neg", "pos_index", "neg_index", "teacher_scores", "answers", "task",
       "query_id", "prompt")  # fmt: skip

# Of the right kind, and refused for what they mean.
REFUSED = [("score", "task", value) for value in ("w1 w2", "w1\u2028w2", "", LONG)]
REFUSED += [("score", "answers", [""])]


def row_situations() -> Iterator[Situation]:
    for command, files in FILES.items():
        for file in files:
            for field in ("title", "text", "_id") if file == "corpus.json" else ROW:
                for kind, value in VALUES.items():

                    def spoil(folder, file=file, field=field, value=value):
                        rows = tiny.read_lines(folder / file)
                        if value is ...:
                            rows[1].pop(field, None)
                        else:
                            rows[1][field] = value
                        lines = (json.dumps(row) + "\n" for row in rows)
                        (folder / file).write_text("".join(lines))
                        return []

                    right = why(command, file, field, value)
                    right = None if (command, field, value) in REFUSED else right
                    yield Situation(f"{command}: {file}: {field} {kind}", command, spoil, right)


# -------------------------------------------------------------------------------- files as a whole


def _write(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _replace(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path):
        path.unlink()
        make(path)

    return change


WHOLE = {
    "a byte order mark": (_write(lambda b: b"\xef\xbb\xbf" + b), "UTF-8 may begin with it"),
    "Windows line ends": (_write(lambda b: b.replace(b"\n", b"\r\n")), "the same lines"),
    "blank lines": (_write(lambda b: b"\n \n" + b.replace(b"\n", b"\n\n")), "they are skipped"),
    "no last line end": (_write(lambda b: b.rstrip()), "the same lines"),
    "gzip": (_write(gzip.compress), "is unpacked"),
    "a line separator behind a row": (
        _write(lambda b: b.replace(b"\n", "\u2028\n".encode(), 1)), "white space",
    ),
    "a link": (
        lambda p: (p.rename(p.with_name("elsewhere")), p.symlink_to("elsewhere")), "the same file",
    ),
    "empty": (_write(lambda b: b""), None),
    "only blank lines": (_write(lambda b: b"\n \n"), None),
    "cut short": (_write(lambda b: b[:-20]), None),
    "half of gzip": (_write(lambda b: gzip.compress(b)[:-9]), None),
    "UTF-16": (_write(lambda b: b.decode().encode("utf-16")), None),
    "Latin-1": (_write(lambda b: b.replace(b"w1", b"\xe9", 1)), None),
    "binary": (_write(lambda b: bytes(range(256)) * 9), None),
    "zip": (_write(lambda b: b"PK\x03\x04" + b), None),
    "one array": (_write(lambda b: b"[" + b.strip().replace(b"\n", b",") + b"]\n"), None),
    "CSV": (_write(lambda b: b"query,pos\na,b\n"), None),
    "deep nesting": (_write(lambda b: b'{"query": ' + b"[" * 10**5 + b"\n" + b), None),
    "zero bytes": (_write(lambda b: b + b"\0" * 50 + b"\n"), None),
    "two objects a line": (_write(lambda b: b.replace(b"\n", b" ", 1)), None),
    "missing": (lambda p: p.unlink(), None),
    "a folder": (_replace(lambda p: p.mkdir()), None),
    "a link to nowhere": (_replace(lambda p: p.symlink_to("nowhere")), None),
    "a link to itself": (_replace(lambda p: p.symlink_to(p.name)), None),
}  # fmt: skip


def file_situations() -> Iterator[Situation]:
    for command, files in FILES.items():
        for file in files:
            for kind, (change, right) in WHOLE.items():

                def spoil(folder, file=file, change=change):
                    change(folder / file)
                    return []

                if command == "doctor" and right is None and kind not in MISSING:
                    right = "the doctor reports what is wrong"
                yield Situation(f"{command}: {file} is {kind}", command, spoil, right)


MISSING = ("missing", "a folder", "a link to nowhere", "a link to itself")


# -------------------------------------------------------------------------------------- the models

DAMAGE = {
    "missing": lambda p: p.unlink(),
    "empty": _write(lambda b: b""),
    "half": _write(lambda b: b[: len(b) // 2]),
    "a pointer": _write(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    "{}": _write(lambda b: b"{}"),
    "[]": _write(lambda b: b"[]"),
    "null": _write(lambda b: b"null"),
    "binary": _write(lambda b: bytes(range(256)) * 9),
}
# In a tokenizer's folder: what can be rebuilt from the others.
SPARE = {"tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "tokenizer.json"}


def model_situations() -> Iterator[Situation]:
    for command, model in (("train", "bert"), ("retrieve", "bert"), ("rank", "bert"),
                           ("doctor", "bert"), ("merge", "bert"), ("score", "llama")):  # fmt: skip
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            for kind, change in DAMAGE.items():

                def spoil(folder, path=f"{model}/{file}", change=change):
                    change(folder / path)
                    return []

                right = None
                if file in SPARE:
                    right = "the other files of the tokenizer say enough, or it is refused"
                if command == "doctor" and file != "tokenizer.json":
                    right = "the doctor reads the tokenizer only"
                yield Situation(f"{command}: {model}/{file} is {kind}", command, spoil, right)
        for field in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                      "intermediate_size", "vocab_size", "max_position_embeddings", "hidden_act",
                      "layer_norm_eps", "rms_norm_eps"):  # fmt: skip
            for kind in (
                "absent",
                "null",
                "zero",
                "negative",
                "fraction",
                "huge",
                "text",
                "object",
            ):

                def spoil(folder, path=f"{model}/config.json", field=field, kind=kind):
                    config = json.loads((folder / path).read_text())
                    if VALUES[kind] is ...:
                        config.pop(field, None)
                    else:
                        config[field] = VALUES[kind]
                    (folder / path).write_text(json.dumps(config))
                    return []

                right = None
                other = "rms_norm_eps" if model == "bert" else "layer_norm_eps"
                if command == "doctor":
                    right = "the doctor reads the tokenizer only"
                elif field == other:
                    right = "such a model has no such field"
                elif kind in ("absent", "null"):
                    right = "has a usual value, where the weights fit it"
                elif field.endswith("_eps") and kind in ("fraction", "zero", "huge"):
                    right = "a number"
                elif field == "max_position_embeddings" and model == "llama" and kind == "huge":
                    right = "rotary positions have no table"
                yield Situation(f"{command}: {model}'s {field} {kind}", command, spoil, right)


# ----------------------------------------------------------------------------- flags that are paths

PATHS = {
    "below a file": "notes/x",
    "a file": "notes",
    "below /proc": "/proc/x/y",
    "too long": "a" * 300,
    "empty": "",
    "a full device": "/dev/full",
    "a bucket": "gs://nowhere/x",
    "with a zero byte": "a\0b",
}


def path_situations() -> Iterator[Situation]:
    places = {
        "--output_dir": ("train", "retrieve", "rank", "rank train", "score", "merge"),
        "--dataset_cache_dir": ("train", "retrieve", "rank", "doctor"),
        "--log_path": ("train+eval", "retrieve", "rank"),
        "--save_name": ("train+eval", "retrieve", "rank", "score"),
        "--embedding_name": ("retrieve",),
        "--json": ("doctor",),
        "--plot": ("doctor",),
        "--query_encoder": ("train", "retrieve", "doctor"),
        "--model_name_or_path": ("score",),
        "--ranker": ("rank",),
        "--config": ("train", "retrieve", "rank"),
    }
    for flag, commands in places.items():
        for command in commands:
            for kind, path in PATHS.items():
                right = None
                if flag == "--log_path" and kind in ("empty", "a file"):
                    right = "no log" if kind == "empty" else "a file can be appended to"
                if command == "doctor" and flag == "--dataset_cache_dir" and kind != "empty":
                    right = "the doctor keeps nothing there but files it has to convert"
                if flag in ("--json", "--plot") and kind in ("empty", "a file"):
                    right = "no file" if kind == "empty" else "is replaced as asked"
                if flag == "--save_name" and kind in ("a file", "empty"):
                    right = "is part of a name"
                if flag == "--embedding_name" and kind in ("a file", "empty"):
                    right = "is the name of a folder; with none they lie in --output_dir"
                if flag == "--config" and kind == "empty":
                    right = "as if it were not given"
                name = f"{command}: {flag} {kind}"
                yield Situation(name, command, lambda _, f=flag, p=path: [f, p], right)


def source_situations() -> Iterator[Situation]:
    """What data is besides files: a BEIR folder's judgements, sources, pipes."""

    def qrels(folder, change):
        (folder / "beir/qrels").mkdir(parents=True)
        rows = tiny.read_lines(folder / "corpus.json")
        for name in ("corpus", "queries"):
            lines = [{"_id": f"{i}", "text": row["text"]} for i, row in enumerate(rows)]
            tiny.write_lines(folder / f"beir/{name}.jsonl", lines)
        path = folder / "beir/qrels/test.tsv"
        path.write_text("query-id\tcorpus-id\tscore\n1\t2\t1\n")
        change(path)
        return [
            "--eval_data",
            "beir/qrels/test.tsv",
            "--corpus",
            "beir",
            "--key_template",
            "{text}",
        ]

    changes = {kind: WHOLE[kind] for kind in MISSING} | {"as it was": (lambda p: None, "is read")}
    for kind, (change, right) in changes.items():
        spoil = partial(qrels, change=change)
        yield Situation(f"retrieve: qrels are {kind}", "retrieve", spoil, right)
    for command, kind in product(("evaluate", "retrieve", "rank", "score"), (*MISSING, "a pipe")):
        change = _replace(os.mkfifo) if kind == "a pipe" else WHOLE[kind][0]

        def spoil(folder, change=change):
            change(folder / "test.json")
            return []

        yield Situation(f"{command}: --eval_data is {kind}", command, spoil, None)
    for flag, commands in {
        "--eval_data": ("retrieve", "train+eval"),
        "--train_data": ("train",),
    }.items():
        for command in commands:
            for name in ("hf:~", "hf:/", "hf:.", "hf:bert", "hf:nowhere/at/all", "tfds:", "hf:"):
                more = [flag, name]
                yield Situation(f"{command}: {flag} {name}", command, lambda _, m=more: m, None)
