"""Event files for TensorBoard, in tensorboard/ of the run directory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cifar_dist.errors import UserError, one_line
from cifar_dist.tracking.metrics_file import Value, number
from cifar_dist.tracking.wandb_media import pictures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10


def start_tensorboard(run_dir: Path, run_config: dict[str, Any]) -> TensorBoard:
    """Open a new event file. Readers drop the steps of older ones (`purge_step`), so log all of metrics.jsonl again.

    Raises:
        UserError: tensorboard is not installed, or the folder cannot be written.
    """
    folder = run_dir / "tensorboard"
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second

        writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_S)
    except OSError as error:
        raise UserError(f"track.tensorboard: {folder} cannot be written: {error.strerror or error}.") from None
    except Exception as error:  # noqa: BLE001 - the package is missing, or one that it needs does not fit
        raise UserError(
            f"track.tensorboard is True, but tensorboard cannot be imported: {one_line(error)}\n"
            f"Run `pip install 'cifar_dist[tensorboard]'`, or leave the setting out."
        ) from None
    text = yaml.safe_dump(run_config, sort_keys=False, allow_unicode=True)
    writer.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()))  # a code block
    return TensorBoard(writer)


class TensorBoard:
    """An event file that is being written. Its methods raise whatever the writer raises."""

    name = "TensorBoard"

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer
        self._excepthook = threading.excepthook
        threading.excepthook = self._ignore_writer

    def log(self, index: int, step: int, metrics: Mapping[str, Value]) -> None:  # noqa: ARG002
        """Log a line of metrics.jsonl."""
        for key, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(key, number(value), step)

    def alert(self, title: str, text: str) -> None:
        """TensorBoard has none."""

    def add_results(self, results: Mapping[str, Any], directory: Path) -> None:
        """Add the pictures of a run that is complete."""
        import numpy as np

        for name, image in pictures(directory).items():
            self._writer.add_image(name, np.asarray(image), results["steps"], dataformats="HWC")

    def finish(self, exit_code: int) -> None:  # noqa: ARG002
        """Flush and close."""
        self._writer.flush()  # which raises what the writing thread met
        self._writer.close()
        threading.excepthook = self._excepthook

    def abandon(self) -> None:
        """After a failure: let the writer's thread end by itself."""

    def _ignore_writer(self, arguments: threading.ExceptHookArgs) -> None:
        """Print no traceback for the writer's thread, whose errors the next call raises."""
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            self._excepthook(arguments)
