"""What was found in training files as a table, with the findings beneath."""

from collections.abc import Callable
from textwrap import fill

from llme_jax.doctor.findings import percent, short_names

WIDTH = 100  # characters of the table
COLUMNS = 4  # files beside one another

Cell = Callable[[dict], object]  # a file's summary -> what the table says


def show(files: list[dict], stops: list[str], remarks: list[str]) -> str:
    """The table with one column a file, and what was found beneath it.

    Args:
        files: `FileFacts.summary` of each, with the overlap with --eval_data as `eval`.
    """
    names = short_names([file["file"] for file in files])
    tables = []
    for start in range(0, len(files), COLUMNS):
        part = slice(start, start + COLUMNS)
        tables.append(_table(files[part], names[part]))
    found = [_wrapped(finding) for finding in stops + remarks] or ["- nothing to worry about"]
    verdict = "These files can be trained on."
    if stops:
        which = "first finding" if len(stops) == 1 else f"first {len(stops)} findings"
        verdict = f"Training would stop at these files: see the {which}."
    return "\n\n".join([*tables, "\n".join(["Findings:", *found]), verdict])


def _table(files: list[dict], names: list[str]) -> str:
    rows = [
        [label, *("" if cell is None else _text(cell(file)) for file in files)]
        for label, cell in _lines(files)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    most = (WIDTH - widths[0]) // len(files) - 2
    rows.insert(0, ["", *(_shortened(name, most) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *texts in rows:
        columns = (f"{text:>{w}}" for text, w in zip(texts, widths[1:], strict=True))
        lines.append("  ".join([f"{label:<{widths[0]}}", *columns]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _lines(files: list[dict]) -> list[tuple[str, Cell | None]]:
    """The lines of the table; those that say nothing of any file are left out."""
    tasks = dict.fromkeys(task for file in files for task in file["tasks"])
    fewer = files[0]["group_negatives"]
    lines: list[tuple[str, Cell | None]] = [
        ("rows", lambda f: f["rows"]),
        *((f"  task {task or '(none)'}", _of("tasks", task)) for task in tasks),
        ("  invalid lines", _of("bad_rows", "count")),
        ("  trained on", lambda f: f["trained_on"]),
        ("  empty query or key", _of("empty_texts", "count")),
        ("queries", lambda f: f["rows"]),
        ("  repeated", _of("duplicate_queries", "count")),
        *_token_lines("query"),
        ("distinct keys", lambda f: f["distinct_keys"]),
        *_token_lines("key"),
        ("positives: min median max", _range("positives")),
        ("  rows without", lambda f: f["no_positives"]),
        ("  rows with one in negatives", _of("positive_among_negatives", "count")),
        ("negatives: min median max", _range("negatives")),
        ("  rows without", lambda f: f["no_negatives"]),
        (f"  rows with fewer than {fewer}", lambda f: f["few_negatives"]),
        ("  rows with a key twice", _of("repeated_keys", "count")),
    ]
    if any(file["teacher_scores"] for file in files):
        scores = "teacher_scores"
        lines += [
            ("rows with teacher scores", _of(scores, "rows")),
            ("  mean", _of(scores, "mean")),
            ("  lowest highest", _pair(scores, "min", "max")),
            ("  median highest - lowest", _of(scores, "median_spread")),
            ("  best key is a positive", _share(scores, "best_is_positive")),
        ]
    if evaluation := files[0]["eval"]:
        lines.append((f"of {evaluation['queries']:,} eval queries", None))
        lines.append(("  also training queries", _of("eval", "queries_in_training")))
        if evaluation["queries_with_positives"]:
            lines.append(
                ("  positives trained on", _of("eval", "queries_with_positives_in_training"))
            )
    return lines


def _token_lines(name: str) -> list[tuple[str, Cell]]:
    """Of queries or keys, how long they are."""
    field = f"{name}_tokens"

    def percentiles(file: dict) -> str | None:
        of = file[field]
        return of and " ".join(f"{of[q]}" for q in ("50%", "90%", "99%"))

    def truncated(file: dict) -> str | None:
        of = file[field]
        return of and f"{percent(of['truncated_share'])} at {of['limit']}"

    return [
        ("  tokens: 50% 90% 99%", percentiles),
        ("  longest", _of(field, "max")),
        (f"  cut by --{name}_max_length", truncated),
    ]


def _of(field: str, name: str) -> Cell:
    return lambda file: (file[field] or {}).get(name)


def _pair(field: str, first: str, second: str) -> Cell:
    return lambda file: (of := file[field]) and f"{_text(of[first])} {_text(of[second])}"


def _range(field: str) -> Cell:
    return lambda file: (of := file[field]) and f"{of['min']} {of['median']:g} {of['max']}"


def _share(field: str, name: str) -> Cell:
    share = _of(field, name)
    return lambda file: None if share(file) is None else percent(share(file))


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _wrapped(finding: str) -> str:
    """A sentence as an item of a list; the lines it names beneath keep to themselves."""
    sentence, *lines = finding.split("\n")
    item = fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([item, *(f"  {line}" for line in lines)])


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]
