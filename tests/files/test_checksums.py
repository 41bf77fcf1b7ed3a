"""A flipped bit in what an earlier run left: made again, or left out, never believed."""

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import small_run
import tiny
from commands import flags
from samples import assert_same, make_rows, plan_rows

from llme_jax import retrieve
from llme_jax.files.checksums import NAME, damage, is_sealed, kept, seal_file


def flip(path, seed=0):
    """One bit of a file changes; size and times may stay as they are."""
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()  # it may still be mapped into memory
    path.write_bytes(content)


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def build(folder):
    (folder / "a").mkdir()
    (folder / "a/one").write_text("one " * 50)
    (folder / "two").write_bytes(bytes(range(256)))
    (folder / "empty").touch()


@pytest.mark.parametrize("kind", ["a/one", "two", NAME])
@pytest.mark.parametrize("seed", range(5))
def test_a_folder_is_made_again(tmp_path, kind, seed, caplog):
    folder = kept(tmp_path / "folder", build)
    assert damage(folder) is None and not caplog.text
    before = {path: path.read_bytes() for path in files_below(folder)}
    flip(folder / kind, seed)
    assert damage(folder)
    assert kept(folder, build) == folder
    assert f"{folder} is made again: " in caplog.text
    assert {path: path.read_bytes() for path in files_below(folder)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_else_is_no_whole_folder(tmp_path):
    for change, said in (
        (lambda f: (f / "two").unlink(), "two is missing"),
        (lambda f: (f / "two").write_bytes(b""), "two is not as it was written"),
        (lambda f: (f / NAME).unlink(), f"it has no {NAME}"),
        (lambda f: (f / NAME).write_text("[1]"), f"its {NAME} cannot be read"),
    ):
        folder = kept(tmp_path / "folder", build)
        change(folder)
        assert damage(folder) == said


def test_what_killed_runs_have_left_is_swept_away(tmp_path):
    names = (".folder.0123abcd.tmp", ".folder.0123abcd.old", ".other.0123abcd.tmp", ".config")
    for name in names:
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below/file").touch()
    long_ago = time.time() - 2 * 3600
    for name in names:
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (long_ago, long_ago))
        os.utime(tmp_path / name, (long_ago, long_ago))
    os.utime(tmp_path / names[2] / "below/file")  # another process is building there
    kept(tmp_path / "folder", build)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *names[2:]}


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert not is_sealed(path)
    seal_file(path)
    assert is_sealed(path)
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert not is_sealed(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not is_sealed(path)


def test_the_store_of_training_data(write_rows, prepared, tmp_path, caplog):
    path = write_rows("t.json", make_rows(12))
    want = prepared(path).assemble(plan_rows(range(12)))
    (store,) = (p for p in (tmp_path / "cache/train").iterdir() if p.is_dir())
    kinds = [p.relative_to(store) for p in files_below(store) if p.stat().st_size]
    assert len(kinds) > 10
    for kind in kinds:
        flip(store / kind)
        assert_same(prepared(path).assemble(plan_rows(range(12))), want)
        assert f"{store} is made again" in caplog.text
        caplog.clear()


def test_a_file_with_the_times_of_another(write_rows, prepared, tmp_path):
    """As `cp --preserve` and rsync leave it: size and time of change say nothing."""
    rows = make_rows(6)
    path = write_rows("t.json", rows)
    prepared(path)
    stat = os.stat(path)
    rows[0]["query"] = "x" + rows[0]["query"][1:]
    write_rows("other.json", rows)
    os.replace(tmp_path / "other.json", path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(path).st_size == stat.st_size
    prepared(path)
    assert len([p for p in (tmp_path / "cache/train").iterdir() if p.is_dir()]) == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.write_data(tmp_path_factory.mktemp("data"))


def search(data, tmp_path, *more):
    words = {
        "query_encoder": data / "bert",
        "data_root": data,
        "eval_data": "llm-embedder:test.json",
        "corpus": "llm-embedder:corpus.json",
        "output_dir": tmp_path / "out",
        "dataset_cache_dir": tmp_path / "cache",
        "log_path": tmp_path / "log",
        "query_max_length": 32,
        "key_max_length": 32,
        "hits": 10,
        "metrics": "mrr",
    }
    retrieve.main([*flags(words), *more])
    return (tmp_path / "out/test.result.json").read_text()


@pytest.mark.parametrize(
    ("flags", "places", "most"),
    [
        (["--save_encode"], ["cache/tokens", "out/embeddings"], 9),
        (["--faiss_index_factory", "HNSW8", "--save_index"], ["out/embeddings"], 9),
        (["--retrieval_method", "bm25"], ["cache/lucene"], 3),
    ],
)
def test_what_retrieval_keeps(data, tmp_path, flags, places, most, capfd):
    want = search(data, tmp_path, *flags)

    def kept():
        files = [p for place in places for p in files_below(tmp_path / place) if p.stat().st_size]
        # What is not read for its content: for people, and the lock.
        return [p for p in files if p.name not in ("manifest.json", ".lock")]

    assert kept()
    rng, flipped = random.Random(0), set()
    for _ in range(min(most, len(kept()))):
        # Lucene may call the files of an index that is made again otherwise.
        path = rng.choice([p for p in kept() if p not in flipped])
        flipped.add(path)
        flip(path)
        capfd.readouterr()
        assert search(data, tmp_path, *flags) == want
        said = capfd.readouterr().err
        assert "made again" in said or "damaged" in said, path


def test_the_result_is_that_of_a_fresh_run(data, tmp_path):
    (tmp_path / "a").mkdir()
    flipped = search(data, tmp_path / "a", "--save_encode")
    for path in files_below(tmp_path / "a/cache/tokens"):
        if path.suffix == ".npy":
            array = np.load(path)
            path.unlink()
            np.save(path, array[::-1])  # same shape and type
    assert search(data, tmp_path / "a", "--save_encode") == flipped
    assert tiny.read_lines(tmp_path / "a/out/test.result.json")


def test_two_that_find_the_damage_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    kept(folder, lambda beside: (beside / "a").write_text("a"))
    (folder / "a").write_text("b")
    rename = Path.rename

    def after_another(path, target):
        if path == folder:  # it was faster
            monkeypatch.setattr(Path, "rename", rename)
            kept(folder, lambda beside: (beside / "a").write_text("a"))
            shutil.rmtree(folder)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", after_another)
    assert (kept(folder, lambda beside: (beside / "a").write_text("a")) / "a").read_text() == "a"
