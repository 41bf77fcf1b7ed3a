"""What --report_to sends where: every step once, also of killed runs; outages; packages."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax
import pytest
from small_run import EVALUATION, STEPS, arguments, write_data

from llme_jax import train
from llme_jax.config import cli
from llme_jax.config.training import REPORTS
from llme_jax.errors import InputError
from llme_jax.training import trackers
from llme_jax.training.metrics_log import MetricsLog, read_metrics
from llme_jax.training.trackers import Trackers


class StandIn(ModuleType):
    """What is used of wandb and trackio; it keeps what it is sent. `hook` is called behind that."""

    def __init__(self, name, hook=lambda step: None):
        super().__init__(name)
        self.opened, self.sent, self.ended, self.hook = [], [], [], hook

    def init(self, **how):
        self.opened.append(how)
        return self

    def Settings(self, **how):
        return how

    def log(self, values, step):
        self.sent.append({"step": step, **values})
        self.hook(step)

    def finish(self, exit_code=None):
        self.ended.append(exit_code)


@pytest.fixture
def installed(monkeypatch):
    modules = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**modules)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(trackers.logger, "warning", lambda text, *of: said.append(text % of))
    return said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_run_that_is_killed_goes_on_where_it_was(data, tmp_path, installed):
    out = tmp_path / "out"
    argv = arguments(data, out, *EVALUATION, "--report_to", "wandb", "trackio", "tensorboard")

    def killed(step):
        if step == 7:  # not yet saved: it is done again
            raise SystemExit

    installed.trackio.hook = killed
    with pytest.raises(SystemExit):
        train.main(argv)
    assert not (out / "checkpoint-7").exists() and (out / "checkpoint-6/state").exists()
    installed.trackio.hook = lambda step: None
    assert train.main(argv) == 0

    lines = read_metrics(out / "metrics.jsonl")
    # Evaluations have a line of their own, behind that of their step.
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    for module in (installed.wandb, installed.trackio):
        assert [line.keys() for line in module.sent] == [line.keys() for line in lines]
        assert [line["step"] for line in module.sent] == [line["step"] for line in lines]
        first, second = module.opened
        assert first == second and first["config"]["max_steps"] == STEPS
        assert first["resume"] == "allow" and first["project"] == "llme_jax"
    ids = json.loads((out / "trackers.json").read_text())
    assert installed.wandb.opened[0]["id"] == ids["wandb"]["id"]
    assert installed.trackio.opened[0]["name"] == f"out-{ids['trackio']['id']}"
    assert installed.wandb.ended == [1, 0] and len(installed.trackio.ended) == 2
    assert len([*out.glob("events.out.tfevents.*")]) == 2


def step(number, **more):
    return {"step": number, "loss": 0.5, **more}


def test_a_run_that_is_killed_twice_sends_no_step_again(tmp_path, installed):
    """The second time before it came as far as the first: metrics.jsonl no longer has those."""
    for lines, begin, steps in ([], 0, (1, 2, 3, 4)), ([1, 2, 3, 4], 2, (3,)), ([1, 2], 2, (3, 4)):
        opened = Trackers(["wandb"], tmp_path, {}, begin, [step(n) for n in lines])
        for number in steps:
            opened.write(number, {"loss": 0.5})
    opened.write(4, {"eval_ndcg@10": 0.5})
    opened.write(5, {"loss": 0.5})
    want = [*((n, "loss") for n in (1, 2, 3, 4)), (4, "eval_ndcg@10"), (5, "loss")]
    assert [(line["step"], [*line][1]) for line in installed.wandb.sent] == want


def test_one_that_was_not_reported_to_before_is_sent_every_step(tmp_path, installed):
    opened = Trackers(["wandb"], tmp_path, {}, 2, [step(n) for n in (1, 2, 3)])
    opened.write(3, {"loss": 0.5})
    assert [line["step"] for line in installed.wandb.sent] == [3]


def test_a_damaged_record_ends_nothing(tmp_path, installed, warnings):
    (tmp_path / "trackers.json").write_text('{"wandb": {"id"')
    Trackers(["wandb"], tmp_path, {}, 2, [step(n) for n in (1, 2)]).write(3, {"loss": 0.5})
    assert [line["step"] for line in installed.wandb.sent] == [3]
    assert [said.split(":")[0].split("/")[-1] for said in warnings] == ["trackers.json is damaged"]


def test_an_outage_is_said_once_and_ends_nothing(tmp_path, installed, warnings):
    def down(*_, **__):
        raise ConnectionError("no route\nto host")

    installed.wandb.hook = installed.wandb.finish = installed.trackio.init = down
    with MetricsLog(tmp_path, 0, ["wandb", "trackio"], {}) as log:
        for number in (1, 2):
            log.write(number, {"loss": 0.5})
    assert [said.split(";")[0] for said in warnings] == [
        "--report_to trackio: ConnectionError: no route",
        "--report_to wandb: ConnectionError: no route",
    ]
    assert [line["step"] for line in installed.wandb.sent] == [1, 2]  # it may be back
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_only_the_first_process_reports(tmp_path, installed, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path, 0, ["wandb", "trackio", "tensorboard"], {}) as log:
        log.write_eval(1, {"ndcg@10": 0.5})
    assert not installed.wandb.opened and not installed.trackio.opened
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", trackers.TRACKERS)
@pytest.mark.parametrize("module", [None, ModuleType("empty")], ids=["missing", "folder"])
def test_a_package_that_is_missing_is_said_before_anything_is_read(
    data, tmp_path, monkeypatch, name, module
):
    package, _ = trackers.TRACKERS[name].needs
    monkeypatch.setitem(sys.modules, package, module)
    argv = arguments(data, tmp_path / "out", "--report_to", name, "--train_data", "nowhere.json")
    with pytest.raises(InputError) as error:
        train.main(argv)
    assert str(error.value) == f"--report_to {name}: run `pip install {package}` first"
    assert not (tmp_path / "out").exists()


def test_which_can_be_named():
    assert {*REPORTS} == {"none", *trackers.TRACKERS}
    with pytest.raises(InputError, match="--report_to mlflow: choose from none, tensorboard, wan"):
        cli.parse(["--report_to", "mlflow"], "train", "")
    with pytest.raises(InputError, match="--report_to none wandb: leave out none, or the others"):
        train.main("--report_to none wandb --train_data x.json".split())


TWICE = """
import sys
from pathlib import Path
from llme_jax.training.trackers import Trackers
name, folder = sys.argv[1], Path(sys.argv[2])
lines = [{"step": n, "loss": 0.5} for n in (1, 2, 3)]
for start, before, steps in ((0, [], (1, 2, 3)), (2, lines, (3, 4))):
    opened = Trackers([name], folder, {"max_steps": 4, "metrics": ["mrr"]}, start, before)
    assert not opened._failed
    for n in steps:
        opened.write(n, {"loss": 1 / n, "qa/loss": 0.5})
    opened.write(steps[-1], {"eval_ndcg@10": 0.25})
    opened.close(False)
    assert not opened._failed
if name == "wandb":
    print(opened._open[name]._run.settings.finish_timeout)
"""


def run_twice(name, folder, **environment):
    code = [sys.executable, "-c", TWICE, name, str(folder)]
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(code, env=env, check=True, capture_output=True, text=True).stdout


def history(path):
    """The rows in a file of wandb: a head, then records behind checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = path.read_bytes(), 7
    while at < len(content):
        _, length, _ = struct.unpack_from("<IHB", content, at)
        record = Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="pip install wandb")
def test_the_real_wandb_offline(tmp_path):
    said = run_twice("wandb", tmp_path, WANDB_MODE="offline")
    assert said.split()[-1] == str(float(trackers.WAIT))
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]
    # Two parts of one run, which `wandb sync` puts together.
    found = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(found) == 2
    first, second = ([*history(path)] for path in found)
    assert [line["_step"] for line in first] == [1, 2, 3]
    assert [line["_step"] for line in second] == [4]  # 3 is there already
    for last in (first[-1], second[-1]):
        assert last["loss"] == 1 / last["_step"] and last["qa/loss"] == 0.5
        assert last["eval_ndcg@10"] == 0.25


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="pip install trackio")
def test_the_real_trackio(tmp_path):
    run_twice("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))
    rows = sqlite3.connect(tmp_path / "kept/llme_jax.db").execute(
        "select run_id, step, metrics from metrics order by id"
    ).fetchall()  # fmt: skip
    assert len({run for run, _, _ in rows}) == 1
    assert [(n, "loss" in json.loads(values)) for _, n, values in rows] == [
        *((n, True) for n in (1, 2, 3)), (3, False), (4, True), (4, False),
    ]  # fmt: skip
