"""The mesh and the rules that place parameters and batches on it.

Three axes: batches are spread over `data` and `fsdp`, parameters and optimizer state over `fsdp`,
those of a language model also over `tensor`. XLA derives the collectives from these placements,
except in `on_each_device`, where it would choose others.

    to_mesh, batch_to_mesh   host arrays -> arrays on the mesh
    gather_fsdp, pin_rows    in a traced function, where parameters travel and rows do not
    replicate                spread arrays -> whole ones on every device, by a program of its own
    on_each_device           a traced function that sees one device's rows and whole parameters
    abstract                 arrays -> ShapeDtypeStructs on the mesh, enough to compile with
"""

import re
from collections.abc import Callable
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
    (r"(embedding|kernel|lora_b)$", (None, "fsdp")),
    (r"lora_a$", ("fsdp", None)),
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


def on_each_device(compute: Callable, params, rows, key, shardings):
    """compute(params, rows, key) of whole parameters, on every device with its own rows.

    Inside, devices exchange the parameters that are spread and nothing else; in the backward pass
    the gradients, once each, in their own type: a sum over devices, or where the parameter is
    spread, each device's part of it.

    Args:
        rows: a tree of arrays with all devices' rows; what comes out is one too.
        key: the same for all; None for none.
        shardings: of the parameters, or one for all of them.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, params)
    specs = jax.tree.map(lambda s: s.spec, shardings)
    batch = PartitionSpec(BATCH_AXES)
    mesh = jax.tree.leaves(shardings)[0].mesh

    def whole(x, spec):
        for axis, name in enumerate(spec):
            if name is not None and mesh.shape[name] > 1:
                x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
        return x

    def local(params, rows, key):
        return compute(jax.tree.map(whole, params, specs), rows, key)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, batch, PartitionSpec()),
        out_specs=batch,
        # Otherwise a replicated parameter's gradient is summed where it is used, each time again.
        check_vma=False,
    )(params, rows, key)


def gather_fsdp(tree, mesh: Mesh, rules, after):
    """Parameters that are spread over `fsdp`, whole along it inside a traced function.

    Left to itself XLA may spread what is computed from them the same way, and then moves the rows
    of a batch between devices, many times what the parameters are.

    Args:
        rules: as of `state_sharding`.
        after: what has to be there before they are gathered, so that not all are at once.
    """
    tree, _ = jax.lax.optimization_barrier((tree, after))

    def gather(x, sharding):
        spec = (None if axis == "fsdp" else axis for axis in sharding.spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(gather, tree, state_sharding(mesh, tree, rules))


def pin_rows(x, mesh: Mesh):
    """The rows of a batch stay where they are, inside a traced function."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


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
