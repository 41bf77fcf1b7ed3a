"""The command: stages run, killed and continued, twins, gates; small models, real Lucene."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run
from commands import ROOT, finish, start
from guide import write_data_root

from llme_jax import pipeline
from llme_jax.errors import InputError

EXPERIMENT = '''
"""Two iterations of seconds."""
from llme_jax.stages.iterations import Iterations, Recipe

STEPS = "--max_steps 4 --save_steps 2 --logging_steps 1 --learning_rate 1e-3"
GROUPS = "--train_group_size 4 --per_device_train_batch_size 2 --contrastive_weight 1"


class Tiny(Iterations):
    recipe = Recipe(
        train_data="train.json",
        eval_data="test.json",
        corpus="corpus.json",
        texts="--query_max_length 24 --key_max_length 32 --dataset_cache_dir cache",
        encoder="--pooling_method mean --add_instruction false",
        metrics="--metrics mrr ndcg --cutoffs 1 10",
        bm25="--hits 20",
        mine="--hits 20",
        retriever=f"{STEPS} {GROUPS}",
        distil="--contrastive_weight 0.2 --distill_weight 1",
        ranker=f"{STEPS} {GROUPS}",
        tolerated=1,
    )


def get_config(arg=None):
    config = Tiny()
    config.pipeline.query_encoder = config.pipeline.ranker = "bert"
    config.pipeline.iterations = 2
    config.which.keep_going = True  # what learns nothing in 4 steps is shut out
    config.pipeline.output_dir = "out"
    return config
'''
STAGES = ("untrained bm25 r1 r1-test r1-mine r2-ranker r2-ranker-test r2-scores r2 r2-test").split()
TRAINED = ("r1", "r2-ranker", "r2")
COMMAND = ["--config", "tiny_pipeline.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_data(tmp_path_factory.mktemp("pipeline"))
    (folder / "tiny_pipeline.py").write_text(EXPERIMENT)
    return folder


def begin(folder: Path, *flags: str):
    # Its processes are what jax starts on one device; the pipeline itself starts none.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return start([*COMMAND, *flags], 1, "pipeline", cwd=folder, PYTHONPATH=path)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody has stopped, and what it said."""
    return folder / "out", finish(begin(folder))


def records(out: Path) -> dict[str, dict]:
    found = {name: out / name / "stage.json" for name in STAGES}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def hashes(out: Path) -> dict[str, str]:
    """Of everything but what says when and where it was made."""
    patterns = ("*/*.json", "*/best/*/model.safetensors")
    files = sorted(path for pattern in patterns for path in out.glob(pattern))
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "stage.json" and "run" not in path.name.split(".")
    }


def test_all_stages_run_in_order(whole):
    out, said = whole
    assert [f"[{i}/10] {name}: python -m" in said for i, name in enumerate(STAGES, 1)] == [
        True
    ] * 10
    begun = [record["begun"] for record in records(out).values()]
    assert begun == sorted(begun) and len(begun) == 10
    scored = [
        json.loads(line) for line in (out / "r2-scores/train.neg.r1.scored.ranker.json").open()
    ]
    assert all(len(row["teacher_scores"]) == len(row["pos"] + row["neg"]) for row in scored)
    assert {row["neg_source"][0] for row in scored} == {"r1"}
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]


def test_nothing_is_done_twice(folder, whole):
    out, _ = whole
    before = records(out)
    said = finish(begin(folder))
    assert said.count("done already") == 10 and records(out) == before


@pytest.mark.slow
def test_killed_in_every_stage_and_continued(folder, whole):
    """kill -9 to the pipeline alone: its stage ends by itself, the same command goes on."""
    out = folder / "killed"
    for number, name in enumerate(STAGES):
        process = begin(folder, "--output_dir", "killed")
        record, end = out / name / "stage.json", time.monotonic() + 300
        while not record.exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.02)
        if name in TRAINED:  # half-way
            while not (out / name / "checkpoint-2/state").exists():
                time.sleep(0.02)
        elif number % 2:  # not only while it starts
            time.sleep(2.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = [n for n, record in records(out).items() if record["seconds"] is not None]
        assert done in (STAGES[:number], STAGES[: number + 1])
        finished = {n: records(out)[n]["made"] for n in done}
    said = finish(begin(folder, "--output_dir", "killed"))
    assert said.count("done already") >= len(STAGES) - 1
    assert {n: records(out)[n]["made"] for n in finished} == finished
    assert not (out / "old").exists()
    assert hashes(out) == hashes(whole[0])


def test_twins_are_refused(folder):
    first = begin(folder, "--output_dir", "twins", "--until", "untrained")
    while not (folder / "twins/untrained/stage.json").exists():
        time.sleep(0.02)
    said = finish(begin(folder, "--output_dir", "twins"), 2)
    assert f"error: twins: another run is at work there (process {first.pid}): wait" in said
    finish(first)


def test_sigterm_goes_to_the_stage(folder):
    process = begin(folder, "--output_dir", "ended", "--until", "untrained")
    while not (folder / "ended/untrained/stage.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert "untrained: stopped with exit code 143; the same" in finish(process, 143)
    finish(begin(folder, "--output_dir", "ended", "--until", "untrained"))


def test_a_changed_setting_redoes_what_depends_on_it(folder, whole, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    states = {}
    for flags in ([], ["--seed", "1"], ["--iterations", "3"], ["--teacher", "yes-no"]):
        assert pipeline.main([*COMMAND, "--dry_run", *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
        states[" ".join(flags)] = [name for name, _, state in found if not state.startswith("done")]
    assert states == {
        "": [],
        "--seed 1": "r1 r1-test r1-mine r2-ranker r2-ranker-test r2-scores r2 r2-test".split(),
        "--iterations 3": "r2 r2-test r2-mine r3-ranker r3-ranker-test r3-scores r3 "
        "r3-test".split(),
        "--teacher yes-no": ["r2-scores", "r2", "r2-test"],
    }


def test_the_report_is_of_the_stages_there_are(folder, whole):
    """Not of those that a run with more iterations has left."""
    shutil.copytree(folder / "out", folder / "fewer")
    (folder / "fewer/r2-test").rename(folder / "fewer/r9-test")
    finish(begin(folder, "--output_dir", "fewer", "--until", "r1-test"))
    report = (folder / "fewer/report.md").read_text()
    assert " r2-ranker-test has ndcg@10 " in report and "r9-test" not in report


def test_a_shut_gate_stops_it(folder, whole):
    text = (folder / "tiny_pipeline.py").read_text().replace("tolerated=1", "tolerated=-1")
    (folder / "strict.py").write_text(text)
    flags = ["--config", "strict.py", "--until", "r1-mine"]
    said = finish(begin(folder, *flags, "--keep_going", "false"), 1)
    assert "stage r1-test: ndcg@10 " in said and "below it by more than -1" in said
    assert "(--keep_going goes on all the same)" in said and "] r1-mine" not in said
    said = finish(begin(folder, *flags))
    assert "(going on all the same)" in said and "r1-mine: done already" in said


# SimLM's values (arXiv:2207.02578) as its scripts have them, in this package's flags.
RECONSTRUCTION = {
    "msmarco.py": {
        "bm25": "--hits 200 --k1 0.82 --b 0.68 --metrics mrr recall collate_neg",
        "r1": "--query_encoder intfloat/simlm-base-msmarco --train_group_size 16 "
        "--per_device_train_batch_size 16 --learning_rate 2e-5 --num_train_epochs 3 "
        "--distill_weight 0 --cos_temperature 0.02 --metrics mrr recall --cutoffs 10 50 1000 "
        "--eval_data llm-embedder:qa/msmarco/dev.json",
        "r1-mine": "--hits 200 --metrics mrr recall collate_neg",
        "r2": "--query_encoder intfloat/simlm-base-msmarco --train_group_size 16 "
        "--learning_rate 2e-5 --num_train_epochs 3",
        "r2-mine": "--hits 200 --max_neg_num 200",
        "r3-ranker": "--ranker google/electra-base-discriminator --train_group_size 16 "
        "--learning_rate 3e-5 --num_train_epochs 3",
        "r3-scores": "--metrics mrr recall collate_score",
        "r3": "--query_encoder intfloat/simlm-base-msmarco --train_group_size 24 "
        "--learning_rate 3e-5 --num_train_epochs 6 --contrastive_weight 0.2 --distill_weight 1 "
        "--teacher_temperature 1 --select_positive first --cos_temperature 0.02",
        "r3-test": "--metrics mrr recall --cutoffs 10 50 1000 --hits 1000",
    },
    "nq.py": {
        "r1": "--query_encoder intfloat/simlm-base-wiki100w --train_group_size 16 "
        "--per_device_train_batch_size 8 --learning_rate 1e-5 --max_steps 20000",
        "r1-mine": "--hits 100 --filter_answers",
        "r2-mine": "--hits 100 --filter_answers --max_neg_num 100",
        "r3-ranker": "--train_group_size 32 --per_device_train_batch_size 4 --max_steps 20000",
        "r3": "--train_group_size 16 --learning_rate 3e-5 --num_train_epochs 15 "
        "--contrastive_weight 1 --distill_weight 1",
        "r3-test": "--metrics nq",
    },
}
LENGTHS = {"msmarco.py": 144, "nq.py": 192}


@pytest.mark.parametrize("config", RECONSTRUCTION)
def test_the_published_pipelines_have_simlms_values(config, capsys):
    assert pipeline.main(["--config", config, "--dry_run"]) == 0
    stages = dict(re.findall(r"^# (\S+): .*\n(.*)$", capsys.readouterr().out, re.M))
    assert [*stages] == (
        "untrained bm25 r1 r1-test r1-mine r2 r2-test r2-mine r3-ranker r3-ranker-test r3-scores "
        "r3 r3-test"
    ).split()
    for name, expected in RECONSTRUCTION[config].items():
        for flag in re.findall(r"--\w+(?: (?!--)\S+)*", expected):
            assert f" {flag} --" in stages[name], (name, flag)
    for name, words in stages.items():
        assert "--query_max_length 32 " in words and "--add_instruction false" in words
        if "ranker" not in name and name != "r3-scores":
            assert f"--key_max_length {LENGTHS[config]} " in words
        if "--query_encoder" in words:
            assert "--pooling_method cls --dense_metric cos" in words


@pytest.mark.slow
def test_the_script_runs_on_files_of_the_real_format(tmp_path):
    root = write_data_root(tmp_path / "root")
    models = ["--query_encoder", str(root / "bert"), "--ranker", str(root / "bert")]
    done = subprocess.run(
        ["bash", ROOT / "scripts/3iter-msmarco.sh", *models, "--trial", "--output_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "DATA_ROOT": str(root),
             "LLME_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[13/13] r3-test: python -m llme_jax.retrieve" in done.stdout
    report = (tmp_path / "out/report.md").read_text()
    assert re.search(r"^\*\*(WIN|MARGINAL|REGRESSION)\*\* r3-test has mrr@10 ", report, re.M)
    metrics = json.loads((tmp_path / "out/r3-test/dev.metrics.json").read_text())
    assert f"| r3-test | {metrics['mrr@10']:.4f} |" in report


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "r9"], "--only r9: there is no such stage, only untrained, bm25, r1"),
        (["--from", "r2", "--until", "r1"], "--until r1 stands before --from r2"),
        (["--only", "r1", "--from", "r1"], "--only says it all"),
        (["--from", "r1", "--output_dir", "new"], "stage r1 reads what bm25 makes, which is not"),
        (["--query_encoder", "bret"], None),
    ],
)
def test_what_cannot_be_done_is_said_first(folder, flags, said, monkeypatch):
    monkeypatch.chdir(folder)
    if said is None:  # a name of the Hub as far as anybody knows
        assert pipeline.main([*COMMAND, *flags, "--dry_run"]) == 0
        return
    with pytest.raises(InputError, match=said):
        pipeline.main([*COMMAND, *flags])
    assert not (folder / "new").exists()


def test_a_mistake_in_the_experiment_names_its_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "wrong.py").write_text(EXPERIMENT.replace("eval_data=", "evil_data="))
    with pytest.raises(InputError, match=r"wrong\.py:\d+: TypeError: .*evil_data.*correct the exp"):
        pipeline.main(["--config", "wrong.py"])
    text = EXPERIMENT.replace(
        "    recipe =", "    def stages(self):\n        return self.words\n\n    recipe ="
    )
    (folder / "later.py").write_text(text)
    with pytest.raises(
        InputError, match=r"later\.py:\d+: AttributeError: .*words.*correct the exp"
    ):
        pipeline.main(["--config", "later.py"])
