"""The mesh and the rules that place parameters and batches on it.

Two axes: batches are spread over both, parameters and optimizer state over `fsdp` only. XLA derives
every collective from these placements; nothing here or elsewhere calls one by hand.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llme_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")

# The first pattern found in a parameter's path decides which of its axes is spread over fsdp;
# every parameter has to match one. Linear kernels are [in, out]: spreading the output axis keeps
# the gathered slices contiguous. Vectors are too small to be worth a gather.
FSDP_RULES = (
    (r"(embedding|kernel)$", -1),
    (r"(bias|scale)$", None),
)


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """All devices as a (data, fsdp) mesh.

    Raises:
        InputError: when the devices cannot be divided into groups of `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise InputError(
            f"--fsdp {fsdp}: does not divide the {len(devices)} devices; give a divisor"
        )
    # Auto: with Explicit axes (the default of make_mesh) `q @ k.T` of two batch-sharded arrays
    # is a type error, while here XLA is meant to choose the gather.
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree):
    """A sharding for every leaf of parameters or optimizer state, by its path and shape.

    Args:
        tree: arrays or ShapeDtypeStructs. Optimizer moments carry their parameter's path as the
            end of their own, so one table serves both.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _place(mesh, path, leaf), tree)


def _place(mesh: Mesh, path, leaf) -> NamedSharding:
    if leaf.ndim == 0:
        return replicated(mesh)
    name = path_name(path)
    for pattern, axis in FSDP_RULES:
        if re.search(pattern, name):
            # An axis that cannot be split evenly stays whole: correct, only less memory saved.
            if axis is None or leaf.shape[axis] % mesh.shape["fsdp"]:
                return replicated(mesh)
            spec = [None] * leaf.ndim
            spec[axis] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*spec))
    raise ValueError(f"no rule in FSDP_RULES places {name}")


def path_name(path) -> str:
    """`encoder/layer/0/attention/self/query/kernel` of a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def to_mesh(tree, shardings):
    """Puts host arrays that every process holds in full onto the mesh."""

    def put(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def local_rows(mesh: Mesh, size: int) -> slice:
    """The rows of a global batch of `size` that this process has to provide."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    bounds = [index[0].indices(size)[:2] for index in indices]
    start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
    if sum(b[1] - b[0] for b in bounds) != stop - start:
        raise ValueError("the devices of one process must hold neighbouring rows of a batch")
    return slice(start, stop)


def batch_to_mesh(mesh: Mesh, batch):
    """Joins the rows that each process assembled into global arrays, spread over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda local: jax.make_array_from_process_local_data(sharding, local), batch
    )
