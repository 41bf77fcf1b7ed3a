"""Settings of `--plan`: what a command will take, found without doing it."""

from dataclasses import dataclass

from llme_jax.config.setting import Group, setting

# 8 devices each, but for the last.
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "h100:1")


@dataclass
class PlanConfig(Group):
    """What is said instead of doing it, and for which devices."""

    title = "plan"

    plan: bool = setting(
        False,
        "Do nothing: say what it would take (memory, operations, padding, programs).",
        decides="nothing",
        may_change=True,
    )
    device_memory: float | None = setting(
        None,
        "Memory of a device, for --plan [what the device reports].",
        decides="nothing",
        unit="GIB",
        above=0,
        may_change=True,
    )
    topology: str | None = setting(
        None,
        "Devices that are not here, for --plan: it compiles for them [those that are here].",
        decides="nothing",
        choices=TOPOLOGIES,
        may_change=True,
    )
