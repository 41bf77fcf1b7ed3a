"""What a language model takes to read prompts (`--plan`)."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jax.sharding import Mesh

from llme_jax.config import PlanConfig
from llme_jax.devices.fitting import Remedies, device_bytes, halves, memory_limit
from llme_jax.devices.memory import Needs
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.inference.dry_run import Reading, show
from llme_jax.inference.over_store import sharing
from llme_jax.lm.batch_rows import BatchRows
from llme_jax.models.causal_lm import CausalLM, sharded_shapes

# (model, its parameters, mesh, prompts a device, width) -> what a device needs for such a batch.
Analyse = Callable[[CausalLM, dict, Mesh, int, int], Needs]


def show_plan(
    settings: PlanConfig,
    lm: CausalLM,
    mesh: Mesh,
    lengths: np.ndarray,
    count: int,
    width: Callable[[int], int],
    longest: int,
    rows: int | None,
    analyse: Analyse,
    flag: str | None = None,
) -> int:
    """Prints it; returns the exit code.

    Args:
        lengths: tokens of some of the prompts.
        count: of all prompts.
        width: of the batch whose longest prompt has so many tokens.
        longest: tokens that a prompt may have.
        rows: prompts on a device at a time; None for as many as its memory allows.
        flag: that says how many; None where there is none.
    """
    shapes = sharded_shapes(lm, mesh)
    of_a_device = partial(analyse, lm, shapes, mesh)
    limit = memory_limit(settings, mesh)
    try:
        left = limit and limit - device_bytes(shapes)
        batch = BatchRows(mesh, longest, rows, of_a_device, left=left)
    except InputError:  # not even one fits, as is said below
        batch = BatchRows(mesh, longest, 1, of_a_device)
    reading = Reading(
        "prompts",
        mesh,
        count,
        lengths,
        longest,
        width,
        batch,
        lambda rows, width: of_a_device(rows // sharing(mesh), width),
        lm.flops,
    )

    def seek(remedies: Remedies) -> None:
        many = batch(longest) // sharing(mesh)
        if flag:
            remedies.seek([(f"{flag} {n}", partial(memory, mesh, n)) for n in halves(many)])
        for name in ("tensor", "fsdp"):
            spread = [
                (f"--{name} {other.shape[name]}", partial(memory, other, rows or 1))
                for other in _wider(mesh, name)
            ]
            remedies.seek(spread)

    def memory(on: Mesh, rows: int) -> float:
        return analyse(lm, sharded_shapes(lm, on), on, rows, longest).total

    return show(settings, shapes, [reading], seek)


def _wider(mesh: Mesh, axis: str) -> Iterator[Mesh]:
    """Meshes of the same devices that spread parameters over more of them."""
    devices = [*mesh.devices.flat]
    for n in range(mesh.shape[axis] + 1, len(devices) + 1):
        sizes = {name: mesh.shape[name] for name in ("fsdp", "tensor")} | {axis: n}
        if len(devices) % (sizes["fsdp"] * sizes["tensor"]) == 0:
            yield make_mesh(**sizes, devices=devices)
