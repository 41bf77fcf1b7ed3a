"""A report against the files it is of: every number; what a browser makes of it; bad input."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import small_run
from PIL import Image
from tiny import read_lines, write_lines

from llme_jax import evaluate, rank, report, retrieve, score, train
from llme_jax.errors import InputError
from llme_jax.reports.blocks import to_markdown, won_and_lost
from llme_jax.reports.bootstrap import paired_bootstrap

LENGTHS = "--query_max_length 24 --key_max_length 32 --add_instruction false".split()
MEASURED = "--eval_data test.json --corpus corpus.json --metrics ndcg mrr --cutoffs 1 10".split()
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders before, mined, trained, after and scored, made by the commands."""
    folder = small_run.write_data(tmp_path_factory.mktemp("report"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        files = ["--dataset_cache_dir", "cache", "--log_path", "log", "--data_root", "."]
        common = [*LENGTHS, *files]
        encoder = ["--query_encoder", "bert"]
        search = [*common, *MEASURED]
        retrieve.main([*search, *encoder, "--output_dir", "before"])
        retrieve.main([*common, *encoder, "--eval_data", "train.json", "--corpus", "corpus.json",
                       "--metrics", "mrr", "collate_neg", "--hits", "20", "--save_to_output",
                       "--output_dir", "mined"])  # fmt: skip
        train.main([*search, *encoder, "--train_data", "mined/train.neg.json", "--max_steps", "4",
                    "--save_steps", "2", "--logging_steps", "1", "--train_group_size", "4",
                    "--per_device_train_batch_size", "1", "--learning_rate", "1e-3",
                    "--output_dir", "trained"])  # fmt: skip
        retrieve.main([*search, "--query_encoder", "trained/best/encoder", "--output_dir", "after"])
        rank.main([*common, "--ranker", "bert", "--eval_data", "mined/train.neg.json",
                   "--metrics", "mrr", "collate_score", "--save_to_output",
                   "--output_dir", "scored"])  # fmt: skip
        report.main(["before", "mined", "trained", "after", "scored", "--output_dir", "said"])
        yield folder


class Text(HTMLParser):
    """The words of a page: without its style, and without its drawings."""

    def __init__(self, page: str):
        super().__init__()
        self.words, self._silent = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._silent += tag in ("style", "svg", "title")

    def handle_endtag(self, tag):
        self._silent -= tag in ("style", "svg", "title")

    def handle_data(self, data):
        if not self._silent:
            self.words.append(data)


def numbers_in(value) -> set[float]:
    """All numbers anywhere in a JSON value, also inside its texts."""
    if isinstance(value, dict):
        return set().union(set(), *map(numbers_in, value), *map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(set(), *map(numbers_in, value))
    if isinstance(value, str):
        return {float(n.replace(",", "").rstrip(".")) for n in NUMBER.findall(value)}
    return {float(value)} if isinstance(value, (int, float)) else set()


def derived(folder) -> set[float]:
    """Numbers that no file holds: differences and intervals, counts of queries, by another way."""
    ndcg = {}
    for name in ("before", "after"):
        gains = []
        hits = {
            row["query_id"]: row["pred"] for row in read_lines(folder / name / "test.result.json")
        }
        for i, row in enumerate(read_lines(folder / "test.json")):
            found = [rank for rank, id in enumerate(hits[i][:10]) if id in row["pos_index"]]
            gains.append(1 / np.log2(found[0] + 2) if found else 0.0)
        ndcg[name] = np.array(gains)
    gain = ndcg["after"] - ndcg["before"]
    interval = paired_bootstrap(ndcg["before"], ndcg["after"])  # itself tested against scipy
    counts = [(gain > 0).sum(), (gain < 0).sum(), (gain == 0).sum(), len(gain), 95, 10_000]
    mining = json.loads((folder / "mined/train.mining.json").read_text())
    ranks = [int(rank) for rank, n in mining["ranks"].items() for _ in range(n)]
    return {gain.mean(), interval.low, interval.high, *map(float, counts), float(np.median(ranks)),
            *ndcg["before"], *ndcg["after"]}  # fmt: skip


def teacher_numbers(capsys, folder) -> set[float]:
    """Those of the report on teacher scores, which has tests of its own."""
    score.main(["--eval_data", str(folder / "scored/train.neg.scored.json"), "--report"])
    return numbers_in(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["md", "html"])
def test_every_number_is_in_the_files_of_the_runs(runs, kind, capsys):
    text = (runs / f"said/report.{kind}").read_text()
    text = " ".join(Text(text).words) if kind == "html" else text
    known = derived(runs) | teacher_numbers(capsys, runs)
    for path in runs.rglob("*.json*"):
        if path.suffix in (".json", ".jsonl") and path.stat().st_size < 10**6:
            lines = path.read_text().splitlines()
            values = map(json.loads, lines) if len(lines) > 1 and lines[1][:1] == "{" else None
            for value in values or [json.loads(path.read_text())]:
                known |= numbers_in(value)
    for said in NUMBER.findall(text):
        digits = len(said.partition(".")[2].partition("e")[0])
        value = float(said.replace(",", ""))
        close = 0.51 * 10**-digits
        assert any(abs(value - k) <= close for k in known), (said, kind)
    assert len(NUMBER.findall(text)) > 100


def test_both_say_the_same(runs):
    markdown = (runs / "said/report.md").read_text()
    words = " ".join(Text((runs / "said/report.html").read_text()).words)
    verdict = re.search(r"\*\*(\w+)\*\* (.*)", markdown)
    assert verdict[1] in ("WIN", "MARGINAL", "REGRESSION") and verdict[2] in words
    headings = re.findall(r"^## (.*)", markdown, re.M)
    assert headings == ["Evaluations", "Queries won and lost", "Training", "Negatives",
                        "Teacher scores", "How it was made"]  # fmt: skip
    assert all(heading in words for heading in headings)


def test_the_page_needs_nothing_else(runs):
    page = (runs / "said/report.html").read_text()
    assert not re.findall(r"(?:src|href)=|url\(|@import|<script|https?://", page)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None and "CI" not in os.environ:
        pytest.skip("there is no chromium here: apt-get install chromium")
    assert path, "apt-get install chromium"
    return path


def test_a_browser_shows_it(runs, browser):
    """Wide and on a phone: something is drawn from top to bottom, nothing sticks out sideways."""
    for width in (1200, 420):
        png = runs / f"{width}.png"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--window-size={width},2000", f"--screenshot={png}",
             f"file://{runs}/said/report.html"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        pixels = np.asarray(Image.open(png).convert("L"))
        assert pixels.shape == (2000, width)
        drawn = (pixels < 200).reshape(10, 200, width).any(axis=(1, 2))
        assert drawn.all()
        assert (pixels[:, -8:] > 200).all()  # the margin


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "there is nothing to report on"),
        (["nowhere"], "nowhere: holds no results: give the --output_dir of train"),
        (["before", "--metric", "map@3"], "--metric map@3: none of the runs measured it, only"),
        (["before", "after", "--baseline", "x"], "--baseline x: there is no such evaluation, only"),
    ],
)
def test_bad_input(runs, argv, said, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(InputError, match=re.escape(said)):
        report.main(argv)
    assert not (runs / "report.html").exists()


def test_changed_queries_are_noticed(runs, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(runs, folder)
    monkeypatch.chdir(folder)
    rows = read_lines(folder / "test.json")
    rows = [row | {"pos_index": rows[i - 1]["pos_index"]} for i, row in enumerate(rows)]
    (folder / "test.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main(["before", "after"])
    text = (folder / "report.md").read_text()
    assert "No interval for before: before: its hits give ndcg@10" in text
    assert "--eval_data was changed" in text and "**" not in text


@pytest.fixture
def copied(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("before/test.metrics.json", {"ndcg@10": float("nan")}, "ndcg@10 is NaN"),
        ("before/test.metrics.json", {"ndcg@10": "0.7"}, 'ndcg@10 is "0.7"'),
        ("before/test.metrics.json", [], r"it is \[\]"),
        ("before/test.metrics.json", "[" * 10**5, "cannot be read"),
        ("before/test.run.json", {"settings": None}, "settings is missing"),
        ("before/test.run.json", {"versions": {"jax": 1}}, "versions.jax is 1"),
        ("mined/train.mining.json", {"queries": 1.5}, "queries is 1.5"),
        ("mined/train.mining.json", {"ranks": {"a": 1}}, "its counts do not fit together"),
        ("mined/train.mining.json", {"score_edges": [0, 1]}, "its counts do not fit together"),
        ("trained/metrics.jsonl", {"step": 5, "loss": None}, "step 5: loss is missing"),
        ("trained/metrics.jsonl", {"step": 5, "eval_mrr@1": {}}, "step 5: mrr@1 is {}"),
        ("trained/run.json", {"devices": [1]}, r"devices is \[1\]"),
        ("trained/stage.json", {"seconds": 1}, "key is missing"),
    ],
)
def test_what_no_run_writes_is_named(copied, file, change, said):
    path = copied / file
    if path.suffix == ".jsonl":
        path.write_text(path.read_text() + json.dumps(change) + "\n")
    else:
        old = json.loads(path.read_text()) if path.exists() else {}
        new = json.dumps(old | change if isinstance(change, dict) else change)
        path.write_text(change if isinstance(change, str) else new)
    with pytest.raises(InputError, match=f"^{file}: {said}.*: (put back|mine again|remove the)"):
        report.main([path.parent.name])


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("metrics", lambda old: {"foo": 1}, "foo is a metric of no query"),
        (
            "run",
            lambda old: {"settings": old["settings"] | {"corpus": 1}},
            "before: in its settings corpus is 1",
        ),
    ],
)
def test_what_cannot_be_measured_again_has_no_interval(copied, kind, change, said):
    path = copied / f"before/test.{kind}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    report.main(["before"])
    assert f"No interval for before: {said}" in (copied / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": float("nan")}, "score is NaN: give an output file"),
        ({"score": "1"}, 'score is "1": give an output file'),
        ({"score": 10**400}, "score is 1000"),
        ({"scores": {"em": None}}, "scores.em is missing"),
        ({"scores": {}}, "its answer fits no question"),
        ({"key": "k"}, 'key is "k"'),
        ({"output": 7}, "its answer fits no question"),
        ({"output": None}, "its answer fits no question"),
        ({"query": 1}, "its answer fits no question"),
        ({"answer": "0"}, "its answer fits no question"),
        ({"query_id": 0}, "the question of line 1 again: remove one"),
    ],
)
def test_answers_that_no_evaluation_writes_are_refused(tmp_path, change, said):
    row = {"query": "q", "choices": ["a", "b"], "answer": 0, "output": 1, "score": 0.0}
    rows = [row | {"scores": {"em": 0.0}, "query_id": i} for i in range(3)]
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        write_lines(Path(path), rows)
    evaluate.main(["--compare", *paths])
    write_lines(Path(paths[1]), [*rows[:1], rows[1] | change, *rows[2:]])
    with pytest.raises(InputError, match=f"^{paths[1]}:2: {said}"):
        evaluate.main(["--compare", *paths])


def test_each_save_name_is_a_run(copied):
    for path in (copied / "after").glob("test.*.json"):
        kind = path.name.split(".")[1]
        shutil.copy(path, copied / f"before/test.{kind}.tuned.json")
        shutil.copy(path, copied / f"trained/test.{kind}.json")
    report.main(["before", "trained", "after"])
    text = (copied / "report.md").read_text()
    assert "** after has ndcg@10" in text
    values = {
        name: json.loads((copied / name / "test.metrics.json").read_text())["ndcg@10"]
        for name in ("before", "after")
    }
    for name in ("before", "before:tuned", "trained:test", "after"):
        value = values["before" if name == "before" else "after"]
        assert f"| {name} | {value:.4f} |" in text
    assert "| trained | 4 |" in text and "No interval" not in text
    report.main(["before", "--baseline", "before:tuned"])
    assert "** before:tuned has" not in (copied / "report.md").read_text()


def test_stages_of_two_pipelines_are_told_apart(copied):
    """Each verdict, difference and row is of its own stage."""
    record = {"made": "", "after": {}, "command": "it's", "spent": 1.0, "seconds": 1.0}
    for pipeline, (first, last) in {"pa": ("before", "after"), "pb": ("after", "before")}.items():
        for number, (stage, files) in enumerate({"untrained": first, "r1": last}.items()):
            shutil.copytree(copied / files, copied / pipeline / stage)
            path = copied / pipeline / stage / "stage.json"
            note = {"key": pipeline, "number": number, "baseline": stage == "untrained"}
            path.write_text(json.dumps(record | note))
    verdicts = []
    for folders in (["pa"], ["pb"], ["pa", "pb", "pa/", "./pb/r1"]):
        report.main(folders)
        text = (copied / "report.md").read_text()
        verdicts.append(re.search(r"^\*\*\w+\*\* (\S+) has \S+ \S+ (\S+) .*?: (\S+) ", text, re.M))
    assert [v[1] for v in verdicts] == ["r1", "r1", "pb/r1"]
    assert verdicts[2][2] == "pa/untrained" and float(verdicts[2][3]) == 0.0
    assert float(verdicts[0][3]) == -float(verdicts[1][3]) != 0.0
    names = re.findall(r"^\| (p\S+) \|", text.split("##")[1], re.M)
    assert names == ["pa/untrained", "pa/r1", "pb/untrained", "pb/r1", "pa/untrained", "pa/r1",
                     "pb/untrained"]  # fmt: skip


def test_rounding_wins_nothing():
    gains = np.array([0.3, 2e-6, -2e-6, 0.0, -0.2])
    found = won_and_lost(
        *("question", "questions", "b", gains, []), lambda i: [f"q{i}", "right", "0", "1"]
    )
    text = to_markdown("page", [found])
    assert "1 questions are better with b, 1 worse, 3 equal." in text
    assert [f"q{i}" in text for i in range(5)] == [True, False, False, False, True]
