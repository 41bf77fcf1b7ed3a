"""The command line: an experiment file, flags on top of it, errors in one sentence."""

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

from llme_jax.config import Config, Groups
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
}


def parse(
    argv: list[str], command: str, description: str, settings: type[Groups] = Config
) -> Groups:
    """The settings of a run: defaults, then the file of `--config`, then the other flags.

    Args:
        settings: the command's groups; of an experiment file it takes what it knows.

    Raises:
        InputError: an unknown flag, a value of the wrong type, a config that cannot be found.
    """
    # Light as it is, importing it takes a second: not at the top, where tests and configs pay.
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            # argparse names both spellings, `argument --max_steps/--max-steps: ...`.
            raise InputError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))

    experiment, argv = _take_config(argv)
    config = settings()
    parser = Parser(
        [type(group) for group in config.groups()],
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
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):  # `--x false` says the same
            action.help = argparse.SUPPRESS
    known = config.flat()
    if experiment:
        known |= {k: v for k, v in load_config(experiment).flat().items() if k in known}
    parser.set_defaults(**known)
    *groups, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(_unknown_flag(unknown[0], config))
    return settings(*groups)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag, what kind of value it takes, its default when it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _format_action_invocation(self, action):
        if action.nargs == 0 or action.choices or action.metavar:
            kind = self._format_args(action, "")
        else:
            kind = {"string_to_bool": "true|false"}.get(action.type.__name__, action.type.__name__)
            kind += " ..." if action.nargs == "+" else ""
        return f"{max(action.option_strings, key=_underscores)} {kind}".rstrip()

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _underscores(option: str) -> tuple[int, int]:
    return option.count("_"), len(option)


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    return known.config, rest


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


def load_config(experiment: str) -> Config:
    """Runs `get_config(arg)` of the experiment file named by `FILE.py` or `FILE.py:ARG`."""
    name, _, arg = experiment.partition(":")
    candidates = [Path(name), *(folder / name for folder in config_folders())]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        close = difflib.get_close_matches(name, installed_configs(), n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"there is {', '.join(installed_configs())}"
        )
        raise InputError(f"--config {name}: no such file here or in ./configs; {hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(arg), write one that returns a Config")
    config = module.get_config(arg or None)
    if not isinstance(config, Config):
        raise InputError(f"{path}: get_config has to return a llme_jax.config.Config")
    return config


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command: exit code 2 and one sentence when the user's input is at fault."""
    try:
        code = main(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
