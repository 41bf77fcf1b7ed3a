"""The dual encoder as a task: queries and keys to vectors, losses on the global batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from numpy import ndarray

from llme_jax.config import Config, LossConfig
from llme_jax.data.batch import Batch, Texts
from llme_jax.data.instructions import instruction_of
from llme_jax.devices.sharding import path_name
from llme_jax.models.dropout import DropoutKey
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder, save_dual_encoder
from llme_jax.retrieval.evaluate import RetrievalEvaluator
from llme_jax.training import losses
from llme_jax.training.task import Opened


def open_dual(config: Config) -> Opened:
    """The encoder or encoders that `config` names.

    Raises:
        InputError: a model cannot be found, read or served, or texts are longer than it reads.
    """
    encoder, params, tokenizer = load_dual_encoder(
        config.encoder, remat=config.training.gradient_checkpointing
    )
    encoder.check_lengths(config.data.query_max_length, config.data.key_max_length)
    return Opened(DualTask(config, encoder, tokenizer), params, {})


@dataclass(frozen=True)
class DualTask:
    """See `training.task.Task`."""

    config: Config
    encoder: DualEncoder
    tokenizer: object

    flag = "--query_encoder"

    @property
    def rules(self) -> tuple:
        return self.encoder.sharding_rules

    @property
    def exports(self) -> tuple[str, ...]:
        return self.encoder.folders

    def loss(self, params, batch, key, *, recipe, devices, chunk):
        return batch_loss(
            *(params, batch, key), encoder=self.encoder, loss=recipe, devices=devices, chunk=chunk
        )

    def forward_flops(self, params: dict, lengths: dict[str, ndarray]) -> float:
        return sum(_flops(self.encoder, params, field, of) for field, of in lengths.items())

    def recomputing(self, on: bool) -> "DualTask":
        return replace(self, encoder=replace(self.encoder, remat=on))

    def evaluator(self, mesh: Mesh) -> RetrievalEvaluator | None:
        if not self.config.data.eval_data:
            return None
        return RetrievalEvaluator(self.config, self.tokenizer, self.encoder, mesh)

    def exporter(self, params: dict, tasks: list[str]) -> Callable[[Path], None]:
        return partial(
            save_dual_encoder,
            encoder=self.encoder,
            params=params,
            tokenizer=self.tokenizer,
            query_max_length=self.config.data.query_max_length,
            key_max_length=self.config.data.key_max_length,
            prompts=_prompts(self.config, tasks),
        )


def batch_loss(
    params: dict,
    batch: Batch,
    dropout_key: Array | None,
    *,
    encoder: DualEncoder,
    loss: LossConfig,
    devices: int,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of one global batch, and its parts."""

    def encode(field: str) -> Float[Array, "n D"]:
        return _embeddings(
            *(encoder, params, batch.texts[field], dropout_key),
            field=field,
            devices=devices,
            chunk=chunk,
        )

    query, key = encode("query"), encode("key")
    inputs = (query, key, *batch[1:])
    of_batch = partial(losses.total, loss=loss, dense_metric=encoder.metric)
    if loss.negative_cross_device or devices == 1:
        return of_batch(*inputs)
    per_device = [x.reshape(devices, -1, *x.shape[1:]) for x in inputs]
    value, parts = jax.vmap(of_batch)(*per_device)
    return value.mean(), {name: part.mean() for name, part in parts.items()}


def _embeddings(
    encoder: DualEncoder,
    params: dict,
    texts: Texts,
    dropout_key: Array | None,
    *,
    field: str,
    devices: int,
    chunk: int | None,
) -> Float[Array, "n D"]:
    """Embeddings of texts in blocks, in the order of the texts."""
    # A text's dropout follows its number, not the row of the block where it stands.
    numbers = jnp.zeros_like(texts.place).at[texts.place].set(jnp.arange(len(texts.place)))
    blocks, start = [], 0
    for ids, lengths in zip(texts.ids, texts.lengths, strict=True):
        drop = None
        if dropout_key is not None:
            drop = DropoutKey(dropout_key, numbers[start : start + len(ids)])
        blocks.append(
            encode_in_chunks(
                *(encoder, params, ids, lengths),
                field=field,
                dropout_key=drop,
                devices=devices,
                chunk=chunk,
            )
        )
        start += len(ids)
    return jnp.concatenate(blocks).at[texts.place].get(unique_indices=True)


def encode_in_chunks(
    encoder: DualEncoder,
    params: dict,
    ids: Int[Array, "n L"],
    lengths: Int[Array, "n"],
    *,
    field: str,
    dropout_key: DropoutKey | None,
    devices: int,
    chunk: int | None,
) -> Float[Array, "n D"]:
    """Embeddings of n texts, `chunk` texts a device at a time.

    A scan whose body is rematerialised keeps only token ids and embeddings for the backward
    pass and encodes each chunk again there: GradCache (arXiv:2101.06983), the gradient unchanged.
    """
    rows = ids.shape[0] // devices
    if chunk is None or chunk >= rows:
        return encoder.encode(params, ids, lengths, field=field, dropout_key=dropout_key)
    chunks = -(-rows // chunk)

    def split(x):
        # Every device contributes equally to every chunk, so no row changes its device.
        x = x.reshape(devices, rows, *x.shape[1:])
        padding = [(0, 0), (0, chunks * chunk - rows)] + [(0, 0)] * (x.ndim - 2)
        # Padded rows repeat real ones: a text of length 0 has no defined mean.
        x = jnp.pad(x, padding, mode="wrap")
        x = x.reshape(devices, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(chunks, devices * chunk, *x.shape[3:])

    @partial(jax.checkpoint, prevent_cse=False)  # the scan already keeps the passes apart
    def body(_, texts):
        ids, lengths, numbers = texts
        key = None if dropout_key is None else dropout_key._replace(texts=numbers)
        return None, encoder.encode(params, ids, lengths, field=field, dropout_key=key)

    numbers = jnp.zeros_like(lengths) if dropout_key is None else dropout_key.texts
    _, embeddings = jax.lax.scan(body, None, (split(ids), split(lengths), split(numbers)))
    width = embeddings.shape[-1]
    embeddings = embeddings.reshape(chunks, devices, chunk, width).swapaxes(0, 1)
    return embeddings.reshape(devices, chunks * chunk, width)[:, :rows].reshape(-1, width)


def _flops(encoder: DualEncoder, params: dict, field: str, lengths: ndarray) -> float:
    """Of the matrix products of an encoder: 2 for each weight of a linear layer and token, 4 D for
    each pair of tokens of a text and layer."""
    config = encoder.query_config if field == "query" else encoder.key_config
    leaves = jax.tree_util.tree_leaves_with_path(
        params["encoder" if encoder.tied else f"{field}_encoder"]
    )
    linear = sum(x.size for path, x in leaves if "kernel" in path_name(path))
    tokens = np.asarray(lengths, float)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return 2 * linear * tokens.sum() + attention * (tokens**2).sum()


def _prompts(config: Config, tasks: list[str]) -> dict[str, str]:
    """The texts put in front, by the names that sentence-transformers knows, `query` and
    `document`; of several tasks these are the first one's, and each has its own (`qa-query`)."""
    instructions = [instruction_of(config.data, task or None) for task in tasks]
    prompts = dict(zip(("query", "document"), instructions[0], strict=True))
    if len(set(instructions)) > 1:
        for task, instruction in zip(tasks, instructions, strict=True):
            prompts |= {f"{task}-query": instruction.query, f"{task}-document": instruction.key}
    return prompts
