"""Settings of scoring with a language model."""

from dataclasses import dataclass
from typing import Literal

from llme_jax.config.data import SOURCES_HELP, SourceConfig
from llme_jax.config.model import DTYPE_HELP, DTYPES, HubConfig, TensorConfig
from llme_jax.config.setting import setting


@dataclass
class ScoringConfig(SourceConfig):
    """What is scored, and where the scores go."""

    title = "scoring"

    eval_data: str | None = setting(
        None,
        "JSON-lines file with task, query, answers and pos and neg, or history; "
        f"also {SOURCES_HELP}.",
        decides="scores",
        unit="FILE",
        reads="data",
    )
    output_dir: str | None = setting(
        None,
        "Folder for the scored rows [beside --eval_data].",
        decides="nothing",
        unit="FOLDER",
        local=True,
    )
    answer_reduction: Literal["first", "max", "mean", "logsumexp"] = setting(
        "first",
        "Of several answers: score the first, or score all and combine them so.",
        decides="files",
    )
    save_name: str = setting(
        "llama2-7b-chat",
        "Scores go to {eval_data's stem}.scored.{save_name}.json.",
        decides="files",
        unit="NAME",
        in_name=True,
    )
    load_score: bool = setting(
        False, "Fail instead of scoring when some pairs have no score yet.", decides="nothing"
    )
    report: bool = setting(
        False,
        "Do not score: report on the teacher_scores that --eval_data has; needs no model.",
        decides="files",
    )


@dataclass
class ReaderConfig(TensorConfig):
    """The language model, and what it reads at a time."""

    title = "language model"

    model_name_or_path: str = setting(
        "meta-llama/Llama-2-7b-chat-hf",
        "Hub name or folder of a llama, mistral, qwen2, qwen3, phi3, gemma2 or gemma3.",
        decides="scores",
        unit="MODEL",
        reads="model",
    )
    lm_dtype: str = setting("auto", DTYPE_HELP, decides="scores", **DTYPES)
    context_max_length: int = setting(
        1024,
        "Longest prompt, with what is scored or written; what is too much is cut off its keys.",
        decides="scores",
        unit="TOKENS",
        least=2,  # a token that is scored, and one before it
    )
    lm_batch_size: str = setting(
        "auto",
        "Prompts on a device at a time; auto: as many as its memory allows.",
        decides="nothing",
        unit="auto|PROMPTS",
    )
    fsdp: int = setting(
        1, "Spread parameters over this many devices.", decides="nothing", unit="DEVICES", least=1
    )

    @property
    def rows(self) -> int | None:
        """Prompts on a device at a time; None for as many as its memory allows."""
        return None if self.lm_batch_size == "auto" else int(self.lm_batch_size)


@dataclass
class LMConfig(ReaderConfig, HubConfig):
    """The language model that scores candidates."""

    key_max_length: int = setting(
        512, "Longest key; the rest is cut off.", decides="scores", unit="TOKENS", least=1
    )
