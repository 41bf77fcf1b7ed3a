"""The keys that a language model reads with each row: found in --corpus, or brought by the row."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llme_jax.config import RetrieveConfig
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.data.beir import corpus_file, queries_file
from llme_jax.files.atomic import digest, digest_file
from llme_jax.files.storage import result_path
from llme_jax.models.weights import find_model, fingerprint_files
from llme_jax.retrieval.results import write_json
from llme_jax.retrieval.run import retrieved

logger = logging.getLogger(__name__)

# Of a retrieval, what changes nothing that is found.
_NO_MATTER = {"output_dir", "log_path", "metrics", "cutoffs", "save_to_output", "load_result"}
_NO_MATTER |= {"batch_size", "save_encode", "load_encode", "save_index", "load_index", "threads"}
_NO_MATTER |= {"coordinator_address", "num_processes", "process_id", "dataset_cache_dir"}
_NO_MATTER |= {"data_root", "model_cache_dir", "eval_data", "corpus", "save_trec"}


class Knowledge(NamedTuple):
    """
    Attributes:
        path: JSON lines of the rows.
        keys: of row i, the best first.
        numbers: of these keys in the corpus.
        digest: of all that was found.
    """

    path: Path
    keys: Callable[[int], Sequence[str]]
    numbers: Callable[[int], list[int]]
    digest: str


def find(config: EvaluateConfig, folder: Path, most: int) -> Knowledge:
    """Finds keys in --corpus, measures that, and writes the files of llme_jax.retrieve.

    What an earlier run with the same settings and files has found is taken again.

    Args:
        folder: for the files.
        most: keys of a row.
    """
    settings = _retrieval(config, folder)
    eval_data = Path(queries_file(settings.data))
    result = result_path(folder, eval_data, "result", settings.evaluation.save_name)
    record = result_path(folder, eval_data, "found", settings.evaluation.save_name)
    describe = _description(settings, eval_data)
    settings.retrieval.load_result |= _is_there(record, result, describe)
    corpus, rows, ranking = retrieved(settings)
    if jax.process_index() == 0 and settings.evaluation.save_result and result.is_file():
        write_json(record, {"retrieval": describe, "result": digest_file(result)})
    ids = [row[row >= 0][:most].tolist() for row in ranking.ids]
    return Knowledge(
        rows.path,
        lambda i: [corpus.text(id) for id in ids[i]],
        ids.__getitem__,
        digest(ids, corpus.digest, corpus.key_template),
    )


def _retrieval(config: EvaluateConfig, folder: Path) -> RetrieveConfig:
    settings = RetrieveConfig()
    settings.take_over(config)
    settings.evaluation.metrics = list(config.evaluation.metrics)
    settings.retrieval.retrieval_method = config.retrieval.retrieval_method
    settings.retrieval.output_dir, settings.retrieval.save_to_output = str(folder), True
    return settings


def _description(settings: RetrieveConfig, eval_data: Path) -> str:
    """A digest of everything that decides what is found."""
    values = {n: v for n, v in settings.flat().items() if n not in _NO_MATTER}
    encoder, models = settings.encoder, []
    if settings.retrieval.retrieval_method == "dense":
        names = {encoder.query_encoder, *([] if encoder.tie_encoders else [encoder.key_encoder])}
        folders = [find_model(name, encoder.model_cache_dir) for name in sorted(names)]
        models = [fingerprint_files(model) for model in folders]
    files = digest_file(eval_data), digest_file(Path(corpus_file(settings.data)))
    return digest(sorted(values.items()), models, files)


def _is_there(record: Path, result: Path, describe: str) -> bool:
    """Is there a result file of the same retrieval? Process 0 decides for all."""
    there = False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        there = found == {"retrieval": describe, "result": digest_file(result)}
    except (OSError, ValueError):
        pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        there = bool(multihost_utils.broadcast_one_to_all(np.array(there)))
    return there
