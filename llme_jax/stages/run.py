"""A pipeline, from its stages to its report: each is a process, and is not done twice."""

import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import datetime
from functools import partial
from pathlib import Path

from llme_jax.config import PipelineConfig
from llme_jax.config.pipeline import WhichConfig
from llme_jax.config.validate import measured
from llme_jax.errors import InputError
from llme_jax.files.lock import end_with_parent, locked
from llme_jax.files.storage import check_writable
from llme_jax.stages.gates import check
from llme_jax.stages.plan import OLD, Planned, missing_inputs, plan


def run(config: PipelineConfig) -> int:
    """Returns the exit code: that of the stage that failed, 1 where a gate is shut.

    Raises:
        InputError: the stages cannot be run as they are; before any is.
    """
    out = Path(config.pipeline.output_dir).expanduser()
    stages = plan(config)
    _check_metric(config.pipeline.metric, stages)
    wanted = _wanted(config.which, stages)
    if config.which.dry_run:
        _show(stages, wanted)
        return 0
    check_writable("--output_dir", out)
    for name in wanted:
        _check_ready(stages[name], stages, wanted)
    if missing := missing_inputs([stages[name] for name in wanted], out):
        raise InputError(missing[0])
    with locked(out) as lock:
        for one in stages.values():  # another run may have ended since
            one.read()
        for name in config.which.force or []:
            _put_away(stages[name], out)
        code = _run_all(config, stages, wanted, out, lock)
        _report(config, [one for one in stages.values() if one.done(stages)], out)
    return code


def _check_metric(metric: str | None, stages: dict[str, Planned]) -> None:
    """Refuses a metric that no stage measures."""
    evaluations = [
        one.settings.evaluation for one in stages.values() if one.settings.flat().get("eval_data")
    ]
    names = {
        name: None for evaluation in evaluations if evaluation for name in measured(evaluation)
    }
    if metric and metric not in names:
        raise InputError(f"--metric {metric}: no stage measures it, only {', '.join(names)}")


def _report(config: PipelineConfig, done: list[Planned], out: Path) -> None:
    """The report of these stages; it never hides how they ended."""
    # Only now: it loads jax, whose threads a process had better not have when it forks.
    from llme_jax.reports.compose import write_report

    try:
        write_report([str(one.folder) for one in done], out, metric=config.pipeline.metric)
    except InputError as error:
        print(f"no report: {error}", file=sys.stderr)


def _wanted(which: WhichConfig, stages: dict[str, Planned]) -> list[str]:
    """The stages that are asked for, in order.

    Raises:
        InputError: there is no such stage.
    """
    for flag, names in (
        ("only", which.only),
        ("from", which.from_ and [which.from_]),
        ("until", which.until and [which.until]),
        ("force", which.force),
    ):
        for name in names or []:
            if name not in stages:
                raise InputError(f"--{flag} {name}: there is no such stage, only "
                                 f"{', '.join(stages)}")  # fmt: skip
    if which.only and (which.from_ or which.until):
        raise InputError("--only says it all: leave out --from and --until")
    names = list(stages)
    first = names.index(which.from_) if which.from_ else 0
    last = names.index(which.until) if which.until else len(names) - 1
    if last < first:
        raise InputError(f"--until {which.until} stands before --from {which.from_}")
    return [n for n in names[first : last + 1] if not which.only or n in which.only]


def _show(stages: dict[str, Planned], wanted: list[str]) -> None:
    for name in wanted:
        one = stages[name]
        state = (
            "done" if one.done(stages) else "begun" if one.begun and not one.changed else "to do"
        )
        behind = f", after {', '.join(one.after)}" if one.after else ""
        print(f"# {name}: {state}{behind}\n{one.shown}\n")


def _run_all(
    config: PipelineConfig, stages: dict[str, Planned], wanted: list[str], out: Path, lock: int
) -> int:
    for number, name in enumerate(wanted, 1):
        one = stages[name]
        where = f"[{number}/{len(wanted)}] {name}"
        if one.done(stages):
            print(f"{where}: done already", flush=True)
        else:
            code = _run_one(one, stages, out, lock, where)
            if code:
                return code
        if not _gates_open(one, stages, config.which.keep_going or config.pipeline.trial):
            return 1
    return 0


def _check_ready(one: Planned, stages: dict[str, Planned], wanted: list[str]) -> None:
    for name in one.after:
        if name not in wanted and not stages[name].done(stages):
            raise InputError(
                f"stage {one.stage.name} reads what {name} makes, which is not done: leave out "
                "--only and --from, or do that one first"
            )


def _run_one(one: Planned, stages: dict[str, Planned], out: Path, lock: int, where: str) -> int:
    made = {name: stages[name].record["made"] for name in one.after}
    if one.ended and one.changed:
        print(f"{where}: {one.changed} of what it has made is gone or another", flush=True)
    if not one.begun or one.ended or one.record["after"] != made:
        _put_away(one, out)
        one.folder.mkdir(parents=True, exist_ok=True)
        one.record = {}
        one.write(
            key=one.key,
            made=uuid.uuid4().hex,
            after=made,
            command=one.shown,
            number=[*stages].index(one.stage.name),
            baseline=one.stage.baseline,
            begun=_now(),
            spent=0.0,
            seconds=None,
        )
    print(f"{where}: {one.shown}", flush=True)
    since = time.monotonic()
    before = one.record["spent"]
    process = subprocess.Popen(
        [sys.executable, "-m", f"llme_jax.{one.stage.command}", *one.argv],
        pass_fds=[lock],
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    with _handing_on(process):
        code = process.wait()
    spent = before + time.monotonic() - since
    if code == 0:
        one.write(spent=spent, seconds=round(spent, 1), ended=_now(), files=one.made())
    else:
        one.write(spent=spent)
        if code < 0:
            code = 128 - code
        print(f"{where}: stopped with exit code {code}; the same command goes on from here",
              file=sys.stderr)  # fmt: skip
    return code


class _handing_on:
    """SIGTERM to the pipeline goes to the stage, which saves and leaves."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def __enter__(self) -> None:
        self._before = signal.signal(
            signal.SIGTERM, lambda *_: self._process.send_signal(signal.SIGTERM)
        )

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._process.poll() is None:  # an error or Ctrl-C here
            self._process.terminate()
            self._process.wait()


def _gates_open(one: Planned, stages: dict[str, Planned], keep_going: bool) -> bool:
    """Checks and notes what must hold behind a stage."""
    outcomes = [check(gate, one, stages) for gate in one.stage.gates]
    found = [{"open": is_open, "found": said} for is_open, said in outcomes]
    if found != one.record.get("gates", []):
        one.write(gates=found)
    shut = [said for is_open, said in outcomes if not is_open]
    for said in shut:
        how = "going on all the same" if keep_going else "--keep_going goes on all the same"
        print(f"stage {one.stage.name}: {said} ({how})", file=sys.stderr, flush=True)
    return not shut or keep_going


def _put_away(one: Planned, out: Path) -> None:
    """What a stage made with other settings or inputs is kept, where nothing reads it."""
    if one.folder.exists():
        kept = out / OLD / f"{one.stage.name}.{uuid.uuid4().hex[:8]}"
        kept.parent.mkdir(exist_ok=True)
        os.rename(one.folder, kept)
        print(f"{one.stage.name}: what was there is now in {kept}", flush=True)
    one.record = {}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
