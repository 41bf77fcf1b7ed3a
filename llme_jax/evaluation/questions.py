"""Every row of an evaluation with the tokens that the language model reads for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.data.beir import corpus_file
from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import strings_of
from llme_jax.data.tokens import plain_backend
from llme_jax.errors import InputError
from llme_jax.evaluation import lrlm
from llme_jax.evaluation.own_keys import drawn, nearest
from llme_jax.evaluation.prompts import PromptFitter
from llme_jax.evaluation.task import Demonstrations, Task
from llme_jax.files.atomic import digest, digest_file

Tokens = list[tuple[np.ndarray, int]]  # of each prompt, and how many of the last are scored


@dataclass
class Questions:
    """
    Attributes:
        path: of the rows.
        prompts: of row i.
        counts: int[n], numbers that the model gives for each row; 0 where it is not asked.
        parts: int[n], parts of each row's answer that are scored one by one.
        written: bool[n], does the model write?
        keys: of row i those that it reads, the best first, and their numbers in the corpus.
        digest: of rows and keys.
    """

    path: Path
    rows: Sequence[dict]
    prompts: Callable[[int], Tokens]
    counts: np.ndarray
    parts: np.ndarray
    written: np.ndarray
    keys: Callable[[int], tuple[Sequence[str], list[int] | None]]
    digest: str


def text_questions(
    config: EvaluateConfig,
    task: Task,
    path: Path,
    rows: Sequence[dict],
    lines: Sequence[str],
    found: tuple[Callable[[int], Sequence[str]], Callable[[int], list[int]], str] | None,
    shown: Demonstrations,
    tokenizer,
    limit: int,
) -> Questions:
    """Rows that are asked in a text.

    Args:
        lines: file and line of each row, for messages.
        found: keys of a row and their numbers in the corpus, and a digest of all; None where rows
            bring what they have.
        limit: tokens of a prompt with its answer.
    """
    settings, method = config.task, config.retrieval.retrieval_method
    if found is None:
        found = _own(config, path, rows)
    keys, numbers, found_digest = found
    choices = PromptFitter(tokenizer, limit)
    writer = PromptFitter(tokenizer, limit, settings.max_new_tokens or 0)
    oracle = method == "oracle"

    def prompts(i: int) -> Tokens:
        read = [[key] for key in rows[i].get("history", ())] if oracle else [_in_order(i)]
        asked = [task.prompt(rows[i], part, shown(i)) for part in read or [[]]]
        fitter = choices if asked[0].options else writer
        made = fitter(asked, [lines[i]] * len(asked))
        return [prompt for of_text in made for prompt in of_text]

    def _in_order(i: int) -> Sequence[str]:
        return _as_read(settings.order_method, rows[i], keys(i))

    options = [len(task.prompt(row, (), ()).options) for row in rows]
    written = np.array([not n for n in options])
    counts = np.where(written, settings.max_new_tokens or 0, options)
    if oracle:
        counts = np.array([max(len(strings_of(row, "history")), 1) for row in rows])
    return Questions(
        path,
        rows,
        prompts,
        counts,
        np.ones(len(rows), int),
        written,
        lambda i: ((), None) if oracle else (keys(i), numbers(i)),
        digest(digest_file(path), found_digest),
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


def _own(config: EvaluateConfig, path: Path, rows: Sequence[dict]) -> tuple:
    """Keys that rows bring, or that are drawn for them."""
    settings, how = config.task, config.retrieval
    wanted = (settings.few_shot if settings.task == "icl" else settings.key_num) or 0
    if how.retrieval_method == "same-task-random":
        return _of_same_task(config, rows, wanted)
    if settings.task != "msc" or how.retrieval_method in ("no", "oracle"):
        own = how.retrieval_method == "no"
        return (lambda i: strings_of(rows[i], "key")[:wanted] if own else ()), _no_numbers, ""
    turns = [strings_of(row, "history") for row in rows]
    if how.retrieval_method == "recent":
        chosen = [range(len(of_row))[::-1][:wanted] for of_row in turns]
    elif how.retrieval_method == "random":
        found = drawn(how.seed, [1] * len(rows), [*map(len, turns)], wanted)
        chosen = [of_query[0] for of_query in found]
    else:
        queries = [[row["query"].strip()] for row in rows]
        stripped = [[turn.strip() for turn in of_row] for of_row in turns]
        found = nearest(config, "chat", path, queries, stripped, wanted)
        chosen = [of_query[0] for of_query in found]
    chosen = [[int(j) for j in of_row] for of_row in chosen]
    return (lambda i: [turns[i][j] for j in chosen[i]]), _no_numbers, digest(chosen)


def _no_numbers(i: int) -> None:
    return None


# The corpus' task that a task of the rows has.
_SAME_TASK = {"mnli_m": "mnli", "mnli_mm": "mnli"}


def _of_same_task(config: EvaluateConfig, rows: Sequence[dict], wanted: int) -> tuple:
    """Lines of --corpus of the row's own task, drawn for each row."""
    corpus, members = Corpus(corpus_file(config.data), config.data.key_template), {}
    for i in range(len(corpus)):
        members.setdefault(corpus.field(i, "task_name"), []).append(i)
    ids = []
    for i, row in enumerate(rows):
        name = _SAME_TASK.get(row["task_name"], row["task_name"])
        if name not in members:
            raise InputError(
                f"{corpus.path}: has no line with task_name {name}, give another --retrieval_method"
            )
        rng = np.random.default_rng([config.retrieval.seed % 2**63, i])
        ids.append(rng.choice(members[name], min(wanted, len(members[name])), False).tolist())
    keys = (lambda i: [corpus.text(j) for j in ids[i]]), ids.__getitem__
    return *keys, digest(ids, corpus.digest, corpus.key_template)


def document_questions(
    config: EvaluateConfig, path: Path, rows: Sequence[dict], tokenizer
) -> Questions:
    """Rows that are long documents, asked in tokens."""
    settings, method = config.task, config.retrieval.retrieval_method
    backend, longest = plain_backend(tokenizer), config.lm.context_max_length
    tokens = [lrlm.tokens_of(row, backend, settings, longest) for row in rows]
    if all(t is None for t in tokens):
        raise InputError(
            f"{path}: no text has {settings.target_length} tokens, give a shorter --target_length"
        )
    documents = [None if t is None else lrlm.Document.of(t, settings) for t in tokens]
    searched = [
        method != "no" and document is not None and document.keys > 0 for document in documents
    ]
    replace = settings.integrate_method == "replace"
    width = 2 if settings.add_key_continuation else 1
    found = {}
    places = [i for i, wanted in enumerate(searched) if wanted]
    if method == "random":
        counts = ([len(documents[i].queries) for i in places], [documents[i].keys for i in places])
        found = dict(
            zip(places, drawn(config.retrieval.seed, *counts, settings.key_num), strict=True)
        )
    elif method == "dense":

        def decoded(i: int, chunks: Sequence[int], width: int) -> list[str]:
            return [
                backend.decode(documents[i].chunk(j, width).tolist(), skip_special_tokens=True)
                for j in chunks
            ]

        queries = [decoded(i, documents[i].queries, 1) for i in places]
        keys = [decoded(i, range(documents[i].keys), width) for i in places]
        near = nearest(config, "lrlm", path, queries, keys, settings.key_num)
        found = dict(zip(places, near, strict=True))

    def prompts(i: int) -> Tokens:
        if tokens[i] is None:
            return []
        if not searched[i]:
            return lrlm.plain(tokens[i], settings)
        document, made = documents[i], []
        for number, query in enumerate(document.queries):
            if method == "oracle":
                sets = [[key] for key in range(document.keys)]
            else:
                best = [int(key) for key in found[i][number]]
                sets = [sorted(best) if settings.order_method == "sequential" else best[::-1]]
            made += [document.after(keys, query + 1, replace) for keys in sets]
        return made

    parts = np.array([
        0 if t is None else (len(d.queries) if wanted else 1)
        for t, d, wanted in zip(tokens, documents, searched, strict=True)
    ])  # fmt: skip
    tried = [
        document.keys if wanted and method == "oracle" else 1
        for document, wanted in zip(documents, searched, strict=True)
    ]
    return Questions(
        path,
        rows,
        prompts,
        parts * np.array(tried),
        parts,
        np.zeros(len(rows), bool),
        lambda i: ((), None),
        digest(
            digest_file(path), [(i, [q.tolist() for q in of_row]) for i, of_row in found.items()]
        ),
    )
