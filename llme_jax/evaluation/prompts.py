"""What a language model reads of a question: knowledge, demonstrations, the question, its options.

Where it is too long the knowledge loses its end, then the first demonstrations go, the farthest
ones; question and options are never cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import plain_backend
from llme_jax.lm.prompts import end_of_text, token_at

SPARE = 8  # tokens that are of no byte of the text


class Prompt(NamedTuple):
    """The parts, in their order; what they need between them is in them.

    Attributes:
        frame: what stands before and behind the knowledge, where there is any.
        intro: stands before the demonstrations, also where there are none.
        options: what may follow the question; none where the model writes.
    """

    question: str
    knowledge: str = ""
    frame: tuple[str, str] = ("", "")
    intro: str = ""
    demonstrations: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All before the options."""
        before, behind = self.frame if self.knowledge else ("", "")
        parts = before, self.knowledge, behind, self.intro, *self.demonstrations, self.question
        return "".join(parts)


class PromptFitter:
    """Prompts as tokens, behind the special tokens that the tokenizer puts in front of a text.

    Args:
        limit: tokens that a prompt has at most, its longest option or `new` tokens included.
        new: tokens that the model may write.
    """

    def __init__(self, tokenizer, limit: int, new: int = 0):
        self._tokenizer, self._limit, self._new = plain_backend(tokenizer), limit - new, new
        self._end = end_of_text(self._tokenizer)

    def __call__(
        self, prompts: Sequence[Prompt], lines: Sequence[str]
    ) -> list[list[tuple[np.ndarray, int]]]:
        """Of every prompt, tokens of text and option and how many of them are the option's.

        Without options there is one for each prompt, with 0 tokens.

        Args:
            lines: file and line of each, for messages.

        Raises:
            InputError: a question is too long; names its line.
        """
        made = []
        for prompt, line in zip(prompts, lines, strict=True):
            text = self._fitted(prompt, line).text
            made.append([self._tokens(text, option) for option in prompt.options or ("",)])
        return made

    def check(self, prompt: Prompt, line: str) -> None:
        """Refuses a question that is too long, without making its prompt.

        Raises:
            InputError: see a call.
        """
        bare = prompt._replace(knowledge="", demonstrations=())
        # A token is a byte at least, but for special ones and a space put in front.
        bytes_ = len(bare.text.encode()) + max([0, *(len(o.encode()) for o in prompt.options)])
        if bytes_ + SPARE > self._limit:
            self._fitted(bare, line)

    def _tokens(self, text: str, option: str) -> tuple[np.ndarray, int]:
        encoding = self._tokenizer.encode(text + option)
        ids = encoding.ids[: self._end]
        count = len(ids) - token_at(encoding, len(text), text + option) if option else 0
        return np.array(ids, np.uint32), count

    def _fitted(self, prompt: Prompt, line: str) -> Prompt:
        while excess := self._excess(prompt):
            if prompt.knowledge:
                prompt = prompt._replace(knowledge=self._shorter(prompt, excess))
            elif prompt.demonstrations:
                prompt = prompt._replace(demonstrations=prompt.demonstrations[1:])
            else:
                raise InputError(
                    f"{line}: the question is {excess} tokens too long: give a "
                    f"--context_max_length of {self._limit + self._new + excess} or more"
                )
        return prompt

    def _excess(self, prompt: Prompt) -> int:
        longest = max(len(self._tokens(prompt.text, o)[0]) for o in prompt.options or ("",))
        return max(longest - self._limit, 0)

    def _shorter(self, prompt: Prompt, excess: int) -> str:
        """The knowledge less so many tokens of its end, at least one."""
        encoding = self._tokenizer.encode(prompt.knowledge, add_special_tokens=False)
        kept = max(len(encoding.ids) - excess, 0)
        # Where the first token that goes begins: a character may be several tokens.
        return prompt.knowledge[: encoding.offsets[kept][0]].rstrip() if kept else ""
