"""The training loop, shared by all tasks: any number of ranks, exact resume.

A task defines model, data and loss; the loop owns gradient accumulation, clipping, precision, the schedule,
checkpoints, resume, divergence checks, logging and the ranks. A killed and resumed training gives bit-identical weights
and metrics to an uninterrupted one (on a GPU: with `deterministic`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rfmedsam2.engine.checkpoint import (
    Position,
    TrainingState,
    is_of_step,
    load_training,
    load_weights,
    save_model,
    save_training,
)
from rfmedsam2.engine.distributed import compile_model, wrap_ddp
from rfmedsam2.engine.monitoring.log import MetricsLog
from rfmedsam2.engine.monitoring.step_metrics import PendingMetrics, StepMetrics, reduce_async
from rfmedsam2.engine.monitoring.time_left import TimeLeft
from rfmedsam2.engine.monitoring.trackers import Ending
from rfmedsam2.engine.rng import capture, preserved, restore, seed_all
from rfmedsam2.engine.runtime import determinism, report_lost_ranks, resident_mb, to_device
from rfmedsam2.engine.schedule import endless_warmup, learning_rate_factor, set_learning_rate
from rfmedsam2.engine.signals import Interrupted, Signals, handle_signals
from rfmedsam2.engine.task import Progress, Run, Task
from rfmedsam2.errors import DivergedError, UsageError
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import BEST, FINAL, LATEST
from rfmedsam2.store.checkpoints import read_all
from rfmedsam2.system.progress import StepReport

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")


def fit(task: Task[Batch], config: TrainConfig, run: Run, *, resume: bool = False) -> Progress:
    """Train until config.iterations optimizer steps are completed, or a signal asks to stop.

    Writes to run.folder: checkpoint_latest (everything needed to resume), checkpoint_best (weights, when the score
    improves), checkpoint_final (weights, at the end), metrics.jsonl, metrics.csv.

    Args:
        task: the task to train.
        config: training configuration.
        run: output folder, record and runtime.
        resume: resume from checkpoint_latest if it exists; otherwise contents of the folder are replaced.

    Raises:
        DivergedError: loss or gradient not finite; the last good checkpoint is kept.
        CheckpointError: the checkpoint to resume from is damaged or of another training.
        WorkerError: data loading failed, or another rank ended.
        StoreError: the folder cannot be written.
    """
    with (
        determinism(config.deterministic),
        run.runtime.whole_gradients(),
        preserved(run.runtime.device),
        report_lost_ranks(run.runtime),
        handle_signals() as signals,
    ):
        if resume and run.runtime.any((run.folder / FINAL).is_file() and not (run.folder / LATEST).is_file()):
            return _already_finished(task, config, run)
        return _Loop(task, config, run, signals, resume=resume).train()


class _Loop(Generic[Batch]):
    """State of one call of `fit`."""

    def __init__(self, task: Task[Batch], config: TrainConfig, run: Run, signals: Signals, *, resume: bool) -> None:
        self._task, self._config, self._run, self._signals = task, config, run, signals
        self._runtime = run.runtime
        self._model = task.model.to(run.runtime.device)
        self._model.train()
        self._optimizer = task.optimizer()
        self._learning = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._scaler = torch.amp.GradScaler(run.runtime.device.type, enabled=run.runtime.precision == torch.float16)
        self._position = Position()
        self._waiting: list[PendingMetrics] = []
        self._last = (float("nan"), float("nan"), 0.0)
        self._time_left = TimeLeft(config)
        self._saved_at = self._clock = time.monotonic()
        self._stop = self._save_wanted = False
        self._begin(resume)
        self._found = self._position
        self._log: MetricsLog | None = None
        if run.runtime.is_main:
            step = self._position.step
            if step == 0 and (note := endless_warmup(config)):
                logger.warning("%s", note)
            validated = self._position.validated == step
            self._log = MetricsLog(run.folder, keep_step=step, keep_validation=validated, tracking=run.tracking)

    def _begin(self, resume: bool) -> None:
        """Start at step 0, or at the last checkpoint."""
        runtime, config, path = self._runtime, self._config, self._run.folder / LATEST
        set_learning_rate(self._optimizer, 1.0)
        seed_all(config.seed, runtime.rank, device=runtime.device)
        if not (resume and runtime.any(path.is_file())):
            if runtime.is_main:
                for name in (LATEST, BEST, FINAL):
                    (self._run.folder / name).unlink(missing_ok=True)
            return
        trained = TrainingState(model=self._model, optimizer=self._optimizer, scaler=self._scaler)
        saved = load_training(path, self._run.record, trained, config)
        self._position = saved.position
        step, total = self._position.step, config.iterations
        logger.info("Resuming at step %d of %d (epoch %d)", step, total, step // config.iterations_per_epoch)
        for note in saved.notes(config, runtime):
            logger.warning(note)
        if len(saved.rng_states) == runtime.world_size:
            restore(saved.rng_states[runtime.rank], runtime.device)
        else:
            seed_all(config.seed, runtime.rank, step, device=runtime.device)

    def train(self) -> Progress:
        """Run all remaining steps."""
        try:
            if self._position.step < self._config.iterations:
                stream = iter(self._task.batches(self._position.step * self._config.accumulation))
                with closing(stream) if hasattr(stream, "close") else nullcontext():  # type: ignore[arg-type]
                    self._epochs(self._prepare(stream))
            else:
                self._after_step()
            if not self._stop:
                self._finish()
        except BaseException:
            self._end("failed")
            raise
        self._end("stopped" if self._stop else "finished")
        return self._progress()

    def _end(self, ending: Ending) -> None:
        if self._log is not None:
            self._log.close(ending)

    def _prepare(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Compile and wrap in DDP, which need the first batch; returns the stream with that batch still in it."""
        config, runtime = self._config, self._runtime
        self._forward: Callable[[Batch], dict[str, Tensor]] = self._task.loss
        compiling = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
        if not compiling and runtime.world_size == 1:
            return stream
        first = next(stream)
        rehearsed = to_device(first, runtime.device)
        if compiling:
            compile_model(self._model, self._task.loss, rehearsed, runtime)
        if runtime.world_size > 1:
            self._forward = wrap_ddp(self._model, self._task.loss, rehearsed, runtime)
        return chain([first], stream)

    def _epochs(self, stream: Iterator[Batch]) -> None:
        if self._position.step:
            self._after_step()  # the checkpoint may be from between the last step of an epoch and its validation
        self._clock = time.monotonic()
        while self._position.step < self._config.iterations and not self._stop:
            self._waiting.append(self._step(stream))
            self._position = replace(self._position, step=self._position.step + 1)
            self._after_step()
            if self._stop:
                self._save()

    def _step(self, stream: Iterator[Batch]) -> PendingMetrics:
        """One optimizer step over `accumulation` micro-batches."""
        config, number = self._config, self._position.step
        lr = set_learning_rate(self._optimizer, learning_rate_factor(config, number))
        ids: list[str] = []
        sums: dict[str, Tensor] = {}
        for micro in range(config.accumulation):
            batch = next(stream, None)
            if batch is None:
                raise UsageError("The task's batches ended before training did", where=f"step {number}")
            ids += batch.get("ids", ()) if isinstance(batch, dict) else getattr(batch, "ids", ())
            with self._no_sync(micro < config.accumulation - 1):
                with self._runtime.autocast():
                    parts = self._forward(to_device(batch, self._runtime.device))
                total = torch.stack([part.float() for part in parts.values()]).sum()
                self._scaler.scale(total / config.accumulation).backward()
            for name, part in parts.items():
                share = part.detach().float() / config.accumulation
                sums[name] = sums[name] + share if name in sums else share
        norm = self._update()
        return self._send(number, sums, norm, ids, lr)

    def _update(self) -> Tensor:
        """Clip and apply the gradients; returns their norm before clipping."""
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._learning, self._config.clip_norm or float("inf"))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _no_sync(self, wanted: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between ranks only in the last micro-batch."""
        forward = self._forward
        return forward.no_sync() if wanted and isinstance(forward, DistributedDataParallel) else nullcontext()

    def _send(self, number: int, sums: dict[str, Tensor], norm: Tensor, ids: list[str], lr: float) -> PendingMetrics:
        """Start copying the step's metrics to the CPU without waiting."""
        due = time.monotonic() - self._saved_at >= self._config.checkpoint_minutes * 60 and self._runtime.is_main
        # the gradient scaler detects infinite gradients itself
        norm = torch.zeros_like(norm) if self._scaler.is_enabled() else norm
        wishes = (self._signals.stop is not None, self._signals.save or due)
        values, ready = reduce_async(torch.stack([*sums.values(), norm.float()]), wishes, self._runtime)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        return PendingMetrics(
            number=number, ids=tuple(ids), lr=lr, seconds=seconds, names=tuple(sums), values=values, ready=ready
        )

    def _after_step(self) -> None:
        """Collect metrics that have arrived; validate at the end of an epoch; save if due."""
        step, config = self._position.step, self._config
        epoch_ends = step % config.iterations_per_epoch == 0
        # on a GPU the newest step keeps running while the next one is prepared
        self._collect_metrics(leave=1 if self._runtime.device.type == "cuda" and not epoch_ends else 0)
        epoch = step // config.iterations_per_epoch
        due = epoch % config.validate_every_epochs == 0 or step >= config.iterations
        if epoch_ends and due and self._position.validated < step and not self._stop:
            self._validate()
        if self._save_wanted and not self._stop:
            self._save()

    def _collect_metrics(self, leave: int) -> None:
        while len(self._waiting) > leave:
            step = self._waiting.pop(0)
            figures = step.read()
            if not figures.finite:
                raise self._diverged(step, figures)
            self._stop = self._stop or figures.stop
            self._save_wanted = self._save_wanted or figures.save
            self._position = replace(self._position, seconds=self._position.seconds + step.seconds)
            self._time_left.add_step(step.seconds)
            self._log_step(step, figures)

    def _diverged(self, step: PendingMetrics, figures: StepMetrics) -> DivergedError:
        ids = dict.fromkeys(i for rank in self._runtime.gather(step.ids) for i in rank)
        losses = ", ".join(f"{name} {value:g}" for name, value in figures.losses.items())
        return DivergedError(
            f"Training diverged at step {step.number}: the loss or its gradient is not finite",
            where=f"cases {', '.join(ids)}" if ids else None,
            found=f"{losses}, gradient norm {figures.gradient_norm:g}",
            remedy="Check these cases (rfmed_verify), or lower train.learning_rate; the last good checkpoint is kept",
        )

    def _log_step(self, step: PendingMetrics, figures: StepMetrics) -> None:
        if self._log is None:
            return
        event = {
            "event": "step",
            "step": step.number + 1,
            "epoch": step.number // self._config.iterations_per_epoch,
            "loss": sum(figures.losses.values()),
            "losses": figures.losses,
            "lr": step.lr,
            "gradient_norm": figures.gradient_norm,
            "seconds": round(step.seconds, 6),
            "memory_mb": round(self._runtime.memory_mb() or resident_mb(), 1),
        }
        self._log.write(event)
        self._run.track.step(self._report(step.number + 1, event["loss"], step.lr, step.seconds))

    def _report(
        self, step: int, loss: float, lr: float, seconds: float, scores: dict[str, float] | None = None
    ) -> StepReport:
        self._last = (loss, lr, seconds)
        return StepReport(
            step=step,
            total=self._config.iterations,
            epoch=(step - 1) // self._config.iterations_per_epoch,
            loss=loss,
            lr=lr,
            seconds=seconds,
            eta_seconds=self._time_left.seconds(step, self._position.validated),
            memory_mb=self._runtime.memory_mb(),
            scores=scores,
        )

    def _validate(self) -> None:
        """Score the model without changing any training state, so that it can be skipped or interrupted."""
        began = time.monotonic()
        try:
            # ranks synchronize in here: with several ranks, a stop takes effect at the next step
            alone = self._runtime.world_size == 1
            with (
                self._signals.interruptible() if alone else nullcontext(),
                preserved(self._runtime.device),
                torch.no_grad(),
                self._runtime.autocast(),
            ):
                self._model.eval()
                scores = self._averaged(self._task.validate())
        except Interrupted:
            self._stop = True
            return
        finally:
            self._model.train()
        self._clock = time.monotonic()
        self._time_left.add_validation(self._clock - began)
        self._record_scores(scores, self._clock - began)

    def _averaged(self, scores: dict[str, float]) -> dict[str, float]:
        """Mean over the ranks of each score; ranks without a score are left out of its mean."""
        gathered = self._runtime.gather(scores)
        names = dict.fromkeys(name for each in gathered for name in each)
        return {n: sum(g[n] for g in gathered if n in g) / sum(n in g for g in gathered) for n in names}

    def _record_scores(self, scores: dict[str, float], seconds: float) -> None:
        position = self._position
        best = position.best is None or scores["score"] > position.best
        self._position = replace(
            position,
            validated=position.step,
            scores=scores,
            best=scores["score"] if best else position.best,
            seconds=position.seconds + seconds,
        )
        if self._log is None:
            return
        epoch = position.step // self._config.iterations_per_epoch - 1
        event = {"event": "validation", "step": position.step, "epoch": epoch, "seconds": round(seconds, 6)}
        self._log.write(event | {"scores": scores})
        self._log.flush()
        if best:
            save_model(self._run.folder / BEST, self._run.record(position.step, scores), self._model)
        self._run.track.step(self._report(position.step, *self._last, scores=scores))

    def _save(self) -> None:
        """Write checkpoint_latest with everything that an exact resume needs."""
        self._collect_metrics(leave=0)
        rng_states = self._runtime.gather(capture(self._runtime.device))
        if self._log is not None:
            self._log.flush()  # before the checkpoint: the log must contain every step of the checkpoint
            save_training(
                self._run.folder / LATEST,
                self._run.record(self._position.step, self._position.scores or {}),
                TrainingState(model=self._model, optimizer=self._optimizer, scaler=self._scaler),
                config=self._config,
                position=self._position,
                rng_states=rng_states,
            )
        self._save_wanted = self._signals.save = False
        self._saved_at = self._clock = time.monotonic()

    def _finish(self) -> None:
        final, runtime, step = self._run.folder / FINAL, self._runtime, self._position.step
        if self._position == self._found and not runtime.any(not is_of_step(final, self._run.kind, step)):
            return  # already finished by an earlier run
        self._save()
        if runtime.is_main:
            save_model(final, self._run.record(step, self._position.scores or {}), self._model)
        runtime.any(False)  # barrier: no rank leaves before the files exist

    def _progress(self) -> Progress:
        position = self._position
        return Progress(
            status="stopped" if self._stop else "finished",
            signal=self._signals.stop if self._stop else None,
            step=position.step,
            epoch=position.step // self._config.iterations_per_epoch,
            best=position.best,
            scores=position.scores or {},
            seconds=position.seconds,
        )


def _already_finished(task: Task[Any], config: TrainConfig, run: Run) -> Progress:
    """Load the final weights of a training whose checkpoint_latest was removed."""
    final = run.folder / FINAL
    record, tensors, _ = read_all(final, run.kind)
    if record.step < config.iterations:
        raise UsageError(
            "This training is finished and its checkpoint_latest was removed, so it cannot be extended",
            where=final,
            found=f"{record.step} steps completed, {config.iterations} requested",
            remedy="Start a new training, or one initialized with these weights",
        )
    load_weights(final, task.model, {n.removeprefix("model/"): t for n, t in tensors.items()})
    epoch = record.step // config.iterations_per_epoch
    return Progress(
        status="finished", signal=None, step=record.step, epoch=epoch, best=None, scores=record.scores, seconds=0.0
    )
