"""What finished runs have left in their folders, read back for a report."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import NoneType

import numpy as np

from llme_jax.config.retrieval import NQ_CUTOFFS
from llme_jax.data.corpus import NEED_POSITIVES, Corpus, EvalData
from llme_jax.errors import InputError
from llme_jax.lm.teacher_report import Report, read_report
from llme_jax.reports.record import RECORD, read_json, read_record, wrong
from llme_jax.retrieval.evaluate import open_data
from llme_jax.retrieval.metrics import answer_rank, mrr, ndcg, recall, relevance
from llme_jax.retrieval.results import read_result
from llme_jax.sources.resolve import Files
from llme_jax.training.metrics_log import read_metrics

# The files of a command: `{stem of its data}.{kind}[.{save name}].json`.
KINDS = re.compile(r"(.+)\.(metrics|mining|output|result|run|scored)(?:\.(.+))?\.json")
METRICS = {"*": float}
RUN = {"settings?": dict, "versions?": {"*": str}, "devices?": str}
MINING = {
    "queries": int, "negatives": int, "without_any": int, "positive_not_found": int,
    "ranks": {"*": int}, "sources": {"*": int}, "dropped": {"*": int}, "score_edges?": [float],
    "positive_scores?": [int], "negative_scores?": [int],
}  # fmt: skip
MEASURING = {
    "eval_data": (str, list), "corpus": (str, NoneType), "data_root": str, "key_template": str,
    "dataset_cache_dir": (str, NoneType),
}  # fmt: skip
LOGGED = ("loss", "queries_per_second", "tokens_per_second", "padding_fraction")


@dataclass
class Run:
    """One run's results: those of a folder, or those of one save name in it.

    Attributes:
        name: of one of several in a folder, `{folder}{label}`.
        label: `:{save name}`; empty where there is one.
        kind: training, evaluation, answers, mining, scores, or other.
        record: what a pipeline wrote down of the stage; empty outside of one.
        run: settings, devices and versions; empty where the run wrote none.
        metrics: of the last evaluation, as {"ndcg@10": 0.7}.
        lines: of metrics.jsonl.
        mining: the report of mining.
        teacher: the report on teacher scores.
        answers: the output file of an evaluation with a language model.
        result: the hits.
    """

    name: str
    folder: Path
    label: str = ""
    record: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)
    mining: dict = field(default_factory=dict)
    teacher: Report | None = None
    answers: Path | None = None
    result: Path | None = None

    @property
    def settings(self) -> dict:
        return self.run.get("settings", {})

    @property
    def kind(self) -> str:
        if self.lines:
            return "training"
        if self.mining:
            return "mining"
        if self.teacher:
            return "scores"
        if self.answers:
            return "answers"
        return "evaluation" if self.metrics else "other"

    @property
    def devices(self) -> int:
        found = re.match(r"(\d{1,9}) x ", self.run.get("devices", ""))
        return int(found[1]) if found else 1


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in these folders; of a pipeline's folder, those of its finished stages, in order.

    Raises:
        InputError: a folder holds no results, or others than a run writes.
    """
    _inputs.cache_clear()
    runs = {}
    for name in folders:
        folder = Path(name).expanduser()
        records = {path.parent: read_record(path.parent) for path in folder.glob(f"*/{RECORD}")}
        stages = [stage for stage, record in records.items() if record["seconds"] is not None]
        stages.sort(key=lambda stage: records[stage]["number"])
        found = [run for stage in stages for run in _read(stage, stage.name)]
        found = found or _read(folder, folder.name if read_record(folder) else name)
        if found[0].kind == "other" and len(found) == 1:
            raise InputError(
                f"{name}: holds no results: give the --output_dir of train, retrieve, rank or "
                "pipeline"
            )
        runs |= {(run.folder.resolve(), run.label): run for run in found}
    if len({run.name for run in runs.values()}) < len(runs):  # stages of several pipelines
        for run in runs.values():
            run.name = f"{run.folder}{run.label}"
    return [*runs.values()]


def _read(folder: Path, name: str) -> list[Run]:
    """A training, then what was written under each save name; without any, a run of no kind."""
    record, lines = read_record(folder), read_metrics(folder / "metrics.jsonl")
    groups, results = defaultdict(dict), []
    for path in sorted(folder.glob("*.json")):
        if (match := KINDS.fullmatch(path.name)) and path.is_file():
            stem, kind, save_name = match.groups()
            groups[stem, save_name or ""][kind] = path
    for names, files in [*groups.items()]:
        if not {*files} - {"result", "run"}:  # hits alone, as a training leaves them
            results += [files["result"]] if "result" in files else []
            del groups[names]
    runs = []
    if lines or not groups:
        run = read_json(folder / "run.json", RUN)
        metrics = _last_evaluation(folder / "metrics.jsonl", lines)
        result = results[0] if results else None
        runs = [Run(name, folder, "", record, run, metrics, lines, result=result)]
    stems = {stem for stem, _ in groups}
    for (stem, save_name), files in groups.items():
        label = save_name
        if len(stems) > 1 or (lines and not save_name):
            label = f"{stem}.{save_name}".rstrip(".")
        label = f":{label}" if label and len(groups) + len(runs) > 1 else ""
        runs.append(
            Run(
                f"{name}{label}",
                folder,
                label,
                record,
                read_json(files["run"], RUN) if "run" in files else {},
                read_json(files["metrics"], METRICS) if "metrics" in files else {},
                mining=_mining(files["mining"]) if "mining" in files else {},
                teacher=read_report(files["scored"]) if "scored" in files else None,
                answers=files.get("output"),
                result=files.get("result"),
            )
        )
    return runs


def _last_evaluation(path: Path, lines: list[dict]) -> dict[str, float]:
    """Its metrics, of the lines of a metrics.jsonl.

    Raises:
        InputError: something that a report shows is no number.
    """
    last = {}
    for line in lines:
        metrics = {n[5:]: value for n, value in line.items() if n.startswith("eval_")}
        shown = metrics | {name: line[name] for name in LOGGED if name in line}
        if said := wrong(shown, METRICS):
            raise InputError(f"{path}: step {line['step']}: {said}: remove the line")
        last = metrics or last
    return last


def _mining(path: Path) -> dict:
    """The report of mining.

    Raises:
        InputError: mining writes no such report.
    """
    facts = read_json(path, MINING)
    right = all(rank.isdecimal() and count > 0 for rank, count in facts["ranks"].items())
    if right and "score_edges" in facts:
        counts = [len(facts.get(f"{of}_scores", ())) for of in ("positive", "negative")]
        right = counts == [len(facts["score_edges"]) - 1] * 2 and counts[0] > 0
    if not right:
        raise InputError(f"{path}: its counts do not fit together: mine again")
    return facts


@dataclass
class Measured:
    """A metric of every query of an evaluation.

    Attributes:
        values: float[Q].
        ids: int[Q, hits], the hits of each, best first.
    """

    queries: EvalData
    corpus: Corpus
    values: np.ndarray
    ids: np.ndarray


def measure_queries(run: Run, metric: str) -> Measured:
    """What the mean of a run's metric is of.

    Raises:
        InputError: its files are gone, or no longer give its metric.
    """
    match = re.fullmatch(r"(mrr|recall|ndcg|answer_recall)@([1-9]\d{0,8})", metric)
    if not match:
        raise InputError(f"{metric} is a metric of no query")
    name, k = match[1], int(match[2])
    if run.result is None or not run.settings:
        raise InputError(f"{run.folder}: has no result file with its settings")
    if said := wrong(run.settings, MEASURING):
        raise InputError(f"{run.folder}: in its settings {said}: run it again")
    if isinstance(sets := run.settings["eval_data"], list):
        raise InputError(f"{run.folder}: has means over {len(sets)} sets, whose queries differ")
    queries, corpus = _inputs(*(
        *(run.settings[key] for key in ("eval_data", "corpus", "data_root")),
        *(run.settings[key] for key in ("dataset_cache_dir", "key_template")),
        "nq" if name == "answer_recall" else name,
    ))  # fmt: skip
    _, ids = read_result(run.result, queries.query_ids, len(corpus))
    if name in NEED_POSITIVES:
        relevant = relevance(ids, queries.positives)
        counts = np.array([len(row) for row in queries.positives])
        values = {"mrr": mrr, "recall": recall, "ndcg": ndcg}[name](relevant, counts, k)
    else:
        texts = ([corpus.text(int(i)) for i in row if i >= 0] for row in ids[:, : max(NQ_CUTOFFS)])
        ranks = np.array(list(map(answer_rank, texts, queries.answers)))
        values = (ranks < k).astype(np.float64)
    if abs(values.mean() - run.metrics[metric]) > 1e-6:
        raise InputError(
            f"{run.folder}: its hits give {metric} {values.mean():.4f}, it says "
            f"{run.metrics[metric]:.4f}: --eval_data was changed, evaluate again"
        )
    return Measured(queries, corpus, values, ids)


@lru_cache(8)  # the same for most evaluations of a report; the next report reads files anew
def _inputs(eval_data, corpus, root, cache, template, metric) -> tuple[EvalData, Corpus]:
    given = {"eval_data": eval_data, "corpus": corpus, "data_root": root}
    files = Files(given | {"dataset_cache_dir": cache, "key_template": template})
    found, queries = open_data(files, template, [metric])
    return queries, found
