"""One dictionary of metrics to the console, to metrics.jsonl and to W&B. Only rank 0 has a tracker."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError
from cifar_dist.tracking.console import Console
from cifar_dist.tracking.metrics_file import RecordFile, Value
from cifar_dist.tracking.wandb_run import start_wandb


class Tracker:
    """Opens the three places where metrics go; use it in a `with` statement.

    Args:
        run_dir: holds metrics.jsonl, wandb_id.txt and wandb/.
        run_config: the complete configuration, shown at W&B; plain values only.
        total_steps: optimizer steps of the whole run.
        start_step: steps already done. Later lines of metrics.jsonl are dropped, so everything measured at step t must
            be logged before the checkpoint of step t is written.
        name: the run's name at W&B.

    Raises:
        UserError: metrics.jsonl cannot be written, or a W&B mode that was given explicitly does not work.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackConfig,
        run_config: dict[str, Any],
        total_steps: int,
        start_step: int,
        name: str,
    ) -> None:
        with ExitStack() as stack:
            self._records = stack.enter_context(closing(RecordFile(run_dir / "metrics.jsonl", start_step)))
            self._console = stack.enter_context(closing(Console(total_steps, start_step)))
            self._wandb = start_wandb(config, run_dir, run_config, name, self.log)
            stack.pop_all()  # no error: keep them open
        if self._records.num_dropped:
            self.log(
                f"{self._records.path}: dropped {self._records.num_dropped} lines after step {start_step}, "
                "which will be written again."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        self._wandb.finish({}, exit_code=0 if error is None else 1)
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
        """Write one record, measured after `step` optimizer steps, to all three places. Accuracies are from 0 to 1.

        Raises:
            UserError: metrics.jsonl cannot be written. A W&B process that dies does not stop the run (see `finish`).
        """
        self._records.append(step, metrics)
        self._wandb.log({"step": step, **metrics})
        self._console.log_metrics(step, metrics)

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.log(text)

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Write W&B's summary and close everything. A run that stops early only leaves the `with` statement.

        Raises:
            UserError: metrics.jsonl cannot be written, or a W&B mode was given explicitly and W&B failed.
        """
        self._console.close()
        self._wandb.finish(summary, exit_code=0)
        self._records.close()
        self._wandb.check()
