"""Long-range language modelling: how likely a document's end is after chunks of it."""

from llme_jax.evaluation.msc import TASK as LIKELIHOOD
from llme_jax.evaluation.task import needs_text


def check(row: dict) -> None:
    needs_text(row, "text")


TASK = LIKELIHOOD._replace(check=check)  # tokens are read, no prompt is made
