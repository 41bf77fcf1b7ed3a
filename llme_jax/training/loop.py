"""The training loop, top to bottom: check, place, step, evaluate, save, close."""

import logging
import math
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # for what it knows of SIGTERM there is no public name
from jax.experimental import multihost_utils
from tqdm import tqdm

from llme_jax.config import Config
from llme_jax.data.instructions import instruction_of
from llme_jax.data.plan import Plan
from llme_jax.data.prefetch import prefetch
from llme_jax.data.rows import BadRows
from llme_jax.data.train_data import TrainData, prepare
from llme_jax.devices import sharding
from llme_jax.devices.runtime import lost_process
from llme_jax.files.cache import check_cache
from llme_jax.models.dual_encoder import load_dual_encoder, save_dual_encoder
from llme_jax.plots import draw_curves
from llme_jax.retrieval.evaluate import RetrievalEvaluator
from llme_jax.retrieval.results import check_log
from llme_jax.training.checkpoint import Checkpoints
from llme_jax.training.dry_run import Preview
from llme_jax.training.host_check import check_agreement
from llme_jax.training.optim import make_optimizer, schedule
from llme_jax.training.run_folder import RunFolder
from llme_jax.training.step import init_state, make_step
from llme_jax.training.telemetry import (
    MetricsLog,
    Recorder,
    StepInput,
    compare,
    count,
    read_metrics,
)

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that SIGTERM ended after saving


def train(config: Config) -> int:
    """One run from its settings to its last checkpoint; returns the exit code."""
    settings = config.training

    # 1. Read and check everything before anything is written or compiled.
    folder = RunFolder(settings.output_dir)
    folder.check_settings(config)
    check_cache(config.data.dataset_cache_dir)
    if config.data.eval_data and jax.process_index() == 0:
        check_log(config.evaluation.log_path)
    mesh = sharding.make_mesh(settings.fsdp)
    global_batch = folder.global_batch(config, mesh.size)
    encoder, params, tokenizer = load_dual_encoder(
        config.encoder, remat=settings.gradient_checkpointing
    )
    encoder.check_lengths(config.data.query_max_length, config.data.key_max_length)
    bad_rows = BadRows(config.data.max_bad_rows)
    data = prepare(config.data, config.loss, tokenizer, seed=settings.seed, bad_rows=bad_rows)
    folder.check_data(data)
    plan = data.plan(global_batch)
    data.settle_widths(plan, mesh.size)
    evaluator = (
        RetrievalEvaluator(config, tokenizer, encoder, mesh) if config.data.eval_data else None
    )

    # 2. The schedule.
    accumulation = settings.gradient_accumulation_steps
    steps_per_epoch = max(plan.steps_per_epoch // accumulation, 1)
    max_steps = settings.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(settings.num_train_epochs * steps_per_epoch)
    stop = min(max_steps, settings.early_exit_steps or max_steps)
    optimizer = make_optimizer(settings, max_steps)
    learning_rate = schedule(settings, max_steps)

    # 3. The state: the newest checkpoint's, else fresh from the pretrained weights.
    checkpoints = Checkpoints(folder.path, settings.save_total_limit)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.state_sharding(mesh, abstract)
    if settings.plan:
        return Preview(settings, encoder, optimizer, abstract, data, plan, mesh).show()
    start = checkpoints.latest()
    if jax.process_count() > 1:
        check_agreement(config, tokenizer, data, evaluator, folder.path, start, params)
    if start is None:
        start = 0
        on_mesh = sharding.to_mesh(params, shardings.params)
        state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(on_mesh)
    else:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state = checkpoints.restore(start, like)
        logger.info("continuing %s at step %d of %d", folder.path, start, max_steps)
    del params
    folder.write(config, data, global_batch, mesh)
    bad_rows.report(folder.path / "bad_rows.jsonl")
    _describe(data, plan, mesh, steps_per_epoch, max_steps)

    # 4. The loop.
    step_fn = make_step(
        encoder,
        optimizer,
        devices=mesh.size,
        chunk=settings.sub_batch_size,
        seed=settings.seed,
        shardings=shardings,
    )
    log = MetricsLog(folder.path, start, settings.report_to == "tensorboard")
    best = BestMetric(settings.metric_for_best_model)
    if known := best.resume(log.path, checkpoints.steps()):
        checkpoints.mark_best(known)  # a run that was killed may not have come to it
    export = partial(_export, config, encoder, tokenizer, data, mesh)
    terminated = Terminated(start)
    if evaluator and settings.eval_on_start and start == 0:
        log.write_eval(0, evaluator(state.params, 0))
    eval_steps = settings.eval_steps or settings.save_steps
    inputs = prefetch(_inputs(plan, data, mesh, global_batch, accumulation, range(start, stop)))
    recorder = Recorder(log, data, learning_rate, settings.logging_steps, steps_per_epoch)
    bar = tqdm(total=stop, initial=start, unit="step", disable=jax.process_index() != 0)
    leave = False
    try:
        for step in range(start + 1, stop + 1):
            item = next(inputs)
            state, metrics = step_fn(state, item.batches, item.recipes)
            # A step's numbers are fetched once the next one is under way: no gap between them.
            recorder.begin(step, item, metrics, bar)

            leave = terminated(step)
            save = leave or step == stop or step % settings.save_steps == 0
            evaluate = evaluator and not leave and (step == stop or step % eval_steps == 0)
            if save or evaluate:
                recorder.finish(bar)  # a state whose loss was not finite is never saved
                improved = evaluate and best.update(
                    log.write_eval(step, evaluator(state.params, step))
                )
                if save or improved:
                    checkpoints.save(state, step, export(state.params))
                if improved:
                    checkpoints.mark_best(step)
                recorder.resume()
            if leave:
                break
    finally:
        bar.close()
        inputs.close()
        # An error must not cut off the checkpoint that is being written; but all processes have
        # to be there to finish it.
        if not lost_process(sys.exception()):
            checkpoints.wait()

    # 5. The close.
    if leave:
        logger.info("stopped by SIGTERM and saved at step %d; the same command goes on", step)
        return TERMINATED
    if jax.process_index() == 0:
        _summarise(log.path, checkpoints.path(max(start, stop)), checkpoints.best())
    return 0


def _inputs(
    plan: Plan, data: TrainData, mesh, global_batch: int, accumulation: int, steps: range
) -> Iterator[StepInput]:
    """The inputs of optimizer steps, a pure function of plan and data."""
    rows = sharding.local_rows(mesh, global_batch)
    for step in steps:
        plans = [plan(step * accumulation + i) for i in range(accumulation)]
        local = [data.assemble(planned, mesh.size, rows) for planned in plans]
        counts = [count(batch, jax.process_count()) for batch in local]
        batches = [sharding.batch_to_mesh(mesh, batch) for batch in local]
        yield StepInput(batches, [data.recipe(p.dataset) for p in plans], plans, counts)


class BestMetric:
    """The best value so far of the metric that picks the best checkpoint."""

    def __init__(self, wanted: str | None):
        self._wanted = f"eval_{wanted or 'ndcg@10'}"
        self._value = -math.inf

    def resume(self, metrics_path: Path, steps: list[int]) -> int | None:
        """Takes note of a run's evaluations; which of the checkpoints at `steps` was the best."""
        best = None
        for line in read_metrics(metrics_path):
            if line["step"] in steps and self.update(line):
                best = line["step"]
        return best

    def update(self, metrics: dict[str, float]) -> bool:
        """Whether a line of evaluation metrics is the best so far."""
        names = [name for name in metrics if name.startswith("eval_")]
        if not names:
            return False
        value = metrics[self._wanted if self._wanted in names else names[0]]
        improved = value > self._value
        self._value = max(self._value, value)
        return improved


class Terminated:
    """Asked after every step whether SIGTERM has come, with one answer for all processes.

    Until it is made SIGTERM ends the process at once, as nothing is lost yet.

    Args:
        step: the last one that is done.
    """

    def __init__(self, step: int):
        self._received = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._receive)
        else:
            # jax takes SIGTERM and lets all leave after the step that follows the newest it knows.
            jax.config.update("jax_enable_preemption_service", True)
            distributed.global_state.initialize_preemption_sync_manager()
            self(step)

    def _receive(self, *_):
        self._received = True

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


def _export(config: Config, encoder, tokenizer, data: TrainData, mesh, params):
    """What writes the encoder's folder in the background, with its own copy of the parameters."""
    whole = sharding.replicate(params, sharding.replicated(mesh))
    # A copy: on CPU np.asarray would share memory with arrays that the next step overwrites.
    host = jax.tree.map(np.array, whole) if jax.process_index() == 0 else None
    return partial(
        save_dual_encoder,
        encoder=encoder,
        params=host,
        tokenizer=tokenizer,
        query_max_length=config.data.query_max_length,
        key_max_length=config.data.key_max_length,
        prompts=_prompts(config, data.tasks),
    )


def _prompts(config: Config, tasks: list[str]) -> dict[str, str]:
    """The texts put in front, by the names that sentence-transformers knows, `query` and
    `document`; of several tasks these are the first one's, and each has its own (`qa-query`)."""
    instructions = [instruction_of(config.data, task or None) for task in tasks]
    prompts = dict(zip(("query", "document"), instructions[0], strict=True))
    if len(set(instructions)) > 1:
        for task, instruction in zip(tasks, instructions, strict=True):
            prompts |= {f"{task}-query": instruction.query, f"{task}-document": instruction.key}
    return prompts


def _describe(data: TrainData, plan: Plan, mesh, steps_per_epoch: int, max_steps: int):
    """Says what is trained on: each file's share, and what an epoch leaves out of it."""
    batches, shares, size = plan.batches_per_epoch(), plan.shares(), plan.batch_size
    for i, rows in enumerate(data.sizes):
        said = f"{data.names[i]} ({data.tasks[i] or 'no task'}), {rows} rows"
        if batches is None:
            said += f", {rows / sum(data.sizes):.1%} of all"
        else:
            said += f", {shares[i]:.1%} of the batches"
            if left := max(0, rows - batches[i] * size):
                said += f", {left} rows left out of every epoch"
        logger.info("train data: %s", said)
    logger.info(
        "%d x %s%s, batches of %d queries, %d steps (%.2f epochs)",
        mesh.size,
        mesh.devices.flat[0].device_kind,
        f" of {jax.process_count()} processes" if jax.process_count() > 1 else "",
        size,
        max_steps,
        max_steps / steps_per_epoch,
    )


def _summarise(metrics_path: Path, last: Path, best_step: int | None) -> None:
    """The first and the last evaluation side by side, the curves, where the encoder is."""
    evaluations = [
        line for line in read_metrics(metrics_path) if any(k.startswith("eval_") for k in line)
    ]
    if len(evaluations) > 1:
        print(compare(evaluations[0], evaluations[-1]))
    curves = metrics_path.with_name("curves.png")
    draw_curves(read_metrics(metrics_path), curves)
    folder = metrics_path.parent
    print(f"encoder: {folder / last.name / 'encoder'}")
    if best_step is not None and last.name != f"checkpoint-{best_step}":
        best = "best" if (folder / "best").is_dir() else f"checkpoint-{best_step}"  # in a bucket
        print(f"best:    {folder / best / 'encoder'} (step {best_step})")
    print(f"curves:  {curves}")
