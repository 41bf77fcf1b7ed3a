"""The train step: the only place where gradients are taken.

One batch is a global one: every device encodes its rows, XLA gathers the embeddings and the loss
sees them all, so loss and gradient are the same on any number of devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from llme_jax.config import LossConfig
from llme_jax.data.batch import Batch, Texts
from llme_jax.devices.sharding import replicate_in_trace
from llme_jax.models.dropout import DropoutKey
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.training import losses


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


def encode_in_chunks(
    encoder: DualEncoder,
    params: dict,
    ids: Int[Array, "n L"],
    lengths: Int[Array, "n"],
    *,
    field: str,
    dropout_key: DropoutKey | None,
    devices: int,
    chunk: int | None,
) -> Float[Array, "n D"]:
    """Embeddings of n texts, `chunk` texts a device at a time.

    A scan whose body is rematerialised keeps only token ids and embeddings for the backward
    pass and encodes each chunk again there: GradCache (arXiv:2101.06983), the gradient unchanged.
    """
    rows = ids.shape[0] // devices
    if chunk is None or chunk >= rows:
        return encoder.encode(params, ids, lengths, field=field, dropout_key=dropout_key)
    chunks = -(-rows // chunk)

    def split(x):
        # Every device contributes equally to every chunk, so no row changes its device.
        x = x.reshape(devices, rows, *x.shape[1:])
        padding = [(0, 0), (0, chunks * chunk - rows)] + [(0, 0)] * (x.ndim - 2)
        # Padded rows repeat real ones: a text of length 0 has no defined mean.
        x = jnp.pad(x, padding, mode="wrap")
        x = x.reshape(devices, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(chunks, devices * chunk, *x.shape[3:])

    @partial(jax.checkpoint, prevent_cse=False)  # the scan already keeps the passes apart
    def body(_, texts):
        ids, lengths, numbers = texts
        key = None if dropout_key is None else dropout_key._replace(texts=numbers)
        return None, encoder.encode(params, ids, lengths, field=field, dropout_key=key)

    numbers = jnp.zeros_like(lengths) if dropout_key is None else dropout_key.texts
    _, embeddings = jax.lax.scan(body, None, (split(ids), split(lengths), split(numbers)))
    width = embeddings.shape[-1]
    embeddings = embeddings.reshape(chunks, devices, chunk, width).swapaxes(0, 1)
    return embeddings.reshape(devices, chunks * chunk, width)[:, :rows].reshape(-1, width)


def batch_loss(
    params: dict,
    batch: Batch,
    dropout_key: Array | None,
    *,
    encoder: DualEncoder,
    loss: LossConfig,
    devices: int,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of one global batch, and its parts."""

    def encode(texts: Texts, field: str):
        # A text's dropout follows its number, not the row of the block where it stands.
        numbers = jnp.zeros_like(texts.place).at[texts.place].set(jnp.arange(len(texts.place)))
        blocks, start = [], 0
        for ids, lengths in zip(texts.ids, texts.lengths, strict=True):
            drop = None
            if dropout_key is not None:
                drop = DropoutKey(dropout_key, numbers[start : start + len(ids)])
            blocks.append(
                encode_in_chunks(
                    *(encoder, params, ids, lengths),
                    field=field,
                    dropout_key=drop,
                    devices=devices,
                    chunk=chunk,
                )
            )
            start += len(ids)
        return jnp.concatenate(blocks).at[texts.place].get(unique_indices=True)

    query, key = encode(batch.query, "query"), encode(batch.key, "key")
    inputs = (query, key, *batch[2:])
    of_batch = partial(losses.total, loss=loss, dense_metric=encoder.metric)
    if loss.negative_cross_device or devices == 1:
        return of_batch(*inputs)
    per_device = [x.reshape(devices, -1, *x.shape[1:]) for x in inputs]
    value, parts = jax.vmap(of_batch)(*per_device)
    return value.mean(), {name: part.mean() for name, part in parts.items()}


def make_step(
    encoder: DualEncoder,
    optimizer: optax.GradientTransformation,
    *,
    devices: int,
    chunk: int | None,
    seed: int,
    shardings: TrainState | None = None,
):
    """`step(state, batches, recipes) -> (state, StepMetrics)`.

    Args:
        devices: size of the mesh; every batch axis is divisible by it.
        chunk: texts a device encodes at a time, None for all.
        seed: dropout of batch t is drawn from (seed, t).
        shardings: where the state lives; the new state goes to the same place.

    `batches` is a list of gradient_accumulation_steps batches, `recipes` their losses. The state
    is donated: the caller must not use the old one again. `step.lower(state, batch, recipe,
    several)` is, as `jax.jit(f).lower`, the program of a step of one batch, or of one of several.
    """

    def value_and_grad(params, batch, micro_step, recipe):
        dropout_key = jax.random.fold_in(jax.random.key(seed), micro_step)

        def loss(params):
            if shardings is not None:
                params = replicate_in_trace(params, shardings.params)
            return batch_loss(
                *(params, batch, dropout_key),
                encoder=encoder,
                loss=recipe,
                devices=devices,
                chunk=chunk,
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    def update(state: TrainState, values, parts, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(values.mean(), optax.tree.norm(grads), parts, values)
        return TrainState(state.step + 1, params, opt_state), metrics

    out = None if shardings is None else (shardings, None)

    @partial(jax.jit, static_argnames="recipe", donate_argnums=0, out_shardings=out)
    def single(state, batch, recipe):
        (value, parts), grads = value_and_grad(state.params, batch, state.step, recipe)
        return update(state, value[None], parts, grads)

    gradient = jax.jit(value_and_grad, static_argnums=3)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    @partial(jax.jit, donate_argnums=0, out_shardings=out)
    def apply(state, values, parts, grads):
        grads = jax.tree.map(lambda x: x / len(values), grads)
        # Recipes differ: a part is the mean over the batches that have it.
        parts = {name: jnp.stack(part).mean() for name, part in parts.items()}
        return update(state, jnp.stack(values), parts, grads)

    def step(state: TrainState, batches: list[Batch], recipes: list[LossConfig]):
        if len(batches) == 1:
            return single(state, batches[0], recipes[0])
        values, all_parts, grads = [], {}, None
        first = state.step * len(batches)
        for i, (batch, recipe) in enumerate(zip(batches, recipes, strict=True)):
            (value, parts), new = gradient(state.params, batch, first + i, recipe)
            grads = new if grads is None else add(grads, new)
            values.append(value)
            for name, part in parts.items():
                all_parts.setdefault(name, []).append(part)
        return apply(state, values, all_parts, grads)

    def lower(state, batch, recipe, several):
        if several:
            return gradient.lower(state.params, batch, state.step, recipe)
        return single.lower(state, batch, recipe)

    step.lower = lower
    return step
