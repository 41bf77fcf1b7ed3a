"""Hosts compare what they are about to train with, before the first step and through the loop."""

import json

import pytest
import tiny
from commands import finish, patient, start_together
from small_run import EVALUATION, arguments, write_data

pytestmark = patient
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
        ("corpus", "--eval_data or --corpus, its size: differs between process 0 and process 1"),
        ("start", "the checkpoint to continue from: differs between process 0 and process 1"),
    ],
)
def test_what_differs_is_said_on_both(said, name, message):
    for host, text in enumerate(said):
        assert f"{name} {message}, in this one, {host}, it is " in text


def test_hosts_that_agree_train(said):
    assert all("same trained" in text for text in said)
