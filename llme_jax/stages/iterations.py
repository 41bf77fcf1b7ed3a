"""The stages of SimLM's pipeline (arXiv:2207.02578): mine, train, mine, train, score, distil."""

import shlex
from dataclasses import dataclass, replace
from typing import ClassVar

from llme_jax.config import HaveNegatives, NotBelow, PipelineConfig, Stage, UsefulScores
from llme_jax.config.data import SourceConfig

SMALL = (
    "--max_steps 4 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2 "
    "--train_group_size 4"
)


@dataclass(frozen=True)
class Recipe:
    """The words of each kind of command, as they are typed; of two the same the later one counts.

    Attributes:
        train_data, eval_data, corpus: rows to train on, queries to evaluate on, passages.
        mining_corpus: passages that negatives are taken from; `corpus` when empty.
        texts: of every command: lengths, templates, instructions.
        encoder: of every encoder: pooling, similarity.
        metrics: of every evaluation.
        mined: metrics of every mining.
        bm25, mine: of mining with BM25 and with a retriever.
        retriever: of training a retriever; `distil` stands behind it where scores are distilled.
        pairs: of every command of a reranker; `ranker` of training one.
        depth: hits that it orders when it is measured.
        lm: of scoring with a language model.
        tolerated: how far a retriever may fall below the untrained encoder.
    """

    train_data: str
    eval_data: str
    corpus: str
    texts: str
    encoder: str
    metrics: str
    bm25: str
    mine: str
    retriever: str
    distil: str
    ranker: str
    mining_corpus: str = ""
    mined: str = "mrr recall"
    pairs: str = ""
    depth: int = 100
    lm: str = ""
    tolerated: float = 0.01

    def small(self) -> "Recipe":
        """The same with a few steps for every model."""
        return replace(
            self,
            retriever=last_counts(f"{self.retriever} {SMALL}"),
            distil=f"{self.distil} {SMALL}",
            ranker=last_counts(f"{self.ranker} {SMALL}"),
        )


@dataclass
class Iterations(PipelineConfig):
    """An experiment of these stages; a subclass says with what words."""

    recipe: ClassVar[Recipe]

    def stages(self) -> list[Stage]:
        return iterations(self, self.recipe.small() if self.pipeline.trial else self.recipe)


def iterations(config: PipelineConfig, r: Recipe) -> list[Stage]:
    """Retrievers r1, r2, ...; each starts from the pre-trained encoder, on other negatives.

    r1 trains on the negatives of BM25, every other on those that the one before it mines. Those of
    the last (of all, with --refresh) are scored by the teacher, and it is distilled from them.
    """
    s, out, root = config.pipeline, shlex.quote(config.pipeline.output_dir), _root(config)
    every = f"--log_path {out}/performance.log{root}"
    mined = (
        f"--eval_data {r.train_data} --corpus {r.mining_corpus or r.corpus} {r.texts} "
        f"--metrics {r.mined} collate_neg --save_to_output {every}"
    )
    measured = f"--eval_data {r.eval_data} --corpus {r.corpus} {r.texts} {r.metrics} {every}"
    start = f"--query_encoder {shlex.quote(s.query_encoder)} {r.encoder}"
    stem, negatives = _stem(r.train_data), (HaveNegatives(0.9),)
    stages = [
        Stage("untrained", "retrieve", f"{start} {measured}", baseline=True),
        Stage("bm25", "retrieve", f"--retrieval_method bm25 {mined} {r.bm25} --save_name bm25",
              negatives),
    ]  # fmt: skip
    rows = f"{out}/bm25/{stem}.neg.bm25.json"
    for i in range(1, s.iterations + 1):
        name, last, words = f"r{i}", i == s.iterations, r.retriever
        if last or s.refresh:
            teacher, rows = _teacher(config, r, rows, i, every, measured)
            stages, words = [*stages, *teacher], last_counts(f"{words} {r.distil}")
        best = f"--query_encoder {out}/{name}/best/encoder {r.encoder}"
        not_below = (NotBelow(s.metric or "ndcg@10", "untrained", r.tolerated),)
        stages += [
            Stage(name, "train", f"{start} --train_data {rows} {r.texts} {words} "
                  f"--seed {s.seed} {every}"),
            Stage(f"{name}-test", "retrieve", f"{best} {measured}", not_below),
        ]  # fmt: skip
        if not last:
            words = f"{best} {mined} {r.mine} --save_name {name}"
            stages.append(Stage(f"{name}-mine", "retrieve", words, negatives))
            rows = f"{out}/{name}-mine/{stem}.neg.{name}.json"
    return stages


def _teacher(
    config: PipelineConfig, r: Recipe, rows: str, i: int, every: str, measured: str
) -> tuple[list[Stage], str]:
    """The stages that score the mined rows of retriever i, and the file with the scores."""
    s, out, name = config.pipeline, shlex.quote(config.pipeline.output_dir), f"r{i}-scores"
    lm = shlex.quote(s.model_name_or_path)
    scored = f"{out}/{name}/{_stem(rows)}.scored.{s.teacher}.json"
    useful = (UsefulScores(),)
    if s.teacher == "lm":
        words = f"--eval_data {rows} --model_name_or_path {lm} {r.lm} --save_name lm{_root(config)}"
        return [Stage(name, "score", words, useful)], scored
    pairs = last_counts(f"{r.texts} {r.pairs}")
    score = (
        f"--eval_data {rows} {pairs} --metrics mrr recall collate_score "
        f"--save_to_output --save_name {s.teacher} {every}"
    )
    if s.teacher == "yes-no":
        words = f"--ranker {lm} --ranker_method yes-no {score}"
        return [Stage(name, "rank", words, useful)], scored
    trained, ranker = f"r{i}-ranker", f"--ranker {out}/r{i}-ranker/best/ranker"
    start = f"--ranker {shlex.quote(s.ranker)} --train_data {rows} {pairs}"
    stages = [Stage(trained, "rank", f"{start} {r.ranker} --seed {s.seed} {every}")]
    if i > 1:  # what it makes of the last retriever's hits
        hits = f"{out}/r{i - 1}-test/{_stem(r.eval_data)}.result.json"
        words = f"{ranker} --load_result {hits} --rerank_depth {r.depth} {measured} {r.pairs}"
        stages.append(Stage(f"{trained}-test", "rank", last_counts(words)))
    return [*stages, Stage(name, "rank", f"{ranker} {score}", useful)], scored


def _root(config: PipelineConfig) -> str:
    root = config.data.data_root
    return "" if root == SourceConfig().data_root else f" --data_root {shlex.quote(root)}"


def last_counts(words: str) -> str:
    """Without flags that come again further on."""
    flags: dict[str, list[str]] = {}
    for word in shlex.split(words):
        if word.startswith("--"):
            flags[name := word] = []
        else:
            flags[name].append(word)
    return shlex.join(word for name, values in flags.items() for word in (name, *values))


def _stem(name: str) -> str:
    """`llm-embedder:qa/nq/train.json` -> `train`"""
    (name,) = shlex.split(name)
    return name.split(":")[-1].split("/")[-1].removesuffix(".json")
