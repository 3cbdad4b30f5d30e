"""One dictionary of metrics to the console, to metrics.jsonl, to W&B and to TensorBoard. Only rank 0 has a tracker."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cifar_dist.config import TrackConfig
from cifar_dist.errors import NonFiniteError, StopError, UserError, one_line
from cifar_dist.tracking.console import Console
from cifar_dist.tracking.metrics_file import RecordFile, Value
from cifar_dist.tracking.tensorboard import start_tensorboard
from cifar_dist.tracking.wandb_run import start_wandb


class Sink(Protocol):
    """A destination of metrics beside metrics.jsonl. After a method has raised, the tracker calls only `abandon`."""

    name: str

    def log(self, index: int, step: int, metrics: Mapping[str, Value]) -> None:
        """Log line `index` of metrics.jsonl."""

    def alert(self, title: str, text: str) -> None:
        """Tell people that the run ends early."""

    def add_results(self, results: Mapping[str, Any], directory: Path) -> None:
        """Add what a complete run has: the values of summary.json, and files of its directory."""

    def finish(self, exit_code: int) -> None:
        """Close."""

    def abandon(self) -> None:
        """Release what can be released after an error. Raises nothing."""


class Tracker:
    """Opens the places where metrics go; use it in a `with` statement.

    Args:
        run_dir: holds metrics.jsonl, wandb_id.txt, wandb/ and tensorboard/.
        run_config: the complete configuration, for W&B and TensorBoard; plain values only.
        name: the run's name at W&B.
        total_steps: optimizer steps of the whole run.
        start_step: steps already done. Later lines of metrics.jsonl are dropped, so everything measured at step t must
            be logged before the checkpoint of step t is written.
        validation_due: the validation of `start_step` will be logged; a line of it is dropped, too.

    Raises:
        UserError: metrics.jsonl or tensorboard/ cannot be written, tensorboard is not installed, or a W&B mode that was
            given explicitly does not work. After the start no failure of W&B or TensorBoard raises: a line tells of it.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackConfig,
        run_config: dict[str, Any],
        name: str,
        total_steps: int,
        start_step: int,
        validation_due: bool = False,
    ) -> None:
        with ExitStack() as stack:
            records = RecordFile(run_dir / "metrics.jsonl", start_step, validation_due)
            self._records = stack.enter_context(closing(records))
            self._console = stack.enter_context(closing(Console(total_steps, start_step)))
            self._sinks = list[Sink]()
            if config.tensorboard:  # first, as its errors need no network
                self._sinks.append(start_tensorboard(run_dir, run_config))
            self.wandb = start_wandb(config, run_dir, run_config, name, self.log)
            if self.wandb is not None:
                self._sinks.append(self.wandb)
            stack.pop_all()  # no error: keep them open
        self._num_lines = 0
        for record in self._records.kept:
            self._log_line(record.pop("step"), record)
        if self._records.num_dropped:
            self.log(
                f"{self._records.path}: dropped {self._records.num_dropped} lines from step {start_step} on, "
                "which will be written again."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        interrupted = str(error).startswith("stopped by SIGINT")  # somebody is there and knows
        if isinstance(error, NonFiniteError | StopError) and not interrupted:
            title = "Training stopped: not finite" if isinstance(error, NonFiniteError) else "Training was preempted"
            self._each("at an alert", lambda sink: sink.alert(title, str(error)))
        self._finish(0 if error is None else 1)
        try:
            self._records.close()
        except UserError:
            if error is None:  # else the first error is the one to report
                raise

    def progress(self, step: int) -> None:
        """Show that `step` optimizer steps are done. Cheap enough for every step."""
        self._console.progress(step)

    def show_test(self, done: int, total: int) -> None:
        """Show that `done` of `total` batches of the final test are done."""
        self._console.show_test(done, total)

    def log_metrics(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Write one record, measured after `step` optimizer steps, to all places. Accuracies are from 0 to 1.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self._records.append(step, metrics)
        self._log_line(step, metrics)
        self._console.log_metrics(step, metrics)

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.log(text)

    def finish(self, results: Mapping[str, Any], directory: Path) -> None:
        """Hand on the results of a run that is complete, and close everything.

        A run that stops early only leaves the `with` statement.

        Args:
            results: the values of summary.json.
            directory: of the run, with its pictures.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self._console.close()
        self._each("with the results", lambda sink: sink.add_results(results, directory))
        self._finish(0)
        self._records.close()

    def _log_line(self, step: int, metrics: Mapping[str, Value]) -> None:
        index, self._num_lines = self._num_lines, self._num_lines + 1
        self._each(f"at step {step}", lambda sink: sink.log(index, step, metrics))

    def _finish(self, exit_code: int) -> None:
        self._each("at the end of the run", lambda sink: sink.finish(exit_code))
        self._sinks.clear()

    def _each(self, when: str, call: Callable[[Sink], None]) -> None:
        """Call every sink; one that fails gets no further calls, and a line tells so."""
        for sink in [*self._sinks]:
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001 - what people look at never decides how a run ends
                self._sinks.remove(sink)
                self.log(f"warning: {sink.name} failed {when} ({one_line(error)}); metrics.jsonl is complete.")
                sink.abandon()
