"""The mesh and the rules that place parameters and batches on it.

Three axes: batches are spread over `data` and `fsdp`, parameters and optimizer state over `fsdp`,
those of a language model also over `tensor`. XLA derives every collective from these placements;
nothing here or elsewhere calls one by hand.

    to_mesh, batch_to_mesh   host arrays -> arrays on the mesh
    replicate                spread arrays -> whole ones on every device, by a program of its own
    replicate_in_trace       the same inside a traced function
    abstract                 arrays -> ShapeDtypeStructs on the mesh, enough to compile with
"""

import re
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llme_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")

# Of encoders. The first pattern found in a parameter's path decides which of its axes are spread
# over what; every parameter has to match one. Linear kernels are [in, out]: spreading the output
# axis keeps the gathered slices contiguous. Vectors are too small to be worth a gather.
FSDP_RULES = (
    (r"(embedding|kernel)$", (None, "fsdp")),
    (r"(bias|scale)$", (None,)),
)


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """All devices as a (data, fsdp, tensor) mesh.

    Raises:
        InputError: when the devices cannot be divided into groups of `fsdp * tensor`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % (fsdp * tensor):
        flags = f"--fsdp {fsdp}" if tensor == 1 else f"--fsdp {fsdp} --tensor {tensor}"
        raise InputError(
            f"{flags}: {fsdp * tensor} does not divide the {len(devices)} devices; give a divisor"
        )
    # Auto: with Explicit axes (the default of make_mesh) `q @ k.T` of two batch-sharded arrays
    # is a type error, while here XLA is meant to choose the gather.
    return jax.make_mesh(
        (len(devices) // (fsdp * tensor), fsdp, tensor),
        (*BATCH_AXES, "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree, rules=FSDP_RULES):
    """A sharding for every leaf of parameters or optimizer state, by its path and shape.

    Args:
        tree: arrays or ShapeDtypeStructs. Optimizer moments carry their parameter's path as the
            end of their own, so one table serves both.
        rules: pairs of a pattern and axes, as FSDP_RULES; each family has its own.
    """
    place = partial(_place, mesh, rules)
    return jax.tree_util.tree_map_with_path(place, tree)


def _place(mesh: Mesh, rules, path, leaf) -> NamedSharding:
    if leaf.ndim == 0:
        return replicated(mesh)
    name = path_name(path)
    for pattern, axes in rules:
        if re.search(pattern, name):
            # An axis that cannot be split evenly stays whole: correct, only less memory saved.
            spec = [
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, leaf.shape, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*spec))
    raise ValueError(f"no rule places {name}")


def replicate_in_trace(tree, shardings):
    """Parameters that are spread over devices, whole on each while a traced function reads them.

    Left to itself XLA spreads what is computed from them the same way, and then moves the texts'
    activations between devices at every layer, many times what the parameters are.

    Args:
        shardings: of the tree's leaves.
    """
    return jax.tree.map(
        lambda x, s: jax.lax.with_sharding_constraint(x, replicated(s.mesh)), tree, shardings
    )


def replicate(tree, sharding: NamedSharding):
    """Arrays that are spread over a mesh, whole on every device; as they are where they are so.

    Args:
        sharding: `replicated` on the mesh.
    """
    if all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def abstract(tree, shardings):
    """ShapeDtypeStructs of arrays or structs, with their shardings.

    Args:
        shardings: of the tree's leaves, or one for all of them.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


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
