"""The seam between training and what is trained.

The command hands in a function that opens a task; loop, step, dry run, telemetry and checkpoint
know of it what stands here, and nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from numpy import ndarray

from llme_jax.config import Config, DistillConfig, RankConfig
from llme_jax.data.batch import Batch
from llme_jax.data.pairs import PairLayout

Params = dict  # nested, of arrays; what is trained and what is frozen differ in their first keys


class Evaluator(Protocol):
    """Measures parameters as often as wanted; what it reads is read and checked when it is made.

    Attributes:
        sizes: how much it measures on; the same on all hosts.
    """

    sizes: tuple[int, ...]

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Metrics of the parameters of a step, as {"ndcg@10": 0.5, ...}."""


class Task(Protocol):
    """Something that trains.

    Attributes:
        config: the settings; `data` has the texts before queries and keys that the model asks for.
        flag: what names the model, for messages: "--query_encoder".
        tokenizer: a fast one of transformers; texts become tokens with it.
        rules: where parameters go, see `sharding.state_sharding`.
        exports: the folders of a checkpoint that users take away.
        layout: how each query is joined with its keys, which makes `pair` the one text that a
            batch has; None: it has `query` and `key`.
    """

    config: Config | RankConfig
    flag: str
    tokenizer: object
    rules: tuple
    exports: tuple[str, ...]
    layout: PairLayout | None

    def loss(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        *,
        recipe: DistillConfig,
        devices: int,
        chunk: int | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a global batch, and its parts by name; traced, once a shape and recipe.

        Args:
            params: what is trained and what is frozen, together.
            key: what dropout is drawn from; None for no dropout.
            devices: how many share the batch; each holds equal runs of neighbouring rows.
            chunk: texts that a device holds activations of at a time, None for all.
        """

    def forward_flops(self, params: Params, lengths: dict[str, ndarray]) -> float:
        """Operations of a forward pass, an addition and a multiplication counted apart.

        Args:
            params: arrays or ShapeDtypeStructs.
            lengths: tokens of every text, by the names that a batch has for its texts.
        """

    def recomputing(self, on: bool) -> "Task":
        """The same task, whose activations are recomputed in the backward pass, or are not."""

    def evaluator(self, mesh: Mesh) -> Evaluator | None:
        """What measures it while it trains; None when nothing is to be measured.

        Raises:
            InputError: what it is measured on cannot be used.
        """

    def exporter(self, params: Params, tasks: list[str]) -> Callable[[Path], None]:
        """What writes `exports` into the folder it is given, in the background.

        Args:
            params: of numpy, a copy of its own; they are there on process 0 only, which writes.
            tasks: those of the training data, "" for none.
        """


class Opened(NamedTuple):
    """A task with its parameters on the host: what is trained, and what is only read."""

    task: Task
    params: Params
    frozen: Params


OpenTask = Callable[[Config | RankConfig], Opened]
