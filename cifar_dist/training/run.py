"""One run from start to end: data, run directory, training, the final test, and the files that it leaves.

The only module that connects training with fault tolerance and tracking.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from torch import Tensor

from cifar_dist import environment, extension
from cifar_dist.config import NUM_TEST, Config, to_plain, to_yaml
from cifar_dist.data.dataset import prepared_folder, read_split, scored_samples
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Split
from cifar_dist.distributed import World, all_gather_text, broadcast_bytes, broadcast_from_main, run_and_sync_errors
from cifar_dist.errors import UserError, begin_shutdown, explain_os_error, one_line
from cifar_dist.fault_tolerance import health, run_lock, signals, status
from cifar_dist.fault_tolerance.stop_consensus import StopConsensus
from cifar_dist.fault_tolerance.watchdog import Watchdog
from cifar_dist.files import write_json, write_text_atomic
from cifar_dist.models.network import without_auxiliary
from cifar_dist.phase import SLOW_S, VERY_SLOW_S, Phase, set_phase
from cifar_dist.tracking import console, wandb_run
from cifar_dist.tracking.curves import draw_curves
from cifar_dist.tracking.rank_log import rank_log
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.training import checkpoint, debug, predictions, run_directory
from cifar_dist.training.evaluation import bn_samples
from cifar_dist.training.metrics import Window
from cifar_dist.training.precision import Precision, common_precision, set_backends
from cifar_dist.training.profiling import profiler
from cifar_dist.training.summary import describe, device_name, summarize
from cifar_dist.training.train_step import TrainStep
from cifar_dist.training.trainer import Hooks, Trainer
from cifar_dist.training.weights import load_start_weights
from cifar_dist.training.whitening import fit_whitening

logger = logging.getLogger("cifar_dist")


def _write_report(path: Path) -> None:
    from cifar_dist.reports import run_report  # here, as only the end of a run needs it

    run_report.write(path.parent)


class Run(Hooks):
    """All that one rank does for the run with `config`, up to summary.json, and the hooks of its Trainer.

    Rank 0 has `tracker` and `lock`; every rank has a log file. `stack` closes what the run opens.
    """

    def __init__(self, config: Config, world: World, stack: ExitStack) -> None:
        self.config, self.world, self.stack = config, world, stack
        self.directory, self.name = Path(), ""  # set by _open_directory; the name in curves.png and at W&B
        self.tracker: Tracker | None = None
        self.lock: run_lock.RunLock | None = None
        self._stop = StopConsensus(world)
        self._tracking_error: UserError | None = None
        self._compared_step = 0
        self._own_hooks = Hooks()
        self._profile_step: Callable[[], None] = lambda: None

    def execute(self) -> None:
        """Do the whole run.

        Raises:
            UserError: see `errors` for the kinds.
            StopError: a signal came, and the state is saved.
        """
        config, world = self.config, self.world
        stall_s, connection_error = config.run.stall_timeout_s, self._stop.connection_error
        with Watchdog(world, stall_s, connection_error, lambda phase: self.log(f"starting: {phase} ...")) as watch:
            set_phase(Phase("importing own code", limit_s=SLOW_S))
            run_and_sync_errors(world, self._import_own_code)
            set_phase(Phase("preparing or verifying the dataset", limit_s=VERY_SLOW_S))
            precision = common_precision(config.train.precision, world)
            set_backends(config.train, config.run.deterministic, world.device)
            data_dir = prepared_folder(config.data, world, self.log)
            split = read_split(config.data, data_dir, world)
            set_phase(Phase("opening the run directory", limit_s=SLOW_S))
            origin, start = self._open_directory()
            watch.directory = self.directory
            with (
                status.status_file(self.directory, world.size, self.owns_directory),
                watch.share_errors(),
                health.explain_out_of_memory(config, world.rank, world.size),
            ):
                path = self.directory / "logs" / f"rank-{world.rank}.log"
                run_and_sync_errors(world, lambda: self.stack.enter_context(rank_log(path)))
                trainer = self._build_trainer(precision, data_dir, split)
                if start:
                    run_and_sync_errors(world, lambda: trainer.restore(checkpoint.decode(start, origin), origin))
                elif config.model.weights is not None:
                    self._load_start_weights(trainer)
                self._train_and_test(trainer, data_dir)

    def _import_own_code(self) -> None:
        extension.import_all(self.config)
        name = self.config.run.hooks
        if name is None:
            return
        self._own_hooks = extension.create("run.hooks", name, Hooks)
        for method in ("stop_requested", "before_write"):
            if getattr(type(self._own_hooks), method) is not getattr(Hooks, method):
                raise UserError(f"run.hooks is {name}, which has {method}, but a run calls only its own. Leave it out.")

    def _open_directory(self) -> tuple[str, bytes]:
        """Open the run directory. Name and bytes of the checkpoint to resume from, on every rank; empty: none."""
        data = b""

        def open_on_main() -> tuple[str, str]:
            """Create and lock the directory; the names of it and of the checkpoint, whose bytes go to `data`."""
            nonlocal data
            directory = run_directory.path_of(self.config)
            with explain_os_error(f"the run directory {directory} cannot be written", "Choose another --run.dir."):
                directory.mkdir(parents=True, exist_ok=True)
                self.lock = run_lock.acquire(directory, self.config.run.resume == "auto", self.log)
                self.stack.callback(self.lock.release)
                run_directory.open_for_run(self.config, directory)
            origin, data = run_directory.find_start(self.config, directory, self.log) or ("", b"")
            return str(directory), str(origin)

        directory, origin = broadcast_from_main(self.world, open_on_main)
        self.directory = Path(directory)
        self.name = self.config.run.name or self.directory.resolve().name
        if origin:
            self.log(f"resuming from {origin}")
        return origin, broadcast_bytes(data, self.world)

    def _build_trainer(self, precision: Precision, data_dir: Path, split: Split) -> Trainer:
        config, world = self.config, self.world
        open_loader = partial(BetonLoader, data_dir / "train.beton", world.device, config.data.num_workers)
        loader = self.stack.enter_context(run_and_sync_errors(world, open_loader))
        train_step: TrainStep = run_and_sync_errors(world, lambda: TrainStep(config, world, precision))
        fit_whitening([train_step.model, train_step.scored_model], loader, bn_samples(split, config.eval), world)
        set_phase(Phase("the start of training", limit_s=SLOW_S))
        return Trainer(config, train_step, split, loader, self.directory / "checkpoints", self)

    def _load_start_weights(self, trainer: Trainer) -> None:
        train_step = trainer.train_step
        line, digest = load_start_weights(train_step.model, self.config.model, self.world)
        if train_step.ema is not None:
            train_step.ema.module.load_state_dict(without_auxiliary(train_step.model).state_dict())
        trainer.progress.weights_sha256 = digest
        self.log(line)

    def _train_and_test(self, trainer: Trainer, data_dir: Path) -> None:
        config, world = self.config, self.world
        devices = all_gather_text(device_name(world.device), world)
        self.log(describe(config, trainer, devices, self.directory))
        summary, report = self.directory / "summary.json", self.directory / "report.html"
        complete = broadcast_from_main(world, lambda: summary.exists() and report.exists())  # the first and last result
        if complete and trainer.progress.step == trainer.schedule.total_steps:
            self.log(f"this run is complete; its results are in {summary}")
            return
        # With debug.overfit_steps it trains on one batch, on a CPU for many minutes, but on all ranks alike.
        set_phase(Phase("the self-check", limit_s=VERY_SLOW_S))
        run_and_sync_errors(world, lambda: debug.check(config, trainer, self.log))
        set_phase(Phase("the start of tracking", limit_s=SLOW_S))
        self._start_tracking(trainer)
        if trainer.progress.step < trainer.schedule.total_steps:
            trainer.train_step.prepare()  # before signals are deferred, so that one ends the run while it compiles
        steps_left, folder = trainer.schedule.total_steps - trainer.progress.step, self.directory / "profile"
        profiled = profiler(config.debug.profile, steps_left, folder, world, self.log)
        with signals.deferred(), profiled as self._profile_step:
            trainer.train()
        results = self._test(trainer, data_dir, devices)
        n, seconds = results["test_n"], trainer.progress.train_seconds
        on = f"on {n:,}" + ("" if n == NUM_TEST else f" of {NUM_TEST:,} (eval.test_subset)")
        told = f"test accuracy {results['test_accuracy']:.2%} {on} images; {seconds:.0f} s of training"
        self.log(f"{told}; see {summary} and curves.png")
        self._own_hooks.after_run(results)

    def _test(self, trainer: Trainer, data_dir: Path, devices: list[str]) -> dict[str, Any]:
        """Do the final test and write the results. Returns the values of summary.json."""
        config, world, directory = self.config, self.world, self.directory
        set_phase(Phase("the final test", limit_s=SLOW_S))
        samples = scored_samples(config.eval, data_dir, world)
        with trainer.loader.for_file(data_dir / "test.beton") as loader:
            show = None if self.tracker is None else self.tracker.show_test
            test = trainer.evaluator.score(loader, samples, config.eval.tta, show)
            set_phase(Phase("writing the results", limit_s=SLOW_S))
            scores = {"accuracy": test.accuracy, "accuracy_tta": test.accuracy_tta, "loss": test.loss, "n": test.n}
            self.log_metrics(trainer.progress.step, {f"test/{name}": score for name, score in scores.items()})
            results = summarize(config, trainer, test, devices)
            files: dict[str, Callable[[Path], object]] = {
                "curves.png": lambda path: draw_curves(directory / "metrics.jsonl", path, self.name),
                "predictions.csv": lambda path: predictions.write_answers(path, test, samples),
                "mistakes.png": lambda path: predictions.write_mistakes(path, test, samples, loader),
                "filters.png": lambda path: predictions.write_filters(path, trainer.train_step.scored_model),
                "report.html": _write_report,
            }
            run_and_sync_errors(world, begin_shutdown)  # or a signal costs a complete run its pictures and its report
            run_and_sync_errors(world, lambda: self._write_results(results, files), only_if=world.is_main)
        return results

    def _start_tracking(self, trainer: Trainer) -> None:
        """Open the tracker on rank 0, and one rank of each further node records its system metrics."""
        world, track, progress = self.world, self.config.track, trainer.progress
        if world.num_nodes > 1:
            track = replace(track, group=track.group or self.name)
        start = (self.name, trainer.schedule.total_steps, progress.step, progress.validation_due)

        def open_tracker() -> tuple[str, str] | None:
            self.before_write()
            write_text_atomic(self.directory / "config.yaml", to_yaml(self.config))
            self.tracker = self.stack.enter_context(Tracker(self.directory, track, to_plain(self.config), *start))
            return self.tracker.wandb.main if self.tracker.wandb else None

        main = broadcast_from_main(world, open_tracker)
        node = environment.number("GROUP_RANK", 0)  # of torchrun
        if main and world.local_rank == 0 and node > 0:
            self.stack.enter_context(
                wandb_run.system_metrics_of_node(track, self.directory, main, node, self.name, self.log)
            )

    def _write_results(self, results: dict[str, Any], files: Mapping[str, Callable[[Path], object]]) -> None:
        """Write summary.json, and `files`, each by its function."""
        assert self.tracker is not None
        self.before_write()
        write_json(self.directory / "summary.json", results)  # its existence means: the run is complete
        for name, write in files.items():
            try:
                write(self.directory / name)
            except Exception as error:  # noqa: BLE001 - what people look at never decides whether a run ends well
                self.log(f"warning: {name} was not written: {type(error).__name__}: {one_line(error)}")
        self.tracker.finish(results, self.directory)

    def log(self, text: str) -> None:
        """Print a line on rank 0; write it to the log file on every rank."""
        logger.info(text)
        if self.tracker is not None:
            self.tracker.log(text)
        elif self.world.is_main:
            print(text, flush=True)

    def owns_directory(self) -> bool:
        return self.lock is not None and self.lock.held()

    def log_metrics(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        logger.info("step %d  %s", step, "  ".join(console.describe(metrics)))
        if self.tracker is not None and self._tracking_error is None and self.owns_directory():
            try:
                self.tracker.log_metrics(step, metrics)
            except UserError as error:
                # An error on one rank alone would leave the others waiting. So request a stop: all ranks begin to save
                # after the same step, where before_write raises this error on rank 0 before anything is written.
                self._tracking_error = error
                signals.request()
        self._own_hooks.log_metrics(step, {name: value for name, value in metrics.items() if value is not None})

    def before_training(self, trainer: Trainer) -> None:
        self._own_hooks.before_training(trainer)

    def after_step(self, step: int) -> None:
        if self.tracker is not None:
            self.tracker.progress(step)
        self._profile_step()
        self._own_hooks.after_step(step)

    def stop_requested(self, last_step: bool = False) -> Signals | None:
        return self._stop.agreed_signal(last_step)

    def check_window(self, trainer: Trainer, window: Window) -> None:
        progress, every = trainer.progress, self.config.train.check_ranks_every_steps
        if window.num_nonfinite:
            raise health.nonfinite_step(*trainer.metrics.first_nonfinite(), self.world.size, progress.last_saved)
        # Ranks are compared before every save, too, so a checkpoint that was resumed from has been compared.
        if every and progress.step - max(self._compared_step, progress.last_saved or 0) >= every:
            self._compare_ranks(trainer)
        self._own_hooks.check_window(trainer, window)

    def before_save(self, trainer: Trainer) -> None:
        self._own_hooks.before_save(trainer)
        # First, since the next check is local, and after this one all ranks decide alike.
        state = self._compare_ranks(trainer)
        health.refuse_nonfinite(state, trainer.progress.step, trainer.progress.last_saved)

    def before_write(self) -> None:
        if self._tracking_error is not None:
            raise self._tracking_error
        if self.lock is not None:
            self.lock.check()

    def _compare_ranks(self, trainer: Trainer) -> dict[str, Tensor]:
        """Refuse ranks that differ; the tensors that were compared."""
        progress, train_step = trainer.progress, trainer.train_step
        ema = train_step.ema and train_step.ema.module
        state = health.tensors_of_state(train_step.model, ema, train_step.optimizer)
        health.refuse_divergence(state, self.world, progress.step, progress.last_saved)
        self._compared_step = progress.step
        return state
