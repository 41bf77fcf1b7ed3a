"""How likely each of a question's options is: what stands before them is read once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import fitting
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import batch_sharding, to_mesh
from llme_jax.inference.over_store import batch_shapes, over_store
from llme_jax.lm.batch_rows import BatchRows
from llme_jax.lm.likelihood import PREDICTED, SLOTS, log_probabilities, slots_for
from llme_jax.models.attention import NOT_SEEN
from llme_jax.models.causal_lm import CausalLM

USUAL = 4  # options of a question


class Questions(NamedTuple):
    """Texts with several ends each.

    Attributes:
        before: the tokens that all options of a question begin with.
        ends: of each question, of each option: the tokens that follow.
        scored: int of the same shape, how many of the last tokens are the option's.
    """

    before: TokenStore
    ends: list[list[np.ndarray]]
    scored: list[list[int]]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[np.ndarray]], scored: list[list[int]]) -> "Questions":
        """
        Args:
            prompts: the whole tokens of every option of every question; those of a question begin
                with the same token, which is not scored.
        """
        before, ends = [], []
        for options, lengths in zip(prompts, scored, strict=True):
            most = min(len(tokens) - n for tokens, n in zip(options, lengths, strict=True))
            heads = np.stack([tokens[:most] for tokens in options])
            differ = (heads != heads[0]).any(0)
            common = int(differ.argmax()) if differ.any() else most
            before.append(options[0][:common])
            ends.append([tokens[common:] for tokens in options])
        return cls(TokenStore.of(before), ends, scored)


@partial(jax.jit, static_argnames=("lm", "group"))
def option_log_likelihood(
    params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    ends: Int[Array, "B O T"],
    end_lengths: Int[Array, "B O"],
    scored: Int[Array, "B O"],
    *,
    lm: CausalLM,
    group: int,
) -> Float[Array, "B O"]:
    """Mean log-probability of the last `scored` tokens of each end, in fp32.

    Args:
        ids: what stands before the ends, right-padded.
        group: of the T * O tokens of ends, how many get their logits at a time; divides them.
    """
    batch, options, slots = ends.shape
    inside = slots - 1  # tokens of an end that predict another one
    hidden, cache = lm.prefill(params, ids, lengths + end_lengths.max(1), options * inside)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    states = jnp.broadcast_to(last[:, :, None], (batch, options, 1, last.shape[-1]))
    if inside:
        width = ids.shape[1]
        option, place = (x.reshape(-1) for x in np.indices((options, inside)))
        before, slot = lengths[:, None, None], jnp.arange(width)
        at = lengths[:, None] + place
        to_text = jnp.where(slot < before, at[..., None] - slot, NOT_SEEN)
        to_ends = np.where(option[:, None] == option, place[:, None] - place, NOT_SEEN)
        to_ends = jnp.broadcast_to(to_ends, (batch, *to_ends.shape))
        behind = jnp.concatenate([to_text, to_ends], axis=2)
        more = ends[:, :, :-1].reshape(batch, -1)
        hidden, _ = lm.extend(params, cache, more, 0, at, behind)
        hidden = hidden.reshape(batch, options, inside, -1)
        states = jnp.concatenate([states, hidden], axis=2)
    parts = states.reshape(batch, options * slots, -1), ends.reshape(batch, -1)
    logs = log_probabilities(lm, params, *parts, group).reshape(ends.shape)
    slot, end = jnp.arange(slots), end_lengths[..., None]
    counts = (slot < end) & (slot >= end - scored[..., None])
    return jnp.where(counts, logs, 0.0).sum(2) / jnp.maximum(scored, 1)


class OptionScorer:
    """Scores options with a language model on a mesh of this process' devices.

    Args:
        widths: ascending; what the texts before the options are padded to.
        rows: questions a device gets at a time; as many as its memory allows when None.
    """

    def __init__(
        self,
        lm: CausalLM,
        params,
        mesh: Mesh,
        widths: list[int],
        rows: int | None,
    ):
        self._lm, self._params, self._mesh, self._widths = lm.on(mesh), params, mesh, widths
        self._rows = BatchRows(mesh, widths[-1], rows, partial(analyse, lm, params, mesh))

    def __call__(self, questions: Questions, done: Callable[[int, int], None]) -> list[np.ndarray]:
        """Mean log-probability of every option's tokens, float32[options] of each question.

        Args:
            done: is told questions and tokens before their options of each batch as it is finished.
        """
        counts = [len(options) for options in questions.ends]

        def launch(ids, lengths, texts: np.ndarray):
            batch = _padded(questions, texts, max(counts))
            ends, *numbers = to_mesh(batch, (batch_sharding(self._mesh),) * len(batch))
            slots = ends.shape[1] * ends.shape[2]
            group = max(1, PREDICTED * self._rows.devices // len(texts))
            group = max(n for n in range(1, slots + 1) if slots % n == 0 and n <= group)
            how = {"lm": self._lm, "group": group}
            return option_log_likelihood(self._params, ids, lengths, ends, *numbers, **how)

        found = over_store(
            questions.before,
            launch,
            mesh=self._mesh,
            pad_id=0,
            width=partial(fitting, self._widths),
            rows=self._rows,
            done=done,
        )
        return [scores[:count] for scores, count in zip(found, counts, strict=True)]


def analyse(lm: CausalLM, params, mesh: Mesh, rows: int, width: int) -> Needs:
    """What a device needs for `rows` questions of this width; see `likelihood.analyse`."""
    shapes = (width,), (), (USUAL, SLOTS), (USUAL,), (USUAL,)
    batch = batch_shapes(mesh, rows, *shapes)
    return needs(option_log_likelihood.lower(params, *batch, lm=lm.on(mesh), group=SLOTS))


def _padded(
    questions: Questions, texts: np.ndarray, options: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends [B, O, T] of some questions, their lengths and how many tokens of each are scored."""
    longest = max(len(end) for text in texts for end in questions.ends[text])
    slots = 1 if longest == 1 else slots_for(longest)  # of letters none is read
    ends = np.zeros((len(texts), options, slots), np.int32)
    lengths, scored = np.zeros((2, len(texts), options), np.int32)
    for row, text in enumerate(texts):
        for i, end in enumerate(questions.ends[text]):
            ends[row, i, : len(end)], lengths[row, i] = end, len(end)
            scored[row, i] = questions.scored[text][i]
    return ends, lengths, scored
