"""What something that is kept for later runs depends on: settings, by what they decide, and facts.

Token stores, vectors, found keys, parts of scores and stages of a pipeline are named by it. Facts
are contents: of files, of weights, of tokenizers. Names of files and models are none.
"""

from dataclasses import fields
from typing import Any

from llme_jax import __version__
from llme_jax.config.setting import Group, Groups
from llme_jax.files.atomic import digest


def decisive(settings: Group | Groups, *what: str) -> dict[str, Any]:
    """The settings that decide any of these, see `Setting.decides`; none that names a file or a
    model, whose content counts."""
    groups = settings.groups() if isinstance(settings, Groups) else [settings]
    found = {}
    for group in groups:
        for f in fields(group):
            declared = f.metadata["setting"]
            if {*what} & {*declared.decides} and declared.reads is None:
                found[f.name] = getattr(group, f.name)
    return found


def identity(settings: Group | Groups | None, *what: str, **facts) -> dict[str, Any]:
    """Everything that something depends on, by name.

    Args:
        what: which settings count; see `decisive`.
        facts: what else it is made of, as digests.
    """
    decided = decisive(settings, *what) if settings is not None else {}
    return {"llme_jax": __version__, "settings": decided, **facts}


def name_of(identity: dict[str, Any]) -> str:
    """A short name for it, of folders in the cache."""
    return digest(sorted(identity.items()))
