"""What a run will take, found without training (`--plan`): memory, operations, padding, programs.

The step is compiled for the devices that are there, and XLA says what it needs of each.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np
from numpy import ndarray

from llme_jax import sharding
from llme_jax.config import LossConfig, TrainConfig
from llme_jax.data.batch import Batch, Texts
from llme_jax.data.plan import Plan
from llme_jax.data.train_data import SAMPLED_BATCHES, TrainData
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.step import TrainState, make_step
from llme_jax.telemetry import count, describe_shapes

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class Program:
    """A step for batches of the same shapes and the same losses."""

    batch: Batch  # one of them, of all hosts
    recipe: LossConfig
    seen: int = 0  # how many of the batches that were looked at
    memory: int = 0  # bytes of a device


@dataclass
class Preview:
    """Prints what a run will take.

    Args:
        encoder: as it is to be trained.
        optimizer, abstract, shardings: of the state; nothing of it is in memory.
        plan: which rows make a batch; `data.settle_widths` has seen it.
    """

    settings: TrainConfig
    encoder: DualEncoder
    optimizer: object
    abstract: TrainState
    shardings: TrainState
    data: TrainData
    plan: Plan
    mesh: object

    def show(self) -> int:
        """Returns the exit code: 1 when the run does not fit into the devices' memory."""
        batches = min(SAMPLED_BATCHES, self.plan.steps_per_epoch)
        assembled = [self._assemble(self.plan, step) for step in range(batches)]
        programs = _programs(assembled)
        for i, program in enumerate(programs, 1):
            logger.info("compiling %d of %d: %s", i, len(programs), describe_shapes(program.batch))
            program.memory = self._memory(program.batch, program.recipe, self.settings)
        print(self._describe([batch for batch, _ in assembled], programs))
        largest = max(programs, key=lambda program: program.memory)
        limit = self._limit()
        if limit is None:
            print("no limit is known here: --device_memory GIB compares with that of a device")
            return 0
        room = f"{largest.memory / GIB:.2f} GiB of {limit / GIB:.2f} GiB"
        if largest.memory <= limit:
            print(f"it fits: {room} of a device")
            return 0
        print(f"it does not fit: {room} of a device; it would with")
        found = [f"  {flags}: {memory / GIB:.2f} GiB" for flags, memory in self._fitting(largest)]
        print("\n".join(found) if found else "  none of the settings that were tried")
        return 1

    def _assemble(self, plan: Plan, step: int) -> tuple[Batch, LossConfig]:
        planned = plan(step)
        batch = self.data.assemble(planned, self.mesh.size)
        return batch, self.data.recipe(planned.dataset)

    def _limit(self) -> float | None:
        """Bytes of a device, where that is known."""
        if self.settings.device_memory is not None:
            return self.settings.device_memory * GIB
        stats = self.mesh.local_devices[0].memory_stats() or {}
        return stats.get("bytes_limit")

    def _memory(self, batch: Batch, recipe: LossConfig, settings: TrainConfig) -> int:
        """Bytes of a device while a step runs, as XLA plans them."""
        encoder = replace(self.encoder, remat=settings.gradient_checkpointing)
        step = make_step(
            encoder,
            self.optimizer,
            devices=self.mesh.size,
            chunk=settings.sub_batch_size,
            seed=settings.seed,
            shardings=self.shardings,
        )
        state = jax.tree.map(_placed, self.abstract, self.shardings)
        of_batch = sharding.batch_sharding(self.mesh)
        structs = jax.tree.map(lambda x: _placed(x, of_batch), batch)
        several = settings.gradient_accumulation_steps > 1
        needs = step.lower(state, structs, recipe, several).compile().memory_analysis()
        memory = needs.argument_size_in_bytes + needs.output_size_in_bytes
        memory += needs.temp_size_in_bytes - needs.alias_size_in_bytes
        if several:  # what is not part of that program: the optimizer's state, the gradients' sum
            memory += _bytes(state.opt_state) + _bytes(state.params)
        return memory

    def _fitting(self, largest: Program) -> Iterator[tuple[str, int]]:
        """The mildest change of each setting with which the largest step fits, and its memory."""
        settings, limit = self.settings, self._limit()

        def first(changes: Iterator[tuple[str, Callable]]) -> Iterator[tuple[str, int]]:
            for flags, memory in changes:
                logger.info("trying %s", flags)
                needed = memory()
                if needed <= limit:
                    yield flags, needed
                    return

        def with_settings(**changes) -> tuple[str, Callable]:
            flags = " ".join(f"--{name} {value}".lower() for name, value in changes.items())
            changed = replace(settings, **changes)
            return flags, lambda: self._memory(largest.batch, largest.recipe, changed)

        if not settings.gradient_checkpointing:
            yield from first(iter([with_settings(gradient_checkpointing=True)]))
        texts = len(largest.batch.key.place) // self.mesh.size
        sizes = list(_halves(min(texts, settings.sub_batch_size or texts)))
        yield from first(with_settings(sub_batch_size=size) for size in sizes)
        yield from first(
            (f"--per_device_train_batch_size {size}", lambda size=size: self._smaller(size))
            for size in _halves(self.plan.batch_size // self.mesh.size)
        )

    def _smaller(self, rows: int) -> int:
        """Bytes of a device with batches of so many queries a device."""
        plan = replace(self.plan, batch_size=rows * self.mesh.size)
        self.data.settle_widths(plan, self.mesh.size)
        batches = min(SAMPLED_BATCHES, plan.steps_per_epoch)
        programs = _programs([self._assemble(plan, step) for step in range(batches)])
        largest = max(programs, key=lambda p: count(p.batch, 1).slots)
        return self._memory(largest.batch, largest.recipe, self.settings)

    def _forward_flops(self, *lengths: ndarray) -> float:
        return forward_flops(self.encoder, self.abstract.params, *lengths)

    def _describe(self, batches: list[Batch], programs: list[Program]) -> str:
        counts = [count(batch, 1) for batch in batches]
        tokens, slots = (sum(getattr(c, name) for c in counts) for name in ("tokens", "slots"))
        again = self.settings.gradient_checkpointing or self.settings.sub_batch_size is not None
        passes = 4 if again else 3  # forward, twice that backward, forward once more
        per_step = passes * self.settings.gradient_accumulation_steps / len(batches)
        real, padded = (
            per_step * sum(self._forward_flops(*lengths(batch)) for batch in batches)
            for lengths in (real_lengths, padded_lengths)
        )
        parameters = sum(x.size for x in jax.tree.leaves(self.abstract.params))
        state = _bytes(jax.tree.map(_placed, self.abstract, self.shardings))
        lines = [
            f"parameters         {parameters:,}; with the optimizer's state {state / GIB:.2f} GiB "
            f"on each of {self.mesh.size} devices",
            f"operations a step  {real / 1e12:.3g} TFLOP, {padded / 1e12:.3g} with padding",
            f"padding            {1 - tokens / slots:.1%} of the tokens that are computed",
            f"programs           {len(programs)} in the first {len(batches)} batches:",
        ]
        for program in sorted(programs, key=lambda program: -program.seen):
            lines.append(
                f"  {program.memory / GIB:.2f} GiB a device, {program.seen} batches: "
                f"{describe_shapes(program.batch)}"
            )
        return "\n".join(lines)


def _programs(assembled: list[tuple[Batch, LossConfig]]) -> list[Program]:
    programs: dict[tuple, Program] = {}
    for batch, recipe in assembled:
        key = (str(jax.tree.map(np.shape, batch)), recipe)
        programs.setdefault(key, Program(batch, recipe)).seen += 1
    return list(programs.values())


def _halves(number: int) -> Iterator[int]:
    """Half of a number, half of that, ... down to 1."""
    while number > 1:
        number //= 2
        yield number


def _placed(x, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _bytes(tree) -> int:
    """Of a device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def real_lengths(batch: Batch) -> tuple[ndarray, ndarray]:
    """Tokens of every query and every key."""
    return tuple(np.concatenate(texts.lengths) for texts in (batch.query, batch.key))


def padded_lengths(batch: Batch) -> tuple[ndarray, ndarray]:
    """The same with padding."""

    def widths(texts: Texts) -> ndarray:
        return np.concatenate([np.full(len(ids), ids.shape[1]) for ids in texts.ids])

    return widths(batch.query), widths(batch.key)


def forward_flops(
    encoder: DualEncoder, params: dict, query_lengths: ndarray, key_lengths: ndarray
) -> float:
    """Operations of the encoders' matrix products, an addition and a multiplication counted apart.

    2 for each weight of a linear layer and token, 4 D for each pair of tokens of a text and layer.

    Args:
        params: arrays or ShapeDtypeStructs.
        query_lengths, key_lengths: tokens of every text.
    """
    total = 0.0
    for field, config, lengths in (
        ("query", encoder.query_config, query_lengths),
        ("key", encoder.key_config, key_lengths),
    ):
        leaves = jax.tree_util.tree_leaves_with_path(
            params["encoder" if encoder.tied else f"{field}_encoder"]
        )
        linear = sum(x.size for path, x in leaves if "kernel" in sharding.path_name(path))
        tokens = np.asarray(lengths, float)
        attention = 4 * config.hidden_size * config.num_hidden_layers
        total += 2 * linear * tokens.sum() + attention * (tokens**2).sum()
    return total
