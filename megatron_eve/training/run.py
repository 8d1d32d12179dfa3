# SPDX-License-Identifier: Apache-2.0
"""A run from start to end, on every process: set-up, resume, the loop over steps, checkpoints.

RUN_DIR/config.txt      the resolved configuration        RUN_DIR/metrics.jsonl   one record a logged step
RUN_DIR/checkpoints/    see checkpoint/manager.py         RUN_DIR/quarantine.jsonl  samples that were refused
RUN_DIR/DONE            written when the last step is done and saved
RUN_DIR/.lock           held by the process of rank 0, see folder_lock.py
RUN_DIR/evaluations/    results of evaluation.command, see training/evaluation.py
RUN_DIR/stacks/         Python stacks of all ranks when one does not answer, see training/watchdog.py
"""

import logging
import random
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_eve import device
from megatron_eve.checkpoint.manager import CheckpointManager, TrainingState
from megatron_eve.checkpoint.weights import load_weights
from megatron_eve.config.run_summary import plan_text, rounding_advice
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import total_steps
from megatron_eve.config.text_form import config_text
from megatron_eve.data.loader import PackLoader
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.data.read.vocabulary import vocabulary_of
from megatron_eve.errors import ConfigError, MissingHereError
from megatron_eve.metrics.peak import peak_flops
from megatron_eve.metrics.profiling import Capture
from megatron_eve.metrics.sinks import Sinks
from megatron_eve.metrics.throughput import StepMeter
from megatron_eve.model.accelerators import accelerators_line, refuse_missing_accelerators
from megatron_eve.parallel.groups import ParallelState, init_distributed, init_model_parallel
from megatron_eve.run_files import DONE_FILE
from megatron_eve.stop_signals import StopSignals
from megatron_eve.training.assemble import build_training
from megatron_eve.training.data_start import open_on_all
from megatron_eve.training.evaluation import Evaluations
from megatron_eve.training.feed import next_step
from megatron_eve.training.learning import LearningWatch
from megatron_eve.training.non_finite import SkipGuard
from megatron_eve.training.run_directory import claimed
from megatron_eve.training.signals import StopFlag
from megatron_eve.training.step import StepResult, train_step
from megatron_eve.training.unreadable import UnreadableGuard
from megatron_eve.training.watchdog import Watch, watch_ranks
from megatron_eve.whole import write_text

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that lives as long as the run."""

    config: RunConfig
    run_dir: Path
    state: ParallelState
    training: TrainingState
    loader: PackLoader | None  # on data leaders
    unreadable: UnreadableGuard
    checkpoints: CheckpointManager
    steps: int


def run(config: RunConfig, *, signals: StopSignals) -> None:
    """Train as `config` (resolved) says; resumes from the newest checkpoint of its run directory.

    Returns when the run is done or was asked to stop; RUN_DIR/DONE tells which.
    """
    refuse_missing_accelerators(config)
    init_distributed(timeout_s=config.train.distributed_timeout_s)
    state = init_model_parallel(
        config.parallel,
        seed=config.train.seed,
        timeout_s=config.train.distributed_timeout_s,
    )
    random.seed(config.train.seed)  # a checkpoint holds its state; megatron-core seeds torch's
    torch.use_deterministic_algorithms(config.train.deterministic)
    run_dir = Path(config.run_dir)
    ours = claimed(run_dir, config) if state.rank == 0 else nullcontext()
    with ours:
        signals.catch_stops()
        stop = StopFlag(run_dir, signals)
        limit_s = config.train.distributed_timeout_s
        with watch_ranks(state, limit_s=limit_s, run_dir=run_dir) as watch:
            assembled = _assemble(config, state=state, run_dir=run_dir)
            try:
                _train(assembled, stop=stop, watch=watch)
            finally:
                assembled.checkpoints.close()
                if assembled.loader is not None:
                    assembled.loader.close()


def _assemble(config: RunConfig, *, state: ParallelState, run_dir: Path) -> Run:
    checkpoints = _open_checkpoints(config, state=state, run_dir=run_dir)
    loader = _open_loader(config, state=state, run_dir=run_dir)
    epoch, unreadable_left = _from_rank0(
        (loader.epoch_size, loader.unreadable_left) if loader is not None else None
    )
    guard = UnreadableGuard(left=unreadable_left, is_teller=state.rank == 0)
    steps = total_steps(config, epoch=epoch)
    if not steps:
        raise ConfigError(
            f"the sources hold {epoch.samples} usable samples, less than one step of {config.batch.size}; "
            "set train.steps or a smaller batch.size"
        )
    if state.rank == 0:
        _LOG.info("plan\n%s", plan_text(config, epoch=epoch))
        if advice := rounding_advice(config, epoch=epoch):
            _LOG.warning("%s", advice)
        _LOG.info("kernels: %s", accelerators_line(config))
    prepare = None
    if (weights := config.checkpoint.load_weights_from) and checkpoints.newest() is None:
        copied = config.checkpoint.copy_text_to_vision
        prepare = partial(load_weights, folder=weights, copy_text_to_vision=copied)
    training = build_training(config, state=state, steps=steps, prepare=prepare)
    return Run(config, run_dir, state, training, loader, guard, checkpoints, steps)


def _open_checkpoints(
    config: RunConfig, *, state: ParallelState, run_dir: Path
) -> CheckpointManager:
    return CheckpointManager(
        run_dir,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        async_save=config.checkpoint.async_save,
        config_text=config_text(config),
        stage=config.stage.name,
        vocabulary=_vocabulary(config) if state.rank == 0 else None,
    )


def _vocabulary(config: RunConfig) -> Mapping[str, Any]:
    """The token of each row of the embedding, recorded with the weights."""
    backend = load_tokenizer(config.data.tokenizer).backend
    return vocabulary_of(backend, with_added=True).as_json()


def _open_loader(config: RunConfig, *, state: ParallelState, run_dir: Path) -> PackLoader | None:
    if config.data.decode_on == "gpu" and not device.has_gpu():
        raise MissingHereError(
            "data.decode_on=gpu, but there is no GPU here; set data.decode_on=cpu."
        )
    return open_on_all(
        lambda alive, is_first: PackLoader(
            data=config.data,
            batch=config.batch,
            model=config.model,
            trainable=config.stage.trainable,
            tokenizer=load_tokenizer(config.data.tokenizer),
            data_rank=state.dp_rank,
            data_size=state.dp_size,
            device="cuda" if config.data.decode_on == "gpu" else "cpu",
            quarantine_report=run_dir / "quarantine.jsonl",
            alive=alive,
            is_first=is_first,
        ),
        state=state,
        timeout_s=config.train.distributed_timeout_s,
    )


def _from_rank0(value: Any) -> Any:
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _resume(run: Run) -> int:
    """The number of steps already done; restores the loader and every live object to that point."""
    resumed = run.checkpoints.resume(run.training)
    if resumed is None:
        return 0
    if run.loader is not None:
        run.loader.load_state_dict(resumed.data)
    if run.state.rank == 0:
        _LOG.info("resumed from %s", resumed.path)
    return resumed.step


def _open_sinks(run: Run, *, start_step: int) -> Sinks:
    return Sinks.open(
        run.config,
        run_dir=run.run_dir,
        start_step=start_step,
        total_steps=run.steps,
        is_writer=run.state.rank == 0,
    )


def _open_capture(run: Run) -> Capture:
    return Capture(
        run.config,
        run_dir=run.run_dir,
        state=run.state,
        model=run.training.wrapped,
        optimizer=run.training.optimizer,
    )


def _train(run: Run, *, stop: StopFlag, watch: Watch) -> None:
    is_first = run.state.rank == 0
    done = _resume(run)
    if is_first and done < run.steps:
        (run.run_dir / DONE_FILE).unlink(missing_ok=True)  # of a run of fewer steps
    torch.distributed.barrier()  # no rank may save while a signal would still end another at once
    stop.may_save()
    sinks, capture = _open_sinks(run, start_step=done), _open_capture(run)
    evaluations = Evaluations(run.config.evaluation, run_dir=run.run_dir, is_starter=is_first)
    with closing(sinks), closing(capture), closing(evaluations):
        evaluations.resumed(done)
        stopping = False
        meter, guard, learning = StepMeter(), SkipGuard(), LearningWatch(run.config.stage)
        peak = peak_flops(device.device_name(), dtype=run.config.train.dtype)
        while done < run.steps and not stopping:
            done += 1
            with capture.step(done):
                result = _step(run, number=done, stop=stop, capture=capture, watch=watch)
            stopping, values = result.stop_requested, result.metrics
            capture.done(done, values)
            meter.add(values)
            run.unreadable.count(values["unreadable"])
            guard.count(skipped=bool(values["skipped"]))
            if is_first:
                learning.count(values, reached=result.reached)
            last = stopping or done == run.steps
            if done % run.config.logging.every_steps == 0 or last:
                steps_left = run.steps - done
                record = meter.take(
                    world_size=run.state.world_size, steps_left=steps_left, peak_flops=peak
                )
                sinks.log(done, record | evaluations.news())
            run.checkpoints.poll()
            if done % run.config.checkpoint.save_every_steps == 0 or last:
                watch.at(f"saving step {done}")
                _save(run, step=done)
                evaluations.saved(done)
            if last:
                run.checkpoints.wait()
            evaluations.poll()
        watch.finish()
        learning.finish()
        _finish(run, done=done)
        evaluations.finish(give_up=stop)


def _step(run: Run, *, number: int, stop: StopFlag, capture: Capture, watch: Watch) -> StepResult:
    """One step, with its times and memory among the metrics."""
    started = time.perf_counter()
    watch.at(f"{'reading' if run.loader is not None else 'receiving'} the data of step {number}")
    with capture.range("data_wait"):
        packs = next_step(run.loader, state=run.state)
    waited = time.perf_counter() - started
    watch.at(f"step {number}")
    result = train_step(
        run.training.wrapped,
        packs,
        optimizer=run.training.optimizer,
        schedule=run.training.schedule,
        config=run.config,
        state=run.state,
        stop_requested=stop(),
        faults=run.loader.take_faults() if run.loader is not None else {},
        ranges=capture.range,
    )
    seconds = {"step_time_s": time.perf_counter() - started, "data_wait_s": waited}
    return replace(result, metrics=result.metrics | seconds | _memory())


def _memory() -> dict[str, float]:
    peak = device.peak_memory_gib()
    return {} if peak is None else {"memory_gib": peak}


def _save(run: Run, *, step: int) -> None:
    # Data leaders share the plan's position; megatron-core wants it the same on every process.
    data = _from_rank0(run.loader.state_dict() if run.loader is not None else None)
    run.checkpoints.save(run.training, step=step, data=data)


def _finish(run: Run, *, done: int) -> None:
    if run.state.rank != 0:
        return
    if done >= run.steps:
        write_text(run.run_dir / DONE_FILE, f"{done}\n")
        _LOG.info("done: %d steps, checkpoints in %s", done, run.checkpoints.folder)
    else:
        _LOG.info("stopped on request after step %d of %d; start again to go on", done, run.steps)
