"""Files of other people's model folders: what cannot be read is one sentence."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llme_jax.config.setting import WANTED
from llme_jax.errors import InputError

_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "truncate_dim"),
    *("original_max_position_embeddings", "global_attn_every_n_layers", "local_attention"),
    *("sliding_window", "sliding_window_pattern"),
}
_POINTER = b"version https://git-lfs"


def read_json(path: Path, kind: type = dict):
    """The object, or the list, in a JSON file.

    Raises:
        InputError: the file is missing, is a git-lfs pointer, or holds something else.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error}); copy the file again") from None
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(
            f"{path}: holds a {type(content).__name__} instead of {wanted}; copy the file again"
        )
    return content


def check_type(path: Path, name: str, value, wanted: type) -> None:
    """
    Raises:
        InputError: a field of a config.json is of another type (a whole number is a float too), is
            a size that no model has, or a rate or an epsilon outside 0 to 1.
    """
    allowed = (int, float) if wanted is float else (wanted,)
    if type(value) not in allowed:
        raise InputError(f"{path}: {name} is {json.dumps(value)}; give {WANTED[wanted]}")
    if wanted is float and not 0 <= value < 1:
        raise InputError(f"{path}: {name} is {value}; give a number from 0 to below 1")
    if name in _SIZES and not 0 < value < 2**31:
        raise InputError(f"{path}: {name} is {value}; give what the model has, 1 or more")


def check_object(path: Path, name: str, value) -> None:
    """
    Raises:
        InputError: a field holds something else than an object.
    """
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {json.dumps(value)}; give an object")


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
