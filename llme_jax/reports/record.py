"""What a stage of a pipeline writes down about its last run."""

import json
from pathlib import Path

RECORD = "stage.json"  # in the stage's folder


def read_record(folder: Path) -> dict:
    """The record in a stage's folder; empty where there was no run."""
    record = read_json(folder / RECORD)
    return record if isinstance(record, dict) else {}


def read_json(path: Path):
    """A JSON file's value; an empty dict where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def first_json(folder: Path, pattern: str) -> dict:
    """The value of the first file with such a name; empty where there is none."""
    files = sorted(folder.glob(pattern))
    return read_json(files[0]) if files else {}
