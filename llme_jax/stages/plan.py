"""Which stages of a pipeline there are, what each depends on, and which are done.

A stage is named by content: its key is the hash of the settings that decide anything, of what they
read, and of the version of this package. What an earlier stage writes counts by that stage's key,
so that all keys are known before anything runs.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llme_jax.config import (
    Config,
    MergingConfig,
    NotBelow,
    PipelineConfig,
    RankConfig,
    RetrieveConfig,
    ScoreConfig,
    Stage,
    cli,
)
from llme_jax.config.identity import identity, name_of
from llme_jax.config.setting import PARTS, Groups, SettingError
from llme_jax.config.validate import (
    validate,
    validate_merging,
    validate_ranking,
    validate_retrieval,
    validate_scoring,
)
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest_file
from llme_jax.reports.record import RECORD, read_record
from llme_jax.sources.resolve import content_of, resolve_path

DECIDING = PARTS[:-1]  # what leaves the files of a stage as they are redoes none
OLD = "old"  # folder of what stages made with other settings
REPORTS = ("report.html", "report.md")
SMALL = 1 << 16  # bytes of a file whose content is noted, not its size alone
# Of what a stage makes: what no other one reads, and people may change or delete.
SPARE = re.compile(r"(.*/)?(state/.*|[^/]*\.parts/.*|\.lock|[^/]*\.(log|md|png))|stage\.json")
COMMANDS = {
    "train": (Config, validate),
    "retrieve": (RetrieveConfig, validate_retrieval),
    "rank": (RankConfig, validate_ranking),
    "score": (ScoreConfig, validate_scoring),
    "merge": (MergingConfig, validate_merging),
}


@dataclass
class Planned:
    """A stage that can be run.

    Attributes:
        settings: of its command.
        key: see the module.
        after: names of the stages whose files it reads.
        record: what its last run wrote down, of whatever key.
        changed: a file that this run made, and that is gone or another now.
    """

    stage: Stage
    folder: Path
    argv: list[str]
    settings: Groups
    key: str = ""
    after: list[str] = field(default_factory=list)
    record: dict = field(default_factory=dict)
    changed: str | None = None

    @property
    def shown(self) -> str:
        """What a person would type."""
        return f"python -m llme_jax.{self.stage.command} {shlex.join(self.argv)}"

    @property
    def begun(self) -> bool:
        """Whether its folder holds a run of this key, which the same command continues."""
        return self.record.get("key") == self.key

    @property
    def ended(self) -> bool:
        """Whether that run ended."""
        return self.begun and self.record["seconds"] is not None

    def done(self, others: dict[str, "Planned"]) -> bool:
        """Whether its last run ended, and read what the others have now."""
        made = {name: others[name].record.get("made") for name in self.after}
        return self.ended and not self.changed and (
            self.record["after"] == made and all(others[name].done(others) for name in self.after)
        )  # fmt: skip

    def read(self) -> None:
        self.record = read_record(self.folder)
        made = self.record.get("files", {}).items()
        self.changed = next((name for name, was in made if _fact(self.folder / name) != was), None)

    def made(self) -> dict[str, list | None]:
        """What tells the files in its folder from others, by their names."""
        files = (p for p in sorted(self.folder.rglob("*")) if p.is_symlink() or p.is_file())
        facts = {str(p.relative_to(self.folder)): p for p in files}
        return {name: _fact(p) for name, p in facts.items() if not SPARE.fullmatch(name)}

    def write(self, **changes) -> None:
        self.record |= changes
        with atomic_text(self.folder / RECORD) as file:
            file.write(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")


def plan(config: PipelineConfig) -> dict[str, Planned]:
    """The stages by name, in order, each checked as its command would check it.

    Raises:
        InputError: a stage has a flag or a value that its command refuses, or reads what no stage
            before it has written.
    """
    out = Path(config.pipeline.output_dir).expanduser()
    planned: dict[str, Planned] = {}
    for stage in _stages(config):
        _check_declared(stage, planned)
        folder = out / stage.name
        settings, check = COMMANDS[stage.command]
        try:
            argv = [*_words(stage), "--output_dir", str(folder)]
            parsed = cli.parse(argv, stage.command, "", settings)
            check(parsed)
            if stage.command != "merge" and parsed.planning.plan:
                raise InputError("--plan: makes nothing that a stage could be for, leave it out")
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None
        one = Planned(stage, folder, argv, parsed)
        one.read()
        facts = []
        for flag, value, kind in _read(parsed):
            producer = _producer(value, out)
            if producer and producer not in planned:
                raise InputError(
                    f"stage {stage.name}: --{flag} {value} is of stage {producer}, which does not "
                    "stand before it"
                )
            if producer:
                one.after += [producer] if producer not in one.after else []
                facts.append((flag, planned[producer].key))
            else:
                facts.append((flag, _content(value, kind)))
        one.key = name_of(identity(parsed, *DECIDING, command=stage.command, read=facts))
        planned[stage.name] = one
    return planned


def _words(stage: Stage) -> list[str]:
    try:
        return shlex.split(stage.words)
    except ValueError as error:
        raise InputError(
            f"'{stage.words}' cannot be split into words as in a shell ({error}): put values with "
            "a quotation mark through shlex.quote"
        ) from None


def _check_declared(stage: Stage, before: dict[str, Planned]) -> None:
    """Refuses what cannot be a stage behind those before it."""
    wrong = None
    if stage.name in before:
        wrong = "there are two, give each its own name"
    elif not re.fullmatch(r"\w[\w.-]*", stage.name) or stage.name in (OLD, *REPORTS):
        wrong = f"is no name for a folder of its own: letters and digits, and not {OLD}"
    elif stage.command not in COMMANDS:
        wrong = f"no command {stage.command}, there is {', '.join(COMMANDS)}"
    for gate in stage.gates:
        if isinstance(gate, NotBelow) and gate.than not in before:
            wrong = f"is compared with {gate.than}, which does not stand before it"
    if wrong:
        raise InputError(f"stage {stage.name}: {wrong}")


def _stages(config: PipelineConfig) -> list[Stage]:
    if not callable(config.stages):
        raise InputError(f"stages is {config.stages!r}: write a method that gives a list of Stage")
    try:
        stages = config.stages()
        if not isinstance(stages, list) or not all(isinstance(s, Stage) for s in stages):
            raise SettingError(f"stages gives {stages!r}: give a list of Stage")
        if not stages:
            raise SettingError("stages gives an empty list: give one Stage or more")
        return stages
    except Exception as error:
        if isinstance(error, InputError) and not isinstance(error, SettingError):
            raise
        path = Path(type(config).stages.__code__.co_filename)
        raise cli.wrong_experiment(error, path) from error


def missing_inputs(stages: list[Planned], out: Path) -> list[str]:
    """Data that stages read and that neither is there nor comes of a stage, a sentence each."""
    return [
        f"stage {one.stage.name}: --{flag} {value}: there is no such file"
        for one in stages
        for flag, value, kind in _read(one.settings)
        if kind == "data" and not _producer(value, out) and _content(value, kind) is None
    ]


def _read(settings: Groups) -> Iterator[tuple[str, str, str]]:
    """Flag, value and kind of everything that a command reads; names of data as paths."""
    flat = settings.flat()
    root = flat.get("data_root", "")
    for group, f, declared in settings.declared():
        value = getattr(group, f.name)
        if declared.reads is None or value is None:
            continue
        for name in value if isinstance(value, list) else [value]:
            path = resolve_path(name, root) if declared.reads == "data" else name
            yield f.name, path, declared.reads


def _producer(value: str, out: Path) -> str | None:
    """The stage in whose folder a path lies."""
    path, base = (os.path.abspath(os.path.expanduser(p)) for p in (value, out))
    inside = path.startswith(base + os.sep)
    return os.path.relpath(path, base).split(os.sep)[0] if inside else None


def _content(value: str, kind: str) -> str | None:
    """What changes when the data or the model behind a name does; None where nothing is there."""
    found = content_of(value)
    return value if found is None and kind == "model" else found  # of the Hub


def _fact(path: Path) -> list[int | str] | None:
    """What changes when a file does: its size, and its content where that is small.

    None of a link that leads somewhere: copies of the folder may hold what it leads to.
    """
    if path.is_dir():
        return None
    if not path.is_file():
        return []
    size = path.stat().st_size
    return [size, digest_file(path)] if size <= SMALL else [size]
