"""The card that a run leaves: its numbers are the run's; a person's own is kept."""

import json
import re

import pytest
from sentence_transformers import SentenceTransformer
from small_run import EVALUATION, arguments, write_data

from llme_jax import train
from llme_jax.training.metrics_log import read_metrics
from llme_jax.training.model_card import base_licence


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data"))
    (data / "bert/README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# base\n")
    out = data / "out"
    argv = [*arguments(data, out, *EVALUATION), "--eval_on_start", "--early_exit_steps", "4"]
    assert train.main(argv) == 0
    return argv, out, (out / "best/encoder/README.md").read_text()


def test_what_it_says(run):
    _, out, card = run
    assert card.startswith("---\nlibrary_name: sentence-transformers\nbase_model: bert\n")
    assert "\nlicense: apache-2.0\n---\n" in card
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    lines = {line["step"]: line for line in read_metrics(out / "metrics.jsonl")
             if "eval_ndcg@10" in line}  # fmt: skip
    step = int((out / "best").resolve().name.removeprefix("checkpoint-"))
    assert f"step {step}, batches of " in card
    names = [name for name in lines[0] if name.startswith("eval_")]
    assert rows == [
        (name.removeprefix("eval_"), f"{lines[0][name]:.4f}", f"{lines[step][name]:.4f}")
        for name in names
    ]
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert f"learning_rate {settings['learning_rate']}" in card
    assert re.search(r"^\| \S+ \| qa \| 48 \|$", card, re.M)


def test_its_code_runs(run):
    code = re.search(r"```python\n(.*?)```", run[2], re.S)[1]
    code = re.sub(r'SentenceTransformer\(".*?"\)', "opened", code)
    exec(code, {"opened": SentenceTransformer(str(run[1] / "best/encoder"))})


def test_a_persons_own_is_kept_and_ours_is_written_anew(run):
    argv, out, card = run
    path = out / "best/encoder/README.md"
    path.write_text("# Mine\n")
    assert train.main(argv) == 0 and path.read_text() == "# Mine\n"
    path.write_text(card + "\nmore\n")
    assert train.main(argv) == 0 and path.read_text() == card


@pytest.mark.parametrize(
    ("text", "licence"),
    [("---\nlicense: mit\n---\n", "mit"), ("# no head\nlicense: mit\n", None), (None, None)],
)
def test_the_licence_of_the_base(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_licence(str(tmp_path)) == licence
