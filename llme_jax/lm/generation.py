"""What a language model writes after prompts: greedily or drawn, batches of static shape."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llme_jax.data.tokens import TokenStore
from llme_jax.data.widths import fitting
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import replicated, to_mesh
from llme_jax.hugging_face.folders import ModelFolder
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.tokenizer import plain_backend
from llme_jax.inference.over_store import batch_shapes, over_store
from llme_jax.lm.batch_rows import BatchRows
from llme_jax.models.attention import NOT_SEEN
from llme_jax.models.causal_lm import CausalLM

NONE = -1  # behind the end of what was written
TIMES = 2  # as many texts as are read at a time: a step reads all weights, however many there are


@partial(jax.jit, static_argnames=("lm", "new"))
def write(
    params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    numbers: Int[Array, "B"],
    stops: Bool[Array, "V"],
    key: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    lm: CausalLM,
    new: int,
) -> Int[Array, "B new"]:
    """Up to `new` tokens after each of the right-padded prompts; NONE from a stop on.

    Args:
        numbers: of the prompts; what is drawn for one is a function of key, number and place.
        stops: tokens that end a text, themselves not in it.
        temperature, top_p: see `choose`.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)

    def chosen(hidden, place):
        """The next token of each text and its end, as they go on in `out`."""
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
        tokens = choose(lm.logits(params, hidden), now, temperature, top_p)
        return tokens, stops[tokens]

    hidden, cache = lm.prefill(params, ids, lengths, new)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    tokens, ended = chosen(last, 0)
    out = jnp.full((len(ids), new), NONE, jnp.int32)
    out = out.at[:, 0].set(jnp.where(ended, NONE, tokens))

    def going_on(state):
        place, _, ended, _, _ = state
        return (place < new) & ~ended.all()

    # A new token gets the same slot in all texts, behind their padding.
    width, slot = ids.shape[1], jnp.arange(ids.shape[1] + new)
    is_text = (slot < lengths[:, None]) | (slot >= width)
    where = jnp.where(slot < width, slot, lengths[:, None] + slot - width)

    def one_more(state):
        place, tokens, ended, out, more = state
        at = (lengths + place - 1)[:, None]
        behind = jnp.where(is_text, at - where, NOT_SEEN)[:, None]
        kept = cache._replace(more=more)
        hidden, kept = lm.extend(params, kept, tokens[:, None], place - 1, at, behind)
        tokens, ends = chosen(hidden[:, 0], place)
        ended |= ends
        column = jnp.where(ended, NONE, tokens)[:, None]
        out = jax.lax.dynamic_update_slice(out, column, (0, place))
        return place + 1, tokens, ended, out, kept.more

    return jax.lax.while_loop(going_on, one_more, (1, tokens, ended, out, cache.more))[3]


def choose(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "B"]:
    """One token for each row.

    Args:
        keys: random keys [B].
        temperature: what logits are divided by before the draw; 0: the most likely token.
        top_p: the draw is among the most likely tokens that together have this probability.
    """

    def drawn(_):
        scaled = logits / temperature
        order = jnp.argsort(-scaled, axis=1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=1), axis=1)
        before = jnp.cumsum(probabilities, axis=1) - probabilities  # of the first: 0
        kept = jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf)
        places = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.take_along_axis(order, places[:, None], axis=1)[:, 0].astype(jnp.int32)

    def most_likely(_):
        return logits.argmax(1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, drawn, most_likely, None)


class Generator:
    """Writes after prompts with a language model on a mesh of this process' devices.

    Args:
        widths: ascending; what batches are padded to, the last one holds every prompt.
        rows: prompts a device gets at a time; as many as its memory allows when None.
        new: tokens that are written at most.
        stops: bool[V], see `stop_tokens`.
        temperature: 0 for the most likely token.
    """

    def __init__(
        self,
        lm: CausalLM,
        params,
        mesh: Mesh,
        widths: list[int],
        rows: int | None,
        *,
        new: int,
        stops: np.ndarray,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self._lm, self._params, self._mesh = lm.on(mesh), params, mesh
        self._widths, self._new = widths, new
        how = stops, np.float32(temperature), np.float32(top_p)
        self._stops, *self._draw = to_mesh(how, (replicated(mesh),) * len(how))
        self._key = jax.device_put(jax.random.key(seed), replicated(mesh))

        self._rows = BatchRows(
            mesh, widths[-1], rows, partial(analyse, lm, params, mesh, new=new), times=TIMES
        )

    def __call__(
        self,
        prompts: TokenStore,
        done: Callable[[int, int], None],
        numbers: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The tokens that are written after each prompt.

        Args:
            done: is told prompts and tokens of each batch as it is finished.
            numbers: of the prompts, see `write`; from 0 when None.
        """
        if numbers is None:
            numbers = np.arange(len(prompts))

        def launch(ids, lengths, texts: np.ndarray):
            how = self._stops, self._key, *self._draw
            which = numbers[texts].astype(np.int32)
            return write(self._params, ids, lengths, which, *how, lm=self._lm, new=self._new)

        written = over_store(
            prompts,
            launch,
            mesh=self._mesh,
            pad_id=0,
            width=partial(fitting, self._widths),
            rows=self._rows,
            done=done,
        )
        return [row[row != NONE].astype(np.int32) for row in written]


def analyse(lm: CausalLM, params, mesh: Mesh, rows: int, width: int, new: int) -> Needs:
    """What a device needs to write after `rows` prompts of this width; see `likelihood.analyse`."""
    ids, lengths, numbers = batch_shapes(mesh, rows, (width,), (), ())
    everywhere = partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    number = everywhere((), np.float32)
    draw = (
        everywhere((lm.config.vocab_size,), bool),
        everywhere((), jax.eval_shape(lambda: jax.random.key(0)).dtype),
    )
    arguments = params, ids, lengths, numbers, *draw, number, number
    return needs(write.lower(*arguments, lm=lm.on(mesh), new=new))


def stop_tokens(
    folder: ModelFolder, tokenizer, vocabulary: int, at: str | None = "\n"
) -> np.ndarray:
    """Tokens that end what is written: those the model names, and all that hold a text.

    Args:
        folder: of the model.
        vocabulary: tokens that the model knows.
        at: one byte of UTF-8, so that a token holds it or does not; of the token that does, what
            is before it is lost with it. None: only the model's own.

    Returns:
        bool[V]
    """
    stops = np.zeros(vocabulary, bool)
    for name in ("config.json", "generation_config.json"):
        if (folder.base / name).is_file():
            ids = read_json(folder.base / name).get("eos_token_id")
            stops[[] if ids is None else ids] = True
    if tokenizer.eos_token_id is not None:
        stops[tokenizer.eos_token_id] = True
    if at is not None:
        backend = plain_backend(tokenizer)
        for i in range(min(vocabulary, backend.get_vocab_size())):
            stops[i] |= at in backend.decode([i], skip_special_tokens=False)
    return stops
