"""One evaluation, from settings to files: find keys, ask the language model, judge, measure."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from llme_jax.config.evaluation import EvaluateConfig, asks, searches
from llme_jax.config.identity import identity
from llme_jax.data.rows import BadRows, read_lines, strings_of
from llme_jax.data.widths import STEP, choose_widths
from llme_jax.devices.agree import agree, together
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.evaluation.answers import Answerer, Question
from llme_jax.evaluation.documents import document_questions, longest
from llme_jax.evaluation.knowledge import find
from llme_jax.evaluation.outputs import write_outputs
from llme_jax.evaluation.questions import Questions, Rows
from llme_jax.evaluation.task import Task
from llme_jax.evaluation.tasks import task_of
from llme_jax.evaluation.texts import of_same_task, own_keys, text_questions, turns
from llme_jax.files.atomic import digest_file
from llme_jax.files.storage import check_writable, result_path
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_files
from llme_jax.inference.partial_results import PartialResults, parts_folder
from llme_jax.lm.generation import NONE
from llme_jax.models.causal_lm import open_causal_lm
from llme_jax.retrieval.results import check_log, publish_metrics
from llme_jax.sources.resolve import Files, resolve

logger = logging.getLogger(__name__)

PART = {"cpu": 1 << 7, "gpu": 1 << 12, "tpu": 1 << 12}  # rows of one part: what a kill can cost
SAMPLE = 1 << 8  # rows whose lengths decide the widths of batches
# Widths of batches, each of which is compiled, and rows that are worth one more.
WIDTHS, ROWS_A_WIDTH = 16, 64
LONGEST_NAME = 60  # letters of a model in the name of a file


def evaluate(config: EvaluateConfig) -> int:
    """Returns the exit code."""
    settings, folder = config.task, _folder(config)
    with together():
        if jax.process_index() == 0:
            check_writable("--output_dir", folder)
            check_log(config.evaluation.log_path)
        files = resolve(config, leave_out=None if searches(config) else "corpus")
    if not asks(settings):
        find(config, files, folder, config.evaluation.hits)
        return 0
    # What is wrong with rows and model comes before any long work.
    task = task_of(settings)
    with together():
        rows, train = _rows(config, files, task), _demonstrations(config, files, task)
        opened = open_causal_lm(
            config.lm.model_name_or_path,
            dtype=config.lm.lm_dtype,
            cache_dir=config.encoder.model_cache_dir,
        )
        limit = _limit(config, opened[0].max_length)
    read = [rows.path, *([files.demonstrations] if train else [])]
    described = _identity(config, opened, read, limit)
    agree(config, described)
    questions = _questions(config, files, task, rows, train, folder, opened[2], limit)
    out = result_path(folder, rows.path, "output", _save_name(config))
    described |= {"found": questions.found}
    numbers = _answers(config, task, out, questions, described, opened, limit)
    if jax.process_index() == 0:
        _publish(config, task, rows.path, out, questions, numbers, opened[2])
    return 0


def _identity(config: EvaluateConfig, opened, read: Sequence[Path], limit: int) -> dict:
    """What answers depend on beside the keys that are found.

    Args:
        read: the files that questions are made of.
    """
    lm, folder, tokenizer = opened
    return identity(
        config,
        "hits",
        "scores",
        content=list(map(digest_file, read)),
        model=fingerprint_files(folder),
        computed=repr(lm),
        tokenizer=fingerprint(tokenizer),
        limit=limit,
    )


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
        limit = longest(settings, config.retrieval.retrieval_method)
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


def _rows(config: EvaluateConfig, files: Files, task: Task) -> Rows:
    return _read_rows(files.queries if searches(config) else files.rows, task)


def _read_rows(path: Path, task: Task) -> Rows:
    """
    Raises:
        InputError: a row cannot be asked, or there is none; names the line.
    """

    def checked(row: dict) -> dict:
        task.check(row)
        strings_of(row, "key")
        return row

    found = [*read_lines(str(path), checked, BadRows())]
    if not found:
        raise InputError(f"{path}: has no rows, give a file that does")
    return Rows(path, [row for _, row in found], [f"{path}:{line}" for line, _ in found])


def _demonstrations(config: EvaluateConfig, files: Files, task: Task) -> Sequence[dict]:
    """The rows of --train_data, where the task shows some."""
    if not config.task.few_shot or not config.task.train_data:
        return []
    return _read_rows(files.demonstrations, task).rows


def _questions(
    config: EvaluateConfig,
    files: Files,
    task: Task,
    rows: Rows,
    train: Sequence[dict],
    folder: Path,
    tokenizer,
    limit: int,
) -> Questions:
    settings, method = config.task, config.retrieval.retrieval_method
    if settings.task == "lrlm":
        return document_questions(config, files.cache, rows, tokenizer)
    wanted = settings.few_shot if settings.task == "icl" else settings.key_num
    chosen = _chosen(settings.task_names, rows)
    if method == "no":
        keys = own_keys(rows, wanted)
    elif method == "same-task-random":
        keys = of_same_task(config, files, rows)
    elif settings.task == "msc":
        keys = turns(config, files.cache, rows)
    else:
        keys = find(config, files, folder, wanted)
    rows, keys = rows.only(chosen), keys.only(chosen)
    shown = task.demonstrations(rows.rows, train, settings, config.retrieval.seed)
    return text_questions(config, task, rows, keys, shown, tokenizer, limit)


def _chosen(names: list[str] | None, rows: Rows) -> list[int]:
    """The rows of these tasks of icl; all when None."""
    chosen = [i for i, row in enumerate(rows.rows) if names is None or row["task_name"] in names]
    if not chosen:
        there = ", ".join(sorted({row["task_name"] for row in rows.rows}))
        raise InputError(f"--task_names {' '.join(names)}: {rows.path} has {there}")
    return chosen


def _answers(
    config: EvaluateConfig,
    task: Task,
    out: Path,
    questions: Questions,
    described: dict,
    opened,
    limit: int,
) -> PartialResults:
    """The numbers that the model gives for every row; parts that are there are not done again.

    Args:
        described: what they depend on.
    """
    lm, lm_folder, tokenizer = opened
    # Each process asks its share with its own devices: nothing waits for another host.
    mesh = make_mesh(config.lm.fsdp, config.lm.tensor, devices=jax.local_devices())
    steps, unit = questions.counts, " prompts"
    if task.shared:
        steps, unit = np.minimum(steps, 1), " questions"
    answers = PartialResults(
        parts_folder(out, described), questions.counts, steps, unit, desc="Asking"
    )
    rows_a_part = PART[jax.default_backend()] * jax.local_device_count()
    missing = answers.missing(max(1, int(rows_a_part * questions.counts.mean())))
    if answers.found:
        logger.info("%d of %d answers are there already", answers.found, len(answers.scores))
    if not missing:
        return answers
    step = -(-len(questions.rows) // SAMPLE)
    some = [questions.prompts(i) for i in range(0, len(questions.rows), step)]
    lengths = np.array([len(tokens) for prompts in some for tokens, _ in prompts])
    count = min(WIDTHS, 2 + len(questions.rows) // ROWS_A_WIDTH)
    longest = int(lengths.max()) if step == 1 else limit
    widths = choose_widths(lengths, -(-longest // STEP) * STEP, count)
    answerer = Answerer(config, lm, lm_folder, tokenizer, mesh, widths, shared=task.shared)

    def asked(ranges: Iterable[tuple[int, int]]) -> Iterator[list[Question]]:
        for start, stop in ranges:
            yield [Question(i, questions.prompts(i)) for i in range(start, stop)]

    answers.fill(missing, asked, answerer)
    return answers


def _save_name(config: EvaluateConfig) -> str:
    parts = _name(config.lm.model_name_or_path), config.evaluation.save_name
    return ".".join(part for part in parts if part)


def _publish(
    config: EvaluateConfig,
    task: Task,
    path: Path,
    out: Path,
    questions: Questions,
    numbers: PartialResults,
    tokenizer,
) -> None:
    """Judges every answer, writes them and their metrics.

    Args:
        path: of the rows.
        out: for the answers.
    """
    asked = np.flatnonzero(questions.counts).tolist()
    rows = [questions.rows[i] for i in asked]
    outputs = [_read(questions, i, numbers.of_row(i), task, tokenizer) for i in asked]
    scores = [task.judge(row, output) for row, output in zip(rows, outputs, strict=True)]
    metrics = task.summary(rows, outputs, scores)
    write_outputs(out, questions, asked, outputs, scores, numbers)
    how = replace(config.evaluation, save_name=_save_name(config))
    publish_metrics(out.parent, path, how, metrics, config.flat())
    print(f"answers: {out}")


def _read(
    questions: Questions, i: int, numbers: np.ndarray, task: Task, tokenizer
) -> str | int | float:
    """What the numbers of a row say: a text, an option's index, or a mean log-probability."""
    if questions.written[i]:
        tokens = numbers[numbers != NONE].astype(int).tolist()
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()
    if task.shared:
        return int(numbers.argmax())
    # Of every part of an answer, after the keys that make it likeliest.
    return float(numbers.reshape(questions.parts[i], -1).max(1).mean())
