"""One scoring, from settings to files: tokenise, score, reduce, write, report."""

import json
import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from llme_jax.config import LMConfig, ScoreConfig, ScoringConfig
from llme_jax.config.identity import identity
from llme_jax.data.rows import SCORES_OF, parse_scoring_row
from llme_jax.data.scoring import ScoringData, check_eval_data
from llme_jax.data.widths import choose_widths, fitting
from llme_jax.devices import topology
from llme_jax.devices.agree import agree, together
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_text, digest
from llme_jax.files.storage import check_writable, result_path
from llme_jax.hugging_face.folders import ModelFolder
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_files
from llme_jax.inference.partial_results import PartialResults, decimals, parts_folder
from llme_jax.lm.dry_run import show_plan
from llme_jax.lm.likelihood import Scorer, analyse
from llme_jax.lm.prompts import TEMPLATES, Pair, PromptMaker, Prompts
from llme_jax.lm.teacher_report import report_on
from llme_jax.models.causal_lm import CausalLM, load_causal_lm, open_causal_lm
from llme_jax.sources.resolve import Files

logger = logging.getLogger(__name__)

# Pairs of one part: what a kill can cost. Large enough that lengths within it fill whole batches.
PART = {"cpu": 1 << 8, "gpu": 1 << 14, "tpu": 1 << 14}
SAMPLE = 1 << 10  # prompts whose lengths decide the widths of batches
# Widths of batches, each of which is compiled: 16 leave 8% of padding where lengths are spread as
# those of passages are, 32 leave 5%, which pays where scoring takes hours.
WIDTHS, MANY_WIDTHS, MANY_PAIRS = 16, 32, 100_000
TOKEN_LISTS = ("score_inputs", "context_inputs", "query_inputs", "answer_inputs")

REDUCTIONS = {
    "first": lambda scores: scores[:, 0],
    "max": lambda scores: scores.max(1),
    "mean": lambda scores: scores.mean(1),
    "logsumexp": lambda scores: np.logaddexp.reduce(scores, axis=1),
}


def score(config: ScoreConfig) -> int:
    """Returns the exit code."""
    settings, model, planning, _ = config.groups()
    if settings.report:
        return report_on(Files(config.flat()).rows) if jax.process_index() == 0 else 0
    with together():
        files = Files(config.flat())
        path, beside = files.rows, _beside(settings, files)
        check_eval_data(path)
        # Each process scores its share with its own devices: nothing waits for another host.
        devices = topology.devices(planning.topology) or jax.local_devices()
        mesh = make_mesh(model.fsdp, model.tensor, devices=devices)
        lm, folder, tokenizer = open_lm(model, weights=not planning.plan)
        data = ScoringData(path, lambda record, _: parse_scoring_row(record, TEMPLATES))
    out = result_path(beside, path, "scored", settings.save_name)
    most = 1 if settings.answer_reduction == "first" else None
    pairs = data.candidates * (np.minimum(data.answers, 1) if most else data.answers)

    def prepared() -> tuple[PromptMaker, np.ndarray, list[int]]:
        """What makes prompts, tokens of some, and the widths of batches that suit them."""
        limits = model.key_max_length, model.context_max_length
        prompts = PromptMaker(tokenizer, key_max_length=limits[0], context_max_length=limits[1])
        lengths, many = _sample(data, most, prompts).store.lengths, pairs.sum() > MANY_PAIRS
        widths = choose_widths(lengths, limits[1], MANY_WIDTHS if many else WIDTHS)
        return prompts, lengths, widths

    if planning.plan:
        _, lengths, widths = prepared()
        return show_plan(
            *(planning, lm, mesh, lengths, int(pairs.sum()), lambda n: fitting(widths, n)),
            *(widths[-1], model.rows, analyse, "--lm_batch_size"),
        )
    described = _identity(data, folder, lm, tokenizer, config)
    agree(config, described)
    partial = PartialResults(parts_folder(out, described), pairs)
    missing = partial.missing(PART[jax.default_backend()] * jax.local_device_count())
    if partial.found:
        logger.info("%d of %d pairs are scored already", partial.found, len(partial.scores))
    if missing and settings.load_score:
        raise InputError(
            f"--load_score: {len(partial.scores) - partial.found} of {len(partial.scores)} pairs "
            "have no score yet; run without it to score them"
        )
    if missing:
        prompts, _, widths = prepared()
        scorer = Scorer(lm, load_causal_lm(lm, folder, mesh), mesh, widths, model.rows)

        def tokenized(ranges) -> Iterator[Prompts]:
            for part in data.parts(ranges):
                yield prompts(_pairs(part, most, path))

        partial.fill(missing, tokenized, scorer)
    if jax.process_index() != 0:
        return 0
    _write(out, data, partial, settings.answer_reduction)
    print(f"scores: {out}")
    if data.candidates.max() < 2:
        print("no row has two candidates, so there is nothing to compare")
        return 0
    return report_on(out)


def _beside(settings: ScoringConfig, files: Files) -> Path:
    """Where scored rows go; can it be written to?"""
    folder = files.beside or Path.cwd()
    flag, remedy = "--eval_data", "results go there, give an --output_dir"
    if settings.output_dir:
        flag, folder = "--output_dir", Path(settings.output_dir).expanduser()
        remedy = "give another path"
    if jax.process_index() == 0 and (settings.output_dir or folder.is_dir()):
        check_writable(flag, folder, remedy=remedy)
    return folder


def open_lm(model: LMConfig, *, weights: bool = True) -> tuple[CausalLM, ModelFolder, object]:
    """The language model that `model` names, see `open_causal_lm`.

    Raises:
        InputError: it cannot be found or served, or reads shorter prompts.
    """
    opened = open_causal_lm(
        model.model_name_or_path,
        dtype=model.lm_dtype,
        cache_dir=model.model_cache_dir,
        weights=weights,
    )
    if model.context_max_length > (readable := opened[0].max_length):
        raise InputError(
            f"--context_max_length {model.context_max_length}: {model.model_name_or_path} reads "
            f"{readable} tokens, give {readable} or less"
        )
    return opened


def _pairs(part: list, most: int | None, path: Path) -> list[Pair]:
    """Every candidate of the rows with every answer, or with the first `most` of them."""
    return [
        Pair(row, key, answer, f"{path}:{line}")
        for line, row in part
        for key, answer in product(range(len(row.keys)), range(len(row.answers[:most])))
    ]


def _sample(data: ScoringData, most: int | None, prompts: PromptMaker) -> Prompts:
    """About SAMPLE prompts from all over the file, the same in every run."""
    step = -(-len(data) // SAMPLE)
    rows = [(row, row + 1) for row in range(0, len(data), step)]
    pairs = [pair for part in data.parts(rows) for pair in _pairs(part, most, data.path)]
    return prompts(pairs[:: max(1, len(pairs) // SAMPLE)])


def _identity(data, folder: ModelFolder, lm, tokenizer, config: ScoreConfig) -> dict[str, object]:
    """What scores depend on."""
    return identity(
        config,
        "scores",
        data=data.digest,
        model=fingerprint_files(folder),
        computed=repr(lm),
        tokenizer=fingerprint(tokenizer),
        templates=digest(sorted(TEMPLATES.items())),
        answers="first" if config.scoring.answer_reduction == "first" else "all",
    )


def _write(out: Path, data: ScoringData, partial: PartialResults, reduction: str) -> None:
    """Every row in order, with `teacher_scores` for each of its candidates."""
    rows = tqdm(data.records(), total=len(data), desc=f"Writing {out.name}", unit=" rows")
    with atomic_text(out) as file:
        for i, record in enumerate(rows):
            scores = partial.of_row(i)
            if len(scores):
                scores = REDUCTIONS[reduction](scores.reshape(data.candidates[i], -1))
            record["teacher_scores"] = decimals(scores)
            record.pop(SCORES_OF, None)
            if record["task"] == "lrlm":
                for name in TOKEN_LISTS:
                    record.pop(name, None)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
