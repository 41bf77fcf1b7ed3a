"""The training loop, top to bottom: check, place, step, evaluate, save, close."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from llme_jax.config import Config, RankConfig
from llme_jax.config.data import OF_FOLDER
from llme_jax.data.plan import Plan
from llme_jax.data.prefetch import prefetch
from llme_jax.data.rows import BadRows
from llme_jax.data.train_data import TrainData, prepare
from llme_jax.devices import sharding, topology
from llme_jax.devices.agree import agree, check_shared, together
from llme_jax.devices.runtime import lost_process
from llme_jax.files.atomic import digest
from llme_jax.files.cache import check_cache
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.plots import draw_curves
from llme_jax.retrieval.results import check_log
from llme_jax.sources.resolve import resolve
from llme_jax.training.checkpoint import Checkpoints
from llme_jax.training.chunks import Chunk
from llme_jax.training.dry_run import DryRun
from llme_jax.training.hub import check_hub, push
from llme_jax.training.metrics_log import (
    BestMetric,
    MetricsLog,
    compare,
    read_metrics,
    without_details,
)
from llme_jax.training.model_card import write_cards
from llme_jax.training.optim import make_optimizer, schedule
from llme_jax.training.run_folder import RunFolder
from llme_jax.training.signals import Terminated
from llme_jax.training.step import Step, init_state
from llme_jax.training.task import OpenTask, Task
from llme_jax.training.telemetry import Recorder, StepInput, count
from llme_jax.training.trackers import check_trackers

logger = logging.getLogger(__name__)


def train(config: Config | RankConfig, open_task: OpenTask) -> int:
    """One run from its settings to its last checkpoint; returns the exit code.

    Args:
        open_task: makes what is trained.
    """
    with ExitStack() as held:
        return _train(config, open_task, held)


def _train(config: Config | RankConfig, open_task: OpenTask, held: ExitStack) -> int:
    settings, planning = config.training, config.planning

    # 1. Read and check everything before anything is written or compiled.
    with together():
        folder = RunFolder(settings.output_dir)
        folder.check_settings(config)
        check_cache(config.data.dataset_cache_dir)
        if jax.process_index() == 0:
            if config.data.eval_data:
                check_log(config.evaluation.log_path)
            if not planning.plan:
                check_trackers(settings.report_to)
                if settings.push_to_hub:
                    check_hub(settings.push_to_hub)
        mesh = sharding.make_mesh(settings.fsdp, devices=topology.devices(planning.topology))
        global_batch = folder.global_batch(config, mesh.size)
        files = resolve(config)
        task, params, frozen = open_task(config, files)
        of_folder = {name: getattr(task.config.data, name) for name in OF_FOLDER}
        config = replace(config, data=replace(config.data, **of_folder))
        folder.check_settings(config)
        bad_rows = BadRows(config.data.max_bad_rows)
        data = prepare(
            *(files.training, files.cache, task.config.data, config.loss, task.tokenizer),
            seed=settings.seed,
            bad_rows=bad_rows,
            layout=task.layout,
            streams=task.streams,
            teacher_width=task.teacher and task.teacher.width,
        )
        folder.check_data(data)
        plan = data.plan(global_batch)
        data.settle_shapes(plan, mesh.size)
        evaluator = task.evaluator(mesh)

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
    checkpoints = Checkpoints(folder.path, settings.save_total_limit, task.exports)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    if planning.plan:
        return DryRun(
            planning, settings, task, optimizer, abstract, frozen, data, plan, mesh
        ).show()
    shardings = sharding.state_sharding(mesh, abstract, task.rules)
    start = checkpoints.latest()
    if jax.process_count() > 1:
        loaded = fingerprint_params((params, frozen) if start is None else frozen)
        facts = {
            "the files of --train_data": (data.names, data.sizes, data.contents),
            "--eval_data or --corpus, its content": evaluator and evaluator.contents,
            "the checkpoint to continue from": start,
            f"{task.flag}, its tokenizer": fingerprint(task.tokenizer),
            f"{task.flag}, its weights": loaded,
            "--teacher_encoder, its files": task.teacher and digest(task.teacher.facts),
        }
        agree(config, facts)
        check_shared(folder.path)
    held.enter_context(folder.held())
    if task.teacher:
        task.teacher.teach(data, mesh)
    frozen = sharding.to_mesh(frozen, sharding.state_sharding(mesh, frozen, task.rules))
    if start is None:
        start = 0
        on_mesh = sharding.to_mesh(params, shardings.params)
        state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(on_mesh)
    else:
        like = sharding.abstract(abstract, shardings)
        if jax.process_count() == 1:
            for step in checkpoints.damaged_models():
                host = _on_host(checkpoints.restore(step, like).params | frozen, mesh)
                checkpoints.export_again(step, task.exporter(host, data.tasks))
        start, state = checkpoints.restore_newest(like)
        logger.info("continuing %s at step %d of %d", folder.path, start, max_steps)
    del params
    folder.write(config, data, global_batch, mesh)
    bad_rows.report(folder.path / "bad_rows.jsonl")
    _describe(data, plan, mesh, steps_per_epoch, max_steps)

    # 4. The loop.
    step_fn = Step(
        task,
        optimizer,
        mesh=mesh,
        chunk=Chunk.of(settings),
        seed=settings.seed,
        shardings=shardings,
        frozen=frozen,
    )
    log = held.enter_context(MetricsLog(folder.path, start, settings.report_to, config.flat()))
    best = BestMetric(settings.metric_for_best_model)
    known = best.resume(log.path, checkpoints.steps()) if evaluator else start
    if known:
        checkpoints.mark_best(known)  # a run that was killed may not have come to it
    terminated = Terminated(start)
    if evaluator and settings.eval_on_start and start == 0:
        log.write_eval(0, evaluator(state.params | frozen, 0))
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
                    log.write_eval(step, evaluator(state.params | frozen, step))
                )
                if save or improved:
                    host = _on_host(state.params | frozen, mesh)
                    checkpoints.save(state, step, task.exporter(host, data.tasks))
                if improved or not evaluator:  # the last one, where nothing is measured
                    checkpoints.mark_best(step)
                recorder.resume()
            if leave:
                break
    finally:
        # An error must not cut off the checkpoint that is being written, nor one while the bar is
        # closed whose terminal is gone; but all processes have to be there to finish it.
        try:
            if not lost_process(sys.exception()):
                checkpoints.wait()
        finally:
            inputs.close()
            bar.close()

    # 5. The close.
    if leave:
        name = terminated.received.name
        logger.info("stopped by %s and saved at step %d; the same command goes on", name, step)
        return 128 + terminated.received
    if jax.process_index() == 0:
        step = checkpoints.best() or max(start, stop)
        wanted = settings.metric_for_best_model
        lines = [without_details(line, wanted) for line in read_metrics(log.path)]
        write_cards(checkpoints.path(step), config, task, data, global_batch, lines)
        _summarise(lines, log.path, checkpoints.path(max(start, stop)), checkpoints.best(), task)
        if repo := settings.push_to_hub:
            address = push(checkpoints.path(step), task.exports, repo, settings.hub_private)
            print(f"hub:     {address}")
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


def _on_host(params: dict, mesh) -> dict | None:
    """A copy of the parameters in numpy, on process 0; an encoder is written from it."""
    whole = sharding.replicate(params, sharding.replicated(mesh))
    # A copy: on CPU np.asarray would share memory with arrays that the next step overwrites.
    return jax.tree.map(np.array, whole) if jax.process_index() == 0 else None


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


def _summarise(
    lines: list[dict], metrics_path: Path, last: Path, best_step: int | None, task: Task
) -> None:
    """The first and the last evaluation side by side, the curves, where the model is."""
    evaluations = [line for line in lines if any(k.startswith("eval_") for k in line)]
    if len(evaluations) > 1:
        print(compare(evaluations[0], evaluations[-1]))
    curves = metrics_path.with_name("curves.png")
    draw_curves(lines, curves)
    folder = metrics_path.parent
    for name in task.exports:
        print(f"{name + ':':8} {folder / last.name / name}")
    if best_step is not None and last.name != f"checkpoint-{best_step}":
        best = "best" if (folder / "best").is_dir() else f"checkpoint-{best_step}"  # in a bucket
        print(f"best:    {folder / best / task.exports[0]} (step {best_step})")
    print(f"curves:  {curves}")
