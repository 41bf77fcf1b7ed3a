"""Hosts compare what they are about to train with, before the first step and through the loop."""

import json
import re

import pytest
import tiny
from commands import finish, free_port, patient, start, start_together
from small_run import EVALUATION, arguments, write_data

from llme_jax.training.metrics_log import read_metrics

pytestmark = [patient, pytest.mark.slow]
# Two processes, each in a folder of its own, try one run after the other and say what they hear.
CODE = """
import json, os, sys
from llme_jax.config import ProcessConfig, cli
from llme_jax.devices import runtime
from llme_jax.errors import InputError
from llme_jax.training import dual, loop
from llme_jax.training.checkpoint import Checkpoints

runtime.join(ProcessConfig())
os.chdir(sys.argv[1] + os.environ["JAX_PROCESS_ID"])
latest = Checkpoints.latest
for name, words in json.loads(sys.argv[2]).items():
    late = name == "start" and os.environ["JAX_PROCESS_ID"] == "1"
    Checkpoints.latest = (lambda self: None) if late else latest  # it has not seen the newest yet
    try:
        loop.train(cli.parse(words, "train", ""), dual.open_dual)
        print(name, "trained", flush=True)
    except InputError as error:
        print(name, error, flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    """What each of two hosts says of runs in which one thing differs between them."""
    folder = tmp_path_factory.mktemp("hosts")
    data = write_data(folder / "data")
    for host in ("0", "1"):
        here = folder / f"host{host}"
        here.mkdir()
        tiny.save_bert(here / "same", layers=1)
        tiny.save_bert(here / "weights", layers=1, seed=int(host))
        tiny.save_bert(here / "tokenizer", layers=1)
        passages = tiny.read_lines(data / "corpus.json")
        tiny.write_lines(here / "corpus.json", passages[: 40 - int(host)])
    path = folder / "host1/tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"x3"'))

    def run(encoder: str, *more: str) -> list[str]:
        words = arguments(data, folder / "out", "--query_encoder", encoder, "--max_steps", "2")
        return [*words, *more]

    corpus = "--corpus", "corpus.json"
    runs = {
        "weights": run("weights"),
        "tokenizer": run("tokenizer"),
        "corpus": run("same", *EVALUATION, *corpus),
        "same": run("same", "--early_exit_steps", "1"),
        "start": run("same"),
    }
    argv = [str(folder / "host"), json.dumps(runs)]
    return [finish(p) for p in start_together(argv, 2, devices=1, code=CODE)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", "--query_encoder, its weights: differs between process 0 and process 1"),
        ("tokenizer", "--query_encoder, its tokenizer: differs between process 0 and process 1"),
        ("corpus", "--eval_data or --corpus, its content: differs between process 0 and process 1"),
        ("start", "the checkpoint to continue from: differs between process 0 and process 1"),
    ],
)
def test_what_differs_is_said_on_both(said, name, message):
    for host, text in enumerate(said):
        assert f"{name} {message}, in this one, {host}, it is " in text


def test_hosts_that_agree_train(said):
    assert all("same trained" in text for text in said)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_file_that_one_host_lacks_ends_the_run_on_all(data, tmp_path):
    """The processes are named by flags; the second has another data root."""
    together = f"--coordinator_address 127.0.0.1:{free_port()} --num_processes 2 --process_id"
    argv = arguments(data, tmp_path / "out", *together.split())
    first = start([*argv, "0"], devices=1)
    second = start([*argv, "1", "--data_root", str(tmp_path)], devices=1)
    said = f"there is no file {tmp_path}/train.json"
    assert said in finish(second, code=2)
    assert re.search(f"error: process 1: --train_data .*{said}", finish(first, code=2))
    assert not read_metrics(tmp_path / "out/metrics.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate: differs between process 0 and process 1"),
        (["--data_root", "{other}"], "the files of --train_data: differs between process 0 and"),
        ([], "--output_dir out: process 1 does not see what process 0 writes there"),
    ],
)
def test_hosts_that_would_train_something_else_are_refused(data, tmp_path, more, message):
    """The second host is in another folder; its data are not those of the first."""
    other = tmp_path / data.name
    other.mkdir()
    lines = (data / "train.json").read_text().splitlines(keepends=True)
    (other / "train.json").write_text("".join([*lines[1:], lines[0]]))
    together = f"--coordinator_address 127.0.0.1:{free_port()} --num_processes 2 --process_id"
    argv = [*arguments(data, tmp_path / "out"), "--output_dir", "out", *together.split()]
    more = [word.format(other=other) for word in more]
    where = [tmp_path / "0", tmp_path / "1" if not more else tmp_path / "0"]
    processes = []
    for number, flags in ((0, []), (1, more)):
        where[number].mkdir(exist_ok=True)
        processes.append(start([*argv, str(number), *flags], devices=1, cwd=where[number]))
    for process in processes:
        assert f"error: {message.format(root=data.name)}" in finish(process, code=2)
    assert not [*tmp_path.glob("*/out/*")]
