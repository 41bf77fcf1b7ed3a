"""The keys of questions that are found in --corpus."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llme_jax.config import RetrieveConfig
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.evaluation.questions import Keys
from llme_jax.evaluation.texts import keys_of_corpus
from llme_jax.files.atomic import digest, digest_file
from llme_jax.files.storage import result_path
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.weights import fingerprint_files
from llme_jax.retrieval.results import write_json
from llme_jax.retrieval.run import retrieved
from llme_jax.sources.resolve import Files

# Settings that decide what is found, beside the files and the encoder's weights.
DECISIVE = (
    *("key_template", "version", "add_instruction", "query_instruction", "key_instruction"),
    *("query_max_length", "key_max_length", "truncation_side"),
    *("tie_encoders", "pooling_method", "dense_metric", "dtype", "hits", "ignore_identical"),
    *("retrieval_method", "faiss_index_factory", "k1", "b", "language", "seed"),
)


def find(config: EvaluateConfig, files: Files, folder: Path, most: int) -> Keys:
    """Finds keys, measures that, and writes the files of llme_jax.retrieve.

    What an earlier run with the same settings and files has found is taken again.

    Args:
        folder: for the files.
        most: keys of a row.
    """
    settings = RetrieveConfig()
    settings.take_over(config)
    settings.evaluation.metrics = list(config.evaluation.metrics)
    how, save_name = settings.retrieval, settings.evaluation.save_name
    how.output_dir, how.save_to_output = str(folder), True

    eval_data = files.queries
    result = result_path(folder, eval_data, "result", save_name)
    record = result_path(folder, eval_data, "found", save_name)
    described = _description(settings, files)
    given = how.load_result
    how.load_result |= _is_there(record, result, described)
    corpus, _, ranking = retrieved(settings, files)
    if jax.process_index() == 0 and settings.evaluation.save_result and not given:
        # Last, so that a run that was killed before searches again.
        write_json(record, {"retrieval": described, "result": digest_file(result)})
    return keys_of_corpus(corpus, [row[row >= 0][:most].tolist() for row in ranking.ids])


def _description(settings: RetrieveConfig, files: Files) -> str:
    """A digest of everything that decides what is found."""
    values, encoder, models = settings.flat(), settings.encoder, []
    if settings.retrieval.retrieval_method == "dense":
        folders = [find_model(name, encoder.model_cache_dir) for name in encoder.names]
        models = [fingerprint_files(folder) for folder in folders]
    contents = list(map(digest_file, (files.queries, files.corpus)))
    return digest([values[name] for name in DECISIVE], models, contents)


def _is_there(record: Path, result: Path, described: str) -> bool:
    """Is there a result file of the same retrieval? Process 0 decides for all."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        there = found == {"retrieval": described, "result": digest_file(result)}
    except (OSError, ValueError):
        there = False
    if jax.process_count() > 1:
        there = bool(multihost_utils.broadcast_one_to_all(np.array(there)))
    return there
