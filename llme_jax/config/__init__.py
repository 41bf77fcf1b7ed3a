"""Settings: declared once, read from an experiment file and flags, checked when they are set."""

from llme_jax.config.commands import (
    Config,
    DoctorConfig,
    ProcessConfig,
    RankConfig,
    RetrieveConfig,
    ScoreConfig,
    shrunk,
)
from llme_jax.config.data import DataConfig, TextConfig
from llme_jax.config.lm import LMConfig, ScoringConfig
from llme_jax.config.merge import MergingConfig
from llme_jax.config.model import EncoderConfig
from llme_jax.config.pipeline import (
    HaveNegatives,
    NotBelow,
    PipelineConfig,
    PipelineSettings,
    ReportingConfig,
    Stage,
    UsefulScores,
)
from llme_jax.config.plan import PlanConfig
from llme_jax.config.rank import RankDataConfig, RankerConfig, RankLossConfig, RerankConfig
from llme_jax.config.retrieval import EvalConfig, MetricsConfig, MiningConfig, RetrievalConfig
from llme_jax.config.training import DistillConfig, LossConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "DistillConfig",
    "DoctorConfig",
    "EncoderConfig",
    "EvalConfig",
    "HaveNegatives",
    "LMConfig",
    "LossConfig",
    "MergingConfig",
    "MetricsConfig",
    "MiningConfig",
    "NotBelow",
    "PipelineConfig",
    "PipelineSettings",
    "PlanConfig",
    "ProcessConfig",
    "RankConfig",
    "RankDataConfig",
    "RankLossConfig",
    "RankerConfig",
    "ReportingConfig",
    "RerankConfig",
    "RetrievalConfig",
    "RetrieveConfig",
    "ScoreConfig",
    "ScoringConfig",
    "Stage",
    "TextConfig",
    "TrainConfig",
    "UsefulScores",
    "shrunk",
]
