"""What an evaluation writes of every row."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llme_jax.evaluation.questions import Questions
from llme_jax.evaluation.task import Scores
from llme_jax.files.atomic import atomic_text
from llme_jax.inference.partial_results import PartialResults, decimals


def write_outputs(
    path: Path,
    questions: Questions,
    asked: Sequence[int],
    outputs: Sequence[Any],
    scores: Sequence[Scores],
    numbers: PartialResults,
) -> None:
    """The rows that were asked, each with the keys that were read and

    - `prompt_hash`: of the tokens that were read, options included;
    - `output`: an option's index, a text, or a mean log-probability;
    - `log_likelihoods`: of a choice, each option's;
    - `score`: what evaluations are compared by, higher is better; `scores`: all of them.
    """
    with atomic_text(path) as file:
        for i, output, of_row in zip(asked, outputs, scores, strict=True):
            row, (keys, ids) = questions.rows[i], questions.keys.of(i)
            row = row | ({"key": list(keys)} if keys else {})
            row |= {"key_index": ids} if ids is not None else {}
            tokens = [prompt.tolist() for prompt, _ in questions.prompts(i)]
            row |= {"prompt_hash": _hash(tokens), "output": output}
            if isinstance(output, int):
                row["log_likelihoods"] = decimals(numbers.of_row(i))
            row |= {"score": next(iter(of_row.values())), "scores": of_row}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _hash(tokens: list[list[int]]) -> str:
    return blake2b(repr(tokens).encode(), digest_size=8).hexdigest()
