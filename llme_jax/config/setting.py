"""What a setting is: its type, default and help, and which values it takes, where it is declared.

Settings live in groups that commands share; names are unique across the groups of a command, so
each is also a flag (`--max_steps 2000`). A group never holds a value that its declaration refuses.
"""

import ctypes
import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache
from inspect import get_annotations
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin

from llme_jax.errors import InputError
from llme_jax.files.storage import in_bucket

LARGEST_INT = 2**31 - 1  # what arrays on a device count with
LARGEST_FLOAT = 3.4028234663852886e38  # of float32
LONGEST_NAME = 100  # bytes of a part of a file's name, which may have 255
# What results are made of, in order: what a setting decides is the first of these that changes.
PARTS = ("queries", "keys", "texts", "vectors", "hits", "scores", "weights", "files", "nothing")
WANTED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class SettingError(InputError):
    """A name or a value that a group of settings refuses."""


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting beside its name, type and default.

    Attributes:
        help: a phrase for `--help`.
        decides: the first thing that changes with it: tokens of the queries, of the keys, or of
            both (texts); their vectors; hits; scores of pairs and answers; trained weights; only
            what is written of them (files); nothing but speed, places and what is shown. What is
            kept for later runs is named by it, see `identity`. One that is shared decides several.
        unit: what its values are, as `--help` shows it: TOKENS, FILE.
        choices: the only values, or the only entries of a list. A `Literal` type has its own.
        least, above, most, below: of numbers, or of each entry of a list.
        remedies: for values that people try and that are refused, what to do instead.
        out_of_range: what to say instead of the range.
        local: a path of this machine, never in a bucket.
        may_change: a run that is continued may have another value: it does not change what is
            trained, or, like the number of devices, only by rounding.
        per_host: each host of a run may have its own value.
        in_name: a part of a file's name.
        reads: names a file, a folder or a model that the command reads; a stage of a pipeline is
            done again when the content changes.
    """

    help: str
    decides: tuple[str, ...]
    unit: str | None = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    remedies: tuple[tuple[str, str], ...] = ()
    out_of_range: str | None = None
    local: bool = False
    may_change: bool = False
    per_host: bool = False
    in_name: bool = False
    reads: Literal["data", "model"] | None = None


def setting(default, help: str, *, decides: str | tuple[str, ...], **rules) -> Any:
    """A dataclass field that is declared with `Setting(help, decides, **rules)`.

    Raises:
        ValueError: it decides what nobody knows.
    """
    decides = (decides,) if isinstance(decides, str) else decides
    if not decides or {*decides} - {*PARTS}:
        raise ValueError(f"decides={decides}: choose from {', '.join(PARTS)}")
    metadata = {"setting": Setting(help, decides, **rules)}
    if isinstance(default, list):  # copied for every instance
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Kind:
    """The type of a setting, taken apart.

    Attributes:
        base: int, float, str or bool; of a list, that of its entries.
        is_list, optional: whether it is a list; whether None is a value.
        takes_lists: whether it is a list, or one value or a list of several.
        literals: the only values of a `Literal` type.
    """

    def __init__(self, annotation):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        self.optional, more = NoneType in get_args(annotation), []
        if self.optional:
            annotation, *more = parts
        self.is_list = get_origin(annotation) is list
        self.takes_lists = self.is_list or more == [list[annotation]]
        if self.is_list:
            (annotation,) = get_args(annotation)
        is_literal = get_origin(annotation) is Literal
        self.literals: tuple[str, ...] = get_args(annotation) if is_literal else ()
        self.base: type = str if is_literal else annotation


kind_of = cache(Kind)


class Group:
    """Settings that belong together; subclasses are dataclasses whose fields are `setting(...)`."""

    title: ClassVar[str]  # above them in --help

    def __setattr__(self, name: str, value) -> None:
        """
        Raises:
            SettingError: there is no such setting, or it cannot have this value.
        """
        declared = self.__dataclass_fields__.get(name)
        if declared is None:
            raise SettingError(unknown(f"the group {self.title}", name, _names(self)))
        check(declared, value)
        kind = kind_of(declared.type)
        if kind.takes_lists and not kind.is_list and isinstance(value, list) and len(value) < 2:
            value = value[0] if value else None  # of one or several values, one is no list
        super().__setattr__(name, value)


class Groups:
    """Settings of a command, in groups."""

    def __setattr__(self, name: str, value) -> None:
        """
        Raises:
            SettingError: there is no such group.
        """
        declared = self.__dataclass_fields__.get(name)
        if declared is None:
            raise SettingError(unknown(type(self).__name__, name, _names(self)))
        if not isinstance(value, declared.type):
            raise SettingError(f"{name} is {value!r}: give a {declared.type.__name__}")
        super().__setattr__(name, value)

    def groups(self) -> list[Group]:
        return [getattr(self, f.name) for f in fields(self)]

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag name."""
        return {name: value for group in self.groups() for name, value in asdict(group).items()}

    def declared(self) -> Iterator[tuple[Group, Field, Setting]]:
        """Every setting: its group, its field, and what is declared of it."""
        for group in self.groups():
            for f in fields(group):
                yield group, f, f.metadata["setting"]

    def names(self, rule: str) -> set[str]:
        """The settings for which a rule of `Setting` holds, as `local`."""
        return {f.name for _, f, declared in self.declared() if getattr(declared, rule)}

    def take_over(self, other: "Groups") -> None:
        """Takes the values of another command that are not its defaults.

        Only those of the same declaration: `key_max_length` of an encoder is none of a language
        model's. Nor a list where this command takes one value: a flag says which.
        """
        mine = {_origin(group, f.name): group for group, f, _ in self.declared()}
        for group, f, _ in other.declared():
            value = getattr(group, f.name)
            if value == _default(f) or (taker := mine.get(_origin(group, f.name))) is None:
                continue
            kind = kind_of(taker.__dataclass_fields__[f.name].type)
            if kind.takes_lists or not isinstance(value, list):
                setattr(taker, f.name, value)


def check(declared: Field, value) -> None:
    """Refuses a value that a setting cannot have.

    Raises:
        SettingError: names setting, value and remedy.
    """
    kind, rules = kind_of(declared.type), declared.metadata["setting"]
    if value is None and kind.optional:
        return
    if kind.is_list and not isinstance(value, list):
        raise SettingError(f"--{declared.name} {value!r}: give a list, as in [{value!r}]")
    for entry in value if kind.takes_lists and isinstance(value, list) else [value]:
        if remedy := _refused(kind, rules, entry):
            shown = entry if entry != "" else "''"
            raise SettingError(f"--{declared.name} {shown}: {remedy}")


def _refused(kind: Kind, rules: Setting, value) -> str | None:
    """What to do instead of giving this value; None when it is right."""
    types = (int, float) if kind.base is float else kind.base
    if not isinstance(value, types) or (isinstance(value, bool) and kind.base is not bool):
        return f"give {WANTED[kind.base]}"
    if isinstance(value, str) and "\0" in value:
        return "give a text without a zero byte"
    if value == "" and rules.unit == "FOLDER":  # such as "$OUT", which is not set
        return "is empty, . is this folder"
    if value in dict(rules.remedies):
        return dict(rules.remedies)[value]
    choices = kind.literals or rules.choices
    if choices and value not in choices:
        return f"choose from {', '.join(choices)}"
    if rules.in_name and not _is_name(value):
        return f"give a name without /, of {LONGEST_NAME} bytes or less"
    if rules.local and in_bucket(value):
        return "give a path of this machine, it cannot be in a bucket"
    return _out_of_range(kind, rules, value) if kind.base in (int, float) else None


def _is_name(value: str) -> bool:
    leaves = value in (".", "..") or "/" in value or "\0" in value
    return not leaves and len(value.encode()) <= LONGEST_NAME


def _out_of_range(kind: Kind, rules: Setting, value: float) -> str | None:
    if kind.base is int:
        most = LARGEST_INT if rules.most is None else rules.most
        if rules.most is None and value > most:
            return f"give {most} or less"
    else:
        most = math.inf if rules.most is None else rules.most
        if not abs(value) <= LARGEST_FLOAT:  # nan is not
            limits = _limits(rules)
            return "give a finite number" + (f", {limits}" if limits else "")
        value = ctypes.c_float(value).value  # as the devices see it: 1e-50 is 0
    inside = (
        (rules.least is None or value >= rules.least)
        and (rules.above is None or value > rules.above)
        and value <= most
        and (rules.below is None or value < rules.below)
    )
    return None if inside else rules.out_of_range or f"give {_limits(rules)}"


def _limits(rules: Setting) -> str:
    if rules.least is not None and rules.most is not None:
        return f"{rules.least} to {rules.most}"
    parts = []
    if rules.above is not None:
        parts.append(f"a value above {rules.above}")
    if rules.least is not None:
        parts.append(f"{rules.least} or more")
    if rules.below is not None:
        parts.append(f"less than {rules.below}")
    return ", ".join(parts)


def _names(settings: Group | Groups) -> list[str]:
    return [f.name for f in fields(settings)]


def unknown(place: str, name: str, known: Collection[str]) -> str:
    """What an error says of a setting that is none of those known."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
    return f"{place} has no {name}: {hint}"


def _origin(group: Group, name: str) -> tuple[type, str]:
    """The class that declares a setting first, from which others inherit it."""
    first = next(c for c in reversed(type(group).__mro__) if name in get_annotations(c))
    return first, name


def as_list(value: str | list[str] | None) -> list[str]:
    """The values of a setting that takes one or several."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _default(f: Field):
    return f.default if f.default_factory is MISSING else f.default_factory()


def depth(group: Group, name: str) -> int:
    """How far down in the group's inheritance a setting is declared first."""
    return type(group).__mro__[::-1].index(_origin(group, name)[0])
