"""What a run will take, found without training (`--plan`): memory, operations, padding, programs.

The step is compiled for the devices that are there, and XLA says what it needs of each.
"""

import logging
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np

from llme_jax.config import DistillConfig, PlanConfig, TrainConfig
from llme_jax.data.batch import Batch, describe_shapes, work
from llme_jax.data.plan import Plan, PlannedBatch
from llme_jax.data.train_data import SAMPLED_BATCHES, TrainData
from llme_jax.devices import sharding
from llme_jax.devices.fitting import (
    GIB,
    Change,
    Remedies,
    describe_time,
    device_bytes,
    halves,
    memory_limit,
    numbers,
    verdict,
)
from llme_jax.devices.memory import Needs, needs
from llme_jax.training.chunks import Chunk
from llme_jax.training.step import Step, TrainState
from llme_jax.training.task import Params, Task
from llme_jax.training.telemetry import count

logger = logging.getLogger(__name__)


@dataclass
class Program:
    """A step for batches of the same shapes and the same losses."""

    batch: Batch  # one of them, of all hosts
    recipe: DistillConfig
    planned: PlannedBatch
    share: float = 0.0  # of all batches

    @property
    def slots(self) -> int:
        return count(self.batch, processes=1).slots


@dataclass
class Survey:
    """What batches are like; numbers are of a mean batch, operations of its forward pass."""

    programs: dict[tuple, Program] = field(default_factory=dict)
    tokens: float = 0.0
    slots: float = 0.0  # tokens and padding
    flops: float = 0.0  # of tokens
    slot_flops: float = 0.0

    @property
    def largest(self) -> Program:
        """The one that takes the most memory, as nearly all of it is activations of slots."""
        return max(self.programs.values(), key=lambda program: program.slots)


@dataclass
class DryRun:
    """Finds and prints what a run will take.

    Args:
        task: as it is to be trained.
        optimizer, abstract, frozen: of the state and of frozen parameters, which need not be in
            memory.
        plan: which rows make a batch; `data.settle_shapes` has seen it.
    """

    planning: PlanConfig
    settings: TrainConfig
    task: Task
    optimizer: object
    abstract: TrainState
    frozen: Params
    data: TrainData
    plan: Plan
    mesh: object

    def show(self) -> int:
        """Prints it, on process 0.

        Returns:
            The exit code: 1 when the run does not fit into the devices' memory.
        """
        say = print if jax.process_index() == 0 else lambda *_: None
        survey = self._survey(self.plan)
        say(self._describe(survey))
        largest = survey.largest
        needed = self._needed(largest)
        memory = needed.total
        say(f"memory             {memory / GIB:.2f} GiB of a device in the largest of these")
        describe_time(say, self.planning, needed, self._flops(largest), "the step")
        longest = self._longest(largest)
        if longest.slots > largest.slots:
            largest, memory = longest, self._needed(longest).total
            say(
                f"                   {memory / GIB:.2f} GiB if a batch has longer texts than these:"
            )
            say(f"  {describe_shapes(largest.batch)}")
        limit = memory_limit(self.planning, self.mesh)
        return verdict(say, memory, limit, partial(self._seek, largest))

    def _survey(self, plan: Plan) -> Survey:
        survey, params = Survey(), self.abstract.params | self.frozen
        for share, planned in plan.samples(SAMPLED_BATCHES):
            batch = self.data.assemble(planned, self.mesh.size)
            recipe = self.data.recipe(planned.dataset)
            key = (str(jax.tree.map(np.shape, batch)), recipe)
            survey.programs.setdefault(key, Program(batch, recipe, planned)).share += share
            counts = count(batch, processes=1)
            survey.tokens += share * counts.tokens
            survey.slots += share * counts.slots
            survey.flops += share * self.task.forward_flops(params, work(batch))
            survey.slot_flops += share * self.task.forward_flops(params, work(batch, padding=True))
        return survey

    def _longest(self, program: Program) -> Program:
        """The program of rare batches, whose texts are longer than those that were looked at."""
        batch = self.data.assemble(program.planned, self.mesh.size, max_width=True)
        return replace(program, batch=batch, share=0.0)

    def _needed(self, program: Program) -> Needs:
        logger.info("compiling %s", describe_shapes(program.batch))
        return self._needs(program.batch, program.recipe, self.settings)

    def _flops(self, program: Program) -> float:
        """Operations of a step on a device."""
        params = self.abstract.params | self.frozen
        forward = self.task.forward_flops(params, work(program.batch))
        return self._passes * forward / self.mesh.size

    @property
    def _passes(self) -> int:
        """What a step computes, in forward passes: there are no gradients of frozen weights."""
        trained, frozen = map(numbers, (self.abstract.params, self.frozen))
        return 2 if frozen > trained else 3

    def _memory(self, batch: Batch, recipe: DistillConfig, settings: TrainConfig) -> float:
        return self._needs(batch, recipe, settings).total

    def _needs(self, batch: Batch, recipe: DistillConfig, settings: TrainConfig) -> Needs:
        """What a device needs while a step runs, as XLA plans it."""
        mesh = sharding.make_mesh(settings.fsdp, devices=[*self.mesh.devices.flat])
        shardings = sharding.state_sharding(mesh, self.abstract, self.task.rules)
        frozen = sharding.state_sharding(mesh, self.frozen, self.task.rules)
        step = Step(
            self.task.recomputing(settings.gradient_checkpointing),
            self.optimizer,
            mesh=mesh,
            chunk=Chunk.of(settings),
            seed=settings.seed,
            shardings=shardings,
            frozen=sharding.abstract(self.frozen, frozen),
        )
        state = sharding.abstract(self.abstract, shardings)
        inputs = sharding.abstract(batch, sharding.batch_sharding(mesh))
        accumulating = settings.gradient_accumulation_steps > 1
        found = needs(step.lower(state, inputs, recipe, accumulating=accumulating))
        if accumulating:  # not in that program: the optimizer's state, the gradients' sum
            more = device_bytes(state.opt_state) + device_bytes(state.params)
            found = found._replace(arguments=found.arguments + more)
        return found

    def _seek(self, largest: Program, remedies: Remedies) -> None:
        """Looks for flags with which the largest step fits.

        Of each setting it is the mildest change; all together are tried when none is enough.
        """
        settings, devices = self.settings, self.mesh.size

        def changed(**changes) -> Change:
            flags = " ".join(f"--{name} {value}".lower() for name, value in changes.items())
            other = replace(settings, **changes)
            return flags, lambda: self._memory(largest.batch, largest.recipe, other)

        remat = {} if settings.gradient_checkpointing else {"gradient_checkpointing": True}
        chunks = self._smaller_chunks(largest)
        spread = [n for n in range(settings.fsdp + 1, devices + 1) if devices % n == 0]
        rows = [*halves(self.plan.batch_size // devices)]
        remedies.seek([changed(**remat)] if remat else [])
        remedies.seek([changed(**chunk) for chunk in chunks])
        remedies.seek([changed(fsdp=n) for n in spread])
        remedies.seek(
            [(f"--per_device_train_batch_size {n}", partial(self._smaller, n)) for n in rows]
        )
        if not remedies.found:
            both = remat | ({"fsdp": spread[-1]} if spread else {})
            remedies.seek([changed(**both, **chunk) for chunk in chunks])

    def _smaller_chunks(self, largest: Program) -> list[dict[str, int]]:
        """Settings of smaller and smaller sub-batches; of tokens where there are such already."""
        if tokens := self.settings.sub_batch_tokens:
            longest = max(w for t in self._longest(largest).batch.texts.values() for w in t.widths)
            return [{"sub_batch_tokens": n} for n in halves(tokens) if n >= longest]
        texts = max(len(x) for t in largest.batch.texts.values() for x in t.place.values())
        texts //= self.mesh.size
        most = min(texts, self.settings.sub_batch_size or texts)
        return [{"sub_batch_size": n} for n in halves(most)]

    def _smaller(self, rows: int) -> float:
        """Bytes of a device with batches of so many queries a device."""
        plan = replace(self.plan, batch_size=rows * self.mesh.size)
        self.data.settle_shapes(plan, self.mesh.size)
        longest = self._longest(self._survey(plan).largest)
        return self._memory(longest.batch, longest.recipe, self.settings)

    def _describe(self, survey: Survey) -> str:
        again = self.settings.gradient_checkpointing or Chunk.of(self.settings) is not None
        passes = self._passes + (1 if again else 0)  # forward once more
        per_step = passes * self.settings.gradient_accumulation_steps / 1e12
        held = self.abstract, self.frozen
        parameters = numbers((self.abstract.params, self.frozen))
        shardings = sharding.state_sharding(self.mesh, held, self.task.rules)
        state = device_bytes(sharding.abstract(held, shardings))
        lines = [
            f"parameters         {parameters:,}; with the optimizer's state {state / GIB:.2f} GiB "
            f"on each of {self.mesh.size} devices",
            f"operations a step  {per_step * survey.flops:.3g} TFLOP on all devices, "
            f"{per_step * survey.slot_flops:.3g} with padding",
            f"padding            {1 - survey.tokens / survey.slots:.1%} of what is computed",
            f"programs           {len(survey.programs)}, for so many of the batches:",
        ]
        for program in sorted(survey.programs.values(), key=lambda program: -program.share):
            lines.append(f"  {program.share:6.1%}: {describe_shapes(program.batch)}")
        return "\n".join(lines)
