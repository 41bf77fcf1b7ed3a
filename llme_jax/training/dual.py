"""The dual encoder as a task: queries and keys to vectors, losses on the global batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from llme_jax.config import Config
from llme_jax.config.data import OF_FOLDER
from llme_jax.config.validate import check_sub_batches
from llme_jax.data.instructions import instruction_of, with_model_texts
from llme_jax.hugging_face.folders import check_no_adapter
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder, save_dual_encoder
from llme_jax.models.lora import Lora, with_adapters
from llme_jax.models.space import encoder_texts
from llme_jax.retrieval.evaluate import RetrievalEvaluator
from llme_jax.sources.resolve import Files
from llme_jax.training import losses
from llme_jax.training.chunks import over_texts
from llme_jax.training.task import Opened
from llme_jax.training.teacher import Teacher


def open_dual(config: Config, files: Files) -> Opened:
    """The encoder or encoders that `config` names.

    Raises:
        InputError: a model cannot be found, read or served, or texts are longer than it reads.
    """
    _ = files.sets  # refuses one without passages before a model is fetched
    encoder, params, tokenizer = load_dual_encoder(
        config.encoder,
        remat=config.training.gradient_checkpointing,
        weights=not config.planning.plan,
    )
    own = encoder_texts(config.encoder, tokenizer, encoder.max_length)
    data = with_model_texts(config.data, config.encoder.query_encoder, own)
    encoder.check_lengths(data.query_max_length, data.key_max_length)
    encoder.check_dims("--matryoshka_dims", config.loss.matryoshka_dims)
    lengths = {name: getattr(data, name) for name in OF_FOLDER}
    teacher = None
    if config.loss.teacher_encoder:
        of_teacher = replace(config, data=replace(config.data, **lengths))
        teacher = Teacher(of_teacher, files.cache, encoder)
    config = replace(config, data=data)
    check_sub_batches(config)
    frozen = {}
    if lora := Lora.of(config.training):
        for name in config.encoder.names:
            check_no_adapter(name, config.encoder.model_cache_dir)
        configs = encoder.query_config, encoder.key_config
        names = {part: of.names for part, of in zip(encoder.folders, configs, strict=False)}
        params, frozen = with_adapters(params, names, lora, encoder.dtype, config.training.seed)
        encoder = replace(encoder, lora=lora)
    return Opened(DualTask(config, encoder, tokenizer, teacher, files), params, frozen)


@dataclass(frozen=True)
class DualTask:
    """See `training.task.Task`."""

    config: Config
    encoder: DualEncoder
    tokenizer: object
    teacher: Teacher | None = None
    files: Files | None = None  # of its evaluation

    flag = "--query_encoder"
    layout = None  # queries and keys are read apart

    @property
    def rules(self) -> tuple:
        return self.encoder.sharding_rules

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        if self.encoder.tied:
            return {"texts": ("query", "key")}
        return {"queries": ("query",), "keys": ("key",)}

    @property
    def exports(self) -> tuple[str, ...]:
        return self.encoder.folders + self.encoder.adapter_folders

    def outputs(self, params, texts, key, *, chunk):
        out = {}
        for name, of in texts.items():
            compute = partial(self.encoder.encode_packed, params, field=self.streams[name][0])
            out |= over_texts(compute, of, key, chunk=chunk)
        return out

    def loss(self, outputs, batch, *, recipe, devices):
        """Of embeddings of all queries [B, D] and keys [M, D]."""
        inputs = (outputs["query"], outputs["key"], *batch[1:])
        of_batch = partial(losses.total, loss=recipe, dense_metric=self.encoder.metric)
        if recipe.negative_cross_device or devices == 1:
            return of_batch(*inputs)
        per_device = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), inputs)
        value, parts = jax.vmap(of_batch)(*per_device)
        return value.mean(), {name: part.mean() for name, part in parts.items()}

    def forward_flops(self, params: dict, work: dict[str, tuple[float, float]]) -> float:
        flops = self.encoder.flops
        return sum(flops(params, self.streams[name][0], *of) for name, of in work.items())

    def recomputing(self, on: bool) -> "DualTask":
        return replace(self, encoder=replace(self.encoder, remat=on))

    def evaluator(self, mesh: Mesh) -> RetrievalEvaluator | None:
        if not self.config.data.eval_data:
            return None
        return RetrievalEvaluator(self.config, self.files, self.tokenizer, self.encoder, mesh)

    def exporter(self, params: dict, tasks: list[str]) -> Callable[[Path], None]:
        return partial(
            save_dual_encoder,
            encoder=self.encoder,
            params=params,
            tokenizer=self.tokenizer,
            query_max_length=self.config.data.query_max_length,
            key_max_length=self.config.data.key_max_length,
            truncation_side=self.config.data.truncation_side,
            prompts=_prompts(self.config, tasks),
            bases=self.config.encoder.names,
        )


def _prompts(config: Config, tasks: list[str]) -> dict[str, str]:
    """The texts put in front, by the names that sentence-transformers knows, `query` and
    `document`; of several tasks these are the first one's, and each has its own (`qa-query`)."""
    instructions = [instruction_of(config.data, task or None) for task in tasks]
    prompts = dict(zip(("query", "document"), instructions[0], strict=True))
    if len(set(instructions)) > 1:
        for task, instruction in zip(tasks, instructions, strict=True):
            prompts |= {f"{task}-query": instruction.query, f"{task}-document": instruction.key}
    return prompts
