"""README.md of a trained model: what it was trained on, what it scores, how to use it."""

import re
from dataclasses import fields
from pathlib import Path

from llme_jax.config import Config, RankConfig
from llme_jax.config.setting import Group, as_list
from llme_jax.data.train_data import TrainData
from llme_jax.training.hub import place_in_repo
from llme_jax.training.task import Task

MARK = "<!-- Written by llme_jax. Without this line it is yours, and is left as it is. -->"
# How each exported folder is used; one of another task has no card.
USE = {
    "ranker": """from sentence_transformers import CrossEncoder

model = CrossEncoder("{folder}")
scores = model.predict([("a query", "a passage")])""",
    "encoder": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
queries = model.encode_query(["a query"])
passages = model.encode_document(["a passage", "another one"])
print(model.similarity(queries, passages))""",
}
USE |= dict.fromkeys(("query_encoder", "key_encoder"), USE["encoder"])


def write_cards(
    checkpoint: Path,
    config: Config | RankConfig,
    task: Task,
    data: TrainData,
    global_batch: int,
    lines: list[dict],
) -> None:
    """Writes a README.md into each folder that a checkpoint exports; one of a person is kept.

    Args:
        lines: of metrics.jsonl, up to the checkpoint's step.
    """
    for name in filter(USE.get, task.exports):
        path = checkpoint / name / "README.md"
        if path.exists() and MARK not in path.read_text(errors="replace"):
            continue
        path.write_text(_card(name, path.parent, config, task, data, global_batch, lines))


def _card(name: str, folder: Path, config, task: Task, data: TrainData, batch: int, lines) -> str:
    settings = config.flat()
    base = settings[name if name in settings else "query_encoder"]
    licence = base_licence(base)
    base = _named(base)
    if teacher := settings.get("teacher_encoder"):
        settings["teacher_encoder"] = _named(teacher)
    repo, where = settings["push_to_hub"], folder
    if repo and not place_in_repo(name):
        where = repo  # at the top, from where it opens by its name
    step = int(folder.parent.name.removeprefix("checkpoint-"))
    head = ["---", "library_name: sentence-transformers", f"base_model: {base}"]
    head += [f"license: {licence}"] if licence else []
    files = "\n".join(
        f"| {name} | {of or ''} | {rows} |"
        for name, of, rows in zip(data.names, data.tasks, data.sizes, strict=True)
    )
    return f"""{chr(10).join(head)}
---
{MARK}

# A {"reranker" if name == "ranker" else "retriever"} made from {base}

Fine-tuned with llme_jax: step {step}, batches of {batch} queries.

## Trained on

| file | task | rows |
|---|---|---|
{files}

Loss: {_listed(config.loss, settings)}.
Data: {_listed(config.data, settings)}.
Optimizer: AdamW; {_listed(config.training, settings)}.

## Measured

{_metrics(lines, step, settings)}

## How to use it

```python
{USE[name].format(folder=where)}
```

Queries were cut at {settings["query_max_length"]} tokens, keys at {settings["key_max_length"]}. \
`python -m llme_jax.{"rank" if name == "ranker" else "retrieve"} {task.flag} {where}` uses it here.

## Licence

{f"The base model has {licence}" if licence else f"See the base model, {base}"}; what it was \
trained on may ask for more.
"""


def _named(model: str) -> str:
    """A name of the Hub, or that of a folder: where it lies means nothing elsewhere."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _listed(group: Group, settings: dict) -> str:
    """The settings of a group that decide what was learnt."""
    declared = {f.name: f.metadata["setting"] for f in fields(group)}
    names = [n for n, s in declared.items() if "weights" in s.decides and s.reads != "data"]
    values = {name: settings[name] for name in names if settings.get(name) is not None}
    shown = {n: " ".join(map(str, v)) if isinstance(v, list) else v for n, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _metrics(lines: list[dict], step: int, settings: dict) -> str:
    """The table of the checkpoint's evaluation, beside that of the untrained model."""
    evaluations = {
        line["step"]: line for line in lines if any(name.startswith("eval_") for name in line)
    }
    now, before = evaluations.get(step), evaluations.get(0)
    if now is None:
        return "Nothing was evaluated while it was trained."
    rows = ["| metric | untrained | this model |", "|---|---|---|"]
    for name, value in now.items():
        if name.startswith("eval_"):
            first = f"{before[name]:.4f}" if before and name in before else "not measured"
            rows.append(f"| {name.removeprefix('eval_')} | {first} | {value:.4f} |")
    sets, corpora = (as_list(settings.get(name)) for name in ("eval_data", "corpus"))
    corpus = f", passages {', '.join(corpora)}" if corpora else ""
    mean = "; without the name of a set, the mean" if any("/" in name for name in now) else ""
    return f"On {', '.join(sets)}{corpus}{mean}:\n\n" + "\n".join(rows)


def base_licence(base: str) -> str | None:
    """What the base's own card says, where it is a folder here that has one."""
    card = Path(base).expanduser() / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = re.search(r"^license:\s*(\S+)\s*$", head[1], re.M) if head else None
    return found[1] if found else None
