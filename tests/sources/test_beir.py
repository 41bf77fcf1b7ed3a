"""BEIR folders, MS MARCO's tables and ids: the metrics that ir-measures and others compute."""

import json
import os
import random
import shutil

import ir_measures
import numpy as np
import pytest
import tiny
from commands import flags
from ir_measures import RR, R, nDCG
from named import corpus_file, queries_file, training_files
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from llme_jax import rank, retrieve, train
from llme_jax.config import DataConfig
from llme_jax.doctor.__main__ import main as doctor
from llme_jax.errors import InputError
from llme_jax.sources import beir

TEMPLATE = "{title} {text}"


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model; the same collection as BEIR has it (`set`) and as MS MARCO has it (`marco`)."""
    folder = tmp_path_factory.mktemp("beir")
    tiny.save_bert(folder / "bert")
    rng, words = random.Random(0), np.random.default_rng(0)
    texts = {f"d-{i}": tiny.text(words) for i in rng.sample(range(1000), 60)}
    queries = {f"q-{i}" if i % 2 else f"{i}": tiny.text(words, 2, 5) for i in range(30)}
    base, marco = folder / "set", folder / "marco"
    passages = [{"_id": i, "title": "", "text": text, "metadata": {}} for i, text in texts.items()]
    write(base / "corpus.jsonl", map(json.dumps, passages))
    write(base / "queries.jsonl",
          (json.dumps({"_id": i, "text": text}) for i, text in queries.items()))  # fmt: skip
    write(marco / "collection.tsv", (f"{i}\t{text}" for i, text in texts.items()))
    for split, ids in (("test", [*queries][:20]), ("train", [*queries][20:])):
        judged = [(q, d, rng.choice([0, 1, 1])) for q in ids for d in rng.sample([*texts], 4)]
        lines = ["\t".join(map(str, row)) for row in [("query-id", "corpus-id", "score"), *judged]]
        write(base / f"qrels/{split}.tsv", lines)
        write(marco / f"qrels.{split}.tsv", (f"{q}\t0\t{d}\t{g}" for q, d, g in judged))
        write(marco / f"queries.{split}.tsv", (f"{q}\t{queries[q]}" for q in ids))
    return folder


@pytest.fixture
def settings(made, tmp_path):
    return {
        "query_encoder": made / "bert",
        "pooling_method": "mean",
        "add_instruction": "false",
        "dataset_cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "log_path": tmp_path / "log",
        "query_max_length": 32,
        "key_max_length": 32,
    }


def read_qrels(path):
    rows = (line.split("\t") for line in path.read_text().splitlines()[1:])
    return [(q, d, int(grade)) for q, d, grade in rows]


def as_dict(qrels):
    found = {}
    for q, d, grade in qrels:
        found.setdefault(q, {})[d] = grade
    return {q: judged for q, judged in found.items() if any(judged.values())}


@pytest.mark.parametrize("kind", ["set", "marco"])
def test_metrics_are_those_of_ir_measures_and_sentence_transformers(made, settings, tmp_path, kind):
    base = made / kind
    files = flags(settings | {"eval_data": base, "corpus": base, "hits": 60})
    more = ["--metrics", "ndcg", "mrr", "recall", "--cutoffs", "3", "10", "--save_trec"]
    retrieve.main([*files, *more])
    ours = json.loads((tmp_path / f"out/{kind}.test.metrics.json").read_text())

    judged = as_dict(read_qrels(made / "set/qrels/test.tsv"))
    found = [*ir_measures.read_trec_run(str(tmp_path / f"out/{kind}.test.result.trec"))]
    assert {one.query_id for one in found} == judged.keys()
    wanted = ir_measures.calc_aggregate(
        [m @ k for m in (nDCG, R, RR) for k in (3, 10)], judged, found
    )
    names = {"nDCG": "ndcg", "R": "recall", "RR": "mrr"}
    for measure, value in wanted.items():
        name, cutoff = str(measure).split("@")
        assert ours[f"{names[name]}@{cutoff}"] == pytest.approx(value, abs=1e-6)

    bert = Transformer(str(made / "bert"), max_seq_length=32)
    model = SentenceTransformer(modules=[bert, Pooling(32, "mean"), Normalize()], device="cpu")
    corpus = [json.loads(line) for line in (made / "set/corpus.jsonl").open()]
    queries = [json.loads(line) for line in (made / "set/queries.jsonl").open()]
    evaluator = InformationRetrievalEvaluator(
        {q["_id"]: q["text"] for q in queries if q["_id"] in judged},
        {p["_id"]: p["text"] for p in corpus},
        {q: {d for d, grade in ds.items() if grade} for q, ds in judged.items()},
        mrr_at_k=[3, 10], ndcg_at_k=[3, 10], precision_recall_at_k=[3, 10], accuracy_at_k=[3],
        map_at_k=[3], write_csv=False,
    )  # fmt: skip
    theirs = evaluator(model)
    for name in names.values():
        for cutoff in (3, 10):
            assert ours[f"{name}@{cutoff}"] == pytest.approx(theirs[f"cosine_{name}@{cutoff}"],
                                                             abs=1e-6)  # fmt: skip


def lines_of(path):
    return tiny.read_lines(path)


def test_a_folder_is_what_is_asked_of_it(made, tmp_path):
    judged = as_dict(read_qrels(made / "set/qrels/train.tsv"))
    corpus = lines_of(made / "set/corpus.jsonl")
    text = {p["_id"]: f" {p['text']}" for p in corpus}
    pairs = []
    for kind in ("set", "marco"):
        base = str(made / kind)
        data = DataConfig(train_data=[base], eval_data=base, corpus=base)
        data.dataset_cache_dir = str(tmp_path)
        (path,) = training_files(data)
        pairs.append(lines_of(path))
        qrels = made / kind / ("qrels/train.tsv" if kind == "set" else "qrels.train.tsv")
        data.eval_data = str(qrels)  # another split, by its file
        rows = lines_of(queries_file(data))
        assert [row["pos_id"] for row in rows] == [row["pos_id"] for row in pairs[-1]]
        assert all(corpus[n]["_id"] == i for row in rows
                   for n, i in zip(row["pos_index"], row["pos_id"], strict=True))  # fmt: skip
        assert [row["text"] for row in lines_of(corpus_file(data))] == [p["text"] for p in corpus]
        assert training_files(data) == [path]  # made once
    assert pairs[0] == pairs[1]
    for row in pairs[0]:
        ids = [i for i, grade in judged[row["query_id"]].items() if grade]
        assert row["pos_id"] == ids and row["pos"] == [text[i] for i in ids]


def test_the_commands_take_folders(made, settings, tmp_path, capsys):
    base = str(made / "set")
    training = flags(
        {"max_steps": 2, "train_group_size": 1, "per_device_train_batch_size": 1, "save_steps": 2}
    )
    files = ["--eval_data", base, "--corpus", base]
    train.main([*flags(settings), *training, "--train_data", base, *files])
    assert (tmp_path / "out/set.test.result.json").exists()
    mining = ["--eval_data", f"{base}/qrels/train.tsv", "--corpus", base, "--max_neg_num", "5"]
    retrieve.main([*flags(settings), *mining, "--metrics", "mrr", "collate_neg"])
    rows = lines_of(tmp_path / "out/set.train.neg.json")
    corpus = lines_of(made / "set/corpus.jsonl")
    for row in rows:
        assert not {*row["pos_id"]} & {corpus[i]["_id"] for i in row["neg_index"]}
        assert row["neg"] == [f" {corpus[i]['text']}" for i in row["neg_index"]]
    ranking = {k: v for k, v in settings.items() if k not in ("query_encoder", "pooling_method")}
    ranking |= {"ranker": made / "bert", "query_max_length": 16}
    hits = tmp_path / "out/set.test.result.json"
    rank.main([*flags(ranking), *files, "--load_result", str(hits), "--metrics", "mrr",
               "--save_name", "ranked"])  # fmt: skip
    assert (tmp_path / "out/set.test.result.ranked.json").exists()
    assert doctor([base, "--train_group_size", "1", "--query_encoder",
                                 str(made / "bert"), *files]) == 0  # fmt: skip
    assert "set.train.json" in capsys.readouterr().out


def test_rows_of_your_own_may_name_passages(made, tmp_path):
    corpus = lines_of(made / "set/corpus.jsonl")
    rows = [
        {"query": "a", "pos_id": [corpus[3]["_id"]], "neg_id": [corpus[5]["_id"]]},
        {"query": "b", "pos_index": [corpus[7]["_id"], corpus[1]["_id"]]},
    ]
    path = tiny.write_lines(tmp_path / "rows.json", rows)
    data = DataConfig(eval_data=str(path), corpus=str(made / "set"))
    data.dataset_cache_dir = str(tmp_path / "cache")
    found = lines_of(queries_file(data))
    assert [row["pos_index"] for row in found] == [[3], [7, 1]] and found[0]["neg_index"] == [5]
    tiny.write_lines(path, [rows[0] | {"pos_id": ["nowhere"]}])
    with pytest.raises(InputError, match=r'rows.json:1: pos_id has "nowhere", which is no passage'):
        queries_file(data)
    data.corpus = None
    with pytest.raises(InputError, match="names passages by id: give the --corpus"):
        queries_file(data)


def break_(base, name, change):
    path = base / name
    write(path, change(path.read_text().splitlines()))


REFUSED = {
    "queries.jsonl:2: has no _id and text": lambda b: break_(
        b, "queries.jsonl", lambda x: [x[0], '{"text": "a"}']
    ),
    "test.tsv:3: not a judgement": lambda b: break_(
        b, "qrels/test.tsv", lambda x: [*x[:2], "1\t2\tyes"]
    ),
    "test.tsv: judges no passage relevant": lambda b: break_(
        b, "qrels/test.tsv", lambda x: [*x[:1], "1\td-1\t0"]
    ),
    "has no qrels of the split test or dev; name the qrels file": lambda b: (
        b / "qrels/test.tsv"
    ).rename(b / "qrels/other.tsv"),
    "has no queries.jsonl, which belongs to it": lambda b: (b / "queries.jsonl").unlink(),
    "corpus.jsonl:2: has no _id, id, docid, doc_id or pid": lambda b: break_(
        b, "corpus.jsonl", lambda x: [x[0], '{"title": "", "text": "a"}']
    ),
    "corpus.jsonl: passages 1 and 3 have the same id": lambda b: break_(
        b, "corpus.jsonl", lambda x: [x[0], x[1], x[0]]
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(made, tmp_path, said):
    base = shutil.copytree(made / "set", tmp_path / "set")
    REFUSED[said](base)
    data = DataConfig(eval_data=str(base), corpus=str(base))
    data.dataset_cache_dir = str(tmp_path / "cache")
    with pytest.raises(InputError) as error:
        queries_file(data)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob(".*")]


def test_positives_that_are_no_passages_are_left_out(made, tmp_path, caplog):
    base = shutil.copytree(made / "set", tmp_path / "set")
    lines = (base / "qrels/test.tsv").read_text().splitlines()
    write(base / "qrels/test.tsv", [*lines, "0\tgone\t1", "nobody\td\t1"])
    data = DataConfig(eval_data=str(base), corpus=str(base))
    data.dataset_cache_dir = str(tmp_path / "cache")
    data_rows = lines_of(queries_file(data))
    assert all(row["pos_index"] for row in data_rows)
    assert "1 positives are no passages of" in caplog.text
    assert "1 of its 21 queries are not in" in caplog.text


def test_an_id_counts_more_than_a_number(made, tmp_path):
    """As when the passages stand in another order than they did."""
    corpus = lines_of(made / "set/corpus.jsonl")
    path = tiny.write_lines(
        tmp_path / "rows.json", [{"query": "a", "pos_id": [corpus[3]["_id"]], "pos_index": [5]}]
    )
    data = DataConfig(eval_data=str(path), corpus=str(made / "set"))
    data.dataset_cache_dir = str(tmp_path / "cache")
    assert lines_of(queries_file(data))[0]["pos_index"] == [3]
    texts = tiny.write_lines(tmp_path / "texts.json", [{"title": "", "text": "x"}] * 6)
    data.corpus = str(texts)  # which have no ids
    assert lines_of(queries_file(data))[0]["pos_index"] == [5]


def test_judgements_of_the_same_size_and_time(made, tmp_path):
    base = shutil.copytree(made / "set", tmp_path / "set")
    data = DataConfig(eval_data=str(base), corpus=str(base))
    data.dataset_cache_dir = str(tmp_path / "cache")
    before, qrels = lines_of(queries_file(data)), base / "qrels/test.tsv"
    stat, lines = qrels.stat(), qrels.read_text().splitlines()
    lines[1:] = [line[:-1] + ("0" if line.endswith("1") else "1") for line in lines[1:]]
    qrels.write_text("\n".join([*lines, ""]))
    os.utime(qrels, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert qrels.stat().st_size == stat.st_size
    assert lines_of(queries_file(data)) != before


def test_ids_with_blanks_stand_between_tabs(tmp_path):
    write(tmp_path / "test.tsv", ["q\td\ts", "q 1\td 1\t1", "q 1\td 2\t0"])
    assert beir._judged(tmp_path / "test.tsv") == {"q 1": ["d 1"]}
