"""One evaluation, from settings to files: find keys, ask the language model, judge, measure."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.validate import asks, searches
from llme_jax.data.beir import check_files
from llme_jax.data.rows import BadRows, read_lines
from llme_jax.data.sources import local_file
from llme_jax.data.tokens import fingerprint
from llme_jax.data.widths import choose_widths
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.evaluation import knowledge, lrlm
from llme_jax.evaluation.answers import Answerer, Question
from llme_jax.evaluation.outputs import write_outputs
from llme_jax.evaluation.questions import Questions, document_questions, text_questions
from llme_jax.evaluation.task import Task
from llme_jax.evaluation.tasks import task_of
from llme_jax.files.atomic import digest
from llme_jax.files.storage import check_writable, result_path
from llme_jax.inference.partial_results import PartialResults, parts_folder
from llme_jax.lm.generation import NONE
from llme_jax.models.causal_lm import open_causal_lm
from llme_jax.models.weights import fingerprint_files
from llme_jax.retrieval.results import check_log, publish_metrics

logger = logging.getLogger(__name__)

PART = {"cpu": 1 << 6, "gpu": 1 << 12, "tpu": 1 << 12}  # rows of one part: what a kill can cost
SAMPLE = 1 << 8  # rows whose lengths decide the widths of batches
WIDTHS = 16
LONGEST_NAME = 60  # letters of a model in the name of a file


def evaluate(config: EvaluateConfig) -> int:
    """Returns the exit code."""
    settings, data = config.task, config.data
    folder = _folder(config)
    if jax.process_index() == 0:
        check_writable("--output_dir", folder)
        check_log(config.evaluation.log_path)
    check_files(data if searches(config) else replace(data, corpus=None))
    if not asks(settings):
        knowledge.find(config, folder, config.evaluation.hits)
        return 0
    task = task_of(settings)
    train = _demonstrations(config, task)  # what is wrong with them comes before any long work
    opened = open_causal_lm(
        config.lm.model_name_or_path,
        dtype=config.lm.lm_dtype,
        cache_dir=config.encoder.model_cache_dir,
    )
    limit = _limit(config, opened[0].max_length)
    questions = _questions(config, task, folder, train, opened[2], limit)
    numbers = _answers(config, task, folder, questions, opened, limit)
    if jax.process_index() == 0:
        _publish(config, task, folder, questions, numbers, opened[2])
    return 0


def _folder(config: EvaluateConfig) -> Path:
    """--output_dir's folder of the encoder, or of the method that finds keys."""
    name = config.retrieval.retrieval_method
    if name == "dense":
        name = _name(config.encoder.query_encoder)
    return Path(config.retrieval.output_dir).expanduser() / name


def _name(model: str) -> str:
    """A model's name as a part of a file's: of a folder the last words of its path."""
    path = Path(model).expanduser()
    if path.is_dir():
        parts = [part for part in path.absolute().parts if part != "encoder"]
        of_a_run = re.fullmatch(r"best|checkpoint-\d+", parts[-1])
        model = "/".join(parts[-2:] if of_a_run else parts[-1:])
    return model.strip("/").replace("/", "--")[-LONGEST_NAME:]


def _limit(config: EvaluateConfig, readable: int) -> int:
    """Tokens that the model reads and writes at most.

    Raises:
        InputError: it cannot read so many.
    """
    settings, model = config.task, config.lm.model_name_or_path
    if settings.task == "lrlm":
        limit = lrlm.longest(settings, config.retrieval.retrieval_method)
        if limit > readable:
            raise InputError(
                f"--context_window_size {settings.context_window_size}: {limit} tokens are read "
                f"with what is found, {model} reads {readable}: give a smaller window or --key_num"
            )
        return limit
    limit = config.lm.context_max_length
    if limit > readable:
        raise InputError(
            f"--context_max_length {limit}: {model} reads {readable} tokens, give {readable} or "
            "less"
        )
    if limit <= (settings.max_new_tokens or 0):
        raise InputError(
            f"--context_max_length {limit}: leaves no room for a prompt beside --max_new_tokens "
            f"{settings.max_new_tokens}, give more"
        )
    return limit


def _rows(path: Path, check: Callable[[dict], None]) -> tuple[list[dict], list[str]]:
    """The rows of a file, and file and line of each."""

    def checked(row: dict) -> dict:
        check(row)
        return row

    found = [(f"{path}:{line}", row) for line, row in read_lines(str(path), checked, BadRows())]
    if not found:
        raise InputError(f"{path}: has no rows, give a file that does")
    return [row for _, row in found], [line for line, _ in found]


def _demonstrations(config: EvaluateConfig, task: Task) -> list[dict]:
    """The rows of --train_data, where the task shows some."""
    settings, data = config.task, config.data
    if not settings.few_shot or not settings.train_data:
        return []
    path = Path(local_file(settings.train_data, data.data_root, data.dataset_cache_dir))
    path = path.expanduser()
    if not path.is_file():
        raise InputError(
            f"--train_data {path}: there is no such file, check the path and --data_root, or give "
            "--few_shot 0"
        )
    return _rows(path, task.check)[0]


def _questions(
    config: EvaluateConfig, task: Task, folder: Path, train: list[dict], tokenizer, limit: int
) -> Questions:
    settings, data = config.task, config.data
    wanted = settings.few_shot if settings.task == "icl" else settings.key_num
    if searches(config) and config.retrieval.retrieval_method != "same-task-random":
        found = knowledge.find(config, folder, wanted or 0)
        path = found.path
    else:
        found = None
        path = Path(local_file(data.eval_data, data.data_root, data.dataset_cache_dir))
        path = path.expanduser()
    rows, lines = _rows(path, task.check)
    chosen = range(len(rows))
    if settings.task_names:
        chosen = [i for i in chosen if rows[i]["task_name"] in settings.task_names]
        if not chosen:
            raise InputError(
                f"--task_names {' '.join(settings.task_names)}: {path} has "
                f"{', '.join(sorted({row['task_name'] for row in rows}))}"
            )
    rows, lines = [rows[i] for i in chosen], [lines[i] for i in chosen]
    if settings.task == "lrlm":
        return document_questions(config, path, rows, tokenizer)
    keys = found and (
        lambda i: found.keys(chosen[i]),
        lambda i: found.numbers(chosen[i]),
        found.digest,
    )
    shown = task.demonstrations(rows, train, settings, config.retrieval.seed)
    return text_questions(config, task, path, rows, lines, keys, shown, tokenizer, limit)


def _answers(
    config: EvaluateConfig, task: Task, folder: Path, questions: Questions, opened, limit: int
) -> PartialResults:
    """The numbers that the model gives for every row; parts that are there are not done again."""
    lm, lm_folder, tokenizer = opened
    # Each process asks its share with its own devices: nothing waits for another host.
    mesh = make_mesh(config.lm.fsdp, config.lm.tensor, devices=jax.local_devices())
    step = -(-len(questions.rows) // SAMPLE)
    sample = [questions.prompts(i) for i in range(0, len(questions.rows), step)]
    seen = [(tokens.tolist(), count) for prompts in sample for tokens, count in prompts]
    describe = {
        "questions": digest(questions.digest, seen),
        "weights": fingerprint_files(lm_folder),
        "model": repr(lm),
        "tokenizer": fingerprint(tokenizer),
        "settings": digest(repr(config.task), config.retrieval.seed, limit),
        "method": config.retrieval.retrieval_method,
    }
    out = _output(config, folder, questions.path)
    steps = None if not task.shared else np.minimum(questions.counts, 1)
    unit = " questions" if task.shared else " prompts"
    answers = PartialResults(parts_folder(out, describe), questions.counts, steps, unit)
    rows_a_part = PART[jax.default_backend()] * jax.local_device_count()
    missing = answers.missing(max(1, int(rows_a_part * questions.counts.mean())))
    if answers.found:
        logger.info("%d of %d answers are there already", answers.found, len(answers.scores))
    if not missing:
        return answers
    lengths = np.array([len(tokens) for tokens, _ in seen])
    widths = choose_widths(lengths, limit, WIDTHS)
    answerer = Answerer(config, lm, lm_folder, tokenizer, mesh, widths, shared=task.shared)

    def asked(ranges: Iterable[tuple[int, int]]) -> Iterator[list[Question]]:
        for start, stop in ranges:
            yield [Question(i, questions.prompts(i)) for i in range(start, stop)]

    answers.fill(missing, asked, answerer)
    return answers


def _output(config: EvaluateConfig, folder: Path, path: Path) -> Path:
    return result_path(folder, path, "output", _save_name(config))


def _save_name(config: EvaluateConfig) -> str:
    parts = _name(config.lm.model_name_or_path), config.evaluation.save_name
    return ".".join(part for part in parts if part)


def _publish(
    config: EvaluateConfig,
    task: Task,
    folder: Path,
    questions: Questions,
    numbers: PartialResults,
    tokenizer,
) -> None:
    """Judges every answer, writes them and their metrics."""
    read = partial(_read, config, tokenizer)
    asked = [i for i in range(len(questions.rows)) if questions.counts[i]]
    outputs = [read(questions, i, numbers.of_row(i)) for i in asked]
    rows = [questions.rows[i] for i in asked]
    scores = [task.judge(row, output) for row, output in zip(rows, outputs, strict=True)]
    metrics = task.summary(rows, outputs, scores)
    path = _output(config, folder, questions.path)
    write_outputs(path, questions, asked, outputs, scores, numbers)
    how = replace(config.evaluation, save_name=_save_name(config))
    publish_metrics(folder, questions.path, how, metrics, config.flat())
    print(f"answers: {path}")


def _read(
    config: EvaluateConfig, tokenizer, questions: Questions, i: int, numbers: np.ndarray
) -> Any:
    """What the numbers of a row say: a text, an option's index, or a mean log-probability."""
    if questions.written[i]:
        tokens = numbers[numbers != NONE].astype(int).tolist()
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()
    if config.task.task in ("msc", "lrlm"):
        # Of every part of an answer, after the key that makes it likeliest.
        return float(numbers.reshape(questions.parts[i], -1).max(1).mean())
    return int(numbers.argmax())
