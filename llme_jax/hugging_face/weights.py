"""Hugging Face weights in and out: where a model lies, which tensor is which parameter."""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import digest, digest_file
from llme_jax.hugging_face.adapters import adapted
from llme_jax.hugging_face.folders import ModelFolder, read_adapter
from llme_jax.hugging_face.foreign import check_file, open_safetensors, read_json
from llme_jax.hugging_face.fused import unfused

_logger = logging.getLogger(__name__)
Names = Sequence[tuple[str, str]]
# Last step of a parameter's path -> last step of the tensor's name; all steps before are the same.
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# What checkpoints hold besides the model: heads, buffers that older versions wrote, DeBERTa's table
# of absolute positions where only relative ones are read.
_IGNORED = re.compile(
    r"(^|\.)(pooler|cls|lm_head|classifier|position_ids|token_type_ids|rotary_emb"
    r"|discriminator_predictions|generator_predictions|generator_lm_head"
    r"|lm_predictions|mask_predictions|position_embeddings)(\.|$)"
)
_SERVED_TYPES = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
_FILES = ("model.safetensors", "pytorch_model.bin")  # in which weights are
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
Folder = Path | ModelFolder


class Tensor:
    """A tensor in a safetensors file; `tensor[a:b, c:d]` reads that part only."""

    def __init__(self, slices):
        self._slices, self.shape = slices, tuple(slices.get_shape())
        self.dtype = slices.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        return self._slices[index]


def open_tensors(folder: Path, files: Sequence[str] = _FILES) -> dict[str, Tensor | np.ndarray]:
    """Every tensor of a Hugging Face folder by name, in the type it is stored in.

    Args:
        files: the names that they may have; the first one that is there is read.

    Raises:
        InputError: there are no weights, a shard is missing, or reading them takes torch.
    """
    tensors = {}
    for name in files:
        for path in _shards(folder, name):
            if path.suffix == ".bin":
                tensors |= read_torch(path)
            else:
                file = open_safetensors(path)  # left open: parts of it are read later
                tensors |= {n: Tensor(file.get_slice(n)) for n in file.keys()}  # noqa: SIM118
        if tensors:
            return tensors
    raise InputError(f"{folder}: no {files[0]} in this folder; give one that has it")


def model_tensors(folder: Folder) -> dict[str, Tensor | np.ndarray]:
    """As `open_tensors`, by today's names, with the adapter that the folder has.

    Checkpoints converted from TensorFlow call LayerNorm's tensors gamma and beta. model2vec calls
    its table `embeddings`; tokens may share rows of it (`mapping`) and have `weights`.

    Raises:
        InputError: as `open_tensors`, or mapping, weights or adapter do not fit.
    """
    model = ModelFolder.of(folder)
    tensors = {_modern(name): tensor for name, tensor in open_tensors(model.base).items()}
    if model.adapted:
        own = open_tensors(model.path, _ADAPTER_FILES)
        tensors = adapted(tensors, read_adapter(model.path), own, model.path, _IGNORED)
    if "embeddings" not in tensors:
        return tensors
    table, rows, weights = (tensors.pop(n, None) for n in ("embeddings", "mapping", "weights"))
    try:
        table = table if rows is None else table[...][rows[...]]
        if weights is not None:
            table = table[...]
            table = (table.astype(np.float64) * weights[...][:, None]).astype(table.dtype)
    except (IndexError, ValueError):
        raise InputError(
            f"{folder}: mapping and weights do not fit the table of embeddings; copy "
            "model.safetensors again"
        ) from None
    return tensors | {"embedding.weight": table}


def has_weights(folder: Folder) -> bool:
    return any(_shards(ModelFolder.of(folder).base, name) for name in _FILES)


def same_tensors(folder: Folder, one: str, other: str) -> bool:
    """Whether two tensors, by the ends of their names, hold the same; also where one is missing."""
    tensors = model_tensors(folder)
    ends = [[t for n, t in tensors.items() if f".{n}".endswith(f".{end}")] for end in (one, other)]
    if not all(ends):
        return True
    first, second = ends[0][0], ends[1][0]
    if tuple(first.shape) != tuple(second.shape):
        return False
    rows, step = first.shape[0], 4096
    blocks = (slice(i, min(i + step, rows)) for i in range(0, rows, step))
    return all(np.array_equal(first[block], second[block]) for block in blocks)


def _shards(folder: Path, name: str) -> list[Path]:
    """The files that hold the weights: the one of that name, or those that its index lists."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: has no weight_map; copy the file again")
    shards = [folder / str(shard) for shard in sorted(set(map(str, listed.values())))]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{index}: lists {shard.name}, which is not there; copy it too")
    return shards


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a state dict that torch saved, float32; also of one in a checkpoint of more.

    Raises:
        InputError: torch is not installed, or the file holds no state dict.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: reading this format takes torch; install it or convert the file to "
            "model.safetensors"
        ) from None
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen types, of pickle, zipfile and torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        if "Weights only" in reason:
            reason = "it holds Python objects that are no tensors"
        raise InputError(
            f"{path}: torch cannot read tensors from it ({reason}); download it again, or save "
            "the state dict alone"
        ) from None
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(hasattr(t, "shape") for t in content.values()):
        raise InputError(f"{path}: holds no state dict; save that alone")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def load_params(folder: Folder, shapes: dict, names: Names = ()) -> dict:
    """Parameters in the shape of `shapes`, float32 on the host, from the weights in `folder`.

    Args:
        shapes: nested dict of `jax.ShapeDtypeStruct`; its paths are the tensors' names.
        names: pairs of parts of names, ours and the files', where they are not the same.

    Raises:
        InputError: names every tensor that is missing, left over or of another shape.
    """

    def read(path, tensor):
        leaf = tensor[...]
        return np.ascontiguousarray(leaf.T if _is_kernel(path) else leaf, np.float32)

    params = jax.tree_util.tree_map_with_path(read, _matched(folder, shapes, names))
    finite = jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), params)
    _check_finite(folder, finite, names)
    return params


def shapes_of_params(folder: Folder, shapes: dict, names: Names = ()) -> dict:
    """`shapes`, after a look at the weights in `folder`, which need not be there.

    Raises:
        InputError: as `load_params`, but for what has to be read.
    """
    if has_weights(folder):
        _matched(folder, shapes, names)
    return shapes


def load_params_to(folder: Folder, shapes: dict, shardings: dict) -> dict:
    """Parameters on the devices, in the types of `shapes`.

    Each device's part is read by itself: no tensor is ever whole on the host, unless a device has
    it whole, nor on a device that has but a part.

    Args:
        shapes: as for `load_params`.
        shardings: where each parameter lives.

    Raises:
        InputError: as `load_params`.
    """

    def read(path, shape, sharding, tensor):
        @cache  # devices that hold copies share one read
        def part(*bounds):
            index = tuple(slice(*b) for b in (bounds[::-1] if _is_kernel(path) else bounds))
            piece = tensor[index].astype(shape.dtype)
            return piece.T if _is_kernel(path) else piece

        def of_device(index):
            return part(*(i.indices(n)[:2] for i, n in zip(index, shape.shape, strict=True)))

        array = jax.make_array_from_callback(shape.shape, sharding, of_device)
        return jax.block_until_ready(array)  # before the next one is read

    matched = _matched(folder, shapes)
    params = jax.tree_util.tree_map_with_path(read, shapes, shardings, matched)
    finite = jax.jit(lambda params: jax.tree.map(lambda x: jnp.isfinite(x).all(), params))(params)
    _check_finite(folder, finite)
    return params


def _check_finite(folder: Folder, finite: dict, names: Names = ()) -> None:
    """
    Args:
        finite: of each parameter, whether all its numbers are.

    Raises:
        InputError: some are not; every result of such a model is wrong or none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(finite)
    if wrong := [tensor_name(path, names) for path, fine in leaves if not fine]:
        more = f", as in {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
        raise InputError(
            f"{folder}: there are values in {wrong[0]}{more} that are not finite (NaN, infinity); "
            "the training that made them diverged, or the file is damaged: give other weights"
        )


def _is_kernel(path: tuple) -> bool:
    """Whether it is stored transposed."""
    return path[-1].key == "kernel"


def _matched(folder: Folder, shapes: dict, names: Names = ()) -> dict:
    """In the shape of `shapes`, the tensor that each parameter is read from."""
    tensors = model_tensors(folder)
    paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
    prefix = _prefix(tensors, tensor_name(paths[0][0], names))
    expected = {
        prefix + tensor_name(path, names): leaf.shape[::-1] if _is_kernel(path) else leaf.shape
        for path, leaf in paths
    }
    tensors = unfused(tensors, expected)
    problems, leaves = [], []
    for name, want in expected.items():
        tensor = tensors.pop(name, None)
        if tensor is None:
            problems.append(f"{name} is missing")
            continue
        if tensor.shape != want:
            problems.append(f"{name} has shape {tensor.shape} instead of {want}")
        elif str(tensor.dtype).lower() not in _SERVED_TYPES:
            raise InputError(
                f"{folder}: {name} is stored as {tensor.dtype}, these weights are quantised; give "
                "the model they were made of, in float32, float16 or bfloat16"
            )
        leaves.append(tensor)
    left = [name for name in sorted(tensors) if not _IGNORED.search(name)]
    if heads := [name for name in left if not name.startswith(prefix)]:
        _logger.info("%s: left out, as they are not of the encoder: %s", folder, ", ".join(heads))
    problems += [f"{name} is unexpected" for name in left if name.startswith(prefix)]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(
            f"{folder}: the weights do not fit config.json ({'; '.join(problems[:6])}{more}); give "
            "the config.json that belongs to them"
        )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), leaves)


def save_params(path: Path, params: dict, names: Names = ()) -> None:
    """Write the nested dict `params` as float32 safetensors under Hugging Face names.

    Args:
        names: as for `load_params`.
    """
    # transformers refuses files without the metadata.
    save_file(file_tensors(params, names), path, metadata={"format": "pt"})


def file_tensors(params: dict, names: Names = ()) -> dict[str, np.ndarray]:
    """`params` as files have them: float32, by Hugging Face names, kernels transposed.

    Args:
        names: as for `load_params`.
    """
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.asarray(leaf, np.float32)
        leaf = leaf.T if _is_kernel(keys) else leaf
        tensors[tensor_name(keys, names)] = np.ascontiguousarray(leaf)
    return tensors


def fingerprint_params(params) -> str:
    """A name for the parameters of a model, from every bit of them."""
    state = blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        state.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        state.update(array)
    return state.hexdigest()


def fingerprint_files(folder: Folder) -> str:
    """A name for a model's folder, from every bit of its weights and of its JSON files, which say
    what ends a text and much more."""
    model = ModelFolder.of(folder)
    files = sorted({path for name in _FILES for path in _shards(model.base, name)})
    files += sorted({*model.base.glob("*.json"), *model.path.glob("*.json")})
    if model.adapted:
        files += sorted(model.path.glob("adapter_*"))
    bar = tqdm(files, desc="Hashing weights", unit=" files", leave=False)
    return digest([digest_file(path) for path in bar])


def tensor_name(path: tuple, names: Names = ()) -> str:
    """encoder/layer/0/.../query/kernel -> encoder.layer.0.....query.weight"""
    *steps, leaf = (step.key for step in path)
    name = ".".join([*steps, _LEAVES[leaf]])
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name


def _modern(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _prefix(names: Iterable[str], known: str) -> str:
    """What a checkpoint puts before the encoder's names ("bert."), seen from a known one."""
    return min((n.removesuffix(known) for n in names if f".{n}".endswith(f".{known}")), default="")
