"""One dict of metrics to the console, to metrics.jsonl and to W&B. Rank 0 has the only one."""

from __future__ import annotations

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
        run_dir: the run directory, made when missing; holds metrics.jsonl, wandb_id.txt and wandb/.
        config: W&B mode and project.
        run_config: the complete configuration, plain values only; goes to W&B.
        total_steps: optimizer steps of the whole run.
        start_step: steps already done. Later lines of an old metrics.jsonl are dropped, so everything
            measured at step t must have been logged before the checkpoint of step t is written.
        name: the run's name at W&B.

    Raises:
        UserError: metrics.jsonl cannot be written, or W&B was asked for by name and cannot be had.
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
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the run directory {run_dir}: {error.strerror}.") from error
            self._records = stack.enter_context(closing(RecordFile(run_dir / "metrics.jsonl", start_step)))
            self._console = stack.enter_context(closing(Console(total_steps, start_step)))
            self._wandb = start_wandb(config, run_dir, run_config, name, self.log)
            stack.pop_all()  # all is well: keep them open
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
        clean = error is None or (isinstance(error, SystemExit) and not error.code)
        self._console.close()
        if self._wandb is not None:
            self._wandb.finish({}, exit_code=0 if clean else 1)
        try:
            self._records.close()
        except UserError:
            if error is None:  # else the first error is the one to report
                raise

    def progress(self, step: int) -> None:
        """Say that `step` optimizer steps are done; cheap enough for every step, waits for nothing."""
        self._console.progress(step)

    def log_metrics(self, step: int, metrics: Mapping[str, Value], *, to_console: bool = True) -> None:
        """Send one record to all places.

        Args:
            step: optimizer steps done.
            metrics: plain numbers; accuracies as shares of 1, `seconds` since the start of training. NaN and
                infinities become the strings "nan", "inf" and "-inf" in metrics.jsonl.
            to_console: False keeps the record off the console.

        Raises:
            UserError: metrics.jsonl cannot be written. A W&B process that dies meanwhile is reported in a
                line, and does not stop the run (see `finish`).
        """
        self._records.append(step, metrics)
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})
        if to_console:
            self._console.log_metrics(step, metrics)

    def log(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.log(text)

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Write W&B's summary and close everything: at the end of a complete run, its last file saved.

        A run that is stopped to be resumed, or fails, just leaves the `with` statement.

        Raises:
            UserError: metrics.jsonl cannot be written, or W&B was asked for by name and stopped meanwhile.
        """
        self._console.close()
        if self._wandb is not None:
            self._wandb.finish(summary, exit_code=0)
        self._records.close()
        if self._wandb is not None:
            self._wandb.check()
