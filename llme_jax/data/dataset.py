"""One listed file of --train_data: the rows of it that are trained on, and its recipe."""

import logging
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from llme_jax.config import DataConfig, DistillConfig
from llme_jax.data.instructions import find_recipe
from llme_jax.data.select import Selection, filter_rows, lacks_positive
from llme_jax.data.train_store import TrainStore
from llme_jax.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One listed file: its store, the rows of it that are trained on, and how."""

    name: str
    path: str
    store: TrainStore
    rows: ndarray  # int64, indices into the store
    selection: Selection
    configured: DistillConfig  # as flags and --use_train_config say
    recipe: DistillConfig  # the same, but distill_weight is 0 when no row has teacher_scores


def make_dataset(
    name: str,
    path: str,
    store: TrainStore,
    data: DataConfig,
    loss: DistillConfig,
    sample_seed: tuple[int, int],
) -> Dataset:
    """Filters and samples the rows of a listed file and settles its recipe.

    Raises:
        InputError: no row is left, a row has no positive that select_positive could take, or the
            file lacks the teacher_scores that its losses need.
    """
    if not len(store):
        raise InputError(f"{path}: there are no rows in this file: leave it out")
    if data.use_train_config:
        data, loss = _with_recipe(path, store, data, loss)
    how = Selection(
        data.train_group_size,
        data.select_positive,
        data.select_negative,
        loss.stable_distill,
        data.teacher_scores_min,
        data.teacher_scores_margin,
    )
    rows = _surviving_rows(path, store, how)
    if data.max_sample_num is not None and len(rows) > data.max_sample_num:
        rng = np.random.default_rng(sample_seed)
        rows = np.sort(rng.choice(rows, data.max_sample_num, replace=False))
    recipe = _possible_loss(path, store, rows, loss, how)
    return Dataset(name, path, store, rows, how, loss, recipe)


def check_one_recipe(datasets: list[Dataset]) -> None:
    """Refuses datasets that cannot share a batch, because their recipes have different losses.

    Raises:
        InputError: names the first two that differ.
    """
    for other in datasets[1:]:
        if other.configured != datasets[0].configured:
            raise InputError(
                f"--use_train_config gives {datasets[0].path} and {other.path} different losses, "
                "which no mixed batch can have: give --inbatch_same_dataset epoch"
            )


def _with_recipe(
    path: str, store: TrainStore, data: DataConfig, loss: DistillConfig
) -> tuple[DataConfig, DistillConfig]:
    """Settings with the values that --use_train_config takes from the file's task."""
    if len(store.tasks) > 1:
        raise InputError(
            f"{path}: rows are of the tasks {', '.join(t or 'none' for t in store.tasks)}, "
            "--use_train_config has one recipe a file: give one file a task"
        )
    (task,) = store.tasks
    try:
        recipe = find_recipe(data.version, task or None)
    except InputError as error:
        raise InputError(f"{path}:{store.lines[0]}: {error}") from None
    of_data = {name: value for name, value in recipe.items() if hasattr(data, name)}
    of_loss = {name: value for name, value in recipe.items() if name not in of_data}
    return replace(data, **of_data), replace(loss, **of_loss)


def _surviving_rows(path: str, store: TrainStore, how: Selection) -> ndarray:
    dropped = filter_rows(store.rows, how)
    counts = {name: int(mask.sum()) for name, mask in dropped.items() if mask.any()}
    kept = ~np.logical_or.reduce(list(dropped.values()))
    report = ", ".join(f"{count} by {name}" for name, count in counts.items())
    if not kept.any():
        raise InputError(
            f"{path}: none of the {len(store)} rows is left, dropped are {report}: "
            "loosen the filters, mine negatives, or train on in-batch negatives alone "
            "(--train_group_size 1)"
        )
    if counts:
        logger.info("%s: dropped of %d rows are %s", path, len(store), report)
    lacking = np.flatnonzero(kept & lacks_positive(store.rows, how))
    if len(lacking):
        remedy = (
            "score the row, --select_positive teacher needs a positive or teacher_scores"
            if how.positive == "teacher"
            else "give --select_positive teacher, which needs teacher_scores"
        )
        raise InputError(
            f"{path}:{store.lines[lacking[0]]}: the row has no positive "
            f"and select_positive is {how.positive}: {remedy}"
        )
    return np.flatnonzero(kept)


def _possible_loss(
    path: str, store: TrainStore, rows: ndarray, loss: DistillConfig, how: Selection
) -> DistillConfig:
    """The loss without distillation when no row has teacher scores of two keys."""
    scored = how.group_size > 1 and not np.isnan(store.rows.highest[rows]).all()
    if loss.distill_weight <= 0 or scored:
        return loss
    alone = loss.stable_distill or loss.contrastive_weight <= 0
    if alone and loss.embedding_weight <= 0:
        setting = "stable_distill" if loss.stable_distill else "contrastive_weight 0"
        missing, remedy = "no row has teacher_scores", "add teacher_scores to its rows"
        if how.group_size == 1:
            missing = "--train_group_size 1 takes no key to compare with"
            remedy = "give --train_group_size 2 or more"
        raise InputError(
            f"{path}: {missing} and {setting} leaves nothing else to train on: {remedy}, or train "
            "on it contrastively (--distill_weight 0 --contrastive_weight 1)"
        )
    return replace(loss, distill_weight=0.0)
