"""The settings of each command, and how an experiment shrinks."""

from dataclasses import dataclass, field
from typing import TypeVar

from llme_jax.config.data import DataConfig, TextConfig
from llme_jax.config.lm import LMConfig, ScoringConfig
from llme_jax.config.model import EncoderConfig
from llme_jax.config.pipeline import PipelineConfig
from llme_jax.config.plan import PlanConfig
from llme_jax.config.rank import RankDataConfig, RankerConfig, RankLossConfig, RerankConfig
from llme_jax.config.retrieval import (
    EvalConfig,
    MeasureConfig,
    MetricsConfig,
    MiningConfig,
    RetrievalConfig,
)
from llme_jax.config.setting import Group, Groups, setting
from llme_jax.config.training import LossConfig, TrainConfig
from llme_jax.errors import InputError


@dataclass
class ProcessConfig(Group):
    """The processes of a run on several hosts; TPU pods and SLURM steps need no flag."""

    title = "processes"

    coordinator_address: str | None = setting(
        None,
        "Where process 0 listens [$JAX_COORDINATOR_ADDRESS].",
        decides="nothing",
        unit="HOST:PORT",
        may_change=True,
        per_host=True,
    )
    num_processes: int | None = setting(
        None,
        "How many there are [$JAX_NUM_PROCESSES].",
        decides="nothing",
        unit="PROCESSES",
        least=1,
        may_change=True,
    )
    process_id: int | None = setting(
        None,
        "Which one this is, from 0 [$JAX_PROCESS_ID].",
        decides="nothing",
        unit="PROCESS",
        least=0,
        may_change=True,
        per_host=True,
    )


@dataclass
class Config(Groups):
    """All settings of one training run."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    planning: PlanConfig = field(default_factory=PlanConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class RetrieveConfig(Groups):
    """All settings of one retrieval."""

    data: TextConfig = field(default_factory=TextConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    evaluation: MeasureConfig = field(default_factory=MeasureConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    planning: PlanConfig = field(default_factory=PlanConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class RankConfig(Groups):
    """All settings of a reranker: of its training, or of one reranking."""

    data: RankDataConfig = field(default_factory=RankDataConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    loss: RankLossConfig = field(default_factory=RankLossConfig)
    evaluation: RerankConfig = field(default_factory=RerankConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    planning: PlanConfig = field(default_factory=PlanConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class ScoreConfig(Groups):
    """All settings of one scoring."""

    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    planning: PlanConfig = field(default_factory=PlanConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class ReportConfig(Group):
    """What the data doctor writes beside the table."""

    title = "report"

    json: str | None = setting(
        None,
        "Write what was found to this file; - prints it instead of the table.",
        decides="files",
        unit="FILE",
        local=True,
    )
    plot: str | None = setting(
        None, "Draw histograms into this PNG.", decides="files", unit="FILE", local=True
    )


@dataclass
class DoctorConfig(Groups):
    """All settings of a look at training files: those of training that decide what it reads."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: MetricsConfig = field(default_factory=MetricsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


Experiment = TypeVar("Experiment", Config, RankConfig, PipelineConfig)


def shrunk(config: Experiment, arg: str | None) -> Experiment:
    """An experiment, or, when `arg` is `runlocal`, what takes seconds of it, in another folder.

    Raises:
        InputError: for any other argument.
    """
    if arg not in (None, "runlocal"):
        raise InputError(f"--config ...:{arg}: the only argument is runlocal")
    if arg and isinstance(config, PipelineConfig):
        config.pipeline.output_dir += "-runlocal"
        config.pipeline.trial = True
    elif arg:
        training = config.training
        training.output_dir += "-runlocal"
        training.max_steps, training.save_steps, training.logging_steps = 4, 2, 1
        training.per_device_train_batch_size = 2
        config.data.train_group_size = 4
    return config
