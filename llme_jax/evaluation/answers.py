"""What a language model makes of questions: likelihoods, or tokens that it writes."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.data.tokens import TokenStore
from llme_jax.hugging_face.folders import ModelFolder
from llme_jax.lm.generation import NONE, Generator, stop_tokens
from llme_jax.lm.likelihood import Scorer
from llme_jax.lm.options import OptionScorer, Questions
from llme_jax.lm.prompts import Prompts
from llme_jax.models.causal_lm import CausalLM, load_causal_lm


class Question(NamedTuple):
    """
    Attributes:
        row: its number.
        prompts: tokens of each, and how many of the last are scored; of one alone none are where
            the model writes.
    """

    row: int
    prompts: list[tuple[np.ndarray, int]]

    @property
    def is_written(self) -> bool:
        return len(self.prompts) == 1 and self.prompts[0][1] == 0


class Answerer:
    """Answers questions with a language model on a mesh of this process' devices.

    Args:
        shared: prompts of a question share what stands before their scored tokens.
        widths: see `Scorer`.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        lm: CausalLM,
        folder: ModelFolder,
        tokenizer,
        mesh: Mesh,
        widths: list[int],
        *,
        shared: bool,
    ):
        self._config, self._shared = config, shared
        self._folder, self._tokenizer = folder, tokenizer
        self._how = lm, load_causal_lm(lm, folder, mesh), mesh, widths, config.lm.rows

    def __call__(
        self, questions: Sequence[Question], done: Callable[[int, int], None]
    ) -> np.ndarray:
        """The numbers of each question, one after the other, float32.

        Of a written one the tokens, NONE behind their end, --max_new_tokens in all; of another the
        mean log-probability of each prompt's scored tokens.

        Args:
            done: is told questions (prompts, where they share nothing) and tokens of each batch.
        """
        found: dict[int, np.ndarray] = {}
        written = [i for i, q in enumerate(questions) if q.is_written]
        scored = [i for i, q in enumerate(questions) if q.prompts and not q.is_written]
        if written:
            found |= self._written(questions, written, done)
        if scored:
            engine = self._options if self._shared else self._likelihoods
            found |= engine(questions, scored, done)
        return np.concatenate([np.zeros(0, np.float32), *(found[i] for i in sorted(found))])

    def _written(self, questions, which: list[int], done) -> dict[int, np.ndarray]:
        store = TokenStore.of([questions[i].prompts[0][0] for i in which])
        rows = np.array([questions[i].row for i in which])
        new = self._config.task.max_new_tokens
        texts = self._generator(store, done, rows)
        padded = (np.pad(t, (0, new - len(t)), constant_values=NONE) for t in texts)
        return dict(zip(which, (row.astype(np.float32) for row in padded), strict=True))

    def _options(self, questions, which: list[int], done) -> dict[int, np.ndarray]:
        tokens = [[t for t, _ in questions[i].prompts] for i in which]
        counts = [[count for _, count in questions[i].prompts] for i in which]
        found = self._option_scorer(Questions.of(tokens, counts), done)
        return dict(zip(which, found, strict=True))

    def _likelihoods(self, questions, which: list[int], done) -> dict[int, np.ndarray]:
        prompts = [prompt for i in which for prompt in questions[i].prompts]
        store = TokenStore.of([tokens for tokens, _ in prompts])
        counts = np.array([count for _, count in prompts], np.int32)
        found = self._scorer(Prompts(store, counts), done)
        ends = np.cumsum([len(questions[i].prompts) for i in which])
        return dict(zip(which, np.split(found, ends[:-1]), strict=True))

    @cached_property
    def _generator(self) -> Generator:
        settings, lm = self._config.task, self._how[0]
        at = None if settings.add_llama_inst else "\n"
        stops = stop_tokens(self._folder, self._tokenizer, lm.config.vocab_size, at)
        return Generator(
            *self._how,
            new=settings.max_new_tokens,
            stops=stops,
            temperature=settings.temperature if settings.do_sample else 0.0,
            top_p=settings.top_p,
            seed=self._config.retrieval.seed % 2**63,
        )

    @cached_property
    def _option_scorer(self) -> OptionScorer:
        return OptionScorer(*self._how)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(*self._how)
