"""What finished runs have left in their folders, read back for a report."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from llme_jax.config.retrieval import NQ_CUTOFFS
from llme_jax.data.corpus import NEED_POSITIVES, Corpus, EvalData
from llme_jax.errors import InputError
from llme_jax.lm.teacher_report import Report, read_report
from llme_jax.reports.record import RECORD, first_json, read_json, read_record
from llme_jax.retrieval.evaluate import open_data
from llme_jax.retrieval.metrics import answer_rank, mrr, ndcg, recall, relevance
from llme_jax.retrieval.results import read_result
from llme_jax.sources.resolve import Files
from llme_jax.training.metrics_log import read_metrics


@dataclass
class Run:
    """One folder of results.

    Attributes:
        kind: training, evaluation, answers, mining, scores, or other.
        record: what a pipeline wrote down of the stage; empty outside of one.
        run: settings, devices and versions; empty where the run wrote none.
        metrics: of the last evaluation, as {"ndcg@10": 0.7}.
        lines: of metrics.jsonl.
        mining: the report of mining.
        teacher: the report on teacher scores.
        answers: the output file of an evaluation with a language model.
    """

    name: str
    folder: Path
    record: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)
    mining: dict = field(default_factory=dict)
    teacher: Report | None = None
    answers: Path | None = None

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
        return int(self.run.get("devices", "1 x").split(" x")[0])


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in these folders; of a pipeline's folder, those of its finished stages, in order.

    Raises:
        InputError: a folder holds no results.
    """
    _inputs.cache_clear()
    runs = []
    for name in folders:
        folder = Path(name).expanduser()
        stages = [path.parent for path in folder.glob(f"*/{RECORD}")]
        stages = [stage for stage in stages if read_record(stage).get("seconds") is not None]
        stages.sort(key=lambda stage: read_record(stage).get("number", 0))
        found = [_read(stage, stage.name) for stage in stages]
        found = found or [_read(folder, folder.name if read_record(folder) else name)]
        if found[0].kind == "other" and len(found) == 1:
            raise InputError(
                f"{name}: holds no results: give the --output_dir of train, retrieve, rank or "
                "pipeline"
            )
        runs += found
    return runs


def _read(folder: Path, name: str) -> Run:
    run = Run(
        name, folder, record=read_record(folder), lines=read_metrics(folder / "metrics.jsonl")
    )
    run.run = read_json(folder / "run.json") or first_json(folder, "*.run*.json")
    run.mining = first_json(folder, "*.mining*.json")
    if run.lines:
        evaluated = [line for line in run.lines if any(n.startswith("eval_") for n in line)]
        last = evaluated[-1] if evaluated else {}
        run.metrics = {n[5:]: value for n, value in last.items() if n.startswith("eval_")}
    else:
        run.metrics = first_json(folder, "*.metrics*.json")
    if outputs := sorted(folder.glob("*.output.*.json")):
        run.answers = outputs[0]
        run.metrics = read_json(folder / outputs[0].name.replace(".output.", ".metrics.", 1))
    if scored := sorted(folder.glob("*.scored*.json")):
        run.teacher = read_report(scored[0])
    return run


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
    name, _, cutoff = metric.partition("@")
    k = int(cutoff)
    results = sorted(run.folder.glob("*.result*.json"))
    if not results or not run.settings:
        raise InputError(f"{run.folder}: has no result file with its settings")
    if isinstance(sets := run.settings["eval_data"], list):
        raise InputError(f"{run.folder}: has means over {len(sets)} sets, whose queries differ")
    queries, corpus = _inputs(*(
        *(run.settings[key] for key in ("eval_data", "corpus", "data_root")),
        *(run.settings[key] for key in ("dataset_cache_dir", "key_template")),
        "nq" if name == "answer_recall" else name,
    ))  # fmt: skip
    _, ids = read_result(results[0], queries.query_ids, len(corpus))
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
