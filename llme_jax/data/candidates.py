"""Rows whose candidates are reranked: which these are, what they are called, which are right."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxtyping import Float32
from numpy import ndarray

from llme_jax.data.corpus import NEED_POSITIVES, check_answers
from llme_jax.data.rows import prompt_of, query_of, shown, strings_of, task_of, whole_numbers
from llme_jax.errors import InputError

NOWHERE = -2  # a positive that is no candidate, and those after it: -3, -4, ...


class CandidateRow(NamedTuple):
    """A query and the keys that are put in order."""

    query: str
    task: str | None
    keys: list[str]
    ids: list[int]  # what each key is called: its number in the corpus, else its place in the row
    relevant: list[int]  # the ids of all positives, candidates or not
    answers: list[str]
    numbered: bool  # are the ids numbers in the corpus?
    source: str  # the fields that the keys come from
    prompt: str | None  # what is put before this query, where queries get an instruction
    retrieved: Float32[ndarray, "_"] | None = None  # a score of each key from what found it


# Ids, texts and scores of a row's candidates that come from elsewhere, by the row and its number.
Found = Callable[[dict, int], tuple[list[int], list[str], Float32[ndarray, "_"]]]


def parse_candidates(
    record: dict, number: int, *, metrics: Collection[str], found: Found | None = None
) -> CandidateRow:
    """Validates one row: its candidates are `key`, else `pos` and `neg`, else `history`; of these
    the first that it has, or that has texts.

    Args:
        number: of the row, from 0.
        metrics: those to be computed; decides which fields every row has to have.
        found: gives the candidates instead.

    Raises:
        InputError: says what is wrong with which field, without file and line.
    """
    query, task, pos = query_of(record), task_of(record), strings_of(record, "pos")
    numbers = _numbers(record, "pos_index")
    source = _source(record) if found is None else "key"
    retrieved = None
    if found:
        ids, keys, retrieved = found(record, number)
        given = numbers
    elif source == "key":
        keys = strings_of(record, "key")
        ids, given = _numbers(record, "key_index"), numbers
        if ids is not None and len(ids) != len(keys):
            raise InputError(f"key_index has {len(ids)} numbers, key has {len(keys)} texts")
    elif source == "history":
        keys = strings_of(record, "history")
        ids, given = None, numbers
    else:
        keys, (ids, given) = pos + strings_of(record, "neg"), _indices(record, pos, numbers)
    numbered = ids is not None
    if ids is None:
        ids = [*range(len(keys))]
        # Else pos_index counts in the corpus, which says nothing of places in the row.
        given = numbers if source == "history" else None
    relevant = _by_text(keys, ids, pos) if given is None else given
    if NEED_POSITIVES & {*metrics} and not relevant:
        raise InputError(
            "has neither pos nor pos_index, which mrr, recall and ndcg need: add one (pos_index "
            "together with key_index), or ask for --metrics without them, as collate_score"
        )
    if "nq" in metrics:
        check_answers(record.get("answers"))
    answers = record.get("answers") if "nq" in metrics else []
    relevant = [*dict.fromkeys(relevant)]
    prompt = prompt_of(record)
    return CandidateRow(
        query, task, keys, ids, relevant, answers, numbered, source, prompt, retrieved
    )


def _source(record: dict) -> str:
    """The fields that a row's candidates are in."""
    if record.get("key") is not None:
        return "key"
    if record.get("pos") or record.get("neg"):
        return "pos + neg"
    if record.get("history") is not None:
        return "history"
    if record.get("pos") is None and record.get("neg") is None:
        raise InputError("no candidates: every row needs key, or pos and neg, or history")
    return "pos + neg"


def _indices(
    record: dict, pos: list[str], pos_index: list[int] | None
) -> tuple[list[int] | None, list[int] | None]:
    """The numbers of pos + neg, and those of the positives; None where they have none."""
    neg, neg_index = strings_of(record, "neg"), _numbers(record, "neg_index")
    both = (pos_index or []), (neg_index or [])
    if (len(pos), len(neg)) != tuple(map(len, both)):
        return None, None
    return both[0] + both[1], pos_index


def _by_text(keys: list[str], ids: list[int], pos: list[str]) -> list[int]:
    """The ids of the positives, found by their texts."""
    known = {}
    for key, id in zip(keys, ids, strict=True):
        known.setdefault(key, id)
    texts = dict.fromkeys(pos)
    missing = [text for text in texts if text not in known]
    return [known[t] for t in texts if t in known] + [NOWHERE - i for i in range(len(missing))]


def _numbers(record: dict, name: str) -> list[int] | None:
    numbers = whole_numbers(record.get(name))
    if numbers is None:
        return None
    if not isinstance(numbers, list) or any(
        type(n) is not int or not 0 <= n < 2**63 for n in numbers
    ):
        raise InputError(f"{name} is {shown(numbers)}: give a list of integers from 0")
    return numbers
