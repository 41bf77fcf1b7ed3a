"""Scores of pairs by a cross-encoder: batches of static shape over all devices, longest first."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llme_jax.config import PlanConfig, RankConfig, RankDataConfig
from llme_jax.data.candidates import CandidateRow
from llme_jax.data.instructions import instruction_of, with_ranker_texts
from llme_jax.data.pairs import PairLayout, Pairs, pair_layout
from llme_jax.data.tokens import TokenStore, bare_tokens, pair_tokens
from llme_jax.data.widths import fine_width
from llme_jax.devices import topology
from llme_jax.devices.memory import Needs, needs
from llme_jax.devices.sharding import abstract, make_mesh, on_each_device, replicated
from llme_jax.errors import InputError
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.reading import Cutter
from llme_jax.hugging_face.texts import text_defaults
from llme_jax.hugging_face.tokenizer import fingerprint, plain_backend
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.inference.dry_run import Reading, show, smaller_batches
from llme_jax.inference.over_store import batch_shapes, over_store, rows_a_batch
from llme_jax.models.cross_encoder import CrossEncoder, load_cross_encoder
from llme_jax.retrieval.encode import on_every_device

T = TypeVar("T")


class Scoring(NamedTuple, Generic[T]):
    """A way to score the candidates of rows.

    Attributes:
        describe: gives what scores depend on, besides the rows, by name.
        tokens: makes the input of all pairs of some rows, on the host.
        load: puts the model on the devices; returns what gives the pairs' scores, float32[n], and
            tells of pairs and tokens of each batch.
        plan: says what scoring will take: of some of the rows, and the number of all pairs, to the
            exit code.
    """

    describe: Callable[[], dict[str, str]]
    tokens: Callable[[Sequence[CandidateRow]], T]
    load: Callable[[], Callable[[T, Callable[[int, int], None]], np.ndarray]]
    plan: Callable[[Sequence[CandidateRow], int], int]


class Ranker(NamedTuple):
    """A cross-encoder as `load_cross_encoder` gives it.

    Attributes:
        config: with what its folder says of texts.
        layout: how it joins pairs.
    """

    config: RankConfig
    encoder: CrossEncoder
    params: dict
    tokenizer: object
    layout: PairLayout


def open_ranker(config: RankConfig, *, weights: bool = True) -> Ranker:
    """The cross-encoder that `config` names.

    Raises:
        InputError: the model cannot be found, read or served, or pairs are longer than it reads.
    """
    encoder, params, tokenizer = load_cross_encoder(
        config.ranker.ranker,
        dtype=config.ranker.dtype,
        cache_dir=config.ranker.model_cache_dir,
        remat=config.training.gradient_checkpointing,
        attention=config.ranker.attention,
        seed=config.training.seed,
        weights=weights,
    )
    model = find_model(config.ranker.ranker, config.ranker.model_cache_dir, weights=False)
    own = text_defaults(model, tokenizer, encoder.config.max_length)
    data = with_ranker_texts(config.data, config.ranker.ranker, own)
    limit = data.query_max_length + data.key_max_length
    if limit > encoder.config.max_length:
        raise InputError(
            f"--query_max_length and --key_max_length are {limit} tokens together: "
            f"{config.ranker.ranker} has {encoder.config.max_length} positions, give "
            f"{encoder.config.max_length} or less"
        )
    layout = pair_layout(tokenizer, limit, data.truncation_side)
    return Ranker(replace(config, data=data), encoder, params, tokenizer, layout)


def open_cross_scorer(config: RankConfig) -> tuple[RankConfig, Scoring]:
    """Scores with the cross-encoder that `config` names, on the devices of this process; and the
    settings with what its folder says of texts.

    Each process scores its share of the rows: nothing waits for another host.

    Raises:
        InputError: as `open_ranker`.
    """
    planning = config.planning
    config, encoder, params, tokenizer, layout = open_ranker(config, weights=not planning.plan)
    data = config.data
    mesh = make_mesh(devices=topology.devices(planning.topology) or jax.local_devices())
    scorer = CrossScorer(data, encoder, tokenizer, layout, mesh, config.evaluation.batch_size)

    def describe() -> dict[str, str]:
        return {
            "weights": fingerprint_params(params),
            "model": repr(replace(encoder, remat=False)),
            "tokenizer": fingerprint(tokenizer),
            "pairs": repr(layout),
        }

    plan = partial(scorer.plan, planning, params)
    return config, Scoring(describe, scorer.tokens, partial(scorer.bound, params), plan)


class CrossScorer:
    """Scores the candidates of rows.

    Args:
        encoder: the static part of the model.
        layout: how its tokenizer joins query and key.
        mesh: whose devices share every batch. With several processes on it, all call this with
            the same rows and all receive the scores.
        rows: queries scored at a time, at most; no score depends on it.
    """

    def __init__(
        self,
        data: RankDataConfig,
        encoder: CrossEncoder,
        tokenizer,
        layout: PairLayout,
        mesh: Mesh,
        rows: int,
    ):
        self._data, self._encoder = data, encoder
        self._tokenizer, self._pad_id = plain_backend(tokenizer), tokenizer.pad_token_id or 0
        self._cut = None
        if layout.in_template:
            self._cut = Cutter(tokenizer, layout.limit, layout.side)
        self._layout, self._mesh, self._rows = layout, mesh, rows

    def tokens(
        self, rows: Sequence[CandidateRow], desc: str | None = None
    ) -> tuple[Pairs | TokenStore, int]:
        """Every candidate of every row joined with its query, and the most that a row has.

        Args:
            desc: what a progress bar says; None for no bar.

        Raises:
            InputError: --version has no instruction for a row's task.
        """
        instructions = [instruction_of(self._data, row.task, row.prompt) for row in rows]
        counts = [len(row.keys) for row in rows]
        if self._cut:
            parts = [
                (row.query, i.key + key, i.query)
                for i, row in zip(instructions, rows, strict=True)
                for key in row.keys
            ]
            queries, keys, prompts = zip(*parts, strict=True) if parts else ((), (), ())
            return pair_tokens(queries, keys, prompts, self._cut), max(counts, default=0)
        queries = [i.query + row.query for i, row in zip(instructions, rows, strict=True)]
        keys: dict[str, int] = {}
        numbers = [
            keys.setdefault(i.key + key, len(keys))
            for i, row in zip(instructions, rows, strict=True)
            for key in row.keys
        ]
        limits = self._tokenizer, self._layout.limit, self._layout.side, desc
        pairs = Pairs(
            *(bare_tokens([*texts], *limits) for texts in (queries, keys)),
            self._layout,
            np.repeat(np.arange(len(rows)), counts),
            np.array(numbers, np.int64),
        )
        return pairs, max(counts, default=0)

    def __call__(
        self, params: dict, tokens: tuple[Pairs | TokenStore, int], done: Callable[[int, int], None]
    ) -> np.ndarray:
        """Raw scores of all pairs, float32[n].

        Args:
            params: whole on every device of the mesh.
            tokens: as `tokens` gives them.
            done: is told pairs and tokens of each batch as it is finished.
        """
        pairs, most = tokens
        if not len(pairs):
            return np.zeros(0, np.float32)
        mesh = self._mesh
        forward = partial(_forward, params, encoder=self._encoder, result=replicated(mesh))
        return over_store(
            pairs,
            lambda ids, lengths, second, _: forward(ids, lengths, second),
            mesh=mesh,
            pad_id=self._pad_id,
            **self._batches(self._rows, most),
            done=done,
        )

    @property
    def _longest(self) -> int:
        # Not that of some pairs: the next part would be compiled anew. Fused attention on GPU takes
        # even widths.
        return min(self._layout.limit + self._layout.limit % 2, self._encoder.config.max_length)

    def _batches(self, rows: int, most: int) -> dict[str, Callable[[int], int]]:
        """`width` and `rows` of batches of pairs, as `over_store` takes them.

        Args:
            rows: queries scored at a time.
            most: candidates that one of them has.
        """
        at_once = rows * max(most, 1)
        return {
            "width": lambda length: fine_width(length, self._longest),
            "rows": lambda width: rows_a_batch(self._mesh, width, at_once),
        }

    def plan(
        self, settings: PlanConfig, params: dict, sample: Sequence[CandidateRow], pairs: int
    ) -> int:
        """Says what scoring will take; returns the exit code.

        Args:
            params: shapes are enough.
            sample: some of the rows.
            pairs: how many there are in all.
        """
        of_sample, most = self.tokens(sample)
        mesh, encoder = self._mesh, self._encoder

        def readings(size: int) -> list[Reading]:
            return [
                Reading(
                    *("pairs", mesh, pairs, of_sample.lengths, self._longest),
                    **self._batches(size, most),
                    analyse=partial(analyse, encoder, params, mesh),
                    flops=partial(encoder.flops, params),
                )
            ]

        seek = partial(smaller_batches, self._rows, readings)
        shapes = abstract(params, replicated(mesh))
        return show(settings, shapes, readings(self._rows), seek)

    def bound(self, params: dict) -> Callable[..., np.ndarray]:
        """A call with these parameters, which go to the devices now."""
        return partial(self, on_every_device(params, self._mesh))


def analyse(encoder: CrossEncoder, params: dict, mesh: Mesh, rows: int, width: int) -> Needs:
    """Compiles the scoring of a batch of pairs; shapes of parameters are enough."""
    everywhere = replicated(mesh)
    pairs = batch_shapes(mesh, rows // mesh.size, (width,), (), ())
    how = {"encoder": encoder, "result": everywhere}
    return needs(_forward.lower(abstract(params, everywhere), *pairs, **how))


@partial(jax.jit, static_argnames=("encoder", "result"))
def _forward(params, ids, lengths, second, *, encoder: CrossEncoder, result: NamedSharding):
    def score(params, pairs, _):
        return encoder.score(params, *pairs)

    scores = on_each_device(score, params, (ids, lengths, second), None, result)
    # On every device, so that every process can read all of them.
    return jax.lax.with_sharding_constraint(scores, result)
