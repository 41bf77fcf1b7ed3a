"""Checks training files before anybody pays for a chip: what is in them, and what is wrong."""

import json
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from llme_jax.config import DataConfig, DoctorConfig, EncoderConfig, LossConfig, TextConfig
from llme_jax.data.corpus import Corpus, read_queries
from llme_jax.data.dataset import check_one_recipe
from llme_jax.data.instructions import check_recipes, find_eval_instruction, with_model_texts
from llme_jax.doctor.counts import Lines
from llme_jax.doctor.facts import FileFacts, read_facts
from llme_jax.doctor.findings import find
from llme_jax.doctor.report import show
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_write
from llme_jax.files.storage import check_writable
from llme_jax.hugging_face.folders import find_model
from llme_jax.hugging_face.foreign import read_json
from llme_jax.hugging_face.reading import Cutter
from llme_jax.hugging_face.texts import NO_LIMIT, TextDefaults, open_tokenizer, text_defaults
from llme_jax.sources.resolve import Files


def examine(config: DoctorConfig) -> int:
    """Prints what is found, writes what --json and --plot ask for; returns the exit code.

    Returns:
        1 when training would stop at these files, else 0.

    Raises:
        InputError: a file is missing, or there is no tokenizer to measure texts with.
    """
    data, encoder, loss, measured, doctor = config.groups()
    if data.use_train_config:
        check_recipes(data.version)
    written = {"--json": doctor.json if doctor.json != "-" else None, "--plot": doctor.plot}
    for flag, path in written.items():
        if path:
            check_writable(flag, path, is_file=True)
    sources = Files(config.flat())
    paths = sources.training
    tokenizer, own = _find_tokenizer(encoder)
    data = with_model_texts(data, encoder.query_encoder, own)
    evaluation = _read_eval(data, sources, measured.metrics)
    files, facts = [], []
    for path in dict.fromkeys(paths):
        facts.append(read_facts(path, data, Cutter(tokenizer, NO_LIMIT, "right")))
        files.append(facts[-1].summary(data, loss))
        files[-1]["eval"] = evaluation and evaluation.overlap(facts[-1])
    stops, remarks = find(files, evaluation and evaluation.bad, data.max_bad_rows)
    stops += _different_losses(facts, data, loss)
    if evaluation and evaluation.stops:
        stops.append(evaluation.stops)
    report = {"files": files, "stops_training": stops, "remarks": remarks}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text if doctor.json == "-" else show(files, stops, remarks))
    if path := written["--json"]:
        with atomic_write(Path(path).expanduser()) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    if doctor.plot:
        _plot(facts, data, Path(doctor.plot).expanduser())
    return 1 if stops else 0


def _find_tokenizer(encoder: EncoderConfig) -> tuple[object, TextDefaults]:
    """The tokenizer of --query_encoder, and what its folder says of texts."""
    try:
        model = find_model(encoder.query_encoder, encoder.model_cache_dir, weights=False)
        tokenizer = open_tokenizer(model)
        config = read_json(model.config) if model.config.is_file() else {}
        longest = config.get("max_position_embeddings") or NO_LIMIT
        return tokenizer, text_defaults(model, tokenizer, longest)
    except InputError as error:
        raise InputError(
            f"{error}; the texts are measured with its tokenizer: --query_encoder FOLDER names a "
            "model that is here"
        ) from None


@dataclass
class EvalQueries:
    """The queries to evaluate on, and the passages that answer them, as hashes.

    Attributes:
        queries: int64[Q].
        positives: int64[P], the text of each positive passage; empty without a corpus.
        owners: int64[P], whose query each positive is.
        bad: lines that are left out.
        stops: what training would say of the file as a whole, if anything.
    """

    path: str
    queries: ndarray
    positives: ndarray
    owners: ndarray
    bad: Lines
    stops: str | None

    def overlap(self, facts: FileFacts) -> dict:
        """How much of this a training file holds too."""
        trained = facts.positives.contains(self.positives)
        return {
            "file": self.path,
            "queries": len(self.queries),
            "queries_in_training": int(facts.queries.contains(self.queries).sum()),
            "queries_with_positives": len(np.unique(self.owners)),
            "queries_with_positives_in_training": len(np.unique(self.owners[trained])),
        }


def _different_losses(facts: list[FileFacts], data: DataConfig, loss: LossConfig) -> list[str]:
    """What training would say of files that cannot share a batch."""
    if data.inbatch_same_dataset is not None or not data.use_train_config:
        return []
    datasets = []
    for file in facts:
        with suppress(InputError):  # has been found already
            datasets.append(file.dataset(data, loss))
    try:
        check_one_recipe(datasets)
    except InputError as error:
        return [str(error)]
    return []


def _read_eval(data: TextConfig, sources: Files, metrics: list[str]) -> EvalQueries | None:
    """The queries of --eval_data and, where there is a corpus, their positives."""
    if data.eval_data is None:
        return None
    path = sources.queries
    corpus = Corpus(sources.corpus, data.key_template) if sources.corpus else None
    queries, positives, owners = array("q"), array("q"), array("q")
    bad, stops, size = Lines(), None, corpus and len(corpus)
    rows = read_queries(path, metrics=metrics, corpus_size=size, bad_rows=bad)
    for _, row in rows:
        for i in _positives(row, size or 0):
            positives.append(hash(corpus.text(i)))
            owners.append(len(queries))
        queries.append(hash(row["query"]))
    if not (queries or bad.count):
        raise InputError(f"{path}: has no queries, give --eval_data a file that does")
    if queries:
        try:
            find_eval_instruction(data, path, row.get("task"))
        except InputError as error:
            stops = str(error)
    columns = (np.array(a, np.int64) for a in (queries, positives, owners))
    return EvalQueries(str(path), *columns, bad, stops)


def _positives(row: dict, corpus_size: int) -> set[int]:
    """Where a query's positives are in the corpus; metrics that need none do not check them."""
    indices = row.get("pos_index")
    if not isinstance(indices, list):
        return set()
    return {i for i in indices if type(i) is int and 0 <= i < corpus_size}


def _plot(facts: list[FileFacts], data: TextConfig, png: Path) -> None:
    """Histograms of all files together; what no row has gets no panel."""
    from llme_jax.plots import draw_histograms  # needs jax, which takes a second

    rows = [file.numbers()[1] for file in facts]
    spread = np.concatenate([r.highest - r.lowest for r in rows])
    queries, keys = "tokens of a query", "tokens of a distinct key"
    panels = {
        queries: np.concatenate([f.query_lengths.values() for f in facts]),
        keys: np.concatenate([f.key_lengths.values() for f in facts]),
        "negatives of a row": np.concatenate([r.n_keys - r.n_pos for r in rows]),
        "highest teacher score less lowest": spread[~np.isnan(spread)],
    }
    panels = {title: values for title, values in panels.items() if len(values)}
    limits = {
        queries: ("--query_max_length", data.query_max_length),
        keys: ("--key_max_length", data.key_max_length),
    }
    if panels:
        draw_histograms(panels, png, counted="number", limits=limits)
