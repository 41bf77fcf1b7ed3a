"""A run whose folder is in a bucket: a server that speaks Google's protocol, on this machine."""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from commands import finish, free_port, patient, start, start_together
from safetensors.numpy import load
from small_run import (
    EVALUATION,
    STEPS,
    arguments,
    assert_same_bits,
    assert_same_to_rounding,
    weights,
    write_data,
)

from llme_jax import retrieve, train
from llme_jax.errors import InputError
from llme_jax.files import storage
from llme_jax.training.checkpoint import Checkpoints
from llme_jax.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def bucket(monkeypatch):
    """The environment of a process that finds gs://bucket on this machine."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("bucket_server.py")), str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{port}"
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b/bucket")
            break
        except OSError:
            time.sleep(0.1)
    else:
        pytest.fail(f"no server answers at {url}")
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # of gcsfs, through which all but Orbax reads and writes
        "TENSORSTORE_GCS_HTTP_URL": url,  # of Orbax
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks for more than the server knows
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield storage.open_folder("gs://bucket")
    server.kill()
    server.wait()


def saved(out, step: int) -> dict[str, np.ndarray]:
    return load((out / f"checkpoint-{step}/encoder/model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def local(data):
    """The same run, with its folder on the disk."""
    finish(start(arguments(data, data / "local")))
    return data / "local"


@pytest.mark.slow
def test_killed_it_goes_on_from_the_bucket(data, local, bucket, tmp_path):
    out = bucket / "runs/out"
    argv = arguments(data, tmp_path / "unused", *EVALUATION, "--save_total_limit", "2")
    argv += ["--output_dir", str(out)]
    process = start(argv)
    while not (out / "checkpoint-4/complete").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    said = finish(start(argv))
    assert "continuing gs://bucket/runs/out at step" in said
    assert f"encoder: {out}/checkpoint-{STEPS}/encoder" in said

    assert_same_bits(saved(out, STEPS), weights(local))
    lines = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, STEPS + 1))
    evaluations = {r["step"]: r["eval_ndcg@10"] for r in lines if "eval_ndcg@10" in r}
    best = max(evaluations, key=evaluations.get)
    assert (out / "best").read_text() == f"checkpoint-{best}"
    assert Checkpoints(out).steps() == sorted({best, STEPS - 2, STEPS})
    for name in ("run.json", "curves.png", "test.result.json"):
        assert (out / name).exists(), name
    assert (out / f"checkpoint-{STEPS}/encoder/1_Pooling/config.json").exists()


@pytest.mark.slow
@patient
def test_two_hosts_write_one_checkpoint(data, local, bucket, tmp_path):
    argv = [*arguments(data, tmp_path / "unused"), "--output_dir", f"{bucket}/out"]
    for steps in ("2", "4"):
        processes = start_together([*argv, "--early_exit_steps", steps], 2, devices=4)
        said = [finish(process) for process in processes]
    assert "continuing gs://bucket/out at step 2" in said[0]
    assert_same_to_rounding(saved(bucket / "out", 4), weights(local, 4))


def test_a_checkpoint_counts_when_both_parts_are_there(bucket):
    for step, parts in ((1, ["state/commit_success.txt"]), (2, ["complete"])):
        for part in parts:
            (bucket / f"run/checkpoint-{step}/{part}").write_text("")
    assert Checkpoints(bucket / "run").steps() == []
    (bucket / "run/checkpoint-2/state/commit_success.txt").write_text("")
    assert Checkpoints(bucket / "run").steps() == [2]


def test_what_cannot_be_written_is_found_out_first(data, bucket, tmp_path, monkeypatch):
    argv = arguments(data, tmp_path / "unused")
    with pytest.raises(InputError, match=r"^--output_dir gs://other/out: there is no such bucket"):
        train.main([*argv, "--output_dir", "gs://other/out"])

    def refuse(*_):
        raise OSError("Forbidden")

    monkeypatch.setattr(type(bucket), "write_text", refuse)
    message = r"^--output_dir gs://bucket/out: cannot be reached, OSError: Forbidden; are name"
    with pytest.raises(InputError, match=message):
        train.main([*argv, "--output_dir", "gs://bucket/out"])
    assert not list((bucket / "out").glob("*"))


def test_what_cannot_be_is_one_sentence(data, tmp_path, monkeypatch):
    argv = arguments(data, tmp_path / "unused")
    with pytest.raises(InputError, match="--output_dir s3://b/out: give a folder, or gs://"):
        train.main([*argv, "--output_dir", "s3://b/out"])
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gs://b/out: pip install 'llme_jax\[gcs\]'"):
        train.main([*argv, "--output_dir", "gs://b/out"])
    words = f"--eval_data {data}/test.json --corpus {data}/corpus.json --output_dir gs://b/out"
    with pytest.raises(InputError, match="--output_dir gs://b/out: give a local folder"):
        retrieve.main(words.split())
