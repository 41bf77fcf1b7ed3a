"""Several sets in one evaluation: each as if it were alone, their mean, their names."""

import json

import jax
import numpy as np
import pytest
import tiny
from commands import flags
from named import evaluation_sets, files_of

from llme_jax import train
from llme_jax.config import Config, DataConfig
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.reports.compose import compose
from llme_jax.reports.runs import read_runs
from llme_jax.retrieval import dense, encode, evaluate, exact
from llme_jax.retrieval.evaluate import RetrievalEvaluator

SIZES = {"first": (60, 20), "second": (35, 18)}  # passages and queries


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and two BEIR folders; the second also as JSON lines."""
    folder = tmp_path_factory.mktemp("sets")
    tiny.save_bert(folder / "bert", layers=1)
    rng = np.random.default_rng(0)
    for name, (passages, queries) in SIZES.items():
        texts = [tiny.text(rng) for _ in range(passages)]
        rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
        right = rng.permutation(passages)[:queries].tolist()
        asked = [" ".join(texts[i].split()[:2]) for i in right]
        for split in ("test", "train"):
            judged = [f"q{q}\td{i}\t1\n" for q, i in enumerate(right)]
            path = folder / name / f"qrels/{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
        tiny.write_lines(folder / name / "corpus.jsonl", rows)
        asked = [{"_id": f"q{q}", "text": text} for q, text in enumerate(asked)]
        tiny.write_lines(folder / name / "queries.jsonl", asked)
        rows = [
            {"query": q["text"], "query_id": q["_id"], "pos_index": [i]}
            for q, i in zip(asked, right, strict=True)
        ]
        tiny.write_lines(folder / name / "test.json", rows)
        tiny.write_lines(folder / name / "half.json", rows[: queries // 2])
    return folder


@pytest.fixture
def config(made, tmp_path):
    config = Config()
    config.data.dataset_cache_dir = str(tmp_path / "cache")
    config.data.query_max_length = config.data.key_max_length = 32
    config.data.truncation_side = "right"
    config.encoder.query_encoder = str(made / "bert")
    config.evaluation.metrics, config.evaluation.cutoffs = ["ndcg", "recall"], [1, 10]
    config.evaluation.log_path = None
    config.training.output_dir = str(tmp_path / "out")
    return config


def test_each_set_is_measured_as_alone_by_the_same_programs(made, config, tmp_path):
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    alone = {}
    for name in SIZES:
        config.data.eval_data = str(made / name)
        alone[name] = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)(params)
    assert alone["first"] != alone["second"] and next(iter(alone["first"])) == "ndcg@1"

    config.data.eval_data = [str(made / name) for name in SIZES]
    evaluator = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)
    sizes = [(len(one.corpus), len(one.eval_data)) for one in evaluator.sets.values()]
    assert sizes == [(60, 20), (35, 18)]
    mesh = make_mesh(devices=jax.local_devices()[:1])
    exact._compiled.cache_clear()
    encode._forward.clear_cache()
    merge, join = exact._compiled(mesh, encoder.metric, 64)  # 60 passages in sixteens
    programs = []
    for name in SIZES:
        evaluator.retrieve(params, name)
        sizes = [function._cache_size() for function in (encode._forward, merge, join)]
        programs.append([*sizes, exact._compiled.cache_info().currsize])
    assert programs[0] == programs[1] and min(programs[0]) > 0

    found = evaluator(params)
    assert list(found)[:4] == list(alone["first"])  # the mean comes first
    for metric, value in alone["first"].items():
        # The same ranks, unless scores nearly tie: a mean over 18 queries would show one.
        assert found[f"first/{metric}"] == value
        assert found[f"second/{metric}"] == alone["second"][metric]
        assert found[metric] == pytest.approx((value + alone["second"][metric]) / 2)
    assert len(found) == 12
    written = {p.name for p in (tmp_path / "out").glob("*.result.json")}
    assert written == {*("first.test.result.json", "second.test.result.json"),
                       *("first.result.json", "second.result.json")}  # fmt: skip


def test_sets_that_share_their_passages_encode_them_once(made, config, monkeypatch):
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    base = made / "second"
    config.data.eval_data = [str(base / "test.json"), str(base / "half.json")]
    config.data.corpus = str(base / "corpus.jsonl")
    evaluator = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)
    corpora = [one.corpus for one in evaluator.sets.values()]
    assert corpora[0] is corpora[1]
    fields, real = [], dense.encode
    monkeypatch.setattr(dense, "encode", lambda *a, **k: fields.append(k["field"]) or real(*a, **k))
    found = evaluator(params)
    assert fields == ["key", "query", "query"]
    config.data.eval_data = str(base / "half.json")
    assert (
        RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)(params)["ndcg@10"]
        == found["half/ndcg@10"]
    )


def test_the_mean_picks_the_best_checkpoint(made, tmp_path, monkeypatch, capsys):
    """Each set alone would pick another step."""
    values = {2: (0.9, 0.1), 4: (0.6, 0.6), 6: (0.1, 0.8)}
    coming = iter([value for step in values.values() for value in step])

    def measured(*_):
        return {"ndcg@10": next(coming), "recall@1": 0.0}

    monkeypatch.setattr(evaluate, "measure", measured)
    out, base = tmp_path / "out", str(made / "first")
    settings = {
        "query_encoder": made / "bert",
        "dataset_cache_dir": tmp_path / "cache",
        "output_dir": out,
        "log_path": tmp_path / "log",
        "train_data": base,
        "query_max_length": 32,
        "key_max_length": 32,
        "train_group_size": 1,
        "per_device_train_batch_size": 1,
        "max_steps": 6,
        "save_steps": 2,
    }
    sets = ["--eval_data", base, str(made / "second")]
    train.main([*flags(settings), *sets])

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval_ndcg@10" in line]
    names = ["ndcg@10", "recall@1"]
    own = [f"{name}/{metric}" for name in SIZES for metric in names]
    assert list(lines[0]) == ["step", *(f"eval_{name}" for name in [*names, *own])]
    assert [line["step"] for line in lines] == [*values]
    for line in lines:
        pair = [line[f"eval_{name}/ndcg@10"] for name in SIZES]
        assert pair == [*values[line["step"]]]
        assert line["eval_ndcg@10"] == pytest.approx(sum(pair) / 2)
    assert (out / "best").resolve().name == "checkpoint-4"
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["eval_data"] == sets[1:] and run["settings"]["corpus"] is None

    # For people: the means, and of each set what picks the best.
    said = capsys.readouterr().out
    assert "second/ndcg@10  0.1000  0.8000  +0.7000" in said and "first/recall@1" not in said
    card = (out / "best/encoder/README.md").read_text()
    assert f"On {sets[1]}, {sets[2]}; without the name of a set, the mean" in card
    assert "| second/ndcg@10 | not measured | 0.6000 |" in card and "/recall@1" not in card
    _, sections = compose(read_runs([str(out)]))
    assert "means over 2 sets" in str([section.blocks for section in sections])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["first", "second/"], ["first", "second"]),
        (["first/test.json", "second/half.json"], ["test", "half"]),
        (["first/test.json", "second/test.json"], ["first-test", "second-test"]),
        (["first", "first", "first/test.json"], ["sets-first", "sets-first-2", "test"]),
        (["first/qrels/train.tsv", "first/qrels/test.tsv"], ["first.train", "first.test"]),
        (["a@1 b.json.gz", "tfds:llm_embedder/nq:test"], ["a-1-b", "nq-test"]),
    ],
)
def test_names(made, tmp_path, names, expected):
    base = tmp_path / "sets"
    base.symlink_to(made)
    paths = [name if ":" in name else f"{base}/{name}" for name in names]
    sets = evaluation_sets(DataConfig(eval_data=paths, corpus="c.json"))
    assert [*sets] == expected
    assert [(s.given["eval_data"], s.given["corpus"]) for s in sets.values()] == [
        (p, "c.json") for p in paths
    ]


def test_passages_of_each_set(made):
    names = [str(made / "first/qrels/train.tsv"), str(made / "second/test.json")]
    corpora = [str(made / "first"), str(made / "second/corpus.jsonl")]
    sets = evaluation_sets(DataConfig(eval_data=names, corpus=corpora))
    assert [one.given["corpus"] for one in sets.values()] == corpora
    with pytest.raises(InputError, match=r"second/test.json needs --corpus, .* only a BEIR folder"):
        evaluation_sets(DataConfig(eval_data=names))
    assert len(evaluation_sets(DataConfig(eval_data=names[0]))) == 1
    assert evaluation_sets(DataConfig()) == {}
