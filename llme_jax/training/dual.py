"""The dual encoder as a task: queries and keys to vectors, losses on the global batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpy import ndarray

from llme_jax.config import Config, LossConfig
from llme_jax.data.batch import Batch
from llme_jax.data.instructions import instruction_of, with_model_prompts
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder, save_dual_encoder
from llme_jax.models.families import forward_flops
from llme_jax.models.space import encoder_prompts
from llme_jax.retrieval.evaluate import RetrievalEvaluator
from llme_jax.training import losses
from llme_jax.training.chunks import over_blocks
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
    prompts = encoder_prompts(config.encoder)
    config = replace(
        config, data=with_model_prompts(config.data, config.encoder.query_encoder, prompts)
    )
    return Opened(DualTask(config, encoder, tokenizer), params, {})


@dataclass(frozen=True)
class DualTask:
    """See `training.task.Task`."""

    config: Config
    encoder: DualEncoder
    tokenizer: object

    flag = "--query_encoder"
    layout = None  # queries and keys are read apart

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
        encoder, flops = self.encoder, 0.0
        for field, of in lengths.items():
            config = encoder.query_config if field == "query" else encoder.key_config
            name = "encoder" if encoder.tied else f"{field}_encoder"
            flops += forward_flops(config, params[name], of)
        return flops

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
        compute = partial(encoder.encode, params, field=field)
        texts = batch.texts[field]
        return over_blocks(compute, texts, dropout_key, devices=devices, chunk=chunk)

    query, key = encode("query"), encode("key")
    inputs = (query, key, *batch[1:])
    of_batch = partial(losses.total, loss=loss, dense_metric=encoder.metric)
    if loss.negative_cross_device or devices == 1:
        return of_batch(*inputs)
    per_device = [x.reshape(devices, -1, *x.shape[1:]) for x in inputs]
    value, parts = jax.vmap(of_batch)(*per_device)
    return value.mean(), {name: part.mean() for name, part in parts.items()}


def _prompts(config: Config, tasks: list[str]) -> dict[str, str]:
    """The texts put in front, by the names that sentence-transformers knows, `query` and
    `document`; of several tasks these are the first one's, and each has its own (`qa-query`)."""
    instructions = [instruction_of(config.data, task or None) for task in tasks]
    prompts = dict(zip(("query", "document"), instructions[0], strict=True))
    if len(set(instructions)) > 1:
        for task, instruction in zip(tasks, instructions, strict=True):
            prompts |= {f"{task}-query": instruction.query, f"{task}-document": instruction.key}
    return prompts
