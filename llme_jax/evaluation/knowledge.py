"""The keys of questions that are found in --corpus."""

import json
from functools import partial
from pathlib import Path

import jax

from llme_jax.config import RetrieveConfig
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.identity import identity
from llme_jax.devices.agree import from_first
from llme_jax.evaluation.questions import Keys
from llme_jax.evaluation.texts import keys_of_corpus
from llme_jax.files.atomic import digest_file
from llme_jax.files.storage import result_path
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.weights import fingerprint_files
from llme_jax.retrieval.evaluate import depth
from llme_jax.retrieval.results import write_json
from llme_jax.retrieval.run import retrieved
from llme_jax.sources.resolve import Files


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
    # What is measured again is measured of the same.
    settings.evaluation.hits = depth(settings.evaluation)

    eval_data = files.queries
    result = result_path(folder, eval_data, "result", save_name)
    record = result_path(folder, eval_data, "found", save_name)
    described = _identity(settings, files)
    given = how.load_result
    how.load_result |= from_first(partial(_is_there, record, result, described))
    corpus, _, ranking = retrieved(settings, files)
    if jax.process_index() == 0 and settings.evaluation.save_result and not given:
        # Last, so that a run that was killed before searches again.
        write_json(record, {"retrieval": described, "result": digest_file(result)})
    return keys_of_corpus(corpus, [row[row >= 0][:most].tolist() for row in ranking.ids])


def _identity(settings: RetrieveConfig, files: Files) -> dict:
    """Everything that decides what is found."""
    encoder, facts = settings.encoder, {}
    if settings.retrieval.retrieval_method == "dense":
        folders = [find_model(name, encoder.model_cache_dir) for name in encoder.names]
        facts["models"] = list(map(fingerprint_files, folders))
    facts["content"] = [digest_file(path) for path in (files.queries, files.corpus)]
    return identity(settings, "queries", "keys", "texts", "vectors", "hits", **facts)


def _is_there(record: Path, result: Path, described: dict) -> bool:
    """Is there a result file of the same retrieval?"""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return found == {"retrieval": described, "result": digest_file(result)}
    except (OSError, ValueError):
        return False
