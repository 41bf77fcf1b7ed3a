"""The command line: an experiment file, flags on top of it, errors in one sentence."""

import argparse
import difflib
import errno
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import Field, fields
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from llme_jax.config.commands import Config, RankConfig
from llme_jax.config.pipeline import PipelineConfig
from llme_jax.config.setting import Group, Groups, Setting, SettingError, depth, kind_of
from llme_jax.errors import InputError, RunError

# Flags of the reference (or of the Hugging Face trainer) that mean nothing here.
REFUSED = {
    "deepspeed": "use --fsdp N to spread parameters and optimizer state over N devices",
    "ddp_find_unused_parameters": "leave it out, gradients are exact without it",
    "fp16": "use --dtype bf16 (or fp32); weights are kept in fp32",
    "bf16": "use --dtype bf16",
    "cpu": "set the environment variable JAX_PLATFORMS=cpu",
    "local_rank": "leave it out, one process drives all devices of its host",
    "dataloader_num_workers": "leave it out, batches come from the token store",
    "evaluation_strategy": "leave it out, --eval_data is evaluated every --eval_steps",
    "eval_strategy": "leave it out, --eval_data is evaluated every --eval_steps",
    "overwrite_output_dir": "give another --output_dir, or delete the folder yourself",
    "resume_from_checkpoint": "leave it out, the same command resumes by itself",
    "remove_unused_columns": "leave it out",
    "padding_side": "leave it out, padding changes no score",
    "add_position_ids": "leave it out, positions count from the first token",
    "lm_device_map": "use --tensor N to spread the model over N devices",
    "anserini_dir": "leave it out, pip install 'llme_jax[bm25]' brings Lucene",
    "storeDocvectors": "leave it out, nothing reads document vectors",
    "load_collection": "leave it out, Lucene's index is kept for the same corpus",
    "eos_token_id": "leave it out, what is written ends at a newline whatever token holds it",
    "num_return_sequences": "leave it out, one answer is written for each question",
    "chunk_batch_size": "use --lm_batch_size",
    "load_prev_result": "leave it out, the same command goes on by itself",
}
# What experiment files are of, and the command that trains it.
EXPERIMENTS = {
    Config: "llme_jax.train",
    RankConfig: "llme_jax.rank",
    PipelineConfig: "llme_jax.pipeline",
}


def parse(
    argv: list[str],
    command: str,
    description: str,
    settings: type[Groups] = Config,
    start: Groups | None = None,
) -> Groups:
    """The settings of a run: defaults, then the file of `--config`, then the other flags.

    Args:
        settings: the command's groups; of what an experiment file sets it takes what it knows.
        start: what the defaults are; those that are declared when None.

    Raises:
        InputError: an unknown flag, a value that a setting refuses, a config that cannot be found
            or does not work.
    """
    experiment, argv = _take("config", argv)
    config = start or settings()
    if experiment:
        loaded = load_config(experiment, settings)
        if isinstance(loaded, settings):
            config = loaded
        else:
            config.take_over(loaded)
    parser = Parser(
        prog=f"python -m llme_jax.{command}",
        usage="%(prog)s [--config FILE.py[:ARG]] [--flag value ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.py[:ARG]",
        help="Experiment file: as given, in ./configs, or one of the installed ones "
        f"({', '.join(installed_configs())}); ARG is handed to its get_config.",
    )
    for group in config.groups():
        _add_group(parser, group)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown_flag(unknown[0], config))
    for group, f, _ in config.declared():
        setattr(group, f.name, getattr(given, f.name))
    return config


def names_in_front(argv: list[str], flag: str) -> list[str]:
    """The command line with the words in front of the first flag behind `--{flag}`.

    Raises:
        InputError: that flag is given as well.
    """
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    if names and any(word.split("=")[0] in _spellings(flag) for word in argv):
        raise InputError(f"'{names[0]}' and --{flag}: name the files in one of the two ways")
    return [*argv[len(names) :], f"--{flag}", *names] if names else argv


class Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse names both spellings, `argument --max_steps/--max-steps: ...`.
        raise InputError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag, and what kind of value it takes."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _format_action_invocation(self, action):
        kind = "" if action.nargs == 0 else action.metavar
        spelling = max(action.option_strings, key=len)  # the first of those as long: underscores
        return f"{spelling} {kind}".rstrip()


def _add_group(parser: argparse.ArgumentParser, group: Group) -> None:
    """A flag for each setting; those that the group has of its own come first."""
    shown = parser.add_argument_group(group.title)
    for f in sorted(fields(group), key=lambda f: -depth(group, f.name)):
        name, kind, value = f.name, kind_of(f.type), getattr(group, f.name)
        how = {"dest": name, "default": value, "metavar": _values(f), "help": _help(f, value)}
        if kind.base is bool:
            how |= {"type": _truth, "nargs": "?", "const": True}
        else:
            how |= {"type": kind.base, "nargs": "+" if kind.takes_lists else None}
        if kind.literals:
            how["choices"] = kind.literals
        shown.add_argument(*_spellings(name), **how)
        if f.default is True:  # `--name false` says the same
            no = {"action": "store_false", "dest": name, "default": value}
            shown.add_argument(*_spellings(f"no_{name}"), **no, help=argparse.SUPPRESS)


def _spellings(name: str) -> list[str]:
    name = name.rstrip("_")  # which only keeps a setting apart from a word of Python
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _truth(word: str) -> bool:
    words = {
        **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
        **dict.fromkeys(("false", "no", "f", "n", "0"), False),
    }
    if word.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{word}' is neither true nor false")
    return words[word.lower()]


def _values(f: Field) -> str:
    """What a setting takes, as `--help` shows it."""
    kind, declared = kind_of(f.type), f.metadata["setting"]
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false"}
    choices = kind.literals or declared.choices
    shown = "|".join(choices) if choices else declared.unit or names[kind.base]
    return f"{shown} ..." if kind.takes_lists else shown


def _help(f: Field, value) -> str:
    declared: Setting = f.metadata["setting"]
    said = declared.help
    if value is not None:
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        said += f" (default: {shown.lower() if isinstance(value, bool) else shown})"
    return said.replace("%", "%%")


def value_of(flag: str, argv: list[str]) -> str | None:
    """What a flag is given, looked up before all others; whether that is right comes out later."""
    return _take(flag, argv)[0]


def _take(flag: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the rest of the command line."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{flag}", dest="value")
    known, rest = first.parse_known_args(argv)
    return known.value, rest


def _unknown_flag(argument: str, config: Groups) -> str:
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    if not argument.startswith("-"):
        return f"'{argument}' belongs to no flag: values follow the flag they are for"
    if name in REFUSED:
        return f"--{name} has no meaning here: {REFUSED[name]}"
    close = difflib.get_close_matches(name, [*config.flat(), "config"], n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --help for all flags"
    return f"unknown flag {argument.split('=')[0]}: {hint}"


def config_folders() -> list[Path]:
    """Where experiment files are looked up, first to last."""
    package = Path(__file__).parents[1]
    # `configs` lies beside the package in a checkout and inside it once installed.
    return [Path("configs"), package / "configs", package.parent / "configs"]


def installed_configs() -> list[str]:
    names = {path.name for folder in config_folders() for path in folder.glob("[a-z]*.py")}
    return sorted(names)


def load_config(
    experiment: str, wanted: type[Groups] = Config
) -> Config | RankConfig | PipelineConfig:
    """Runs `get_config(arg)` of the experiment file named by `FILE.py` or `FILE.py:ARG`.

    Args:
        wanted: the settings that take it over; a command that trains trains its own experiments.

    Raises:
        InputError: there is no such file, or it does not give a Config; names its line.
    """
    name, _, arg = experiment.partition(":")
    candidates = [Path(name), *(folder / name for folder in config_folders())]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        close = difflib.get_close_matches(name, installed_configs(), n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"there is {', '.join(installed_configs())}"
        )
        raise InputError(f"--config {name}: no such file here or in ./configs; {hint}")
    if path.suffix != ".py":
        raise InputError(f"--config {name}: is no experiment file, which ends in .py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path}: has no get_config(arg), write one that returns a Config")
        config = module.get_config(arg or None)
    except Exception as error:
        if isinstance(error, InputError | RunError) and not isinstance(error, SettingError):
            raise
        raise wrong_experiment(error, path) from error
    kind = next((kind for kind in EXPERIMENTS if isinstance(config, kind)), None)
    if kind is None:
        raise InputError(
            f"{path}: get_config has to return a Config, RankConfig or PipelineConfig of "
            "llme_jax.config"
        )
    if kind is not wanted and (wanted in EXPERIMENTS or kind is PipelineConfig):
        raise InputError(f"--config {name}: is for python -m {EXPERIMENTS[kind]}")
    return config


def wrong_experiment(error: Exception, path: Path) -> InputError:
    """What went wrong in an experiment file, in one sentence."""
    if isinstance(error, SettingError):
        return InputError(f"{path}:{_line(error, path)}: {error}")
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return InputError(
        f"{path}:{_line(error, path)}: {reason}{_nearest(error)}: correct the experiment file"
    )


def _line(error: Exception, path: Path) -> int:
    """Where in an experiment file an error comes from."""
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == str(path.absolute())), 1)


def _nearest(error: Exception) -> str:
    """For a name that does not exist, the one that was meant."""
    if not isinstance(error, AttributeError) or error.name is None:
        return ""
    close = difflib.get_close_matches(error.name, dir(error.obj), n=1)
    return f", did you mean {close[0]}?" if close else ""


# What a disk says of a name that it does not take, wherever it comes up.
_REFUSED = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP}


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command: exit code 2 and one sentence when the user's input is at fault."""
    import numpy  # noqa: F401, jaxlib crashes when it is interrupted while it does this

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and & do
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    try:
        code = main(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        _leave()
    except BrokenPipeError:  # as behind `| head`
        print("error: nobody reads what is printed any more", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed at the end
        code = 1
    except Exception as error:
        if _interrupt.pressed:  # compiled modules that are being imported raise something else
            _leave()
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
            print(f"error: {error.filename}: {error.strerror}: give another", file=sys.stderr)
            sys.exit(2)
        if not _disk_is_full(error):
            raise
        sys.unraisablehook = lambda _: None  # what else was being written says so at the end
        place = f" ({name})" if (name := getattr(error, "filename", None)) else ""
        print(
            f"error: the disk is full{place}, or what you or one file may take of it (ulimit -f): "
            "free some space and give the same command again",
            file=sys.stderr,
        )
        code = 1
    sys.exit(code)


def _interrupt(*signal_and_frame) -> None:
    _interrupt.pressed = True
    signal.default_int_handler(*signal_and_frame)


_interrupt.pressed = False


def _unraisable(error) -> None:
    """Ctrl-C comes again where Python has dropped its exception, as in the garbage collector."""
    if issubclass(error.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif str(error.exc_value) != "Event loop is closed":  # of writes behind one that has failed
        sys.__unraisablehook__(error)


def _leave() -> NoReturn:
    print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)  # threads that compute would end in a segmentation fault


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _disk_is_full(error: Exception) -> bool:
    """Libraries that write by themselves say so in their own types of error, numpy in words."""
    said = "|".join([*map(os.strerror, _FULL), r"\d+ requested and \d+ written"])
    return getattr(error, "errno", None) in _FULL or re.search(said, str(error)) is not None
