"""Settings of evaluations with a language model, and what each task has in place of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llme_jax.config.commands import ProcessConfig
from llme_jax.config.data import SOURCES_HELP, TextConfig
from llme_jax.config.lm import ReaderConfig
from llme_jax.config.model import EncoderConfig
from llme_jax.config.retrieval import METRICS, EvalConfig, RetrievalConfig
from llme_jax.config.setting import Group, Groups, setting

SEARCHING = ("dense", "bm25", "random", "no")
OWN_KEYS = ("msc", "lrlm")  # rows bring what can be found: turns of a conversation, chunks
AMONG_OWN = ("dense", "random", "oracle", "no")
METHODS = {
    **dict.fromkeys(("mmlu", "popqa", "qa", "qrecc", "tool"), SEARCHING),
    "icl": (*SEARCHING, "same-task-random"),
    "msc": (*AMONG_OWN, "recent"),
    "lrlm": AMONG_OWN,
}

_NQ = "llm-embedder:qa/nq/"
_WITH_KNOWLEDGE = {"hits": 10, "key_num": 3, "key_max_length": 128}
_PROMPTS = {"context_max_length": 2048}
# What the settings are where nothing else is given. Those whose own default is None mean something
# in these tasks only. Source: `evaluation/eval_*.py` of LLM-Embedder (MIT).
TASKS: dict[str, dict[str, Any]] = {
    "mmlu": {
        **_WITH_KNOWLEDGE,
        **_PROMPTS,
        "eval_data": "llm-embedder:qa/mmlu/test.json",
        "train_data": "llm-embedder:qa/mmlu/dev.json",
        "corpus": "llm-embedder:qa/msmarco/corpus.json",
        "few_shot": 0,
    },
    "popqa": {
        **_WITH_KNOWLEDGE,
        **_PROMPTS,
        "eval_data": "llm-embedder:qa/popqa/test.json",
        "corpus": f"{_NQ}corpus.json",
        "few_shot": 15,
        "max_new_tokens": 16,
    },
    "qa": {
        **_WITH_KNOWLEDGE,
        **_PROMPTS,
        "eval_data": f"{_NQ}test.json",
        "train_data": f"{_NQ}dev.json",
        "corpus": f"{_NQ}corpus.json",
        "query_max_length": 32,
        "few_shot": 10,
        "max_new_tokens": 32,
    },
    "qrecc": {
        **_PROMPTS,
        "eval_data": "llm-embedder:convsearch/qrecc/test.concat.json",
        "corpus": "llm-embedder:convsearch/qrecc/corpus.json",
        "key_template": "{text}",
        "metrics": ["ndcg", "recall"],
        "cutoffs": [3, 10, 100],
        "hits": 100,
        "key_num": 3,
        "max_new_tokens": 128,
        "do_generate": False,
    },
    "icl": {
        "context_max_length": 1024,
        "eval_data": "llm-embedder:icl/icl/test.json",
        "corpus": "llm-embedder:icl/icl/corpus.json",
        "key_template": "{contents}",
        "few_shot": 8,
        "max_new_tokens": 64,
        "add_llama_inst": False,
    },
    "msc": {
        **_PROMPTS,
        "eval_data": "llm-embedder:chat/msc/test.json",
        "key_num": 1,
        "order_method": "sequential",
    },
    "lrlm": {
        "eval_data": "llm-embedder:lrlm/books3/test.json",
        "context_max_length": 32768,
        "key_num": 8,
        "order_method": "sequential",
        "context_window_size": 2048,
        "target_length": 1024,
        "chunk_size": 128,
        "anchor_length": 160_000,
        "integrate_method": "concat",
        "add_key_continuation": False,
    },
    "tool": {
        "eval_data": "llm-embedder:tool/toolbench/test.json",
        "corpus": "llm-embedder:tool/toolbench/corpus.json",
        "key_template": "{text}",
        "metrics": ["mrr", "recall", "ndcg"],
        "cutoffs": [1, 3, 5],
    },
}
for _name, _defaults in TASKS.items():
    _defaults["output_dir"] = f"data/results/{_name}"
    _defaults["log_path"] = f"data/results/{_name}/{_name}.log"

ONLY = "[what the task has]"


@dataclass
class TaskConfig(Group):
    """What the language model is asked, and what it is shown."""

    title = "task"

    task: Literal["mmlu", "popqa", "qa", "qrecc", "icl", "msc", "lrlm", "tool"] | None = setting(
        None, "What is evaluated; --help behind it shows its own defaults.", decides="scores"
    )
    compare: list[str] | None = setting(
        None,
        "Evaluate nothing: compare two output files of earlier evaluations, question by question.",
        decides="nothing",
        unit="FILE",
    )
    train_data: str | None = setting(
        None,
        f"JSON-lines file with demonstrations (mmlu, qa); also {SOURCES_HELP} {ONLY}.",
        decides="scores",
        unit="FILE",
        reads="data",
    )
    few_shot: int | None = setting(
        None, f"Demonstrations before each question {ONLY}.", decides="scores", unit="ROWS", least=0
    )
    key_num: int | None = setting(
        None, f"Keys that the language model reads {ONLY}.", decides="scores", unit="KEYS", least=1
    )
    task_names: list[str] | None = setting(
        None, "Only these tasks of icl, as rte sst2 [all].", decides="scores", unit="NAME"
    )
    max_new_tokens: int | None = setting(
        None, f"Tokens that are written at most {ONLY}.", decides="scores", unit="TOKENS", least=1
    )
    do_generate: bool | None = setting(
        None, "Also write answers (qrecc); false measures retrieval only [false].", decides="scores"
    )
    do_sample: bool = setting(
        False, "Draw what is written; false: always the likeliest token.", decides="scores"
    )
    temperature: float = setting(
        1.0, "Divides the scores of the next token before the draw.", decides="scores", above=0
    )
    top_p: float = setting(
        1.0,
        "Draw among the likeliest tokens that together have this probability.",
        decides="scores",
        above=0,
        most=1,
    )
    add_llama_inst: bool | None = setting(
        None, "Put Llama-2's [INST] and [/INST] around the prompt (icl) [false].", decides="scores"
    )
    order_method: Literal["sequential", "relevance"] | None = setting(
        None,
        "The order of what was found (msc, lrlm): as it was said or written, or the best one last "
        "[sequential].",
        decides="scores",
    )
    context_window_size: int | None = setting(
        None,
        "Tokens of a document's end that are read (lrlm) [2048].",
        decides="scores",
        unit="TOKENS",
        least=2,
    )
    target_length: int | None = setting(
        None,
        "Tokens of a document's end that are scored (lrlm) [1024].",
        decides="scores",
        unit="TOKENS",
        least=1,
    )
    chunk_size: int | None = setting(
        None,
        "Tokens of a chunk, which is what can be found (lrlm) [128].",
        decides="scores",
        unit="TOKENS",
        least=1,
    )
    anchor_length: int | None = setting(
        None,
        "Letters of a document that are used (lrlm) [160000].",
        decides="scores",
        unit="LETTERS",
        least=1,
    )
    integrate_method: Literal["concat", "replace"] | None = setting(
        None,
        "What was found stands before the window, or in place of its beginning (lrlm) [concat].",
        decides="scores",
    )
    add_key_continuation: bool | None = setting(
        None, "A key is a chunk and the one after it (lrlm) [false].", decides="scores"
    )


@dataclass
class KnowledgeConfig(EvalConfig):
    """What is measured of the retrieval itself."""

    metrics: list[str] = setting(
        [],
        "What is measured of the retrieval [nothing, but in qrecc and tool]; collate_key writes "
        "rows with the keys found.",
        decides="files",
        choices=(*METRICS, "collate_key"),
    )


@dataclass
class FindingConfig(RetrievalConfig):
    """How keys are found: also among those that a row brings."""

    retrieval_method: Literal[
        "dense", "bm25", "random", "same-task-random", "recent", "oracle", "no"
    ] = setting(
        "dense",
        "What finds the keys. no: what rows have as key; same-task-random: icl; recent: msc; "
        "oracle, the key after which the answer is likeliest: msc, lrlm.",
        decides="hits",
    )


@dataclass
class EvaluateConfig(Groups):
    """All settings of one evaluation with a language model."""

    task: TaskConfig = field(default_factory=TaskConfig)
    data: TextConfig = field(default_factory=TextConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    evaluation: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    retrieval: FindingConfig = field(default_factory=FindingConfig)
    lm: ReaderConfig = field(default_factory=ReaderConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)

    @classmethod
    def of(cls, task: str | None) -> "EvaluateConfig":
        """The settings with what the task has in place of their defaults."""
        config = cls()
        config.task.task = task
        for name, value in TASKS.get(task, {}).items():
            group = next(g for g, f, _ in config.declared() if f.name == name)
            setattr(group, name, list(value) if isinstance(value, list) else value)
        return config


def asks(settings: TaskConfig) -> bool:
    """Is a language model asked, or only the retrieval measured?"""
    return settings.task != "tool" and settings.do_generate is not False


def searches(config: EvaluateConfig) -> bool:
    """Are keys found in --corpus, not among those of a row?"""
    return config.retrieval.retrieval_method != "no" and config.task.task not in OWN_KEYS
