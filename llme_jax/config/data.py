"""Settings of data: where files are, how texts become tokens, which rows are trained on."""

from dataclasses import dataclass
from typing import Literal

from llme_jax.config.setting import Group, setting

DATA_ROOT = "/data/llm-embedder"
DATA_ROOT_HELP = "Folder that paths beginning with 'llm-embedder:' are relative to."
LENGTH = 256  # tokens of queries and of keys, where neither a flag nor a folder says more
# Settings that a model's folder has a value for; a run records what counts.
OF_FOLDER = ("query_max_length", "key_max_length", "truncation_side")
SOURCES_HELP = "hf:NAME:SPLIT, tfds:NAME/CONFIG:SPLIT or gs://bucket/file"


@dataclass
class SourceConfig(Group):
    """Where data files are."""

    title = "data"

    data_root: str = setting(
        DATA_ROOT, DATA_ROOT_HELP, decides="nothing", unit="FOLDER", may_change=True, per_host=True
    )


@dataclass
class TextConfig(SourceConfig):
    """What is retrieved from what, and how texts become tokens."""

    eval_data: str | None = setting(
        None,
        f"JSON-lines file with the queries to evaluate on, or a BEIR folder; also {SOURCES_HELP}.",
        decides="queries",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    corpus: str | None = setting(
        None,
        f"JSON-lines file with the passages to search, or a BEIR folder; also {SOURCES_HELP}.",
        decides="keys",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    key_template: str = setting(
        "{title} {text}",
        "How the fields of a corpus line become the text of one key.",
        decides="keys",
        unit="TEMPLATE",
        may_change=True,
    )
    version: Literal["bge", "llm-embedder", "e5", "instructor", "model"] = setting(
        "bge",
        "The table of instructions and of training recipes to use; model: the prompts in the "
        "model's own folder.",
        decides="texts",
    )
    add_instruction: bool = setting(
        True, "Put the task's instruction before queries and keys.", decides="texts"
    )
    query_instruction: str | None = setting(
        None,
        "Own text before every query, instead of what --version has.",
        decides="queries",
        unit="TEXT",
    )
    key_instruction: str | None = setting(
        None,
        "Own text before every key, instead of what --version has.",
        decides="keys",
        unit="TEXT",
    )
    query_max_length: int | None = setting(
        None,
        "Longest query, special tokens included; the rest is cut off [as the model's folder says, "
        f"else {LENGTH}].",
        decides="queries",
        unit="TOKENS",
        least=1,
    )
    key_max_length: int | None = setting(
        None,
        "Longest key, special tokens included; the rest is cut off [as the model's folder says, "
        f"else {LENGTH}].",
        decides="keys",
        unit="TOKENS",
        least=1,
    )
    truncation_side: Literal["right", "left"] | None = setting(
        None, "The side that is cut off [as the model's folder says, else right].", decides="texts"
    )
    dataset_cache_dir: str | None = setting(
        None,
        "Where tokenised data is kept [$LLME_JAX_CACHE, else ~/.cache/llme_jax].",
        decides="nothing",
        unit="FOLDER",
        local=True,
        may_change=True,
        per_host=True,
    )


@dataclass
class DataConfig(TextConfig):
    """Which rows to train on, which keys to take from them, and what to evaluate on meanwhile."""

    eval_data: str | list[str] | None = setting(
        None,
        "JSON-lines files with the queries to evaluate on, or BEIR folders; of several sets the "
        f"mean counts; also {SOURCES_HELP}.",
        decides="files",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    corpus: str | list[str] | None = setting(
        None,
        "JSON-lines file with the passages to search, or a BEIR folder: one for all sets of "
        f"--eval_data, or one each [the BEIR folders of --eval_data]; also {SOURCES_HELP}.",
        decides="files",
        unit="FILE",
        reads="data",
        may_change=True,
    )
    train_data: list[str] | None = setting(
        None,
        f"JSON-lines files or globs to train on, or BEIR folders; also {SOURCES_HELP}.",
        decides="weights",
        unit="FILE",
        reads="data",
    )
    train_corpus: str | None = setting(
        None,
        "JSON-lines file with the passages that --train_data names by id, or a BEIR folder "
        f"[--corpus]; also {SOURCES_HELP}.",
        decides="weights",
        unit="FILE",
        reads="data",
    )
    train_queries: str | None = setting(
        None,
        f"JSON-lines file with the queries that --train_data names by id; also {SOURCES_HELP}.",
        decides="weights",
        unit="FILE",
        reads="data",
    )
    train_group_size: int = setting(
        8,
        "Keys a query is trained with: 1 positive, the others negatives; 1: pairs alone, whose "
        "negatives are the other queries' keys.",
        decides="weights",
        unit="KEYS",
        least=1,
    )
    select_positive: Literal["first", "random", "teacher", "teacher-pos"] = setting(
        "first",
        "Which key becomes the positive; teacher: the best-scored of pos + neg, teacher-pos: the "
        "best-scored of pos.",
        decides="weights",
    )
    select_negative: Literal["random", "first", "teacher+", "teacher-"] = setting(
        "random",
        "Which negatives are taken; teacher+ and teacher-: best or worst scored first.",
        decides="weights",
    )
    teacher_scores_margin: float | None = setting(
        None,
        "Drop rows whose best and worst teacher scores differ by less.",
        decides="weights",
        least=0,
    )
    teacher_scores_min: float | None = setting(
        None, "Drop rows whose best teacher score is lower.", decides="weights"
    )
    max_sample_num: int | None = setting(
        None,
        "Train on a seeded sample of this many rows of each file.",
        decides="weights",
        unit="ROWS",
        least=1,
    )
    inbatch_same_dataset: Literal["epoch", "epoch-random", "epoch-static", "random"] | None = (
        setting(
            None,
            "Fill every batch from one file. epoch: batches of all files in shuffled order; "
            "epoch-static: the same batches in every epoch; epoch-random: the file is drawn by "
            "its remaining rows; random: by its size.",
            decides="weights",
        )
    )
    use_train_config: bool = setting(
        False,
        "Take selection, loss and temperatures from the task's recipe in --version.",
        decides="weights",
    )
    max_bad_rows: int = setting(
        0,
        "Skip this many invalid lines (listed in bad_rows.jsonl) before stopping.",
        decides="nothing",
        unit="LINES",
        least=0,
        may_change=True,
    )
