"""A pipeline: commands that follow each other, and what must hold before the next one starts."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_origin

from llme_jax.config.data import SourceConfig
from llme_jax.config.setting import Group, Groups, SettingError, setting
from llme_jax.config.training import OutputConfig
from llme_jax.errors import InputError


class Declared:
    """What an experiment file declares; each field is of its type."""

    def __post_init__(self):
        for f in fields(self):
            value, wanted = getattr(self, f.name), get_origin(f.type) or f.type
            if not isinstance(value, (int, float) if wanted is float else wanted):
                raise SettingError(
                    f"{f.name} of {type(self).__name__} is {value!r}: give a {wanted.__name__}"
                    + (f", as ({value!r},)" if wanted is tuple else "")
                )


@dataclass(frozen=True)
class NotBelow(Declared):
    """A metric of the stage is not below that of an earlier stage by more than this."""

    metric: str  # as ndcg@10
    than: str  # the earlier stage
    by: float = 0.0


@dataclass(frozen=True)
class UsefulScores:
    """The teacher's best key is a labelled positive clearly more often than a random one."""


@dataclass(frozen=True)
class HaveNegatives(Declared):
    """At least this share of the mined rows has negatives."""

    share: float = 0.9


Gate = NotBelow | UsefulScores | HaveNegatives


@dataclass(frozen=True)
class Stage(Declared):
    """One command of a pipeline.

    Attributes:
        name: also of its folder in the pipeline's --output_dir, where all that it writes lies.
        command: train, retrieve, rank, score or merge.
        words: its flags as typed in a shell, without --output_dir, which is the stage's folder.
        gates: what must hold once it is done.
        baseline: whether the report compares the others with what this one measures.
    """

    name: str
    command: str
    words: str
    gates: tuple[Gate, ...] = ()
    baseline: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not all(isinstance(gate, Gate) for gate in self.gates):
            raise SettingError(f"gates of Stage are {self.gates!r}: give NotBelow and the like")


@dataclass
class PipelineSettings(OutputConfig):
    """What the stages of an experiment are made of."""

    title = "pipeline"

    output_dir: str = setting(
        "data/outputs/pipeline",
        "Each stage has a folder in it, beside report.html.",
        decides="files",
        unit="FOLDER",
        local=True,
    )
    query_encoder: str = setting(
        "BAAI/bge-base-en",
        "Hub name or folder of the encoder that every retriever starts from.",
        decides="files",
        unit="MODEL",
    )
    teacher: Literal["ranker", "lm", "yes-no"] = setting(
        "ranker",
        "What scores the negatives that are distilled. ranker: a cross-encoder trained on them; "
        "lm: how likely a language model finds the answer; yes-no: a language model's yes.",
        decides="files",
    )
    ranker: str = setting(
        "google/electra-base-discriminator",
        "Hub name or folder of what becomes the reranker (--teacher ranker).",
        decides="files",
        unit="MODEL",
    )
    model_name_or_path: str = setting(
        "meta-llama/Llama-2-7b-chat-hf",
        "Hub name or folder of the language model (--teacher lm or yes-no).",
        decides="files",
        unit="MODEL",
    )
    iterations: int = setting(
        3,
        "Retrievers trained, each on negatives that the one before finds.",
        decides="files",
        least=2,
        most=20,
    )
    metric: str | None = setting(
        None,
        "What retrievers are judged by [ndcg@10, else the first metric].",
        decides="files",
        unit="METRIC",
    )
    trial: bool = setting(
        False,
        "Train every model for a few steps only, to see all stages run; implies --keep_going.",
        decides="files",
    )
    refresh: bool = setting(
        False,
        "Let the teacher score the negatives of every iteration, not only of the last.",
        decides="files",
    )


@dataclass
class WhichConfig(Group):
    """Which stages are done."""

    title = "stages"

    dry_run: bool = setting(
        False, "Print the commands, and which are done, and do nothing.", decides="nothing"
    )
    only: list[str] | None = setting(None, "Do these alone.", decides="nothing", unit="STAGE")
    from_: str | None = setting(
        None, "Do this one and those behind it.", decides="nothing", unit="STAGE"
    )
    until: str | None = setting(
        None, "Do this one and those before it.", decides="nothing", unit="STAGE"
    )
    force: list[str] | None = setting(
        None, "Do these again, and what depends on them.", decides="nothing", unit="STAGE"
    )
    keep_going: bool = setting(
        False, "Go on when what must hold behind a stage does not.", decides="nothing"
    )


@dataclass
class RunsReportConfig(Group):
    """What is reported."""

    title = "report"

    runs: list[str] | None = setting(
        None,
        "Folders of finished runs, or of a pipeline.",
        decides="files",
        unit="FOLDER",
        local=True,
    )
    output_dir: str = setting(
        ".", "Where report.html and report.md go.", decides="files", unit="FOLDER", local=True
    )
    metric: str | None = setting(
        None,
        "What the verdict is about [ndcg@10, else the first metric].",
        decides="files",
        unit="METRIC",
    )
    baseline: str | None = setting(
        None, "The run that others are compared with [the first].", decides="files", unit="RUN"
    )


@dataclass
class ReportingConfig(Groups):
    """All settings of a report."""

    report: RunsReportConfig = field(default_factory=RunsReportConfig)


@dataclass
class PipelineConfig(Groups):
    """All settings of a pipeline; an experiment is a subclass with stages of its own."""

    data: SourceConfig = field(default_factory=SourceConfig)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    which: WhichConfig = field(default_factory=WhichConfig)

    def stages(self) -> list[Stage]:
        """The commands, in order.

        Raises:
            InputError: this is no experiment.
        """
        raise InputError("which pipeline? give --config msmarco.py, nq.py or your own file")
