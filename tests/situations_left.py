"""More situations of campaign.py: what runs have left, pipelines, places of merges."""

import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path

import tiny
from situations import VALUES, Situation, is_text

from llme_jax import merge

# ------------------------------------------------- what runs have left, compared and reported on

HITS = [{"query_id": i, "pred": [i, 5, 6], "score": [3.0, 2.0, 1.0]} for i in range(4)]
MEASURED = {"eval_data": "test.json", "corpus": "corpus.json", "data_root": ".",
            "dataset_cache_dir": "cache", "key_template": "{title} {text}"}  # fmt: skip
LEFT = {
    "test.metrics.json": {"ndcg@10": 0.5, "mrr@10": 0.5},
    "test.run.json": {"settings": MEASURED, "devices": "1 x cpu", "versions": {"jax": "1"}},
    "test.mining.json": {
        "queries": 4, "negatives": 4, "without_any": 0, "positive_not_found": 0,
        "dropped": {"with an answer": 1}, "sources": {"dense": 4}, "ranks": {"1": 4},
        "score_edges": [0.0, 1.0, 2.0], "positive_scores": [1, 0], "negative_scores": [0, 1],
    },
    "metrics.jsonl": {"step": 1, "loss": 1.0, "queries_per_second": 1.0, "eval_ndcg@10": 0.5},
    "stage.json": {
        "key": "a", "made": "b", "after": {}, "command": "python", "number": 0, "baseline": True,
        "spent": 1.0, "seconds": 1.0, "gates": [{"open": True, "found": ""}], "files": {},
    },
}  # fmt: skip
ANSWER = {"query": "q", "choices": ["a", "b"], "answer": 0, "key": ["k"], "output": 1,
          "score": 0.0, "scores": {"em": 0.0}, "query_id": 1}  # fmt: skip
SPOILT = VALUES | {"a text": "it's", "an object of lists": {"1": []}}


def same_kind(value, old) -> str | None:
    """Why a value may stand in a file of ours where another one did."""
    if value is ...:
        return "may be an older file"
    kinds = (int, float) if type(old) in (int, float) else (type(old),)
    return "of the same type" if type(value) in kinds and value != float("nan") else None


def left_behind_situations() -> Iterator[Situation]:
    for file, content in LEFT.items():
        for field, (kind, value) in product((None, *content), SPOILT.items()):
            if field is None and value in (..., {"a": 1}):
                continue

            def spoil(folder, file=file, field=field, value=value):
                (folder / "run").mkdir()
                tiny.write_lines(folder / "run/test.result.json", HITS)
                changed = {**LEFT[file]}
                if field is None:
                    changed = value
                elif value is ...:
                    del changed[field]
                else:
                    changed[field] = value
                for name in {"test.metrics.json", "test.run.json", file}:
                    text = json.dumps(changed if name == file else LEFT[name])
                    (folder / "run" / name).write_text(text + "\n")
                return []

            right = same_kind(value, content.get(field, {}))
            if file == "metrics.jsonl" and field in (None, "step"):
                right = "a line without a step is left out"
            if (field, kind) == ("seconds", "null"):
                right = "a run that has not ended"
            yield Situation(f"report: {file}: {field or 'all'} {kind}", "report", spoil, right)
    for field, old in ANSWER.items():
        for kind, value in SPOILT.items():

            def spoil(folder, field=field, value=value):
                for name in ("a", "b"):
                    rows = [ANSWER | {"query_id": i, "score": 0.5 * i} for i in range(3)]
                    if name == "b" and value is ...:
                        del rows[1][field]
                    elif name == "b":
                        rows[1][field] = value
                    tiny.write_lines(folder / f"{name}.json", rows)
                return []

            right = same_kind(value, old)
            if field == "query_id" and value != 0:
                right = "any value names a row, if both files have it"
            if field in ("answer", "output") and (value is True or is_text(value)):
                right = "True is 1, and a text was written"
            yield Situation(f"compare: {field} {kind}", "compare", spoil, right)


# ---------------------------------------------------------------------------- pipelines, and merge

EXPERIMENT = """from llme_jax.config import HaveNegatives, NotBelow, PipelineConfig, Stage

W = "--query_encoder bert --eval_data test.json --corpus corpus.json"


class P(PipelineConfig):
    def stages(self):
        return {}


def get_config(arg=None):
    return P()
"""
ALONE = '[Stage("a", "retrieve", W)]'
DECLARED = {
    ALONE: "a pipeline of one",
    '[Stage("a", "retrieve", W), Stage("b", "retrieve", W, (NotBelow("ndcg@10", "a"),))]': "two",
    '[Stage("a", "retrieve", W), Stage("b", "retrieve", W, (NotBelow("ndcg@10", "a")))]': None,
    '[Stage("a", "retrieve", W), Stage("b", "retrieve", W, [NotBelow("ndcg@10", "a")])]': None,
    '[Stage("a", "retrieve", W, (NotBelow,))]': None,
    '[Stage("a", "retrieve", W, (HaveNegatives("all"),))]': None,
    '[Stage("a", "retrieve", W + " --query_instruction it\'s")]': None,
    '[Stage("a", "retrieve", W.split())]': None,
    '[Stage("a", "retrieve", W + " --plan")]': None,
    '[Stage("report.html", "retrieve", W)]': None,
    '[Stage("old", "retrieve", W)]': None,
    '[Stage(1, "retrieve", W)]': None,
    '[Stage("a", None, W)]': None,
    '[Stage("a", "retrieve", W, (), "yes")]': None,
    '[Stage("a", "retrieve")]': None,
    '["--query_encoder bert"]': None,
    '(Stage("a", "retrieve", W) for _ in [1])': None,
    'Stage("a", "retrieve", W)': None,
    "None": None,
    "[]": None,
    "[None]": None,
    "1 / 0": None,
    "exit": None,
}


def _declare(folder: Path, declared: str, more: Sequence[str] = ()) -> list[str]:
    (folder / "p.py").write_text(EXPERIMENT.replace("{}", declared))
    return [*more]


def pipeline_situations() -> Iterator[Situation]:
    for declared, right in DECLARED.items():
        spoil = partial(_declare, declared=declared)
        yield Situation(f"pipeline: {declared}", "pipeline", spoil, right)
    spoil = partial(_declare, declared=ALONE, more=("--metric", "nope"))
    yield Situation("pipeline: --metric nope", "pipeline", spoil, None)
    stage = LEFT["stage.json"]
    for field in (None, *stage):
        for kind, value in SPOILT.items():

            def spoil(folder, field=field, value=value):
                _declare(folder, ALONE)
                (folder / "out/a").mkdir(parents=True)
                changed = value if field is None else stage | {field: value}
                if value is ...:
                    changed = {name: v for name, v in stage.items() if name != field}
                (folder / "out/a/stage.json").write_text(json.dumps(changed))
                return []

            right = same_kind(value, stage.get(field, 0))
            if field is None and value is not ...:
                right = None
            if (field, kind) == ("seconds", "null"):
                right = "a run that has not ended"
            name = f"pipeline: stage.json: {field or 'all'} {kind}"
            yield Situation(name, "pipeline", spoil, right)


def merge_situations() -> Iterator[Situation]:
    places = {
        "an input": "bert", "below an input": "bert/x", "another model": "llama",
        "below another model's place": "trained", "a file called encoder": "file",
        "another model called encoder": "mine", "a link to an input": "link",
        "its own result": "merged",
    }  # fmt: skip
    for kind, place in places.items():

        def spoil(folder, place=place):
            for name in ("trained", "mine", "file"):
                (folder / name).mkdir()
            tiny.save_bert(folder / "trained/encoder", layers=1, width=16)
            tiny.save_bert(folder / "mine/encoder", layers=1, width=16)
            (folder / "file/encoder").write_text("mine")
            (folder / "link").symlink_to("bert")
            if place == "merged":
                with redirect_stdout(StringIO()):
                    merge.main(["bert", "other", "--output_dir", place])
            return ["--output_dir", place]

        right = "is replaced" if place == "merged" else None
        yield Situation(f"merge: --output_dir is {kind}", "merge", spoil, right)
