"""What is wrong with training files, and what to do about it, a sentence each."""

from collections.abc import Iterator
from pathlib import PurePath

from llme_jax.data.rows import not_read
from llme_jax.doctor.counts import Lines

WORTH_SAYING = 0.01  # share of texts that are cut off


def find(files: list[dict], bad_eval: Lines | None, allowed: int) -> tuple[list[str], list[str]]:
    """What training would stop with, and what else a person should know.

    Args:
        files: `FileFacts.summary` of each, with the overlap with --eval_data as `eval`.
        bad_eval: invalid lines of --eval_data.
        allowed: --max_bad_rows.
    """
    stops, remarks = [], []
    bad_rows = sum(file["bad_rows"]["count"] for file in files)
    for file, name in zip(files, short_names([f["file"] for f in files]), strict=True):
        if bad := file["bad_rows"]["count"]:
            stopping = bad_rows > allowed
            remedy = f"correct them, or skip them with --max_bad_rows {bad_rows}"
            listed = [(line["line"], line["reason"]) for line in file["bad_rows"]["first"]]
            sentence = _bad_lines(name, bad, listed, remedy if stopping else "training skips them")
            (stops if stopping else remarks).append(sentence)
        if bad and not file["rows"]:
            stops.append(f"{name}: no line of it is a valid row")
        elif file["training_stops_with"]:
            stops.append(file["training_stops_with"])
        remarks += [f"{name}: {sentence}" for sentence in _remarks(file)]
    if bad_eval and bad_eval.count:
        listed = [(line, reason) for _, line, reason in bad_eval.found]
        stops.append(_bad_lines(bad_eval.found[0][0], bad_eval.count, listed, "correct them"))
    return stops, remarks


def _bad_lines(name: str, count: int, listed: list[tuple[int, str]], remedy: str) -> str:
    what = "1 line is" if count == 1 else f"{count:,} lines are"
    lines = [f"{name}: {what} invalid: {remedy}"]
    lines += [f"  line {line}: {reason}" for line, reason in listed]
    if count > len(listed):
        lines.append(f"  and {count - len(listed):,} more")
    return "\n".join(lines)


def _remarks(file: dict) -> Iterator[str]:
    """Of one file, in the order of the table."""
    if fields := file["unread_fields"]:
        yield not_read(fields)
    if flaw := _rows(file["empty_texts"], "an empty query or key"):
        yield f"{flaw}: remove it, it is trained on like any other"
    if flaw := _rows(file["duplicate_queries"], "the query of an earlier row"):
        yield (
            f"{flaw}: join them, because where they meet in a batch each takes the other's "
            "positives for negatives"
        )
    for name, texts in (("query", "queries"), ("key", "distinct keys")):
        of = file[f"{name}_tokens"]
        if of and of["truncated_share"] >= WORTH_SAYING:
            yield (
                f"{percent(of['truncated_share'])} of {texts} are longer than "
                f"--{name}_max_length {of['limit']}: raise it (99% have {of['99%']} tokens or "
                "fewer), or accept that the rest is cut off"
            )
    yield from _remarks_on_candidates(file)
    yield from _remarks_on_scores(file)
    yield from _remarks_on_evaluation(file)


def _remarks_on_candidates(file: dict) -> Iterator[str]:
    if flaw := _rows(file["positive_among_negatives"], "a positive among the negatives"):
        yield f"{flaw}: remove it from neg"
    none, few, wanted = (file[f"{n}_negatives"] for n in ("no", "few", "group"))
    if none and wanted and not file["training_stops_with"]:
        yield (
            f"{_have(none)} no negatives and cannot be trained on with --train_group_size "
            f"{wanted + 1}: mine some with python -m llme_jax.retrieve --metrics collate_neg, or "
            "train on in-batch negatives alone (--train_group_size 1)"
        )
    if few > none:
        yield (
            f"{_have(few - none)} fewer than the {wanted} negatives that --train_group_size "
            f"{wanted + 1} takes, so that theirs are repeated: mine more, or lower it"
        )
    if flaw := _rows(file["repeated_keys"], "a key twice among pos or among neg"):
        yield f"{flaw}: keep it once"


def _remarks_on_scores(file: dict) -> Iterator[str]:
    scores = file["teacher_scores"]
    if not scores:
        return
    if missing := file["rows"] - scores["rows"]:
        yield f"{_have(missing)} no teacher_scores and are not distilled: score them too"
    look = "look at them with python -m llme_jax.score --report before you distil them"
    right, chance = scores["best_is_positive"], scores["by_chance"]
    if scores["median_spread"] == 0:
        yield f"in most rows all teacher_scores are the same: {look}"
    elif right is not None and right < 1.5 * chance and chance < 0.5:
        yield (
            f"the key with the best teacher score is a positive in {percent(right)} of rows, by "
            f"chance it would be in {percent(chance)}: {look}"
        )


def _remarks_on_evaluation(file: dict) -> Iterator[str]:
    overlap = file["eval"]
    if not overlap:
        return
    of = PurePath(overlap["file"]).name
    if same := overlap["queries_in_training"]:
        yield (
            f"{same:,} of {overlap['queries']:,} queries of {of} are trained on: remove them from "
            "one of the two, or the metrics promise too much"
        )
    if same := overlap["queries_with_positives_in_training"]:
        yield (
            f"{same:,} of {overlap['queries_with_positives']:,} queries of {of} have a positive "
            "that is also one in training: the metrics say less of unseen passages"
        )


def _rows(flaw: dict, what: str) -> str:
    """As in "3 rows have a positive among the negatives, first in line 17"; or nothing."""
    if not flaw["count"]:
        return ""
    return f"{_have(flaw['count'])} {what}, first in line {flaw['first_lines'][0]}"


def _have(rows: int) -> str:
    return "1 row has" if rows == 1 else f"{rows:,} rows have"


def short_names(paths: list[str]) -> list[str]:
    """As many trailing parts of each path as tell it from the others."""
    parts = [PurePath(path).parts for path in paths]
    names = []
    for mine in parts:
        kept = 1
        while kept < len(mine) and sum(p[-kept:] == mine[-kept:] for p in parts) > 1:
            kept += 1
        names.append("/".join(mine[-kept:]).replace("//", "/"))
    return names


def percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"
