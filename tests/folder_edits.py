"""Changes to the JSON files of a model folder, as people and other versions make them."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def edit(name: str, **changes):
    """Changes keys of a JSON file, or takes them away with DROP."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content = {k: v for k, v in (content | changes).items() if v is not DROP}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    return change


DROP = object()
BERT, POOLED = "sentence_bert_config.json", "1_Pooling/config.json"
MODEL, TOKENIZER = "config_sentence_transformers.json", "tokenizer_config.json"


def tally(check, cases: Iterable[tuple]) -> Counter:
    """How many cases `check(*case)` says to be `same` and `refused`; fails with all that differ."""
    seen, wrong = Counter(), []
    for case in cases:
        try:
            seen[check(*case)] += 1
        except Exception as error:  # one of another kind is as wrong as another number
            named = [part for part in case if not isinstance(part, Path)]
            wrong.append(f"{named}: {type(error).__name__} {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
    return seen


def older(**changes):
    """sentence_bert_config.json of versions before 6."""

    def change(folder: Path) -> None:
        content = {"max_seq_length": 40, "do_lower_case": False} | changes
        content = {k: v for k, v in content.items() if v is not DROP}
        (folder / BERT).write_text(json.dumps(content))

    return change


def pooled(*modes: str, **more):
    """1_Pooling/config.json of versions before 6."""
    names = "cls_token mean_tokens max_tokens lasttoken weightedmean_tokens".split()
    content = {"word_embedding_dimension": 32} | more
    content |= {f"pooling_mode_{name}": name in modes for name in names}
    return lambda folder: (folder / POOLED).write_text(json.dumps(content))


def modules(change):
    def apply(folder: Path) -> None:
        path = folder / "modules.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def tokenizer_file(**changes):
    return edit("tokenizer.json", **changes)


def also(*changes):
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def renamed(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)
