"""Two hosts with folders of their own, in which one thing differs: every command says so on both,
in one sentence, and keeps nothing; put right, it gives what one host gives."""

import json
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import tiny
from campaign import MAINS, command_line, lay_out, quietly
from commands import finish, patient, start_together
from samples import near

from llme_jax import evaluate

pytestmark = [patient, pytest.mark.slow]
# Two processes meet once, and try one command after the other, each in its own folder.
CODE = """
import json, os, shutil, sys
from functools import cache
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from campaign import MAINS, quietly
from llme_jax import evaluate
from llme_jax.config import ProcessConfig
from llme_jax.devices import runtime
from llme_jax.errors import InputError
from llme_jax.training import signals

runtime.join(ProcessConfig())
signals.start_preemption_service = cache(signals.start_preemption_service)
runtime.join = lambda processes: None
def leave(error):
    raise error
runtime._leave = leave
MAINS["evaluate"] = evaluate.main
process = os.environ["JAX_PROCESS_ID"]
base = Path(sys.argv[1] + process)
for name, command, words in json.loads(sys.argv[2]):
    os.chdir(base / name)
    words = [word.replace("PROCESS", process) for word in words]
    for repaired in (False, True):
        if repaired:
            shutil.copytree(sys.argv[3], ".", dirs_exist_ok=True)
            words = words[:-2] if words[-1].startswith("4") else words
            words = [word.replace("OUT", sys.argv[1] + "0/" + name + "/out") for word in words]
        try:
            said = quietly(MAINS[command], words)
        except InputError as error:
            said = str(error)
        left = [str(p) for p in Path("out").rglob("*") if p.is_file() and p.name != ".lock"]
        print("CASE", json.dumps([name, repaired, said, left]), flush=True)
"""
MAINS = {**MAINS, "evaluate": evaluate.main}
COMMANDS = {
    "retrieve": command_line("retrieve"),
    "rank": command_line("rank"),
    "score": command_line("score"),
    "evaluate": [
        *("--task", "popqa", "--eval_data", "test.json", "--corpus", "corpus.json"),
        *("--query_encoder", "bert", "--model_name_or_path", "llama", "--few_shot", "1"),
        *("--query_max_length", "16", "--key_max_length", "24", "--key_template", "{text}"),
        *("--context_max_length", "64", "--max_new_tokens", "2", "--lm_batch_size", "4"),
        *("--dataset_cache_dir", "cache", "--log_path", "out/log", "--output_dir", "out"),
        *("--hits", "5"),
    ],
    "train": [*command_line("train"), "--output_dir", "OUT"],  # that all hosts share
}
# What is done to the second host's folder, to which commands it matters, and what is said.
DIFFERENCES = {
    "a row less": (("retrieve", "rank", "score", "evaluate", "train"), "differs between process"),
    "other order": (("retrieve", "rank", "score", "evaluate", "train"), "differs between process"),
    "weights": (("retrieve", "rank", "score", "evaluate", "train"), "differs between process"),
    "tokenizer": (("retrieve", "rank", "train"), "differs between process"),
    "corpus": (("retrieve", "evaluate"), "differs between process"),
    "lengths": (("retrieve", "rank", "score", "evaluate", "train"), "differs between process"),
    "a missing file": (("retrieve", "rank", "score", "evaluate", "train"), "no (such )?file"),
}


def spoil(folder, kind: str) -> None:
    """Makes one thing in a folder different."""
    if kind in ("a row less", "other order"):
        for name in ("test", "train"):
            lines = tiny.read_lines(folder / f"{name}.json")
            lines = lines[:-1] if kind == "a row less" else lines[::-1]
            tiny.write_lines(folder / f"{name}.json", lines)
    elif kind == "weights":
        shutil.rmtree(folder / "bert")
        shutil.copytree(folder / "other", folder / "bert")
        shutil.copytree(folder / "llama2", folder / "llama", dirs_exist_ok=True)
    elif kind == "tokenizer":
        path = folder / "bert/tokenizer.json"
        path.write_text(path.read_text().replace('"w3"', '"x3"'))
    elif kind == "corpus":
        tiny.write_lines(folder / "corpus.json", tiny.read_lines(folder / "corpus.json")[::-1])
    elif kind == "a missing file":
        (folder / "test.json").unlink()
        (folder / "train.json").unlink()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What each host says and has left, of each case, before and after it is put right."""
    base = tmp_path_factory.mktemp("hosts")
    inputs = base / "inputs"
    inputs.mkdir()
    lay_out(inputs)
    tiny.save_llama(inputs / "llama2", seed=1)
    rows = tiny.read_lines(inputs / "test.json")
    tiny.write_lines(inputs / "test.json", [
        row | {"prop_id": 0, "obj": "w1", "possible_answers": ["w1"]} for row in rows
    ])  # fmt: skip
    cases = []
    for kind, (commands, _) in DIFFERENCES.items():
        for command in commands:
            name = f"{kind} {command}".replace(" ", "-")
            for host in ("0", "1"):
                shutil.copytree(inputs, base / f"host{host}" / name)
            spoil(base / "host1" / name, kind)
            flag = (
                "--context_max_length" if command in ("score", "evaluate") else "--key_max_length"
            )
            more = {"lengths": [flag, "4PROCESS"]}.get(kind, [])
            cases.append([name, command, [*COMMANDS[command], *more]])
    argv = [str(base / "host"), json.dumps(cases), str(inputs), str(Path(__file__).parent)]
    found = []
    for end in [finish(p) for p in start_together(argv, 2, devices=2, code=CODE)]:
        lines = [json.loads(x[5:]) for x in end.splitlines() if x.startswith("CASE ")]
        found.append({(name, repaired): more for name, repaired, *more in lines})
    return base, found


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_what_differs_is_said_on_both(said, kind):
    commands, words = DIFFERENCES[kind]
    for command in commands:
        name = f"{kind} {command}".replace(" ", "-")
        for of_host in said[1]:
            text, left = of_host[name, False]
            assert re.search(words, text) and "\n" not in text, (name, text)
            assert not left, (name, left)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_right_command_afterwards_gives_what_one_host_gives(said, tmp_path, command):
    base, found = said
    alone = shutil.copytree(base / "inputs", tmp_path / "alone")
    with chdir(alone):
        quietly(MAINS[command], [w.replace("OUT", "out") for w in COMMANDS[command]])
    wanted = [p for p in (alone / "out").rglob("*.json") if is_result(p)]
    for kind, (commands, _) in DIFFERENCES.items():
        if command not in commands:
            continue
        name = f"{kind} {command}".replace(" ", "-")
        assert [of_host[name, True][0] for of_host in found] == ["exit 0"] * 2, name
        for path in wanted:
            there = base / "host0" / name / path.relative_to(alone)
            assert near(there.read_bytes(), path.read_bytes()), there


def is_result(path: Path) -> bool:
    return ".parts" not in str(path) and bool(
        re.search(r"\.(result|neg|scored|output|metrics)\S*json$", path.name)
    )
