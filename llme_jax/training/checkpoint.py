"""Checkpoints of a run: what it resumes from, and the model that users take away.

    {output_dir}/checkpoint-{step}/encoder    a Hugging Face folder; a task may name it otherwise
    {output_dir}/checkpoint-{step}/state      step, parameters, optimizer state (Orbax)
    {output_dir}/checkpoint-{step}/checksums.json    of the weights: Orbax does not check values
    {output_dir}/best                         link to the best checkpoint, or a copy of its model

Both parts are written in the background, beside their place, and renamed when they are whole;
a checkpoint counts once both are there. In a bucket each is followed by an object that says that it
is whole, and `best` is a file with the checkpoint's name. Only this module imports orbax.
"""

import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from llme_jax.devices.sharding import path_name
from llme_jax.errors import InputError
from llme_jax.files import checksums
from llme_jax.files.atomic import atomic_dir, remove
from llme_jax.files.storage import MARKER, in_bucket, temporary_folder, upload
from llme_jax.training.step import TrainState

logger = logging.getLogger(__name__)

COMMITTED = "state/commit_success.txt"  # Orbax writes it last, where it cannot rename


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(
        self, output_dir: Path, limit: int | None = None, exports: Sequence[str] = ("encoder",)
    ):
        """
        Args:
            limit: how many to keep, the newest ones; the best is kept besides.
            exports: the folders beside `state` that a whole checkpoint has.
        """
        for name in ("absl", "asyncio"):  # Orbax logs what it raises, and what it would have raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._exports = exports
        self.folder = output_dir if in_bucket(output_dir) else Path(output_dir).absolute()
        self.limit = limit
        self._orbax = ocp.StandardCheckpointer()
        self._export: threading.Thread | None = None
        self._export_error: BaseException | None = None
        self._pending_best: int | None = None
        self._unsealed: Path | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = []
        for path in self.folder.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and self._is_whole(path):
                found.append(int(match[1]))
        return sorted(found)

    def _is_whole(self, path: Path) -> bool:
        if in_bucket(path):
            return (path / COMMITTED).exists() and (path / MARKER).exists()
        return all((path / part).is_dir() for part in ("state", *self._exports))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step that `best` points to, or whose model it is a copy of."""
        link = self.folder / "best"
        if not link.exists():
            return None
        if _is_copy(link):
            seal = _seal(link)
            return next((s for s in self.steps() if seal and _seal(self.path(s)) == seal), None)
        is_link = not in_bucket(link) and link.is_symlink()
        name = os.path.basename(os.readlink(link)) if is_link else link.read_text()
        match = re.fullmatch(r"checkpoint-(\d+)", name)
        return int(match[1]) if match else None

    def save(self, state: TrainState, step: int, export: Callable[[Path], None]) -> None:
        """Starts saving; returns when the values are safe to change.

        Args:
            export: writes the task's folders into the folder it is given, on process 0. It must
                hold copies of the parameters, since it runs in the background.
        """
        self.wait()
        path = self.path(step)
        if not in_bucket(path) and path.is_symlink():  # into somebody else's folder
            path.unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        self._unsealed = path
        if jax.process_index() == 0:
            self._export = threading.Thread(target=self._run_export, args=(export, path))
            self._export.start()
        self._orbax.save(path / "state", state, force=True)

    def _run_export(self, export, path):
        try:
            if in_bucket(path):
                with temporary_folder() as folder:
                    export(Path(folder))
                    upload(Path(folder), path)
            else:
                for leftover in path.glob(".*"):  # of a run that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                export(path)
        except BaseException as error:  # handed to the main thread by wait()
            self._export_error = error

    def wait(self) -> None:
        """Returns once the checkpoint being written is whole, and old ones are gone."""
        unsealed, best = self._unsealed, self._pending_best
        self._unsealed = self._pending_best = None  # `best` never points to one that failed
        if self._export is not None:
            self._export.join()
            self._export = None
        self._orbax.wait_until_finished()
        if self._export_error is not None:
            raise self._export_error
        if jax.process_index() == 0:
            if unsealed is not None and not in_bucket(unsealed):
                self._seal(unsealed)
            if best is not None:
                self._link_best(best)
            self._delete_old()

    def _seal(self, path: Path) -> None:
        # What people may change in a model, its card or its prompts, is not sealed.
        checksums.seal(path, "state/**/*", "*/**/*.safetensors")

    def damaged_models(self) -> list[int]:
        """Steps of the complete checkpoints whose state is as it was saved, but no model is."""
        if in_bucket(self.folder):
            return []
        found = []
        for step in self.steps():
            path = self.path(step)
            models = (f"{name}/" for name in self._exports)
            said = next((said for name in models if (said := checksums.damage(path, name))), None)
            if said and not checksums.damage(path, "state/"):
                logger.warning("%s: %s, its model is written again", path, said)
                found.append(step)
        return found

    def export_again(self, step: int, export: Callable[[Path], None]) -> None:
        """Writes the model of a complete checkpoint, see `save`; its state must be as it was."""
        export(self.path(step))
        self._seal(self.path(step))

    def mark_best(self, step: int) -> None:
        """Points `best` to the checkpoint of `step` as soon as that is whole."""
        self._pending_best = step

    def _link_best(self, step: int) -> None:
        if in_bucket(self.folder):
            (self.folder / "best").write_text(self.path(step).name)
            return
        link, beside = self.folder / "best", self.folder / "best.new"
        before, is_copy = self.best(), _is_copy(link)
        if is_copy and before is None:
            kept = link.rename(link.with_name(f"best.{uuid.uuid4().hex[:8]}"))
            logger.warning("%s was a copy of no checkpoint that is here: it is now %s", link, kept)
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(self.path(step).name)
        except OSError:  # a disk without links
            if before != step:
                without = shutil.ignore_patterns("state")
                with atomic_dir(link, replace=True) as copy:
                    shutil.copytree(self.path(step), copy, ignore=without, dirs_exist_ok=True)
            return
        if is_copy:  # as in a run that was copied with links followed
            remove(link)
        os.replace(beside, link)

    def _delete_old(self) -> None:
        if self.limit is None:
            return
        for step in self.steps()[: -self.limit]:
            if step == self.best():
                continue
            # What makes it whole leaves first: a half-deleted checkpoint must not look like one.
            path = self.path(step)
            if in_bucket(path):
                (path / MARKER).unlink()
                path.rmtree()
            elif path.is_symlink():  # what it points to is not of this run
                path.unlink()
            else:
                os.rename(path / "state", path / "state.deleted")
                shutil.rmtree(path)

    def restore_newest(self, like: TrainState) -> tuple[int, TrainState]:
        """Step and state of the newest checkpoint that can be read, placed as `like` says.

        Args:
            like: ShapeDtypeStructs with shardings, of any mesh.

        Raises:
            InputError: none can be read, or the newest holds another model; with several processes
                also where the newest is damaged, as they might not agree on that.
        """
        damaged = None
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like)
            except InputError:
                raise
            except Exception as error:  # a dozen types, of Orbax, tensorstore and JSON
                lines = str(error).strip().splitlines()
                reason = lines[0][:150] if lines else type(error).__name__
                damaged = f"{self.path(step) / 'state'} is damaged ({reason})"
                if jax.process_count() > 1:
                    raise InputError(
                        f"{damaged}; delete {self.path(step)} to continue from the one before"
                    ) from error
                logger.warning("%s: going back to the checkpoint before", damaged)
            else:
                return step, state
        raise InputError(
            f"{damaged}, and there is no checkpoint before it; give another --output_dir, or "
            f"delete {self.folder} to start again"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of one checkpoint, see `restore_newest`; a ValueError where it is damaged."""
        path = self.path(step) / "state"
        sealed = not in_bucket(path) and (path.parent / checksums.NAME).is_file()
        if sealed and (found := checksums.damage(path.parent, "state/")):
            raise ValueError(found)
        saved = self._orbax.metadata(path).item_metadata.tree
        # Of a named tuple Orbax keeps a dict, whose paths are the same words.
        found, wanted = (
            {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (saved, like)
        )
        different = sorted(k for k in found | wanted if found.get(k) != wanted.get(k))
        if different:
            name = different[0]
            raise InputError(
                f"{path} holds another model: {name} is {found.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} in this run; give another --output_dir"
            )
        state = self._orbax.restore(path, like)
        if int(state.step) != step:
            raise ValueError(f"it is that of step {int(state.step)}")
        return state


def _is_copy(best: Path) -> bool:
    return not in_bucket(best) and best.is_dir() and not best.is_symlink()


def _seal(checkpoint: Path) -> bytes | None:
    """The checksums of a checkpoint: the same for a copy of it."""
    path = checkpoint / checksums.NAME
    return path.read_bytes() if path.is_file() else None
