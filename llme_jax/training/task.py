"""The seam between training and what is trained.

The command hands in a function that opens a task; loop, step, dry run, telemetry and checkpoint
know of it what stands here, and nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from llme_jax.config import Config, DistillConfig, RankConfig
from llme_jax.data.batch import Batch, Texts
from llme_jax.data.pairs import PairLayout
from llme_jax.sources.resolve import Files
from llme_jax.training.chunks import Chunk
from llme_jax.training.teacher import Teacher

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
        layout: how each query is joined with its keys, which makes `pair` the one field that a
            batch has; None: it has `query` and `key`.
        streams: fields that go through a model together, by what a batch calls their texts.
        teacher: whose vectors of all texts a batch brings; None: it brings none.
    """

    config: Config | RankConfig
    flag: str
    tokenizer: object
    rules: tuple
    exports: tuple[str, ...]
    layout: PairLayout | None
    streams: dict[str, tuple[str, ...]]
    teacher: Teacher | None

    def outputs(
        self,
        params: Params,
        texts: dict[str, Texts],
        key: jax.Array | None,
        *,
        chunk: Chunk | None,
    ) -> dict[str, jax.Array]:
        """What the model makes of a device's texts, by field, in the order of the batch's rows.

        Traced on every device apart, which sees its texts and no other.

        Args:
            params: what is trained and what is frozen, together, whole.
            key: what dropout is drawn from; None for no dropout.
            chunk: of how much activations are held at a time, None for all.
        """

    def loss(
        self,
        outputs: dict[str, jax.Array],
        batch: Batch,
        *,
        recipe: DistillConfig,
        devices: int,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a global batch, and its parts by name; traced, once a shape and recipe.

        Args:
            outputs: of all devices.
            devices: how many share the batch; each holds equal runs of neighbouring rows.
        """

    def forward_flops(self, params: Params, work: dict[str, tuple[float, float]]) -> float:
        """Operations of a forward pass, an addition and a multiplication counted apart.

        Args:
            params: arrays or ShapeDtypeStructs.
            work: tokens, and pairs of tokens that attend to each other, by the streams' names.
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


OpenTask = Callable[[Config | RankConfig, Files], Opened]
