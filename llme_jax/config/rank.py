"""Settings of rerankers: the model, its loss, what is reranked."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llme_jax.config.data import LENGTH, SOURCES_HELP, DataConfig
from llme_jax.config.model import ATTENTION, DTYPE_HELP, DTYPES, HubConfig, TensorConfig
from llme_jax.config.retrieval import METRICS, MeasureConfig
from llme_jax.config.setting import setting
from llme_jax.config.training import DistillConfig

RANK_COLLATIONS = ("collate_key", "collate_score")  # written by the rank command among its metrics


@dataclass
class RankDataConfig(DataConfig):
    """Pairs of query and key: which to train on, which to score, and how long they are."""

    eval_data: str | None = setting(
        None,
        "JSON-lines file whose candidates are reranked: key, else pos and neg, else history; also "
        f"{SOURCES_HELP}.",
        decides="scores",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    corpus: str | None = setting(
        None,
        "JSON-lines file with the passages that a result file of retrieve names; for "
        "--load_result.",
        decides="scores",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    add_instruction: bool | None = setting(
        None,
        "Put the task's instruction before queries and keys [the ranker's own default prompt "
        "before queries, where its folder has one].",
        decides="texts",
    )
    query_max_length: int | None = setting(
        None,
        "With --key_max_length added, the longest pair, special tokens included; tokens are cut "
        f"off the longer of the two texts [as the model's folder says, else {LENGTH}].",
        decides="texts",
        unit="TOKENS",
        least=1,
    )
    train_group_size: int = setting(
        8,
        "Keys a query is trained with: 1 positive, the others negatives.",
        decides="weights",
        unit="KEYS",
        least=2,
    )
    key_max_length: int | None = setting(
        None,
        "See --query_max_length: only their sum counts.",
        decides="texts",
        unit="TOKENS",
        least=1,
    )


@dataclass
class RankerConfig(TensorConfig, HubConfig):
    """The reranker: a model that reads query and key together."""

    title = "ranker"

    ranker: str = setting(
        "BAAI/bge-base-en",
        "Hub name or folder of a cross-encoder, of an encoder that is to become one, or of a "
        "language model (yes-no).",
        decides="scores",
        unit="MODEL",
        reads="model",
    )
    ranker_method: Literal["cross-encoder", "yes-no"] = setting(
        "cross-encoder",
        "What scores a pair. cross-encoder: its head; yes-no: how much likelier a language model "
        "answers yes than no, log P(yes) - log P(no); only without --train_data.",
        decides="scores",
    )
    yes_no_instruction: str = setting(
        "Given a web search query, retrieve relevant passages that answer the query",
        "What a language model is told to judge by (yes-no).",
        decides="scores",
        unit="TEXT",
    )
    dtype: str = setting("auto", DTYPE_HELP, decides="scores", **DTYPES)
    attention: str = setting("auto", decides="scores", **ATTENTION)


@dataclass(unsafe_hash=True)
class RankLossConfig(DistillConfig):
    """What is minimised over the scores of each query's own keys."""

    contrastive_weight: float = setting(
        0.2,
        "Weight of the cross-entropy, whose target is the positive.",
        decides="weights",
        least=0,
    )
    distill_loss: Literal["kl", "margin_mse", "ranknet", "lambdaloss"] = setting(
        "kl",
        "How teacher scores are distilled without --stable_distill: kl compares distributions; "
        "margin_mse by how much the positive scores above each negative; ranknet and lambdaloss "
        "compare pairs of keys, the latter by what swapping them is worth in ndcg.",
        decides="weights",
    )

    negative_cross_device: ClassVar[bool] = True  # pairs meet only those of their own query
    embedding_weight: ClassVar[float] = 0.0  # a pair has no vectors


@dataclass
class RerankConfig(MeasureConfig):
    """Reranking, and what is measured of it."""

    metrics: list[str] = setting(
        ["mrr", "recall", "ndcg"],
        "What is measured (nq: how often a key holds an answer) and written (collate_key: rows "
        "with the keys as ranked, collate_score: rows with teacher_scores).",
        decides="files",
        choices=(*METRICS, *RANK_COLLATIONS),
        may_change=True,
    )
    hits: int | None = setting(
        None,
        "Keep this many keys of a query, the best [all].",
        decides="files",
        unit="KEYS",
        least=1,
        may_change=True,
    )
    batch_size: int = setting(
        1000,
        "Queries whose pairs are scored at a time, at most; no score depends on it.",
        decides="nothing",
        unit="QUERIES",
        least=1,
        may_change=True,
    )
    ignore_identical: ClassVar[bool] = False  # what is ranked was found, or is given
    load_result: str | None = setting(
        None,
        "Rerank the hits of this result file of retrieve, instead of the rows' own keys.",
        decides="scores",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    rerank_depth: int | None = setting(
        None,
        "Of the hits of --load_result take this many, the best [all].",
        decides="scores",
        unit="KEYS",
        least=1,
        may_change=True,
    )
    retriever_weight: float = setting(
        0.0,
        "What the scores of --load_result count, the ranker's count the rest; before they are "
        "added, both are brought to mean 0 and deviation 1 over the keys of a query.",
        decides="files",
        least=0,
        most=1,
        may_change=True,
    )
    save_to_output: bool = setting(
        False,
        "Write collated rows to --output_dir instead of beside --eval_data.",
        decides="files",
        may_change=True,
    )
