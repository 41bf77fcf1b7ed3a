"""What a pipeline does again, and what it refuses before anything runs; no stage is run here."""

import json
import shutil
import uuid

import pytest

from llme_jax.config import HaveNegatives, NotBelow, PipelineConfig, Stage, identity
from llme_jax.errors import InputError
from llme_jax.stages.plan import missing_inputs, plan
from llme_jax.stages.run import run

TEST = "--eval_data test.json --corpus corpus.json"
FOUR = [
    Stage("untrained", "retrieve", f"--query_encoder model {TEST}"),
    Stage("bm25", "retrieve", "--retrieval_method bm25 --eval_data train.json "
          "--corpus corpus.json --metrics collate_neg --save_to_output"),
    Stage("r1", "train", "--query_encoder model --train_data out/bm25/train.neg.json"),
    Stage("r1-test", "retrieve", f"--query_encoder out/r1/best/encoder {TEST} "
          "--fuse out/untrained/test.result.json"),
]  # fmt: skip
NAMES = [stage.name for stage in FOUR]


def listed(stages: list[Stage]) -> PipelineConfig:
    config = type("Listed", (PipelineConfig,), {"stages": lambda self: stages})()
    config.pipeline.output_dir = "out"
    return config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("train.json", "test.json", "corpus.json", "model/weights"):
        (tmp_path / name).write_text(name)
    return tmp_path


def pretend(stages: list[Stage], *names: str) -> None:
    """Writes down that stages have run."""
    planned = plan(listed(stages))
    for name in names or planned:
        one = planned[name]
        made = {other: planned[other].record["made"] for other in one.after}
        one.folder.mkdir(parents=True, exist_ok=True)
        facts = {"command": one.shown, "number": 0, "baseline": False, "spent": 1.0, "seconds": 1.0}
        one.write(key=one.key, made=uuid.uuid4().hex, after=made, files=one.made(), **facts)


def to_do(stages: list[Stage]) -> list[str]:
    planned = plan(listed(stages))
    return [name for name, one in planned.items() if not one.done(planned)]


def changed(name: str, words: str) -> list[Stage]:
    return [Stage(s.name, s.command, f"{s.words} {words}") if s.name == name else s for s in FOUR]


def test_what_reads_what(folder):
    planned = plan(listed(FOUR))
    assert {name: one.after for name, one in planned.items()} == {
        "untrained": [],
        "bm25": [],
        "r1": ["bm25"],
        "r1-test": ["r1", "untrained"],
    }
    assert planned["r1"].shown == (
        "python -m llme_jax.train --query_encoder model --train_data out/bm25/train.neg.json "
        "--output_dir out/r1"
    )


def test_what_ran_is_done(folder):
    assert to_do(FOUR) == NAMES
    pretend(FOUR)
    assert to_do(FOUR) == []


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("train.json", ["bm25", "r1", "r1-test"]),
        ("test.json", ["untrained", "r1-test"]),
        ("corpus.json", NAMES),
        ("model/weights", ["untrained", "r1", "r1-test"]),
        ("model/another", ["untrained", "r1", "r1-test"]),
        ("elsewhere.json", []),
    ],
)
def test_a_changed_file_redoes_what_reads_it(folder, file, again):
    pretend(FOUR)
    (folder / file).write_text("other")
    assert to_do(FOUR) == again


@pytest.mark.parametrize(
    ("stage", "words", "again"),
    [
        ("untrained", "--hits 10", ["untrained", "r1-test"]),
        ("bm25", "--k1 1", ["bm25", "r1", "r1-test"]),
        ("r1", "--learning_rate 1e-5", ["r1", "r1-test"]),
        ("r1-test", "--hits 10", ["r1-test"]),
        ("r1", "--logging_steps 7 --sub_batch_size 4", []),  # which decide nothing
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(folder, stage, words, again):
    pretend(FOUR)
    assert to_do(changed(stage, words)) == again
    pretend(changed(stage, words), *again)
    assert to_do(changed(stage, words)) == []
    assert to_do(FOUR) == again  # and back


def test_a_new_version_redoes_all(folder, monkeypatch):
    pretend(FOUR)
    monkeypatch.setattr(identity, "__version__", "0.0.0")
    assert to_do(FOUR) == NAMES


def test_what_was_made_again_redoes_what_read_it(folder):
    pretend(FOUR)
    pretend(FOUR, "bm25")
    assert to_do(FOUR) == ["r1", "r1-test"]


def test_the_pipeline_may_be_moved(folder):
    pretend(FOUR)
    (folder / "out").rename(folder / "moved")
    stages = [Stage(s.name, s.command, s.words.replace("out/", "moved/")) for s in FOUR]
    config = listed(stages)
    config.pipeline.output_dir = "moved"
    planned = plan(config)
    assert all(one.done(planned) for one in planned.values())


def test_a_killed_stage_is_not_done(folder):
    pretend(FOUR)
    planned = plan(listed(FOUR))
    planned["r1"].write(seconds=None)
    assert to_do(FOUR) == ["r1", "r1-test"]
    assert planned["r1"].begun


@pytest.mark.parametrize("change", [{"key": 1}, {"after": []}, {"spent": None}, {"files": []}, ...])
def test_a_record_that_no_stage_writes_is_refused(folder, change):
    pretend(FOUR)
    path = folder / "out/r1/stage.json"
    record = json.loads(path.read_text())
    path.write_text('{"key": ' if change is ... else json.dumps(record | change))
    field = "cannot be read" if change is ... else f"{next(iter(change))} is "
    with pytest.raises(InputError, match=f"^out/r1/stage.json: {field}.*: put back what the run"):
        plan(listed(FOUR))


def test_what_is_gone_or_changed_is_made_again(folder):
    """But for logs, charts, texts and what only the stage itself reads."""
    files = {"train.neg.json": "{}\n", "large.npy": "x" * 70_000, "notes.md": "", "a.parts/1": ""}
    files["checkpoint-1/state/x"] = ""
    for name in files:
        (folder / "out/bm25" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out/bm25" / name).write_text(files[name])
    (folder / "out/bm25/best").symlink_to("checkpoint-1")
    pretend(FOUR)
    for name in ("notes.md", "a.parts/1", "checkpoint-1/state/x"):
        (folder / "out/bm25" / name).unlink()
    shutil.copytree(folder / "out", folder / "copy")  # links become what they lead to
    shutil.rmtree(folder / "out")
    (folder / "copy").rename(folder / "out")
    assert to_do(FOUR) == []
    for name, other in (("train.neg.json", "[]\n"), ("large.npy", "")):
        (folder / "out/bm25" / name).write_text(other)
        assert to_do(FOUR) == ["bm25", "r1", "r1-test"]
        assert plan(listed(FOUR))["bm25"].changed == name
        (folder / "out/bm25" / name).unlink()
        assert to_do(FOUR) == ["bm25", "r1", "r1-test"]
        (folder / "out/bm25" / name).write_text(files[name])
    assert to_do(FOUR) == []


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (changed("r1", "--learning_rat 1"), "stage r1: unknown flag --learning_rat: did you mean"),
        (changed("r1", "--learning_rate x"), "stage r1: --learning_rate"),
        (changed("untrained", "--rerank_margin 1"), "stage untrained: --rerank_margin needs"),
        ([*FOUR, FOUR[0]], "stage untrained: there are two"),
        ([Stage("x", "retreive", "")], "stage x: no command retreive, there is train, retrieve"),
        ([Stage("old", "train", "")], "stage old: is no name for a folder of its own"),
        ([Stage("a/b", "train", "")], "stage a/b: is no name for a folder of its own"),
        (
            [Stage("x", "train", "", (NotBelow("ndcg@10", "y"),))],
            "stage x: is compared with y, which does not stand before it",
        ),
        ([Stage("report.md", "train", "")], "stage report.md: is no name for a folder of its own"),
        (changed("r1", "--key_template it's"), r"stage r1: '--query.*cannot be split into words"),
        (changed("r1", "--plan"), "stage r1: --plan: makes nothing that a stage could be for"),
        (None, "test_stage_plan.py:1: stages gives None: give a list of Stage"),
        ([], "stages gives an empty list"),
        (["train"], r"stages gives \['train'\]: give a list of Stage"),
        (FOUR[2:], "stage r1: --train_data out/bm25/train.neg.json is of stage bm25, which does"),
    ],
)
def test_mistakes_are_refused(folder, stages, said):
    with pytest.raises(InputError, match=said):
        plan(listed(stages))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Stage("a", "train", "", NotBelow("ndcg@10", "b")),
            "gates of Stage is NotBelow.*tuple",
        ),
        (lambda: Stage("a", "train", "", ("b",)), r"gates of Stage are \('b',\): give NotBelow"),
        (lambda: Stage("a", "train", ["--seed", "1"]), "words of Stage is .*: give a str"),
        (lambda: Stage(None, "train", ""), "name of Stage is None: give a str"),
        (lambda: NotBelow("ndcg@10", "b", "0.1"), "by of NotBelow is '0.1': give a float"),
        (lambda: HaveNegatives([]), r"share of HaveNegatives is \[\]: give a float"),
    ],
)
def test_what_is_declared_is_of_its_type(folder, make, said):
    config = type("Late", (PipelineConfig,), {"stages": lambda self: [make()]})()
    with pytest.raises(InputError, match=r"test_stage_plan.py:\d+: " + said):
        plan(config)
    config = type("Never", (PipelineConfig,), {"stages": []})()
    with pytest.raises(InputError, match=r"stages is \[\]: write a method"):
        plan(config)


def test_a_metric_that_nothing_measures_is_refused_first(folder):
    config = listed(FOUR)
    config.pipeline.metric = "nope"
    with pytest.raises(InputError, match=r"--metric nope: no stage measures it, only .*ndcg@10"):
        run(config)
    config.pipeline.metric, config.which.dry_run = "ndcg@10", True
    assert run(config) == 0


def test_missing_files_are_named(folder):
    (folder / "test.json").unlink()
    planned = plan(listed(FOUR))
    assert missing_inputs([*planned.values()], folder / "out") == [
        f"stage {name}: --eval_data test.json: there is no such file"
        for name in ("untrained", "r1-test")
    ]
