"""The reranker as a task: pairs of query and key to scores, losses on each query's own keys."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from jax.sharding import Mesh

from llme_jax.config import RankConfig
from llme_jax.config.validate import check_sub_batches
from llme_jax.data.instructions import instruction_of
from llme_jax.data.pairs import PairLayout
from llme_jax.hugging_face.folders import check_no_adapter
from llme_jax.models.cross_encoder import FOLDER, CrossEncoder, save_cross_encoder
from llme_jax.models.lora import Lora, with_adapters
from llme_jax.rerank.cross_scorer import open_ranker
from llme_jax.rerank.evaluate import RerankEvaluator
from llme_jax.sources.resolve import Files
from llme_jax.training import rank_losses
from llme_jax.training.chunks import over_texts
from llme_jax.training.task import Opened


def open_cross(config: RankConfig, files: Files) -> Opened:
    """The reranker that `config` names.

    Raises:
        InputError: as `open_ranker`.
    """
    weights = not config.planning.plan
    config, encoder, params, tokenizer, layout = open_ranker(config, weights=weights)
    check_sub_batches(config)
    frozen = {}
    if lora := Lora.of(config.training):
        check_no_adapter(config.ranker.ranker, config.ranker.model_cache_dir)
        parts, names = encoder.apart(params), {"base": encoder.config.names}
        params, frozen = with_adapters(parts, names, lora, encoder.dtype, config.training.seed)
        encoder = replace(encoder, lora=lora)
    return Opened(CrossTask(config, encoder, tokenizer, layout, files), params, frozen)


@dataclass(frozen=True)
class CrossTask:
    """See `training.task.Task`."""

    config: RankConfig
    encoder: CrossEncoder
    tokenizer: object
    layout: PairLayout
    files: Files | None = None  # of its evaluation

    flag = "--ranker"
    streams: ClassVar = {"pairs": ("pair",)}
    teacher = None

    @property
    def rules(self) -> tuple:
        return self.encoder.sharding_rules

    @property
    def exports(self) -> tuple[str, ...]:
        return (FOLDER, *self.encoder.adapter_folders)

    def outputs(self, params, texts, key, *, chunk):
        compute = partial(self.encoder.score_packed, params)
        return over_texts(compute, texts["pairs"], key, chunk=chunk)

    def loss(self, outputs, batch, *, recipe, devices):
        teacher = batch.teacher_scores
        scores = outputs["pair"].reshape(teacher.shape)
        return rank_losses.total(scores, teacher, batch.has_scores, recipe)

    def forward_flops(self, params: dict, work: dict[str, tuple[float, float]]) -> float:
        return self.encoder.flops(params, *work["pairs"])

    def recomputing(self, on: bool) -> "CrossTask":
        return replace(self, encoder=replace(self.encoder, remat=on))

    def evaluator(self, mesh: Mesh) -> RerankEvaluator | None:
        if not self.config.data.eval_data:
            return None
        model = self.encoder, self.tokenizer, self.layout
        return RerankEvaluator(self.config, self.files.queries, *model, mesh)

    def exporter(self, params: dict, tasks: list[str]) -> Callable[[Path], None]:
        return partial(
            save_cross_encoder,
            encoder=self.encoder,
            params=params,
            tokenizer=self.tokenizer,
            max_length=self.layout.limit,
            truncation_side=self.layout.side,
            prompt=_prompt(self.config, tasks),
            base=self.config.ranker.ranker,
        )


def _prompt(config: RankConfig, tasks: list[str]) -> str:
    """The text before all queries, which the folder says; none where tasks have their own, or keys
    have one too, as folders of rerankers have no place for such."""
    found = {instruction_of(config.data, task or None) for task in tasks}
    query, key = found.pop()
    return query if not found and not key else ""
