"""The train step: the only place where gradients are taken.

One batch is a global one: every device computes on its rows, XLA gathers what the loss needs of
all of them, so loss and gradient are the same on any number of devices. The gradient is added up
over devices once a step, in the parameters' own type.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.config import DistillConfig
from llme_jax.data.batch import Batch
from llme_jax.devices.sharding import on_each_device, replicated
from llme_jax.training.chunks import Chunk
from llme_jax.training.task import Params, Task


class TrainState(NamedTuple):
    """What a run needs to go on: everything else follows from the step and the seed."""

    step: Int[Array, ""]
    params: dict
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step says about itself; the loss's parts have their names as keys."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    batch_losses: Float[Array, "A"]  # the loss of each of the step's batches


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


class Step:
    """One optimizer step: `state, metrics = step(state, batches, recipes)`.

    `batches` is a list of gradient_accumulation_steps batches, `recipes` their losses. The state
    is donated: the caller must not use the old one again.

    A step of one batch is a single program. One of several batches is a program for each batch's
    gradient, one that adds it to the sum, and one that updates the state at the end.

    Args:
        mesh: the devices; every batch axis is divisible by their number.
        chunk: of how much a device holds activations at a time, None for all.
        seed: dropout of batch t is drawn from (seed, t).
        shardings: where the state lives; the new state goes to the same place.
        frozen: parameters that the loss reads and the optimizer leaves alone, on the mesh.

    Attributes:
        gradient: jitted (params, frozen, batch, its number, recipe=) -> ((loss, parts), gradient).
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh,
        chunk: Chunk | None,
        seed: int,
        shardings: TrainState | None = None,
        frozen: Params | None = None,
    ):
        self._task, self._optimizer = task, optimizer
        self._mesh, self._chunk, self._seed = mesh, chunk, seed
        self._shardings, self._frozen = shardings, frozen or {}
        self._frozen_shardings = jax.tree.map(lambda x: x.sharding, self._frozen)
        to_state = {"donate_argnums": 0, "out_shardings": shardings and (shardings, None)}
        self._single = jax.jit(self._of_one, static_argnames="recipe", **to_state)
        self.gradient = jax.jit(self._value_and_grad, static_argnames="recipe")
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._apply = jax.jit(self._of_several, **to_state)

    def __call__(
        self, state: TrainState, batches: list[Batch], recipes: list[DistillConfig]
    ) -> tuple[TrainState, StepMetrics]:
        if len(batches) == 1:
            return self._single(state, self._frozen, batches[0], recipe=recipes[0])
        values, all_parts, grads = [], {}, None
        first = state.step * len(batches)
        for i, (batch, recipe) in enumerate(zip(batches, recipes, strict=True)):
            (value, parts), new = self.gradient(
                state.params, self._frozen, batch, first + i, recipe=recipe
            )
            grads = new if grads is None else self._add(grads, new)
            values.append(value)
            for name, part in parts.items():
                all_parts.setdefault(name, []).append(part)
        return self._apply(state, values, all_parts, grads)

    def lower(self, state: TrainState, batch: Batch, recipe: DistillConfig, *, accumulating: bool):
        """As `jax.jit(f).lower`, the program of a step of one batch, or of one of several."""
        if accumulating:
            return self.gradient.lower(state.params, self._frozen, batch, state.step, recipe=recipe)
        return self._single.lower(state, self._frozen, batch, recipe=recipe)

    def _of_one(self, state, frozen, batch, recipe):
        (value, parts), grads = self._value_and_grad(
            state.params, frozen, batch, state.step, recipe
        )
        return self._update(state, value[None], parts, grads)

    def _of_several(self, state, values, parts, grads):
        grads = jax.tree.map(lambda x: x / len(values), grads)
        # Recipes differ: a part is the mean over the batches that have it.
        parts = {name: jnp.stack(part).mean() for name, part in parts.items()}
        return self._update(state, jnp.stack(values), parts, grads)

    def _value_and_grad(self, params, frozen, batch, micro_step, recipe):
        """((loss, parts), gradient) of the batch that is number `micro_step` of the run."""
        dropout_key = jax.random.fold_in(jax.random.key(self._seed), micro_step)

        def loss(params):
            read = params | frozen
            spread = jax.tree.map(lambda _: replicated(self._mesh), read)
            if self._shardings is not None:
                spread = self._shardings.params | self._frozen_shardings
            compute = partial(self._task.outputs, chunk=self._chunk)
            outputs = on_each_device(compute, read, batch.texts, dropout_key, spread)
            return self._task.loss(outputs, batch, recipe=recipe, devices=self._mesh.size)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def _update(self, state, values, parts, grads):
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(values.mean(), optax.tree.norm(grads), parts, values)
        return TrainState(state.step + 1, params, opt_state), metrics
