"""The pages in docs/ tell the truth: commands run, examples are valid, tables are the code's.

The commands of a page run as one shell script, in the page's order, in a folder of its own.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from guide import COMMANDS, launched, write_data_root
from page_shell import Shell

from llme_jax.config import Config as TrainingConfig
from llme_jax.config import (
    DoctorConfig,
    MergingConfig,
    PipelineConfig,
    RankConfig,
    ReportingConfig,
    RetrieveConfig,
    ScoreConfig,
    cli,
)
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import RECIPES
from llme_jax.data.rows import BadRows, parse_row, parse_scoring_row, read_lines
from llme_jax.errors import InputError
from llme_jax.lm.prompts import TEMPLATES
from llme_jax.models.cross_encoder import HEADS
from llme_jax.models.families import ENCODERS
from llme_jax.quickstart import data as quickstart
from llme_jax.retrieval.results import read_result

PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}

# What each page says that its commands leave behind; {bucket} is what is read under gs://.
PROMISED = {
    "coming-from-the-reference": [
        "data/outputs/icl/distill/checkpoint-*/encoder/modules.json",
        "data/outputs/icl/distill/checkpoint-*/state",
        "data/outputs/icl/distill/metrics.jsonl",
        "data/outputs/icl/distill/curves.png",
        "data/outputs/icl/distill/run.json",
        "data/outputs/train.result.bge.json",
        "data/outputs/train.metrics.bge.json",
        "data/results/performance.log",
        "{root}/qa/nq/train.neg.bge.json",
        "{root}/qa/msmarco/train.scored.llama2-7b-chat.json",
    ],
    "models": [
        "data/outputs/qwen3/checkpoint-*/adapter/adapter_config.json",
        "data/outputs/qwen3/checkpoint-*/encoder/modules.json",
    ],
    "data": [
        "findings.json",
        "histograms.png",
        "out/test.result.json",
        "train.scored.llama.json",
        "train.scored.llama.png",
        "train.key.dense.json",
        "train.neg.dense.json",
        "tfds/llm_embedder/nq/1.0.0/dataset_info.json",
        "from-tfds/checkpoint-*/encoder",
        "from-bucket/checkpoint-*/encoder",
    ],
    "recipes": [
        "data/outputs/llm-embedder/checkpoint-*/encoder",
        "data/results/nq/llm-embedder/test.metrics.json",
        "data/results/mmlu/llm-embedder--checkpoint-2/test.metrics.llama.json",
        "data/results/lrlm/pg19/llm-embedder--checkpoint-2/test.metrics.llama.json",
        "data/results/tool/llm-embedder--checkpoint-2/test.metrics.json",
        "kl/checkpoint-*/encoder",
        "stable/checkpoint-*/encoder",
        "train.neg.mixed.json",
        "mined/checkpoint-*/encoder",
        "merged/encoder/modules.json",
        "train.neg.mixed.scored.llama.json",
        "distilled/checkpoint-*/encoder",
        "data/outputs/support-runlocal/checkpoint-4/encoder",
    ],
    "evaluate": [
        "data/results/popqa/bert/test.result.json",
        "data/results/popqa/bert/test.output.llama.json",
        "data/results/popqa/no/test.metrics.llama.json",
        "data/results/popqa/popqa.log",
    ],
    "rerank": [
        "train.neg.bge.json",
        "ranker/checkpoint-*/ranker/model.safetensors",
        "reranked/test.result.json",
        "reranked/test.metrics.json",
        "test.key.json",
        "train.neg.bge.scored.ranker.json",
        "train.neg.bge.scored.ranker.png",
        "distilled/checkpoint-*/encoder",
        "train.neg.bge.scored.qwen.json",
        "hits/train.result.judged.json",
    ],
    "pipeline": [
        "data/outputs/nq/3iter-runlocal/r3/best/encoder/modules.json",
        "data/outputs/nq/3iter-runlocal/report.html",
        "said/report.md",
        "both/report.html",
    ],
    "pods": [
        "data/outputs/nq/contrastive/checkpoint-*/encoder",
        "shared/qa/checkpoint-*/encoder",
        "shared/flags/checkpoint-*/encoder",
        "worker/llme_jax-env/bin/pip",
        "worker/llme_jax-source/llme_jax/train.py",
        "{bucket}/bucket/tfds/llm_embedder/nq/1.0.0/dataset_info.json",
        "{bucket}/bucket/qa/checkpoint-*/encoder",
    ],
}


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(heading above it, text) of a page's code blocks in a language."""
    found, heading = [], ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```(\w+)\n(.*?)^```$", PAGES[page], re.M | re.S):
        heading = match[1] or heading
        if match[2] == language:
            found.append((heading, match[3]))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("llm-embedder"))


@pytest.fixture
def bucket(tmp_path, root, monkeypatch):
    """A folder that is read under gs://."""
    place = tmp_path / "buckets"
    (place / "bucket").mkdir(parents=True)
    shutil.copytree(root / "qa", place / "bucket/llm-embedder/qa")

    class Bucket(DirFileSystem):
        protocol = "gs"
        cachable = False

        def __init__(self, **_):
            super().__init__(path=str(place), fs=LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("gs://").rstrip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    return place


@pytest.fixture
def shell(tmp_path, root, bucket, monkeypatch):
    """A folder with the files that the pages' commands name."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("train", "test", "corpus"):
        shutil.copy(root / f"qa/nq/{name}.json", folder)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    files = [root / "bert", *(folder / f"{name}.json" for name in ("train", "test", "corpus"))]
    monkeypatch.setattr(quickstart, "prepare", lambda _: quickstart.Quickstart(*files))
    return Shell(folder, root, bucket)


SLOW = ("data", "evaluate", "pipeline", "pods", "recipes", "rerank")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
        for page in PAGES
        if blocks(page, "bash")
    ],
)
def test_the_commands_run(page, shell, root, bucket):
    for _, text in blocks(page, "python"):
        if match := re.match(r"# (configs/\w+\.py)\n", text):
            (shell.folder / match[1]).parent.mkdir(exist_ok=True)
            (shell.folder / match[1]).write_text(text)
    # None of the GPUs that gpu_8.sh looks for is here.
    said = shell.run("\n".join(text for _, text in blocks(page, "bash")), GPUS="0")
    print(said, *sorted(shell.seconds.items(), key=lambda item: -item[1]), sep="\n")
    for pattern in PROMISED[page]:
        pattern = pattern.format(root=root, bucket=bucket)
        absolute = Path(pattern).is_absolute()
        found = [*Path("/").glob(pattern[1:])] if absolute else [*shell.folder.glob(pattern)]
        assert found, pattern


def test_every_family_is_in_the_table_of_models():
    first_table = PAGES["models"].partition("## What a folder says")[0]
    rows = [line for line in first_table.splitlines() if line.count("|") == 5]
    named = {name for row in rows[2:] for name in re.findall(r"`(\w[\w-]*)`", row.split("|")[2])}
    assert named == {*ENCODERS}
    rerankers = {
        name for row in rows[2:] if row.split("|")[4].strip().startswith("yes")
        for name in re.findall(r"`(\w[\w-]*)`", row.split("|")[2])
    }  # fmt: skip
    assert rerankers - {"new"} == {*HEADS}  # "new" is read as gte


def test_a_host_without_its_gpus_is_told_so(shell):
    said = shell.run("bash scripts/gpu_8.sh --config qa.py || echo code $?")
    assert "error: JAX sees 0 GPUs on " in said and "GPUS=0 goes on" in said
    assert said.endswith("code 2\n")


def test_the_guides_commands_differ_in_their_launcher_only():
    page = "\n".join(text for _, text in blocks("coming-from-the-reference", "bash"))
    shown = [shlex.split(line) for line in page.replace("\\\n", " ").splitlines()]
    guide = [launched(words)[1] for words in COMMANDS]
    assert len([words for words in shown if words[3:] in guide]) >= 2


def _check_mined(row: dict) -> None:
    parsed = parse_row(row)
    count = len(parsed.keys) - parsed.positives
    for name in ("neg_index", "neg_source", "neg_rank", "neg_score"):
        assert len(row[name]) == count, name


def _check_eval(path: Path) -> None:
    EvalData(path, metrics=["mrr", "nq", "collate_neg"], corpus_size=10**6)


# How the example under a heading of data.md is checked: as an object, or as a file.
OF_ROW = {
    "Training rows": parse_row,
    "Rows with a history": parse_row,
    "Rows to score": lambda row: parse_scoring_row(row, TEMPLATES),
    "Token lists": lambda row: parse_scoring_row(row, TEMPLATES),
    "Mined rows": _check_mined,
}
OF_FILE = {
    "Evaluation rows": _check_eval,
    "Corpus": lambda path: Corpus(path, "{title} {text}"),
    "Result files": lambda path: read_result(path, [5], 10**6),
}


def test_examples_are_valid(tmp_path):
    headings = []
    for heading, text in blocks("data", "json"):
        row = json.loads(text)
        if heading in OF_ROW:
            OF_ROW[heading](row)
        else:
            (tmp_path / "example.json").write_text(json.dumps(row) + "\n")
            OF_FILE[heading](tmp_path / "example.json")
        headings.append(heading)
    assert headings == list(dict.fromkeys(headings)) and {*headings} == {*OF_ROW, *OF_FILE}
    assert not [page for page in PAGES if page != "data" and blocks(page, "json")]


CHECKS = {
    "training": lambda path: [*read_lines(str(path), parse_row, BadRows())],
    "scoring": lambda path: [
        *read_lines(str(path), lambda row: parse_scoring_row(row, TEMPLATES), BadRows())
    ],
    "evaluation": lambda path: EvalData(path, metrics=["mrr"], corpus_size=100),
    "nq": lambda path: EvalData(path, metrics=["nq"], corpus_size=100),
    "corpus": lambda path: Corpus(path, "{title} {text}"),
}


def test_errors_read_as_the_page_says(tmp_path):
    table = PAGES["data"].split("## Errors")[1].split("\n## ")[0]
    said = re.findall(r"^\| (\w+) \| `(.*?)` \| (.*) \|$", table, re.M)
    assert {where for where, _, _ in said} == {*CHECKS}
    for where, line, message in said:
        (tmp_path / "file.json").write_text(line + "\n")
        with pytest.raises(InputError) as error:
            CHECKS[where](tmp_path / "file.json")
        assert str(error.value) == f"{tmp_path}/file.json:1: {message.replace('`', '')}"


def recipes_table() -> str:
    """The recipes as docs/recipes.md has them."""
    (recipes,) = RECIPES.values()
    names = list(dict.fromkeys(name for recipe in recipes.values() for name in recipe))
    lines = ["| | " + " | ".join(recipes) + " |", "|---" * (len(recipes) + 1) + "|"]
    for name in names:
        cells = [str(recipe.get(name, "")).lower() for recipe in recipes.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return re.sub(r"\|  (?=\|)", "| ", "\n".join(lines))


def test_the_recipes_are_those_of_the_code():
    assert recipes_table() in PAGES["recipes"], recipes_table()


def test_flags_exist():
    groups = (TrainingConfig(), RetrieveConfig(), ScoreConfig(), RankConfig(), DoctorConfig())
    groups += (PipelineConfig(), ReportingConfig(), MergingConfig(), EvaluateConfig())
    known = {name.rstrip("_") for settings in groups for name in settings.flat()}
    known |= {*cli.REFUSED, "config"}
    known |= {*re.findall(r'"--(\w+)"', (ROOT / "llme_jax/build_tfds.py").read_text())}
    # Of other programs: torchrun, srun, gcloud.
    known |= {"help", "nproc_per_node", "nodes", "ntasks-per-node", "gpus-per-node", "recursive"}
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text))
        assert named <= known, (page, named - known)


def test_refused_flags_are_all_listed():
    table = PAGES["coming-from-the-reference"]
    for name, remedy in cli.REFUSED.items():
        assert f"| `--{name}` | {remedy} |" in table, f"| `--{name}` | {remedy} |"


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", text):
            assert target.startswith("http") or (ROOT / "docs" / target).exists(), (page, target)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
