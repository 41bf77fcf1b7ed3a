"""JSON files that runs leave, read back and checked; what a pipeline notes of a stage."""

import json
from pathlib import Path
from types import NoneType

from llme_jax.config.setting import LARGEST_FLOAT
from llme_jax.data.rows import shown
from llme_jax.errors import InputError

RECORD = "stage.json"  # in the stage's folder
STAGE = {
    "key": str, "made": str, "after": {"*": str}, "command": str, "number": int, "baseline": bool,
    "spent": float, "seconds": (float, NoneType), "gates?": [{"open": bool, "found": str}],
    "files?": {"*": ([(int, str)], NoneType)},
}  # fmt: skip


def read_record(folder: Path) -> dict:
    """The record in a stage's folder; empty where there was no run."""
    return read_json(folder / RECORD, STAGE)


def read_json(path: Path, shape) -> dict:
    """What a run has written; an empty dict where there is no file.

    Args:
        shape: see `wrong`.

    Raises:
        InputError: it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a pair of surrogates cannot be shown
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        said = f"cannot be read ({error})"
    else:
        said = wrong(value, shape)
    if said:
        raise InputError(f"{path}: {said}: put back what the run wrote, or delete it and run again")
    return value


def wrong(value, shape, name: str = "") -> str | None:
    """What a value has that its shape has not, as "seconds is null"; None where all fits.

    Args:
        shape: a type; a tuple of shapes, one of which fits; [shape] of a list's items; {name:
            shape} of an object's fields, "name?" of one that may be missing, "*" of any.
    """
    parts = None
    if isinstance(shape, tuple):
        if not all(wrong(value, one, name) for one in shape):
            return None
    elif isinstance(shape, list) and isinstance(value, list):
        parts = [(v, shape[0], f"{name}[{i}]") for i, v in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        parts = [
            (value.get(n), one, f"{name}.{n}".lstrip("."))
            for key, one in shape.items()
            for n in (value if key == "*" else [key.rstrip("?")])
            if n in value or not key.endswith("?")
        ]
    elif shape is float and type(value) in (int, float):
        if abs(value) <= LARGEST_FLOAT:  # nan is not
            return None
    elif type(value) is shape:
        return None
    if parts is None:
        return f"{name or 'it'} is {shown(value)}"
    return next(filter(None, (wrong(*part) for part in parts)), None)
