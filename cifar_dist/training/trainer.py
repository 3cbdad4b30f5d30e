"""The training loop: steps, logging, validation and checkpoints, all counted in optimizer steps."""

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from cifar_dist.config import Config, to_yaml
from cifar_dist.data.loader import Batch, BetonLoader
from cifar_dist.data.order import Order, Split
from cifar_dist.distributed import run_and_sync_errors
from cifar_dist.errors import CheckpointError, StopError, one_line
from cifar_dist.phase import SLOW_S, Phase, current, process_age_s, seconds_by_phase, set_phase
from cifar_dist.training import checkpoint
from cifar_dist.training.evaluation import Evaluator, bn_samples
from cifar_dist.training.metrics import Metrics, Receipt, Window
from cifar_dist.training.schedule import Schedule
from cifar_dist.training.train_step import TrainStep

_SAVE = Phase("writing the checkpoint", limit_s=SLOW_S)
logger = logging.getLogger("cifar_dist")


@dataclass
class Progress:
    """State of the loop. Times in seconds, by this rank's clock.

    `train_seconds`: spent in steps, summed over all starts of the run; without start-up, validation and saving.
    `first_step_seconds`: from the start of this process to the end of its first step.
    """

    step: int = 0
    train_seconds: float = 0.0
    first_step_seconds: float | None = None
    startup_seconds: dict[str, float] = field(default_factory=dict)  # first_step_seconds by phase
    since_log: Window = field(default_factory=Window)  # read from the device, not logged yet
    seconds_since_log: float = 0.0
    last_saved: int | None = None
    best_step: int | None = None
    best_accuracy: float = -1.0
    last_validation: dict[str, float] | None = None
    validation_due: bool = False  # the run was stopped before the validation of this step
    recalibrated: int | None = None  # the step whose batch-norm statistics the model has
    weights_sha256: str | None = None  # of the file that model.weights names


class Hooks:
    """Callbacks of the training loop, which do nothing by default.

    `Run` (training/run.py) overrides them, and calls those of `run.hooks` beside its own, but for `stop_requested` and
    `before_write`. Every rank calls each hook at the same point, so hooks may exchange data between ranks. Random
    numbers that they draw do not change a run.
    """

    def before_training(self, trainer: "Trainer") -> None:
        """Called before the first step of this start of the run, which may be a resumed one."""

    def after_step(self, step: int) -> None:
        """Called after each step; `step` steps are done. Must not wait for the device."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`, on every rank."""

    def stop_requested(self, last_step: bool = False) -> Signals | None:  # noqa: ARG002
        """The stop signal that all ranks agreed on, or None. A collective, called after every step.

        Called once more with `last_step` after the last step.
        """
        return None

    def check_window(self, trainer: "Trainer", window: Window) -> None:
        """Raise on every rank if training cannot continue, given the metrics since the last call."""

    def before_save(self, trainer: "Trainer") -> None:
        """Raise on every rank if the state must not be saved."""

    def before_write(self) -> None:
        """Raise on rank 0 if it must not write in the run directory."""

    def after_run(self, results: dict[str, Any]) -> None:
        """Called last, with the values of summary.json, which is written."""


class Trainer:
    """The training loop of one rank, from the current step to the last.

    Args:
        loader: reads train.beton.
        directory: for checkpoints; rank 0 writes.
    """

    def __init__(
        self,
        config: Config,
        train_step: TrainStep,
        split: Split,
        loader: BetonLoader,
        directory: Path,
        hooks: Hooks | None = None,
    ) -> None:
        self.config, self.train_step, self.world = config, train_step, train_step.world
        self.split, self.loader, self.directory = split, loader, directory
        self.hooks = hooks or Hooks()
        self.order = Order(split.train, config.train.batch_size, config.run.seed)
        self.schedule = Schedule(config, self.order.steps_per_epoch)
        self.metrics = Metrics(self.world)
        self.evaluator = Evaluator(train_step.scored_model, config.eval, train_step.precision, self.world)
        self.progress = Progress()

    def train(self) -> None:
        """Run from the current step to the last one.

        Raises:
            StopError: on every rank; a signal came, and the last finished step is saved.
            CheckpointError: on every rank; a checkpoint cannot be written.
            UserError: on every rank; from `hooks`.
        """
        progress, schedule = self.progress, self.schedule
        if progress.validation_due:
            self._validate_and_save_if_due()
        if progress.step < schedule.total_steps:
            self.train_step.prepare()
        self.hooks.before_training(self)
        batches, started = self._batches(), time.perf_counter()
        while progress.step < schedule.total_steps:
            current.step = progress.step + 1
            self.train_step.run(schedule.step(progress.step), batches, self.metrics)
            progress.step += 1
            self.hooks.after_step(progress.step)
            if progress.first_step_seconds is None:
                self._note_first_step()

            stop_signal = self.hooks.stop_requested()
            if not stop_signal and not schedule.should_read_metrics(progress.step):
                continue
            self._read_metrics(started)  # waits for the device
            if schedule.should_log(progress.step):
                self._log()
            if stop_signal:
                # Slurm may kill the job before a validation ends; the resumed run starts with it.
                progress.validation_due = schedule.should_validate(progress.step)
                batches.close()
                self._save_stopped()
                raise self._stop_error(stop_signal)
            if progress.step < schedule.total_steps and schedule.should_save(progress.step):
                # Two reading threads of FFCV may not run at the same time. The new one resumes at the next step.
                batches.close()
                batches = self._batches()
            self._validate_and_save_if_due()
            started = time.perf_counter()
        if stop_signal := self.hooks.stop_requested(last_step=True):
            raise self._stop_error(stop_signal)

    def _batches(self) -> Generator[tuple[int, Batch]]:
        """Pairs (epoch, micro-batch) from the current step on: this rank's slice of each global batch, in order."""
        step, per_rank = self.progress.step, self.config.train.batch_size // self.world.size
        while step < self.schedule.total_steps:
            indices = self.order.rest_of_epoch(step, self.world.rank, self.world.size)
            indices = indices[: (self.schedule.total_steps - step) * per_rank]
            epoch = step // self.order.steps_per_epoch
            with closing(self.loader.read(indices, self.config.train.micro_batch_size)) as reading:
                for batch in reading:
                    yield epoch, batch
            step += len(indices) // per_rank

    def _note_first_step(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.progress.first_step_seconds = process_age_s()
        self.progress.startup_seconds = seconds_by_phase(self.progress.first_step_seconds)
        logger.info("startup: %s", ", ".join(f"{name} {s:.1f} s" for name, s in self.progress.startup_seconds.items()))

    def _read_metrics(self, started: float) -> None:
        progress = self.progress
        window = self.metrics.window()
        seconds = time.perf_counter() - started
        progress.train_seconds += seconds
        progress.seconds_since_log += seconds
        progress.since_log += window
        self.hooks.check_window(self, window)
        if self.schedule.ends_epoch(progress.step):
            self.metrics.receipt.end_epoch()

    def _log(self) -> None:
        progress, window = self.progress, self.progress.since_log
        metrics = {
            "epoch": progress.step / self.order.steps_per_epoch,
            "train/loss": window.loss,
            "train/objective": window.objective,
            "train/accuracy": window.accuracy,
            **self.train_step.figures(progress.seconds_since_log),
            "images_per_second": window.num_samples / progress.seconds_since_log,
            "seconds": progress.train_seconds,
        }
        self.hooks.log_metrics(progress.step, metrics)
        progress.since_log, progress.seconds_since_log = Window(), 0.0

    def _validate_and_save_if_due(self) -> None:
        """Validate and save, if the current step is due for either. The best model so far is always saved."""
        progress = self.progress
        # Saved after a late validation, or a run that is killed before its next checkpoint would validate again.
        save = self.schedule.should_save(progress.step) or progress.validation_due
        progress.validation_due = False
        validate = self.schedule.should_validate(progress.step) and len(self.split.validation) > 0
        if validate or save or progress.step == self.schedule.total_steps:  # the final test uses these statistics
            self._recalibrate()
        if validate:
            result = self.evaluator.score(self.loader, self.split.validation)
            metrics = {"val/accuracy": result.accuracy, "val/loss": result.loss, "val/n": result.n}
            self.hooks.log_metrics(progress.step, metrics)
            progress.last_validation = metrics
            if result.accuracy > progress.best_accuracy:
                progress.best_accuracy, progress.best_step, save = result.accuracy, progress.step, True
        if save:
            self.save()

    def _recalibrate(self) -> None:
        self.evaluator.recalibrate(self.loader, bn_samples(self.split, self.config.eval))
        self.progress.recalibrated = self.progress.step

    def _save_stopped(self) -> None:
        """Save at once, as the process may soon be killed; then again, with batch-norm statistics."""
        if not self.evaluator.norms:
            self._recalibrate()
        self.save()
        if not self.evaluator.norms:
            return
        try:
            self._recalibrate()
            self.save()
        except Exception as error:  # noqa: BLE001 - the step is saved, so this is a stop, not a failure
            logger.warning("no batch-norm statistics were saved: %s: %s", type(error).__name__, one_line(error))

    def save(self) -> None:
        """Write a checkpoint of the current step on rank 0, and remove old ones.

        Raises:
            CheckpointError: on every rank; it cannot be written.
            UserError: on every rank; from `hooks`.
        """
        set_phase(_SAVE)
        self.hooks.before_save(self)
        run_and_sync_errors(self.world, self._write, only_if=self.world.is_main)
        self.progress.last_saved = self.progress.step

    def _write(self) -> None:
        self.hooks.before_write()
        progress = self.progress
        checkpoint.write(self.directory, progress.step, checkpoint.encode(progress.step, self.state()))
        best = [] if progress.best_step is None else [progress.best_step]
        checkpoint.retain(self.directory, progress.step, self.config.train.keep_checkpoints, best)

    def _stop_error(self, signal: Signals) -> StopError:
        text = f"stopped by {signal.name} after step {self.progress.step}, which is saved in {self.directory}."
        return StopError(f"{text} The same command with --run.resume auto resumes it.")

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; equal on all ranks but for times, of which rank 0's are saved."""
        receipt, progress = self.metrics.receipt, self.progress
        return {
            "step": progress.step,
            "config": to_yaml(self.config),
            "statistics": progress.recalibrated == progress.step,
            "weights_sha256": progress.weights_sha256,
            **self.train_step.state(),
            "train_seconds": progress.train_seconds,
            "since_log": [*astuple(progress.since_log), progress.seconds_since_log],
            "best": [progress.best_step, progress.best_accuracy],
            "last_validation": progress.last_validation,
            "validation_due": progress.validation_due,
            "receipt": [receipt.epochs, receipt.words, receipt.num_samples],
        }

    def restore(self, state: dict[str, Any], origin: str) -> None:
        """Load what `state()` returned.

        Raises:
            CheckpointError: it belongs to another model, or is incomplete.
        """
        if missing := self.state().keys() - state.keys():
            raise CheckpointError(f"{origin} is incomplete: it has no {', '.join(sorted(missing))}.")
        self.train_step.restore(state, origin)
        progress = self.progress
        progress.step = progress.last_saved = state["step"]
        progress.recalibrated = progress.step if state["statistics"] else None
        progress.weights_sha256 = state["weights_sha256"]
        progress.train_seconds = state["train_seconds"]
        *window, seconds = state["since_log"]
        if len(window) == len(astuple(Window())):  # else of an older version, without `objective_units`
            progress.since_log, progress.seconds_since_log = Window(*window), seconds
        progress.best_step, progress.best_accuracy = state["best"]
        progress.last_validation = state["last_validation"]
        progress.validation_due = state["validation_due"]
        self.metrics.receipt = Receipt(*state["receipt"])
