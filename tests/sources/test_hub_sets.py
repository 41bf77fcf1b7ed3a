"""Retrieval sets of the Hub, as folders laid out like its repositories."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
from named import corpus_file, evaluation_sets, files_of, queries_file, training_files
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from llme_jax.config import Config, DataConfig
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.retrieval.evaluate import RetrievalEvaluator
from llme_jax.sources import hf_datasets

Tables = dict[str, dict[str, list]]  # columns of corpus, queries and qrels


def write_repository(folder: Path, configs: dict[str, Tables]) -> None:
    """A repository of the Hub: parquet files, and a card that says which split of which
    configuration each is."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            datasets.Dataset.from_dict(columns).to_parquet(folder / config / f"{split}-0.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def make_set(seed: int, titles: bool = False) -> Tables:
    rng = np.random.default_rng(seed)
    texts = [tiny.text(rng) for _ in range(60)]
    judged = [(q, int(d)) for q in range(20) for d in rng.choice(60, 3, replace=False)]
    corpus = {"_id": [f"{d + 100}" for d in range(60)], "text": texts}
    return {
        "corpus": corpus | ({"title": [f"t{i % 7}" for i in range(60)]} if titles else {}),
        "queries": {
            "_id": [f"{q}" for q in range(20)],
            "text": [" ".join(texts[judged[3 * q][1]].split()[:2]) for q in range(20)],
        },
        "qrels": {
            "query-id": [f"{q}" for q, _ in judged],
            "corpus-id": [f"{d + 100}" for _, d in judged],
        },
    }


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nano(tmp_path) -> Path:
    """Two sets as sentence-transformers/NanoBEIR-en has thirteen."""
    sets = {"NanoNFCorpus": make_set(0), "NanoSciFact": make_set(1)}
    parts = {part: {name: one[part] for name, one in sets.items()} for part in make_set(0)}
    write_repository(tmp_path / "NanoBEIR-en", parts)
    return tmp_path / "NanoBEIR-en"


def test_metrics_are_those_of_sentence_transformers(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(hf_datasets.SHORT, "nanobeir", str(nano))
    tiny.save_bert(tmp_path / "bert", layers=1)
    config = Config()
    config.data.eval_data = "hf:nanobeir"
    config.data.query_max_length = config.data.key_max_length = 32
    config.data.truncation_side = "right"
    config.data.add_instruction = False
    config.encoder.query_encoder = str(tmp_path / "bert")
    config.encoder.pooling_method = ["mean"]
    config.evaluation.metrics, config.evaluation.cutoffs = ["ndcg", "mrr", "recall"], [10]
    config.evaluation.log_path = None
    config.training.output_dir = str(tmp_path / "out")
    encoder, params, tokenizer = load_dual_encoder(config.encoder)
    ours = RetrievalEvaluator(config, files_of(config.data), tokenizer, encoder)(params)

    bert = Transformer(str(tmp_path / "bert"), max_seq_length=32)
    model = SentenceTransformer(modules=[bert, Pooling(32, "mean"), Normalize()], device="cpu")
    theirs = NanoBEIREvaluator(
        ["nfcorpus", "scifact"], str(nano), precision_recall_at_k=[10], write_csv=False
    )(model)
    names = {"": "NanoBEIR_mean", "NanoNFCorpus/": "NanoNFCorpus", "NanoSciFact/": "NanoSciFact"}
    assert len(ours) == 9
    for name, value in ours.items():
        of, metric = name[: name.find("/") + 1], name.rpartition("/")[2]
        # The same ranks: what is left is the order of sums in float64.
        assert value == pytest.approx(theirs[f"{names[of]}_cosine_{metric}"], abs=1e-6), name
    assert 0 < ours["NanoSciFact/ndcg@10"] < 1


def lines_of(path) -> list[dict]:
    return tiny.read_lines(Path(path))


@pytest.mark.parametrize("layout", ["nano", "mteb", "beir"])
def test_each_layout_gives_the_rows_of_a_beir_folder(tmp_path, layout):
    one = make_set(2, titles=True)
    judged = one["qrels"] | {"score": [int(i % 4 > 0) for i in range(60)]}
    half = {split: {k: v[part] for k, v in judged.items()}
            for split, part in (("train", slice(30)), ("test", slice(30, 60)))}  # fmt: skip
    corpus, queries = one["corpus"], one["queries"]
    of, name = tmp_path / "of", "hf:of/scifact"
    if layout == "nano":  # as those of zeta-alpha-ai: no scores, all splits are train
        positives = [i for i, score in enumerate(half["test"]["score"]) if score]
        only = {k: [half["test"][k][i] for i in positives] for k in ("query-id", "corpus-id")}
        parts = {"corpus": {"train": corpus}, "queries": {"train": queries}}
        write_repository(of / "scifact", parts | {"qrels": {"train": only}})
    else:
        parts = {"corpus": {"corpus": corpus}, "queries": {"queries": queries}}
        write_repository(of / "scifact", parts | ({"default": half} if layout == "mteb" else {}))
    if layout == "beir":  # tables of numbers in a repository of their own
        (of / "scifact-qrels").mkdir()
        for split, columns in half.items():
            rows = [map(str, row) for row in (columns.keys(), *zip(*columns.values(), strict=True))]
            text = "".join("\t".join(row) + "\n" for row in rows)
            (of / f"scifact-qrels/{split}.tsv").write_text(text)

    base = tmp_path / "scifact"
    for part, columns in (("corpus", corpus), ("queries", queries)):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        base.mkdir(exist_ok=True)
        tiny.write_lines(base / f"{part}.jsonl", rows)
    (base / "qrels").mkdir()
    for split, columns in half.items():
        rows = ["\t".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        (base / f"qrels/{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))

    ours, local = DataConfig(eval_data=name), DataConfig(eval_data=str(base))
    assert lines_of(corpus_file(ours)) == lines_of(corpus_file(local))
    assert lines_of(queries_file(ours)) == lines_of(queries_file(local))
    assert [*evaluation_sets(ours)] == ["scifact"]
    if layout != "nano":
        pairs = [training_files(DataConfig(train_data=[n]))[0] for n in (name, str(base))]
        assert Path(pairs[0]).read_bytes() == Path(pairs[1]).read_bytes()
        ours.eval_data, local.eval_data = f"{name}:train", str(base / "qrels/train.tsv")
        assert lines_of(queries_file(ours)) == lines_of(queries_file(local))
        assert [*evaluation_sets(ours)] == ["scifact.train"]


def test_names_and_refusals(nano, tmp_path):
    sets = evaluation_sets(DataConfig(eval_data=["hf:NanoBEIR-en:NanoSciFact", "hf:NanoBEIR-en"]))
    assert [*sets] == ["NanoBEIR-en-NanoSciFact", "NanoNFCorpus", "NanoBEIR-en-NanoSciFact-2"]
    folder = Path(corpus_file(sets["NanoNFCorpus"]))
    assert folder.parts[-3:] == ("NanoBEIR-en", "NanoNFCorpus", "corpus.jsonl")
    made = folder.stat().st_mtime_ns
    assert Path(corpus_file(sets["NanoNFCorpus"])).stat().st_mtime_ns == made
    write_repository(nano, {part: {"train": columns} for part, columns in make_set(3).items()})
    assert [*evaluation_sets(DataConfig(eval_data="hf:NanoBEIR-en"))] == ["NanoBEIR-en"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "hf:NanoBEIR-en",
            "is 2 sets: give one of NanoNFCorpus, NanoSciFact, as in hf:NanoBEIR-en:N",
        ),
        ("hf:NanoBEIR-en:NQ", "has no split NQ: give one of NanoNFCorpus, NanoSciFact, as"),
        ("hf:apart", "no split of its corpus, a, b, is one of its queries and qrels"),
        ("hf:other", "its qrels of train have the columns query, doc: .* need query-id and corpus"),
    ],
)
def test_refusals(nano, tmp_path, name, said):
    parts = {part: {"train": columns} for part, columns in make_set(0).items()}
    unlike = {"qrels": {"train": {"query": ["1"], "doc": ["100"]}}}
    write_repository(tmp_path / "other", parts | unlike)
    corpus = parts["corpus"]["train"]
    write_repository(tmp_path / "apart", parts | {"corpus": {"a": corpus, "b": corpus}})
    with pytest.raises(InputError, match=said) as error:
        queries_file(DataConfig(eval_data=name))
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob(".*")]
