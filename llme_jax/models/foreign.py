"""Files of other people's model folders: what cannot be read is one sentence."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llme_jax.errors import InputError

_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, is a git-lfs pointer, or holds something else.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} instead of an object; copy the "
                         "file again")  # fmt: skip
    return content


def check_type(path: Path, name: str, value, wanted: type) -> None:
    """
    Raises:
        InputError: a field of a config.json is of another type; a whole number is a float too.
    """
    allowed = (int, float) if wanted is float else (wanted,)
    if type(value) not in allowed:
        kind = {int: "a whole number", float: "a number", str: "a text"}[wanted]
        raise InputError(f"{path}: {name} is {json.dumps(value)}; give {kind}")


def check_file(path: Path) -> None:
    """
    Raises:
        InputError: the file cannot be opened, or is a git-lfs pointer.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; copy the file again") from None
    if start == _POINTER:
        raise InputError(
            f"{path}: is a git-lfs pointer instead of the file; run git lfs pull in its folder, or "
            "download the file itself"
        )


def open_safetensors(path: Path):
    """The open file, memory-mapped.

    Raises:
        InputError: it is no safetensors file, or not a whole one.
    """
    check_file(path)
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
