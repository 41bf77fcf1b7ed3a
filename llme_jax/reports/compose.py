"""A report out of runs: what got better, what it was trained on, what it took."""

import json
import shlex
from pathlib import Path

import numpy as np

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text
from llme_jax.reports import charts
from llme_jax.reports.answers import compare, read_answers
from llme_jax.reports.blocks import (
    Chart,
    Code,
    Paragraph,
    Section,
    Table,
    Verdict,
    between,
    short,
    signed,
    to_html,
    to_markdown,
    won_and_lost,
)
from llme_jax.reports.bootstrap import LEVEL, SAMPLES, Difference, paired_bootstrap
from llme_jax.reports.runs import Measured, Run, measure_queries, read_runs

COLUMNS = 6  # metrics a table shows
RULE = (
    f"WIN: the whole {LEVEL:.0%} interval of the difference is above 0. REGRESSION: it is below 0. "
    f"MARGINAL: 0 lies in it. The interval is a paired bootstrap over queries, {SAMPLES:,} samples."
)


def write_report(
    folders: list[str], out: Path, *, metric: str | None = None, baseline: str | None = None
) -> None:
    """Writes report.html and report.md of the runs in these folders into `out`.

    Args:
        metric: that the verdict is about; ndcg@10, else the first one, when None.
        baseline: the run that the others are compared with; the one that its pipeline marks, else
            the first.

    Raises:
        InputError: there is nothing to report on, or no such metric or run.
    """
    if not folders:
        raise InputError("nothing is done yet")
    title, sections = compose(read_runs(folders), metric, baseline)
    for name, text in (("html", to_html(title, sections)), ("md", to_markdown(title, sections))):
        with atomic_text(out / f"report.{name}") as file:
            file.write(text)
        print(f"report: {out / f'report.{name}'}")


def compose(
    runs: list[Run], metric: str | None = None, baseline: str | None = None
) -> tuple[str, list[Section]]:
    """The title and the sections of a report."""
    judged = [run for run in runs if run.kind == "evaluation"]
    judged = judged or [run for run in runs if run.kind == "training" and run.metrics]
    sections = []
    if judged:
        metric = _metric(judged, metric)
        judged = [run for run in judged if metric in run.metrics]
        first = _baseline(judged, baseline)
        sections = _evaluations(judged, first, metric)
    sections += _answers([run for run in runs if run.kind == "answers"], baseline)
    sections += [_training(runs), _negatives(runs), _teachers(runs), _time(runs), _how(runs)]
    names = [run.name for run in runs]
    title = "Report" if len(names) > 3 else f"Report: {', '.join(names)}"
    return title, [section for section in sections if section.blocks]


def _answers(judged: list[Run], wanted: str | None) -> list[Section]:
    """What a language model answered: metrics, and the last run against the baseline."""
    if not judged:
        return []
    names = list(dict.fromkeys(name for run in judged for name in run.metrics))[:COLUMNS]
    rows = [
        [run.name, *(f"{run.metrics[n]:.4f}" if n in run.metrics else "" for n in names)]
        for run in judged
    ]
    table = Section("Answers of a language model", [Table(["", *names], rows)])
    first, last = _baseline(judged, wanted), judged[-1]
    if first is last:
        return [table]
    try:
        read = [read_answers(run.answers, run.name) for run in (first, last)]
        top, examples = compare(*read)
    except InputError as error:
        table.blocks.append(Paragraph(f"No interval for {last.name}: {error}"))
        return [table]
    top.blocks.insert(1, Paragraph(RULE))
    return [top, table, examples]


def _metric(judged: list[Run], wanted: str | None) -> str:
    names = list(dict.fromkeys(name for run in judged for name in run.metrics))
    if wanted and wanted not in names:
        raise InputError(
            f"--metric {wanted}: none of the runs measured it, only {', '.join(names)}"
        )
    return wanted or ("ndcg@10" if "ndcg@10" in names else names[0])


def _baseline(judged: list[Run], wanted: str | None) -> Run:
    for run in judged:
        if run.name == wanted or (wanted is None and run.record.get("baseline")):
            return run
    if wanted:
        names = ", ".join(run.name for run in judged)
        raise InputError(f"--baseline {wanted}: there is no such evaluation, only {names}")
    return judged[0]


def _evaluations(judged: list[Run], baseline: Run, metric: str) -> list[Section]:
    """Verdict, metrics with intervals, and what single queries gained and lost."""
    measured: dict[str, Measured] = {}
    problems = []
    for run in judged:
        try:
            measured[run.name] = measure_queries(run, metric)
        except InputError as error:
            problems.append(Paragraph(f"No interval for {run.name}: {error}"))
    last = judged[-1]
    differences = _differences(judged, baseline, measured)
    top = Section("")
    if last.name in differences:
        found, count = differences[last.name], len(measured[last.name].values)
        top.blocks.append(Verdict(
            found.verdict,
            f"{last.name} has {metric} {last.metrics[metric]:.4f}, {baseline.name} "
            f"{baseline.metrics[metric]:.4f}: {signed(found.delta)} ({between(found)}, "
            f"{count} queries)",
        ))  # fmt: skip
        top.blocks.append(Paragraph(RULE))
    others = _differences([run for run in judged if run is not last], last, measured)
    sections = [top, _table(judged, baseline, metric, differences, problems)]
    if len(others) > 1:
        rows = [
            [name, signed(-d.delta), f"{signed(-d.high)} to {signed(-d.low)}",
             Difference(-d.delta, -d.high, -d.low).verdict]
            for name, d in others.items()
        ]  # fmt: skip
        head = [f"{last.name} against", metric, "95% interval", ""]
        sections[1].blocks.append(Table(head, rows))
    if last.name in differences:
        sections.append(_examples(measured[baseline.name], measured[last.name], baseline, last))
    return sections


def _differences(
    judged: list[Run], baseline: Run, measured: dict[str, Measured]
) -> dict[str, Difference]:
    """Of all that were measured on the baseline's queries."""
    if baseline.name not in measured:
        return {}
    before = measured[baseline.name]
    return {
        run.name: paired_bootstrap(before.values, measured[run.name].values)
        for run in judged
        if run is not baseline and run.name in measured
        and measured[run.name].queries.query_ids == before.queries.query_ids
    }  # fmt: skip


def _table(judged, baseline: Run, metric: str, differences, problems) -> Section:
    names = [n for n in dict.fromkeys(n for run in judged for n in run.metrics) if n != metric]
    names = [metric, *names][:COLUMNS]
    rows = []
    for run in judged:
        cells = [f"{run.metrics[n]:.4f}" if n in run.metrics else "" for n in names]
        found = differences.get(run.name)
        cells += [signed(found.delta), between(found), found.verdict] if found else [""] * 3
        rows.append([run.name, *cells])
    head = ["", *names, f"{metric} against {baseline.name}", "95% interval", ""]
    blocks = [Table(head, rows)]
    if differences:
        shown = {name: (d.delta, d.low, d.high) for name, d in differences.items()}
        title = f"{metric}, difference to {baseline.name}"
        blocks.append(Chart(title, charts.intervals(shown, "difference")))
    return Section("Evaluations", [*blocks, *problems])


def _examples(before: Measured, after: Measured, baseline: Run, last: Run) -> Section:
    columns = [f"first of {run.name}" for run in (baseline, last)]
    return won_and_lost(
        *("query", "queries", last.name, after.values - before.values, columns),
        lambda i: _example(i, before, after),
    )


def _example(i: int, before: Measured, after: Measured) -> list[str]:
    queries, corpus = after.queries, after.corpus
    right = ""
    if queries.positives is not None:
        right = corpus.text(queries.positives[i][0])
    elif queries.answers is not None:
        right = " / ".join(queries.answers[i])
    firsts = [corpus.text(int(m.ids[i, 0])) if m.ids[i, 0] >= 0 else "" for m in (before, after)]
    values = [f"{m.values[i]:.2f}" for m in (before, after)]
    return [*map(short, (queries.texts[i], right, *firsts)), *values]


def _training(runs: list[Run]) -> Section:
    trained = [run for run in runs if run.kind == "training"]
    rows, curves = [], {}
    for run in trained:
        logged = [line for line in run.lines if "loss" in line]
        if not logged:
            continue
        curves[run.name] = ([x["step"] for x in logged], [x["loss"] for x in logged])
        last = logged[-1]
        rows.append([
            *(run.name, f"{last['step']}", f"{logged[0]['loss']:.4f}", f"{last['loss']:.4f}"),
            *(f"{last[name]:g}" if name in last else ""
              for name in ("queries_per_second", "tokens_per_second", "padding_fraction")),
        ])  # fmt: skip
    if not rows:
        return Section("Training")
    head = ["", "steps", "first loss", "last loss", "queries/s", "tokens/s", "padding"]
    return Section(
        "Training", [Table(head, rows), Chart("Loss", charts.lines(curves, "step", "loss"))]
    )


def _negatives(runs: list[Run]) -> Section:
    mined = [run for run in runs if run.mining]
    rows = []
    for run in mined:
        m = run.mining
        rows.append([
            *(run.name, f"{m['queries']}", f"{m['negatives']}", f"{m['without_any']}"),
            *(f"{m['positive_not_found']}", _median(m["ranks"])),
            ", ".join(f"{name} {count}" for name, count in m["sources"].items()),
            ", ".join(f"{count} {reason}" for reason, count in m["dropped"].items()) or "none",
        ])  # fmt: skip
    if not rows:
        return Section("Negatives")
    head = ["", "queries", "negatives", "queries with none", "positive not found", "median rank",
            "sources", "passages left out"]  # fmt: skip
    blocks = [Table(head, rows, texts=frozenset({7}))]
    for run in mined:
        if "score_edges" in run.mining:
            shown = {"positives": run.mining["positive_scores"],
                     "negatives": run.mining["negative_scores"]}  # fmt: skip
            edges = run.mining["score_edges"]
            chart = charts.bars(shown, edges, "score", "share")
            blocks.append(Chart(f"Scores in {run.name}", chart))
    return Section("Negatives", blocks)


def _median(counts: dict[str, int]) -> str:
    """Of numbers of which so many are each, in ascending order; there may be 100 million."""
    if not counts:
        return ""
    up_to = np.cumsum([*counts.values()])
    middle = np.searchsorted(up_to, [(up_to[-1] - 1) // 2, up_to[-1] // 2], side="right")
    return f"{np.mean([int([*counts][i]) for i in middle]):g}"


def _teachers(runs: list[Run]) -> Section:
    blocks = []
    for run in runs:
        if run.teacher:
            counts, edges = np.histogram(run.teacher.best, 40, (0.0, 1.0))
            chart = charts.bars(
                {run.name: counts.tolist()}, edges.tolist(), "weight", "share of rows"
            )
            blocks += [Paragraph(f"{run.name}:"), Code(str(run.teacher))]
            blocks.append(Chart(f"Weight of the best key in {run.name}", chart))
    return Section("Teacher scores", blocks)


def _time(runs: list[Run]) -> Section:
    timed = [run for run in _stages(runs) if run.record.get("seconds") is not None]
    hours = [run.record["seconds"] * run.devices / 3600 for run in timed]
    rows = [
        [run.name, f"{run.record['seconds']:.1f}", run.run.get("devices", ""), f"{hour:.3f}"]
        for run, hour in zip(timed, hours, strict=True)
    ]
    if not rows:
        return Section("Time")
    total = sum(run.record["seconds"] for run in timed)
    rows.append(["all", f"{total:.1f}", "", f"{sum(hours):.3f}"])
    blocks = [Table(["", "seconds", "devices", "device-hours"], rows)]
    gates = [
        [run.name, "open" if gate["open"] else "shut", gate["found"]]
        for run in timed
        for gate in run.record.get("gates", [])
    ]
    if gates:
        blocks.append(Table(["what had to hold behind", "", "found"], gates, frozenset({2})))
    return Section("Time, and what had to hold", blocks)


def _stages(runs: list[Run]) -> list[Run]:
    """The first run of each folder."""
    return [*{run.folder: run for run in reversed(runs)}.values()][::-1]


def _how(runs: list[Run]) -> Section:
    commands = [
        f"# {run.name}\n{_wrapped(run.record['command'])}"
        for run in _stages(runs)
        if "command" in run.record
    ]
    blocks = [Code("\n\n".join(commands), "The commands")] if commands else []
    versions = {json.dumps(run.run["versions"]) for run in runs if "versions" in run.run}
    for found in sorted(versions):
        said = ", ".join(f"{name} {version}" for name, version in json.loads(found).items())
        blocks.append(Paragraph(f"Versions: {said}"))
    blocks += [
        Code(json.dumps(run.settings, indent=1, ensure_ascii=False), f"All settings of {run.name}",
             long=True)
        for run in runs if run.settings
    ]  # fmt: skip
    return Section("How it was made", blocks)


def _wrapped(command: str) -> str:
    """One flag a line, to be read and typed."""
    try:
        words = shlex.split(command)
    except ValueError:  # somebody has changed it
        return command
    lines = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)
