"""Rows that are asked in a text: their keys, in the order in which they are read, as prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import strings_of
from llme_jax.errors import InputError
from llme_jax.evaluation.own_keys import drawn, nearest
from llme_jax.evaluation.prompts import PromptFitter
from llme_jax.evaluation.questions import NO_KEYS, Keys, Questions, Rows, Tokens
from llme_jax.evaluation.task import Demonstrations, Task, rng_of
from llme_jax.files.atomic import digest
from llme_jax.sources.resolve import Files

# The corpus' task that a task of the rows has.
SAME_TASK = {"mnli_m": "mnli", "mnli_mm": "mnli"}


def text_questions(
    config: EvaluateConfig,
    task: Task,
    rows: Rows,
    keys: Keys,
    shown: Demonstrations,
    tokenizer,
    limit: int,
) -> Questions:
    """
    Args:
        limit: tokens of a prompt with its answer.

    Raises:
        InputError: a question is longer.
    """
    settings = config.task
    oracle = config.retrieval.retrieval_method == "oracle"
    new = settings.max_new_tokens or 0
    choose, write = PromptFitter(tokenizer, limit), PromptFitter(tokenizer, limit, new)

    def tried(i: int) -> list[Sequence[str]]:
        """The keys that are read together."""
        row = rows.rows[i]
        if oracle:
            return [[turn] for turn in strings_of(row, "history")] or [[]]
        return [_as_read(settings.order_method, row, keys.of(i)[0])]

    def prompts(i: int) -> Tokens:
        asked = [task.prompt(rows.rows[i], texts, shown(i)) for texts in tried(i)]
        made = (choose if asked[0].options else write)(asked, [rows.lines[i]] * len(asked))
        return [prompt for of_text in made for prompt in of_text]

    options = []
    for row, line in zip(rows.rows, rows.lines, strict=True):
        bare = task.prompt(row, (), ())
        (choose if bare.options else write).check(bare, line)
        options.append(len(bare.options))
    options = np.array(options)
    counts = np.where(options > 0, options, new)
    if oracle:
        counts = np.array([len(tried(i)) for i in range(len(rows.rows))])
    return Questions(
        rows.rows,
        prompts,
        counts,
        parts=np.ones(len(counts), int),
        written=options == 0,
        keys=keys,
        found=keys.digest,
    )


def _as_read(order: str | None, row: dict, keys: Sequence[str]) -> Sequence[str]:
    """Turns of a conversation in the order in which they are read; other keys as they are."""
    if order is None:
        return keys
    history = [turn.strip() for turn in row.get("history") or ()]
    texts = [key.strip() for key in keys]
    if order == "sequential" and {*texts} <= {*history}:
        return sorted(texts, key=history.index)
    return texts[::-1]


def own_keys(rows: Rows, wanted: int) -> Keys:
    """What rows have as key."""
    return Keys(lambda i: (strings_of(rows.rows[i], "key")[:wanted], None), "")


def turns(config: EvaluateConfig, cache: Path, rows: Rows) -> Keys:
    """Turns of each row's conversation."""
    method, wanted = config.retrieval.retrieval_method, config.task.key_num
    if method == "oracle":
        return NO_KEYS
    history = [strings_of(row, "history") for row in rows.rows]
    if method == "recent":
        found = [[range(len(of_row))[::-1][:wanted]] for of_row in history]
    elif method == "random":
        seed = config.retrieval.seed
        found = drawn(seed, [1] * len(history), [*map(len, history)], wanted)
    else:
        queries = [[row["query"].strip()] for row in rows.rows]
        stripped = [[turn.strip() for turn in of_row] for of_row in history]
        found = nearest(config, cache, "chat", rows.path, queries, stripped, wanted)
    chosen = [[int(j) for j in of_query] for (of_query,) in found]
    return Keys(lambda i: ([history[i][j] for j in chosen[i]], None), digest(chosen))


def of_same_task(config: EvaluateConfig, files: Files, rows: Rows) -> Keys:
    """Lines of --corpus of the row's own task, drawn for each row."""
    corpus, members, ids = Corpus(files.corpus, config.data.key_template), {}, []
    for i in range(len(corpus)):
        members.setdefault(corpus.field(i, "task_name"), []).append(i)
    for i, row in enumerate(rows.rows):
        name = SAME_TASK.get(row["task_name"], row["task_name"])
        if name not in members:
            raise InputError(
                f"{corpus.path}: has no line with task_name {name}, give another --retrieval_method"
            )
        rng = rng_of(config.retrieval.seed, i)
        count = min(config.task.few_shot, len(members[name]))
        ids.append(rng.choice(members[name], count, replace=False).tolist())
    return keys_of_corpus(corpus, ids)


def keys_of_corpus(corpus: Corpus, ids: Sequence[list[int]]) -> Keys:
    """The passages that each row has found, by their numbers."""
    return Keys(
        lambda i: ([corpus.text(j) for j in ids[i]], ids[i]),
        digest(ids, corpus.digest, corpus.key_template),
    )
