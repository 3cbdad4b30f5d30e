"""The training loop: steps, log windows, checkpoints and validations, all counted in optimizer steps."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cifar_dist import stopping
from cifar_dist.cli import to_yaml
from cifar_dist.config import Config
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Indices, Order, Split
from cifar_dist.distributed import together
from cifar_dist.errors import CheckpointError, StopError
from cifar_dist.place import SLOW_S, Place, end_trail, go, here
from cifar_dist.processes import age_s
from cifar_dist.training import checkpoint, drift, evaluation, health, optim
from cifar_dist.training.metrics import Metrics, Receipt, Window
from cifar_dist.training.preemption import StopVote
from cifar_dist.training.schedule import Step, schedule_of
from cifar_dist.training.stepper import Stepper

_SAVES = Place("writing the checkpoint", limit_s=SLOW_S)
STARTUP = "startup_seconds "  # begins the log's line on the first step
log = logging.getLogger("cifar_dist")


@dataclass
class Progress:
    """Where a run stands. Times in seconds: `train` is spent in steps, over all sittings, without start-up,
    validation and saving; `first_step` is from the start of this process to the end of its first step."""

    step: int = 0
    train_seconds: float = 0.0
    first_step_seconds: float | None = None
    startup_seconds: dict[str, float] = field(default_factory=dict)  # these, by what was done
    since_log: Window = field(default_factory=Window)  # read, but not logged yet
    seconds_since_log: float = 0.0
    last_saved: int | None = None
    last_compared: int = 0  # with the other ranks
    best_step: int | None = None
    best_accuracy: float = -1.0
    last_validation: dict[str, float] | None = None
    validation_due: bool = False  # the run was stopped where it should have validated


class Trainer:
    """A run on this rank.

    Args:
        loader: reads the training file.
        report: takes (step, metrics) of a log step, on every rank.
        tick: takes the number of steps done after every step; must not wait for the device.
        directory: of the checkpoints, written by rank 0.
        guard: raises on rank 0, before a checkpoint is written, where it must not be: another process has taken the run
            over, or metrics up to this step could not be written.
    """

    def __init__(
        self,
        config: Config,
        stepper: Stepper,
        split: Split,
        loader: BetonLoader,
        report: Callable[[int, dict[str, float]], None],
        tick: Callable[[int], None],
        directory: Path,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.stepper, self.world = config, stepper, stepper.world
        self.split, self.loader, self.directory = split, loader, directory
        self.report, self.tick, self.guard = report, tick, guard
        self.order = Order(split.train, config.train.batch_size, config.run.seed)
        self.schedule = schedule_of(config, self.order.steps_per_epoch)
        self.metrics = Metrics(self.world)
        self.progress = Progress()

    def train(self) -> None:
        """Run to the last step, from wherever the state is.

        Raises:
            NonFiniteError: on every rank; nothing was saved since the last finite log step.
            DivergedError: on every rank; they do not hold the same model.
            CheckpointError: a checkpoint could not be written.
            RunInUseError: another process has taken the run over.
            StopError: on every rank; a signal came, and the step at which all stopped is saved.
        """
        with stopping.hold():
            if self.progress.validation_due:
                self._validate_and_save()
            self._train(StopVote(self.world))

    def _train(self, vote: StopVote) -> None:
        progress, total = self.progress, self.schedule.total_steps
        started = time.perf_counter()
        batches = self._batches()
        while progress.step < total:
            here.step = progress.step + 1
            lr_share = optim.schedule(progress.step, total, self.config.optim)
            step = Step(progress.step, lr_share, self.schedule.side(progress.step))
            self.stepper.step(step, batches, self.metrics)
            progress.step += 1
            self.tick(progress.step)
            if progress.first_step_seconds is None:
                self._note_first_step()
            asked = vote.after_step()
            if asked or self.schedule.should_read(progress.step):
                self._read_metrics(started)
                if self.schedule.should_log(progress.step):
                    self._log()
                if asked:
                    # A validation may take longer than there is; the next sitting begins with it.
                    progress.validation_due = self.schedule.should_validate(progress.step)
                    self.save()
                    raise self._stopped(asked)
                self._validate_and_save()
                started = time.perf_counter()
        asked = vote.after_last()
        if asked:
            raise self._stopped(asked)

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """(epoch, micro-batch) from the current step on: this rank's slice of each global batch, in order."""
        step, share = self.progress.step, self.config.train.batch_size // self.world.size
        while step < self.schedule.total_steps:
            order = self.order.rest_of_epoch(step, self.world.rank, self.world.size)
            order = order[: (self.schedule.total_steps - step) * share]
            epoch = step // self.order.steps_per_epoch
            for batch in self.loader.read(order, self.config.train.micro_batch_size):
                yield epoch, batch
            step += len(order) // share

    def _note_first_step(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.progress.first_step_seconds = age_s()
        self.progress.startup_seconds = end_trail(self.progress.first_step_seconds)
        log.info("%s%s", STARTUP, json.dumps(self.progress.startup_seconds))

    def _read_metrics(self, started: float) -> None:
        progress = self.progress
        window = self.metrics.window()
        seconds = time.perf_counter() - started
        progress.train_seconds += seconds
        progress.seconds_since_log += seconds
        progress.since_log += window
        if window.num_nonfinite:
            raise health.nonfinite_loss(self.metrics, self.world, progress.last_saved)
        every = self.config.train.check_ranks_every_steps
        if every and progress.step - progress.last_compared >= every:
            self._compare_ranks()
        if self.schedule.ends_epoch(progress.step):
            self.metrics.receipt.end_epoch()

    def _log(self) -> None:
        progress = self.progress
        figures = {
            "epoch": progress.step / self.order.steps_per_epoch,
            "train/loss": progress.since_log.loss,
            "train/accuracy": progress.since_log.accuracy,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "images_per_second": progress.since_log.num_samples / progress.seconds_since_log,
            "seconds": progress.train_seconds,
        }
        self.report(progress.step, figures)
        progress.since_log, progress.seconds_since_log = Window(), 0.0

    def _compare_ranks(self) -> None:
        at, last_saved = self.progress.step, self.progress.last_saved
        drift.refuse_drift(health.tensors_alike(self.stepper), self.world, at, last_saved)
        self.progress.last_compared = at

    def _stopped(self, asked: signal.Signals) -> StopError:
        text = f"stopped by {asked.name} after step {self.progress.step}, which is saved in {self.directory}."
        return StopError(f"{text} The same command with --run.resume auto goes on from there.")

    def _validate_and_save(self) -> None:
        progress, ends = self.progress, self.progress.step == self.schedule.total_steps
        progress.validation_due = False
        save = self.schedule.should_save(progress.step)
        validate = self.schedule.should_validate(progress.step) and len(self.split.validation) > 0
        if validate or ends:
            self.recalibrate()
        if validate:
            result = self.score(self.loader, self.split.validation)
            figures = {"val/accuracy": result.accuracy, "val/loss": result.loss, "val/n": result.n}
            self.report(progress.step, figures)
            progress.last_validation = figures
            if result.accuracy > progress.best_accuracy:
                progress.best_accuracy, progress.best_step, save = result.accuracy, progress.step, True
        if save:
            self.save()

    def recalibrate(self) -> None:
        """Set the batch-norm statistics of the scored model, over the same training samples every time."""
        samples = evaluation.calibration_samples(self.split, self.config.eval)
        stepper, chunk = self.stepper, self.config.eval.batch_size
        evaluation.recalibrate(stepper.scored_model, self.loader, samples, chunk, stepper.number_format, self.world)

    def score(self, loader: BetonLoader, samples: Indices, tta: str = "none") -> evaluation.Score:
        """Score the model, recalibrated before, on `samples` (N,) of the file behind `loader`."""
        stepper, chunk = self.stepper, self.config.eval.batch_size
        return evaluation.score(stepper.scored_model, loader, samples, chunk, stepper.number_format, self.world, tta)

    def save(self) -> None:
        """Write a checkpoint of the current step on rank 0; all ranks raise when that fails.

        Raises:
            NonFiniteError: a parameter is not finite.
            DivergedError: not all ranks hold the same state.
            CheckpointError: it cannot be written.
            RunInUseError: another process has taken the run over.
        """
        go(_SAVES)
        health.refuse_nonfinite(self.stepper.model, self.progress.step, self.progress.last_saved)
        self._compare_ranks()
        together(self.world, self._write, at_work=self.world.speaks)
        self.progress.last_saved = self.progress.step

    def _write(self) -> None:
        self.guard()
        checkpoint.save(self.directory, self.progress.step, self.state())
        best = [] if self.progress.best_step is None else [self.progress.best_step]
        checkpoint.retain(self.directory, self.progress.step, self.config.train.keep_checkpoints, best)

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on; the same on every rank."""
        receipt, progress = self.metrics.receipt, self.progress
        return {
            "step": progress.step,
            "config": to_yaml(self.config),
            **self.stepper.state(),
            "train_seconds": progress.train_seconds,
            "since_log": [*astuple(progress.since_log), progress.seconds_since_log],
            "best": [progress.best_step, progress.best_accuracy],
            "last_validation": progress.last_validation,
            "validation_due": progress.validation_due,
            "receipt": [receipt.epochs, receipt.words, receipt.num_samples],
        }

    def restore(self, state: dict[str, Any], origin: str) -> None:
        """Go back to a state from `state()`.

        Raises:
            CheckpointError: it is of another model, or incomplete.
        """
        missing = self.state().keys() - state.keys()
        if missing:
            raise CheckpointError(f"{origin} is incomplete: it has no {', '.join(sorted(missing))}.")
        self.stepper.restore(state, origin)
        progress = self.progress
        progress.step = progress.last_saved = progress.last_compared = state["step"]
        progress.train_seconds = state["train_seconds"]
        *window, progress.seconds_since_log = state["since_log"]
        progress.since_log = Window(*window)
        progress.best_step, progress.best_accuracy = state["best"]
        progress.last_validation = state["last_validation"]
        progress.validation_due = state["validation_due"]
        self.metrics.receipt = Receipt(*state["receipt"])
