"""Settings of averaging encoders."""

from dataclasses import dataclass, field

from llme_jax.config.model import HubConfig
from llme_jax.config.setting import Groups, setting


@dataclass
class MergeConfig(HubConfig):
    """Which encoders are averaged, and how."""

    title = "merge"

    models: list[str] | None = setting(
        None,
        "Hub names or folders of encoders of one base; pooling and prompts are those of the first.",
        decides="weights",
        unit="MODEL",
        reads="model",
    )
    weights: list[float] | None = setting(
        None,
        "The weight of each; they add up to 1 [all the same].",
        decides="weights",
        unit="NUMBER",
    )
    output_dir: str = setting(
        "data/outputs/merged",
        "The result is its folder encoder.",
        decides="nothing",
        unit="FOLDER",
        local=True,
    )


@dataclass
class MergingConfig(Groups):
    """All settings of a merge."""

    merge: MergeConfig = field(default_factory=MergeConfig)
