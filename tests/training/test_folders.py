"""Two commands in one folder, links into other folders, files that are missing."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from commands import finish, start
from safetensors.numpy import load_file
from small_run import (
    STEPS,
    arguments,
    assert_same_bits,
    assert_same_to_rounding,
    weights,
    write_data,
)

from llme_jax import retrieve, train
from llme_jax.errors import InputError
from llme_jax.files.lock import locked
from llme_jax.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data):
    """A run of 8 steps with a checkpoint at every second."""
    finish(start(arguments(data, data / "finished")))
    return data / "finished"


@pytest.fixture
def run(finished, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(finished, tmp_path / "out", symlinks=True)


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_second_of_two_trainings_says_who_was_first(data, finished, tmp_path):
    out = tmp_path / "out"
    first = start(arguments(data, out))
    while not (out / ".lock").exists() or not (out / ".lock").read_text():
        time.sleep(0.01)
    second = finish(start(arguments(data, out)), code=2)
    assert f"{out}: another run is at work there (process {first.pid})" in second.splitlines()[-1]
    finish(start(arguments(data, out, "--plan")))  # only looks
    finish(first)
    assert_same_bits(weights(out), weights(finished))


def search(data, out, *more):
    files = ["--eval_data", "llm-embedder:test.json", "--corpus", "llm-embedder:corpus.json"]
    left_out = ("train_data", "train_group_size", "per_device_train_batch_size", "max_steps",
                "save_steps", "logging_steps", "learning_rate")  # fmt: skip
    words = arguments(data, out, *files, *more)
    pairs = zip(words[::2], words[1::2], strict=True)
    retrieve.main([w for pair in pairs if pair[0][2:] not in left_out for w in pair])
    return (out / "test.result.json").read_bytes()


def test_embeddings_are_made_by_one_and_read_by_all(data, tmp_path):
    out = tmp_path / "out"
    want = search(data, out, "--save_encode", "true")
    (place,) = (out / "embeddings").iterdir()
    with locked(place, shared=True):
        assert search(data, out, "--save_encode", "true") == want
    said = rf"another run is at work there \(process {os.getpid()}\)"
    with locked(place), pytest.raises(InputError, match=said):
        search(data, out)
    next(place.glob("*.npy")).unlink()
    with locked(place, shared=True), pytest.raises(InputError, match="another run is at work"):
        search(data, out)
    assert search(data, out) == want and not (out / "embeddings").exists()


def test_what_a_link_points_to_is_not_deleted(data, finished, run):
    other = finished / "checkpoint-2"
    before = content(finished)
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}").symlink_to(other)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    train.main(arguments(data, run, "--save_total_limit", "1"))
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert content(finished) == before


def test_a_checkpoint_is_not_written_through_a_link(data, finished, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (6, STEPS):
        shutil.rmtree(run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}").symlink_to(elsewhere)
    train.main(arguments(data, run))
    assert_same_to_rounding(weights(run), weights(finished))
    assert not [*elsewhere.iterdir()] and not (run / f"checkpoint-{STEPS}").is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_a_run_copied_with_links_followed_goes_on(data, finished, tmp_path, monkeypatch, links):
    """To a disk with links, or to one without, where `best` is a copy of the best model."""
    run = shutil.copytree(finished, tmp_path / "out")
    if not links:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: os.readlink(run))
    best = run / "best"
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    train.main(arguments(data, run))
    assert best.is_symlink() == links and (best / "state").exists() == links
    assert_same_bits(load_file(best / "encoder/model.safetensors"), weights(run))
    (kept,) = run.glob("best.*")  # of a checkpoint that is gone
    assert_same_to_rounding(load_file(kept / "encoder/model.safetensors"), weights(run))
    shutil.rmtree(kept)
    train.main(arguments(data, run))  # nothing to do
    assert best.is_symlink() == links and not [*run.glob("best.*")]


@pytest.mark.slow
def test_from_a_damaged_checkpoint_to_the_one_before(data, finished, tmp_path):
    out = tmp_path / "out"
    argv = arguments(data, out)
    finish(start([*argv, "--early_exit_steps", "6"]))
    saved = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert len(saved) > 1
    newest = out / f"checkpoint-{saved[-1]}/state"
    damaged = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4  # Orbax would not notice
    damaged.write_bytes(content)
    said = finish(start(argv))
    assert "is damaged (" in said and "going back to the checkpoint before" in said
    assert f"continuing {out} at step {saved[-2]} of {STEPS}" in said
    assert_same_bits(weights(out), weights(finished))

    shutil.rmtree(newest.parent)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    shutil.copytree(out / f"checkpoint-{saved[-2]}", newest.parent)  # another step's
    said = finish(start(argv))
    assert f"is damaged (it is that of step {saved[-2]})" in said
    assert_same_bits(weights(out), weights(finished))

    for path in out.glob("checkpoint-*/state"):
        for part in path.rglob("*"):
            if part.is_file():
                part.write_bytes(b"")
    said = finish(start(argv), code=2)
    assert "no checkpoint before it; give another --output_dir" in said.splitlines()[-1]


def test_without_its_record_a_run_is_not_continued(data, run):
    (run / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds checkpoint-8 and no run.json, which says how"):
        train.main(arguments(data, run))
    for text in ("{", "[]", json.dumps({"settings": {}}), "\xff"):
        (run / "run.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=r"run.json: is not what a run writes"):
            train.main(arguments(data, run))


def test_a_bad_line_does_not_take_the_others_with_it(data, run, capfd):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1:1] = ["nonsense", "[1]", '{"loss": 1}', ""]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    wanted = [json.loads(line) for line in lines if "step" in line]
    assert read_metrics(path) == wanted
    train.main(arguments(data, run))
    said = capfd.readouterr().err
    for number in (2, 3, 4):
        assert f"metrics.jsonl:{number}: is no line of metrics and is left out" in said
    assert ":5:" not in said
    assert read_metrics(path)[: len(wanted)] == wanted
