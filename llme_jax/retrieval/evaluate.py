"""Evaluation by retrieval: encodes queries and corpus, searches, computes the metrics."""

import json
import os
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llme_jax.config import Config, resolve_path
from llme_jax.data.arrays import digest
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import NO_INSTRUCTION, Instruction, find_instruction
from llme_jax.data.tokens import TokenStore, cache_dir, fingerprint, tokenize
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval.encode import encode
from llme_jax.retrieval.index import search
from llme_jax.retrieval.metrics import answer_recall, ranking_metrics


class Evaluator:
    """Evaluates an encoder on --eval_data and --corpus as often as wanted.

    Both files are read, validated and tokenised once, when it is built.

    Args:
        encoder: the static part of the encoder; its parameters come with every call.
        mesh: with axes (data, fsdp); the first device alone when None.

    Raises:
        InputError: eval data or corpus cannot be used; names the line and the remedy.
    """

    def __init__(self, config: Config, tokenizer, encoder: DualEncoder, mesh: Mesh | None = None):
        self.config, self.encoder, self.mesh = config, encoder, mesh
        data = config.data
        self._pad_id = tokenizer.pad_token_id
        self.corpus = Corpus(resolve_path(data.corpus, data.data_root), data.key_template)
        self.eval_data = EvalData(
            resolve_path(data.eval_data, data.data_root),
            metrics=config.evaluation.metrics,
            corpus_size=len(self.corpus),
        )
        instruction = self._instruction()
        self._queries = self._tokens(
            tokenizer, "query", self.eval_data, self.eval_data.texts, instruction.query
        )
        self._keys = self._tokens(tokenizer, "key", self.corpus, self.corpus, instruction.key)

    def __call__(self, params, step: int | None = None) -> dict[str, float]:
        """Metrics of the encoder with these parameters, as {"mrr@10": 0.5, ...}.

        Process 0 also writes the result file and a line of --log_path, when these are wanted.

        Args:
            step: of the training run, for the log.
        """
        scores, ids = self.retrieve(params)
        metrics = self._metrics(ids)
        if jax.process_index() == 0:
            if self.config.evaluation.save_result:
                path = result_path(self.config, self.eval_data.path)
                write_result(path, self.eval_data.query_ids, ids, scores)
            self._log(metrics, step)
        return metrics

    def retrieve(self, params) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of every query's hits, as `index.search` returns them."""
        batch_size = self.config.evaluation.batch_size
        queries, keys = (
            encode(
                self.encoder,
                params,
                store,
                field=field,
                batch_size=batch_size,
                pad_id=self._pad_id,
                mesh=self.mesh,
            )
            for field, store in (("query", self._queries), ("key", self._keys))
        )
        hits, metric = self.config.evaluation.hits, self.config.encoder.dense_metric
        return search(queries, keys, hits, metric, batch_size=batch_size, mesh=self.mesh)

    def _metrics(self, ids: np.ndarray) -> dict[str, float]:
        settings, data = self.config.evaluation, self.eval_data
        metrics = {}
        if data.positives is not None:
            metrics |= ranking_metrics(settings.metrics, ids, data.positives, settings.cutoffs)
        if data.answers is not None:
            metrics |= answer_recall(ids, data.answers, self.corpus.text)
        return metrics

    def _instruction(self) -> Instruction:
        if not self.config.data.add_instruction:
            return NO_INSTRUCTION
        try:
            return find_instruction(self.config.data.version, self.eval_data.task)
        except InputError as error:
            raise InputError(f"{self.eval_data.path}: {error}") from None

    def _tokens(
        self, tokenizer, field: str, source: Corpus | EvalData, texts: Iterable[str], prefix: str
    ) -> TokenStore:
        data = self.config.data
        length = getattr(data, f"{field}_max_length")
        template = data.key_template if field == "key" else None
        side = data.truncation_side
        return tokenize(
            (prefix + text for text in texts),
            tokenizer,
            max_length=length,
            truncation_side=side,
            key=digest(
                field, source.digest, template, prefix, fingerprint(tokenizer), length, side
            ),
            cache=cache_dir(data.dataset_cache_dir),
            total=len(source),
            desc=f"Tokenising {source.path.name}",
        )

    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        if not self.config.evaluation.log_path:
            return
        path = Path(self.config.evaluation.log_path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "step": step,
            "metrics": metrics,
            "command": " ".join(sys.argv),
            "settings": self.config.flat(),
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def result_path(config: Config, eval_data: Path) -> Path:
    """`{output_dir}/{eval stem}.result[.{save_name}].json`"""
    parts = [eval_data.stem, "result", config.evaluation.save_name, "json"]
    folder = Path(config.training.output_dir).expanduser()
    return folder / ".".join(part for part in parts if part)


def write_result(path: Path, query_ids: list, ids: np.ndarray, scores: np.ndarray) -> None:
    """One line a query, in order: {"query_id", "pred": ids, "score"}, best first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        for query_id, pred, score in zip(query_ids, ids, scores, strict=True):
            found = pred >= 0
            row = {"query_id": query_id, "pred": pred[found].tolist()}
            row["score"] = score[found].tolist()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(beside, path)
