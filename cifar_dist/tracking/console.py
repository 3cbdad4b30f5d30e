"""Console output: a progress bar on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Mapping
from typing import Never

from tqdm import tqdm

from cifar_dist.tracking.metrics_file import Value, number

# Key, text, and factor, in the order in which they are printed.
FIELDS = (
    ("epoch", "epoch {:.2f}", 1),
    ("train/loss", "loss {:.3f}", 1),
    ("train/objective", "objective {:.3f}", 1),
    ("train/accuracy", "accuracy {:.1f} %", 100),
    ("lr", "lr {:.3g}", 1),
    ("lr/biases", "of biases {:.3g}", 1),
    ("lr/muon", "of Muon {:.3g}", 1),
    ("gradient_norm", "gradient norm {:.3g}", 1),
    ("images_per_second", "{:,.0f} images/s", 1),
    ("data_wait", "{:.0f} % waiting for data", 100),
    ("val/loss", "validation loss {:.3f}", 1),
    ("val/accuracy", "validation accuracy {:.2f} %", 100),
    ("val/n", "n {:.0f}", 1),
    ("test/loss", "test loss {:.3f}", 1),
    ("test/accuracy", "test accuracy {:.2f} %", 100),
    ("test/accuracy_tta", "with test-time augmentation {:.2f} %", 100),
    ("test/n", "n {:.0f}", 1),
)
# Of a line of training; the others are in metrics.jsonl and in the log of the rank.
SHOWN = ("epoch", "train/loss", "train/accuracy", "lr", "images_per_second")
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def describe(metrics: Mapping[str, Value]) -> list[str]:
    """The known metrics: `epoch 0.87`, `loss 1.412`, `accuracy 61.2 %`, which is given as a fraction."""
    values = ((words, scale, number(metrics.get(key))) for key, words, scale in FIELDS)
    return [words.format(scale * value) for words, scale, value in values if value is not None]


def _bar(total: int, start: int, name: str) -> "tqdm[Never]":
    return tqdm(
        total=total, initial=start, file=sys.stderr, bar_format=name + BAR_FORMAT, dynamic_ncols=True,
        mininterval=0.2, miniters=1,
    )  # fmt: skip


class Console:
    """A bar on stderr where that is a terminal, else plain lines on stdout; both go with `log`.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps already done.
    """

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # (step, time) from which the remaining time is estimated
        self._bar: tqdm[Never] | None = None
        self._testing = False
        if sys.stderr.isatty():
            self._bar = _bar(total_steps, start_step, "")

    def progress(self, step: int) -> None:
        """Move the bar to `step`. It is drawn at most five times per second; waits for nothing."""
        if self._testing:
            return
        if self._first is None:  # after the first step, because that compiles
            self._first = (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log_metrics(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Show one record: one of training in the bar where there is one, any other as a line."""
        self.progress(step)
        of_training = "train/loss" in metrics
        words = describe({key: metrics.get(key) for key in SHOWN} if of_training else metrics)
        left = self._time_left(step) if of_training else []
        if self._bar is not None and of_training:
            self._bar.set_postfix_str("  ".join(left + words))  # a narrow terminal cuts the end
        else:
            self.log("  ".join([f"step {step}/{self._total}", *words, *left]))

    def show_test(self, done: int, total: int) -> None:
        """Show on a terminal that `done` of `total` batches of the final test are done, in a bar of its own."""
        if self._bar is None:
            return
        if not self._testing:
            self._testing = True
            self._bar.close()
            self._bar = _bar(total, 0, "final test, batches ")
        self._bar.update(done - self._bar.n)

    def _time_left(self, step: int) -> list[str]:
        if self._first is None or step <= self._first[0] or step >= self._total:
            return []
        first_step, first_time = self._first
        seconds_per_step = (time.monotonic() - first_time) / (step - first_step)
        return [f"{tqdm.format_interval(round(seconds_per_step * (self._total - step)))} left"]

    def log(self, text: str) -> None:
        """Print a line to stdout, above the bar where there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Keep the bar and end its line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
