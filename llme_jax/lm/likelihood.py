"""How likely a language model finds answers: batches of static shape, logits where they count."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.data.widths import fitting
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import batch_sharding, to_mesh
from llme_jax.inference.over_store import batch_shapes, over_store
from llme_jax.lm.batch_rows import BatchRows
from llme_jax.lm.prompts import Prompts
from llme_jax.models.causal_lm import CausalLM

PREDICTED = 512  # tokens a device predicts at a time: [512, V] logits exist at once
SLOTS = 8  # answers are padded to this number of tokens, or 4, 16, ... times as many


@partial(jax.jit, static_argnames=("lm", "slots", "group"))
def answer_log_likelihood(
    params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    answer_lengths: Int[Array, "B"],
    *,
    lm: CausalLM,
    slots: int,
    group: int,
) -> Float[Array, "B"]:
    """Mean log-probability of the last `answer_lengths` tokens of right-padded texts, in fp32.

    Args:
        slots: answer tokens of the longest answer, or more.
        group: of these slots, how many get their logits at a time; divides `slots`.
    """
    hidden = lm.hidden(params, ids, lengths)
    slot = jnp.arange(slots)
    # The token before predicts a token; slots past the answer read anything.
    places = jnp.minimum((lengths - answer_lengths - 1)[:, None] + slot, ids.shape[1] - 2)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets = jnp.take_along_axis(ids, places + 1, axis=1)

    logs = log_probabilities(lm, params, hidden, targets, group)
    logs = jnp.where(slot < answer_lengths[:, None], logs, 0.0)
    return logs.sum(1) / answer_lengths


def log_probabilities(
    lm: CausalLM,
    params,
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    group: int,
) -> Float[Array, "B S"]:
    """Of each target after its hidden state, `group` of the S at a time; it divides them."""

    def of(part):
        states, tokens = part
        logits = lm.logits(params, states)
        right = jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0]
        return right - jax.nn.logsumexp(logits, axis=2)

    parts = hidden, targets
    if group == targets.shape[1]:
        return of(parts)
    split = [x.reshape(len(x), -1, group, *x.shape[2:]).swapaxes(0, 1) for x in parts]
    return jax.lax.map(of, tuple(split)).swapaxes(0, 1).reshape(targets.shape)


def slots_for(longest: int) -> int:
    """What answers of up to so many tokens are padded to."""
    slots = SLOTS
    while slots < longest:
        slots *= 4
    return slots


class Scorer:
    """Scores prompts with a language model on a mesh of this process' devices.

    Args:
        widths: ascending; what batches are padded to, the last one holds every prompt.
        rows: prompts a device gets at a time; as many as TOKENS and its memory allow when None.
    """

    def __init__(self, lm: CausalLM, params, mesh: Mesh, widths: list[int], rows: int | None):
        self._lm, self._params, self._mesh, self._widths = lm.on(mesh), params, mesh, widths
        self._rows = BatchRows(mesh, widths[-1], rows, partial(analyse, lm, params, mesh))

    def __call__(self, prompts: Prompts, done: Callable[[int, int], None]) -> np.ndarray:
        """Mean log-probability of every prompt's answer, float32[n].

        Args:
            done: is told prompts and tokens of each batch as it is finished.
        """
        store, answers = prompts

        def launch(ids, lengths, texts: np.ndarray):
            (answer_lengths,) = to_mesh((answers[texts],), (batch_sharding(self._mesh),))
            settings = self._settings(len(texts), int(answers[texts].max()))
            return answer_log_likelihood(self._params, ids, lengths, answer_lengths, **settings)

        return over_store(
            store,
            launch,
            mesh=self._mesh,
            pad_id=0,
            width=partial(fitting, self._widths),
            rows=self._rows,
            done=done,
        )

    def _settings(self, rows: int, longest: int) -> dict:
        slots = slots_for(longest)
        group = max(1, PREDICTED // (rows // self._rows.devices))
        return {"lm": self._lm, "slots": slots, "group": min(slots, 1 << group.bit_length() - 1)}


def analyse(lm: CausalLM, params, mesh: Mesh, rows: int, width: int) -> Needs:
    """Compiles the scoring of a batch and returns what a device needs for it.

    Args:
        params: arrays on the mesh, or, as `sharded_shapes` gives them, no weights at all.
        rows: prompts a device.
    """
    batch = batch_shapes(mesh, rows, (width,), (), ())
    settings = {"lm": lm.on(mesh), "slots": SLOTS, "group": SLOTS}
    return needs(answer_log_likelihood.lower(params, *batch, **settings))
