"""Bits flip in what an earlier run left, twins run, runs are killed: the same files at the end."""

import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from campaign import MAINS, command_line, lay_out
from commands import finish, start

pytestmark = pytest.mark.slow

# A command, what it is given besides, and what it leaves that a later run reads.
RUNS = {
    "train": ([], {"cache/train/", ".safetensors", "state/"}),
    "train+eval": ([], {"cache/tokens/"}),
    "rank train": ([], {".safetensors"}),
    "retrieve": (["--save_encode"], {"cache/tokens/", "out/embeddings/"}),
    "retrieve bm25": (["--retrieval_method", "bm25"], {"cache/lucene/"}),
    "retrieve faiss": (["--faiss_index_factory", "HNSW8", "--save_index"], {".faiss"}),
    "rank": ([], {"out/test.result.parts/"}),
    "score": ([], {"out/test.scored.llama2-7b-chat.parts/"}),
    "merge": ([], {".safetensors"}),
}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory, compiled_once):
    folder = tmp_path_factory.mktemp("base")
    lay_out(folder)
    return folder


def below(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def kind(name: str) -> str:
    """The same for files of the same kind, as the arrays of a token store."""
    return re.sub(r"[0-9a-f]{32}|_\d\w*\.|\d+|\w+(?=\.npy)", "#", name)


def is_result(name: str) -> bool:
    """What people take away; logs and cards hold times."""
    return re.fullmatch(r".*\.safetensors|(out/)?test\.(result|neg|scored)\S*\.json", name)


def words(run: str) -> tuple[str, list[str]]:
    """A run's command and its flags."""
    command = run if run in MAINS else run.split()[0]
    return command, [*command_line(command), *RUNS[run][0]]


@pytest.mark.parametrize("run", RUNS)
def test_a_bit_flips_in_what_is_left(laid_out, tmp_path, monkeypatch, run):
    (command, argv), places = words(run), RUNS[run][1]
    whole, here = tmp_path / "whole", tmp_path / "here"
    shutil.copytree(laid_out, whole, ignore=shutil.ignore_patterns("programs"))
    monkeypatch.chdir(whole)
    MAINS[command](argv)
    made = {name: content for name, content in below(whole).items() if name not in below(laid_out)}
    results = {name: content for name, content in made.items() if is_result(name)}
    chosen = set()
    for place in places:
        kinds = {kind(name): name for name in sorted(made) if place in name}
        names = [*kinds.values()]
        # Not all: it takes a run each, and test_checksums.py does that for any sealed folder.
        chosen |= {names[0], names[len(names) // 2], names[-1]}
    assert results
    for name in sorted(chosen):
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole, here, symlinks=True)
        monkeypatch.chdir(here)
        content = bytearray(made[name] or b"x")
        content[len(content) // 2] ^= 1
        Path(name).write_bytes(content)
        MAINS[command](argv)
        assert results.items() <= below(here).items(), name


# Trainings, rerankings and pipelines have tests of their own; for kills so have dense retrieval and
# scoring.
TWINS = ("retrieve", "retrieve bm25", "score", "merge")
KILLS = ("retrieve bm25", "retrieve faiss", "merge")
PRESSES = {"retrieve bm25": (1.5, 2.5), "score": (2, 4)}  # seconds
KILLED = """
import os, sys
from pathlib import Path
from llme_jax import COMMAND
moments = []
def kill(publish):
    def call(*args, **kwargs):
        moments.append(args)
        os.kill(os.getpid(), 9) if len(moments) == MOMENT else None
        return publish(*args, **kwargs)
    return call
os.replace, os.rename, Path.rename = map(kill, (os.replace, os.rename, Path.rename))
COMMAND.main(sys.argv[1:])
os._exit(99)
"""


AS_A_PERSON = """
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "llme_jax.COMMAND", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def alone(laid_out, tmp_path_factory):
    """alone(run): a folder to run it in, and the results that it has when nothing happens."""

    @cache
    def results(run: str) -> dict[str, bytes]:
        here = lay_out_again("alone")
        finish(start(words(run)[1], 1, words(run)[0], cwd=here))
        before = below(laid_out)
        return {k: v for k, v in below(here).items() if is_result(k) and k not in before}

    def lay_out_again(name: str) -> Path:
        here = tmp_path_factory.mktemp(name) / name
        return shutil.copytree(laid_out, here, ignore=shutil.ignore_patterns("programs"))

    return lambda run: (lay_out_again("here"), results(run))


@pytest.mark.parametrize("run", TWINS)
def test_twins_end_with_the_same_files_or_say_why(alone, run):
    here, results = alone(run)
    command, argv = words(run)
    twins = [start(argv, 1, command, cwd=here) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in twins]
    codes = [process.returncode for process in twins]
    assert 0 in codes and all(
        code == 0 or (code == 2 and "another run is at work there" in line)
        for code, line in zip(codes, said, strict=True)
    ), said
    assert results.items() <= below(here).items()


@pytest.mark.parametrize("run", KILLS)
def test_killed_while_it_publishes(alone, run):
    here, results = alone(run)
    command, argv = words(run)
    for moment in range(1, 100, 2):
        code = KILLED.replace("MOMENT", str(moment))
        process = start(argv, 1, command, code=code, cwd=here)
        process.communicate(timeout=300)
        if process.returncode != -9:
            break
        for name, content in below(here).items():  # whole or not there
            assert name not in results or content == results[name]
    assert process.returncode == 99 and moment > 1
    assert results.items() <= below(here).items()


@pytest.mark.parametrize("run", PRESSES)
def test_ctrl_c_at_any_moment(alone, run):
    here, results = alone(run)
    command, argv = words(run)
    # What a shell runs in the background ignores Ctrl-C, and hands that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for seconds in PRESSES[run]:
            process = start(argv, 1, command, code=AS_A_PERSON, cwd=here)
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
            # While modules are read it dies of the signal, which shells call 130 too.
            assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said
            assert process.returncode != 130 or said.endswith("stopped by Ctrl-C\n")
            for name, content in below(here).items():
                assert not name.endswith((".tmp", ".old"))
                assert name not in results or content == results[name]
    finally:
        signal.signal(signal.SIGINT, before)
    finish(start(argv, 1, command, cwd=here))
    assert results.items() <= below(here).items()


@pytest.mark.parametrize("kind", ["left_behind", "pipelines", "merges", "sources"])
def test_every_situation_works_or_is_one_sentence(kind):
    """A part of the campaign: nothing hangs, no traceback, no half-written file."""
    command = [sys.executable, Path(__file__).with_name("campaign.py"), "--kinds", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout
