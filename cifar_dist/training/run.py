"""A whole run, composed: data, run directory, trainer, trackers, the final test, and what is left behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cifar_dist import stopping
from cifar_dist.cli import to_yaml
from cifar_dist.config import NUM_TEST, Config
from cifar_dist.data.loader import BetonLoader
from cifar_dist.distributed import World, broadcast_bytes, from_rank0, naming_lost_peers, together
from cifar_dist.errors import UserError
from cifar_dist.files import write_text_atomic
from cifar_dist.models.layers import num_parameters
from cifar_dist.place import SLOW_S, VERY_SLOW_S, Place, go
from cifar_dist.tracking.curves import draw_curves
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.training import checkpoint, debug, evaluation, out_of_memory, run_directory, stall, status
from cifar_dist.training.claim import Claim
from cifar_dist.training.precision import number_format, set_backends
from cifar_dist.training.samples import folder_of, scored_samples, split_of
from cifar_dist.training.stepper import Stepper
from cifar_dist.training.summary import device_names, summarize, to_json
from cifar_dist.training.trainer import Trainer
from cifar_dist.training.whitening import fit_whitening

log = logging.getLogger("cifar_dist")


class Reporter:
    """Rank 0 prints and tracks, every rank keeps a log file."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tracker: Tracker | None = None
        self.claim: Claim | None = None  # rank 0 has it
        self.failure: UserError | None = None

    def say(self, text: str) -> None:
        log.info(text)
        if self.tracker is not None:
            self.tracker.say(text)
        elif self.world.speaks:
            print(text, flush=True)

    def report(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        log.info("step %d %s", step, metrics)
        # Where it cannot be written, all ranks stop after the same step, and `guard` says why.
        if self.tracker is not None and self.failure is None and self.may_write():
            try:
                self.tracker.log(step, metrics)
            except UserError as error:
                self.failure = error
                stopping.ask()

    def may_write(self) -> bool:
        return self.claim is not None and self.claim.held()

    def guard(self) -> None:
        """Raise where another process has taken the run over, or where metrics of it could not be written."""
        if self.failure is not None:
            raise self.failure
        if self.claim is not None:
            self.claim.check()

    def tick(self, step: int) -> None:
        if self.tracker is not None:
            self.tracker.progress(step)


def run(config: Config, world: World, stack: ExitStack) -> None:
    """Train as `config` says, in the given world; what is opened is closed by `stack`.

    Raises:
        UserError: anything that a user can mend; see `errors` for the kinds.
        StopError: a signal came; everything is saved.
    """
    with stall.watched(world, config.run.stall_timeout_s) as watch:
        _run(config, world, stack, watch)


def _run(config: Config, world: World, stack: ExitStack, watch: stall.Watch) -> None:
    reporter = Reporter(world)
    go(Place("preparing or verifying the dataset", limit_s=VERY_SLOW_S))
    formats = together(world, lambda: number_format(config.train.precision, world.device))
    set_backends(config.train, config.run.deterministic)
    data = config.data
    data_dir = folder_of(data.dir, data.stage_dir, data.source, world, reporter.say)
    parts = split_of(data, data_dir, world)
    go(Place("opening the run directory", limit_s=SLOW_S))
    directory, origin, start = _claim(config, world, stack, reporter)
    watch.directory = directory
    named = out_of_memory.named(config, world.rank, world.size)
    with status.kept(directory, reporter.may_write), watch.told(), named, naming_lost_peers(world):
        together(world, lambda: _log_to(directory / "logs" / f"rank-{world.rank}.log", stack))
        devices = device_names(world)
        open_loader = partial(BetonLoader, data_dir / "train.beton", world.device, config.data.num_workers)
        loader = stack.enter_context(together(world, open_loader))
        stepper = Stepper(config, world, formats)
        calibration = evaluation.calibration_samples(parts, config.eval)
        fit_whitening([stepper.model, stepper.scored_model], loader, calibration, world)
        go(Place("the start of training", limit_s=SLOW_S))
        checkpoints = directory / "checkpoints"
        trainer = Trainer(config, stepper, parts, loader, reporter.report, reporter.tick, checkpoints, reporter.guard)
        if start:
            together(world, lambda: trainer.restore(checkpoint.decode(start, origin), origin))
        _introduce(config, trainer, devices, directory, reporter)
        complete = from_rank0(world, (directory / "summary.json").exists)
        if complete and trainer.progress.step == trainer.schedule.total_steps:
            reporter.say(f"this run is complete; its figures are in {directory / 'summary.json'}")
            return
        together(world, lambda: _leave_config(config, directory, reporter), at_work=world.speaks)
        go(Place("the self-check", limit_s=VERY_SLOW_S))
        together(world, lambda: debug.check(config, trainer, reporter.say))
        go(Place("the start of tracking", limit_s=SLOW_S))
        together(world, lambda: _start_tracking(config, trainer, directory, stack, reporter), at_work=world.speaks)
        trainer.train()
        _finish(config, trainer, data_dir, devices, directory, reporter)


def _leave_config(config: Config, directory: Path, reporter: Reporter) -> None:
    reporter.guard()
    run_directory.write_config(config, directory)


def _start_tracking(config: Config, trainer: Trainer, directory: Path, stack: ExitStack, reporter: Reporter) -> None:
    reporter.guard()
    plain, steps = yaml.safe_load(to_yaml(config)), (trainer.schedule.total_steps, trainer.progress.step)
    reporter.tracker = stack.enter_context(Tracker(directory, config.track, plain, *steps, _name(config, directory)))


def _name(config: Config, directory: Path) -> str:
    return config.run.name or directory.resolve().name


def _claim(config: Config, world: World, stack: ExitStack, reporter: Reporter) -> tuple[Path, str, bytes]:
    """The run's directory, and the name and bytes of the checkpoint to go on from (empty: none), on every rank."""
    data = b""

    def claim() -> tuple[str, str]:
        nonlocal data
        reporter.claim = stack.enter_context(run_directory.claimed(config, reporter.say))
        directory = reporter.claim.directory
        found = run_directory.starting_point(config, directory, reporter.say)
        checkpoint.sweep(directory / "checkpoints")
        if found and not found[0].is_relative_to(directory):
            # The run stands on its own from the start, should it be stopped before its first own checkpoint.
            checkpoint.write(directory / "checkpoints", checkpoint.decode(found[1], str(found[0]))["step"], found[1])
        if found:
            reporter.say(f"going on from {found[0]}")
            data = found[1]
        return str(directory), str(found[0]) if found else ""

    directory, origin = from_rank0(world, claim)
    return Path(directory), origin, broadcast_bytes(data, world)


class _LogFile(logging.FileHandler):
    """On a full disk it stays behind; what must not be lost says so where it is written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: the standard library would print a traceback for each line."""

    def close(self) -> None:
        with suppress(OSError):  # what could not be written before is tried again
            super().close()


def _log_to(path: Path, stack: ExitStack) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    stack.callback(handler.close)
    stack.callback(log.removeHandler, handler)
    stack.push(_log_failure)


def _log_failure(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    if error is not None:
        log.error("stopped by %s", kind, exc_info=error)


def _introduce(config: Config, trainer: Trainer, devices: list[str], directory: Path, reporter: Reporter) -> None:
    order, schedule = trainer.order, trainer.schedule
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    num = num_parameters(trainer.stepper.scored_model)
    reporter.say(
        f"{config.model.name} ({config.model.stem} stem, width {config.model.width:g}), "
        f"{num:,} parameters, {trainer.stepper.number_format.name}, on {kinds}\n"
        f"{len(order.samples):,} training samples in {schedule.steps_per_epoch} steps of {config.train.batch_size} "
        f"({config.train.micro_batch_size} x {trainer.world.size} x {trainer.stepper.accumulation} accumulated); "
        f"{order.dropped_per_epoch} samples dropped per epoch\n"
        f"steps {trainer.progress.step} to {schedule.total_steps}; run directory {directory}"
    )


def _finish(
    config: Config, trainer: Trainer, data_dir: Path, devices: list[str], directory: Path, reporter: Reporter
) -> None:
    """Read the test set, once, and write what the run leaves."""
    go(Place("the final test", limit_s=SLOW_S))
    samples = scored_samples(config.eval, data_dir, trainer.world)
    with trainer.loader.of(data_dir / "test.beton") as loader:
        test = trainer.score(loader, samples, config.eval.tta)
    go(Place("writing the results", limit_s=SLOW_S))
    figures = {"test/accuracy": test.accuracy, "test/accuracy_tta": test.accuracy_tta, "test/n": test.n}
    reporter.report(trainer.progress.step, figures)
    summary = summarize(config, trainer, test, devices)
    name = _name(config, directory)
    together(trainer.world, lambda: _leave(directory, name, summary, reporter), at_work=reporter.tracker is not None)
    views = {"flip": "flip", "six": "six views"}.get(config.eval.tta)
    tta = "" if test.accuracy_tta is None else f", {test.accuracy_tta:.2%} with {views}"
    part = "" if test.n == NUM_TEST else f" of {NUM_TEST} (eval.test_subset)"
    reporter.say(
        f"test accuracy {test.accuracy:.2%}{tta} on {test.n}{part} images; "
        f"{trainer.progress.train_seconds:.0f} s of training; see {directory}/summary.json and curves.png"
    )


def _leave(directory: Path, name: str, summary: dict[str, Any], reporter: Reporter) -> None:
    assert reporter.tracker is not None
    reporter.guard()
    draw_curves(directory / "metrics.jsonl", directory / "curves.png", name)
    # Last, since it says that the run is complete.
    write_text_atomic(directory / "summary.json", to_json(summary))
    # Not the command line, in which a user may have typed what is not for others.
    plain = {key: v for key, v in summary.items() if isinstance(v, (int, float, str)) and key != "command"}
    reporter.tracker.finish(plain)
