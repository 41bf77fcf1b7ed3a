"""Scores of pairs by a language model that is asked whether the key answers the query.

score = log P(yes) - log P(no) of the next token, which is the difference of the two logits. Prompt
and default instruction are those of Qwen3-Reranker (https://github.com/QwenLM/Qwen3-Embedding),
put into the model's own chat template.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llme_jax.config import RankConfig
from llme_jax.data.candidates import CandidateRow
from llme_jax.data.tokens import TokenStore, bare_tokens
from llme_jax.data.widths import fine_width
from llme_jax.devices import topology
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import fingerprint, plain_backend
from llme_jax.hugging_face.weights import fingerprint_files
from llme_jax.inference.over_store import batch_shapes, over_store
from llme_jax.lm.batch_rows import BatchRows
from llme_jax.lm.dry_run import show_plan
from llme_jax.models.causal_lm import CausalLM, load_causal_lm, open_causal_lm
from llme_jax.rerank.cross_scorer import Scoring

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
PROMPT = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {key}"
HERE = "<<<PROMPT>>>"  # stands for a prompt while the chat template is filled in


def open_yes_no(config: RankConfig) -> Scoring:
    """The language model that `config` names, on the devices of this process.

    Raises:
        InputError: it cannot be found or served, has no chat template, no single token for yes or
            no, or reads shorter texts.
    """
    data, ranker, planning = config.data, config.ranker, config.planning
    devices = topology.devices(planning.topology) or jax.local_devices()
    mesh = make_mesh(config.training.fsdp, ranker.tensor, devices=devices)
    lm, folder, tokenizer = open_causal_lm(
        ranker.ranker,
        dtype=ranker.dtype,
        cache_dir=ranker.model_cache_dir,
        weights=not planning.plan,
    )
    prompts = Prompts(
        tokenizer,
        ranker.ranker,
        instruction=ranker.yes_no_instruction,
        max_length=data.query_max_length + data.key_max_length,
    )
    if prompts.longest > lm.max_length:
        raise InputError(
            f"--query_max_length and --key_max_length: prompts of up to {prompts.longest} tokens, "
            f"{ranker.ranker} reads {lm.max_length}; give less"
        )
    answers = tuple(_single_token(tokenizer, word, ranker.ranker) for word in ("yes", "no"))

    even = prompts.longest + prompts.longest % 2  # fused attention on GPU takes even widths
    longest = min(even, lm.max_length)
    width = partial(fine_width, max_length=longest)
    needed = partial(analyse, answers=answers)

    def load() -> Callable:
        params = load_causal_lm(lm, folder, mesh)
        rows = BatchRows(mesh, longest, None, partial(needed, lm, params, mesh))
        how = {"mesh": mesh, "width": width, "rows": rows}
        return partial(_score, params, lm=lm.on(mesh), answers=answers, **how)

    def describe() -> dict[str, str]:
        return {
            "weights": fingerprint_files(folder),
            "model": repr(lm),
            "tokenizer": fingerprint(tokenizer),
            "prompt": repr(prompts),
        }

    def plan(sample: Sequence[CandidateRow], pairs: int) -> int:
        lengths = prompts(sample).lengths
        return show_plan(planning, lm, mesh, lengths, pairs, width, longest, None, needed)

    return Scoring(describe, prompts, load, plan)


class Prompts:
    """Makes prompts as tokens: the template's beginning, the pair cut to a length, its end.

    Args:
        name: of the model, for errors.
        max_length: tokens of instruction, query and key at most; the key's end is cut off.
    """

    def __init__(self, tokenizer, name: str, *, instruction: str, max_length: int):
        if not tokenizer.chat_template:
            raise InputError(
                f"{name}: has no chat template, which --ranker_method yes-no asks with; give a "
                "model that has one"
            )
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": HERE}]
        try:
            filled = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # templates raise what they like
            raise InputError(
                f"{name}: its chat template does not take a system message ({error}); give another "
                "model"
            ) from error
        if filled.count(HERE) != 1:
            raise InputError(f"{name}: its chat template does not say what the user says once")
        self._tokenizer, self._max_length = plain_backend(tokenizer), max_length
        self._instruction = instruction
        self._ends = tuple(_ids(tokenizer, end) for end in filled.split(HERE))

    def __repr__(self) -> str:
        return repr((self._ends, PROMPT, self._instruction, self._max_length))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return sum(map(len, self._ends)) + self._max_length

    def __call__(self, rows: Sequence[CandidateRow]) -> TokenStore:
        """The prompts of every candidate of every row."""
        texts = [
            PROMPT.format(instruction=self._instruction, query=row.query, key=key)
            for row in rows
            for key in row.keys
        ]
        before, after = (np.array(end, np.uint32) for end in self._ends)
        cut = bare_tokens(texts, self._tokenizer, self._max_length, "right")
        return TokenStore.of([np.concatenate([before, cut[i], after]) for i in range(len(cut))])


def _score(
    params, store: TokenStore, done, *, lm: CausalLM, answers: tuple[int, int], **how
) -> np.ndarray:
    """Scores of all prompts, float32[n].

    Args:
        how: `mesh`, `width` and `rows`, see `over_store`.
    """
    if not len(store):
        return np.zeros(0, np.float32)
    return over_store(
        store,
        lambda ids, lengths, _: yes_or_no(params, ids, lengths, lm=lm, answers=answers),
        pad_id=0,
        done=done,
        **how,
    )


def analyse(
    lm: CausalLM, params, mesh: Mesh, rows: int, width: int, answers: tuple[int, int]
) -> Needs:
    """What a device needs for `rows` prompts of this width; see `likelihood.analyse`."""
    batch = batch_shapes(mesh, rows, (width,), ())
    return needs(yes_or_no.lower(params, *batch, lm=lm.on(mesh), answers=answers))


@partial(jax.jit, static_argnames=("lm", "answers"))
def yes_or_no(
    params,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    *,
    lm: CausalLM,
    answers: tuple[int, int],
) -> Float[Array, "B"]:
    """log P(yes) - log P(no) of what follows right-padded texts, in fp32.

    Args:
        answers: the tokens that mean yes and no.
    """
    last = (lengths - 1)[:, None, None]
    hidden = jnp.take_along_axis(lm.hidden(params, ids, lengths), last, axis=1)[:, 0]
    logits = lm.logits(params, hidden)
    return logits[:, answers[0]] - logits[:, answers[1]]


def _single_token(tokenizer, word: str, name: str) -> int:
    ids = _ids(tokenizer, word)
    if len(ids) != 1:
        raise InputError(f"{name}: writes {word} in {len(ids)} tokens; give a model with one")
    return ids[0]


def _ids(tokenizer, text: str) -> list[int]:
    return plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
