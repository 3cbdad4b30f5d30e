"""metrics.jsonl: one line of strict JSON per record, `{"step": 340, "train/loss": 1.412, ...}`."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError
from cifar_dist.files import write_bytes_atomic

Value = float | int | str | None
Record = dict[str, Any]  # of `Value`s


def read_records(path: Path) -> list[Record]:
    """All records of a metrics.jsonl in file order; a line torn by a crash is skipped.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    return [record for line in path.read_bytes().splitlines() if (record := parse_line(line)) is not None]


def steps_per_epoch(records: Sequence[Record]) -> float | None:
    """Of the run that wrote `records`; None if no line tells."""
    for record in reversed(records):
        epoch = record.get("epoch")
        if isinstance(epoch, (int, float)) and epoch > 0:
            return float(record["step"] / epoch)
    return None


def number(value: Value) -> float | None:
    """The value as a float, "nan", "inf" and "-inf" turned back; None for null."""
    try:
        return None if value is None else float(value)
    except OverflowError:  # an integer beyond all floats
        raise ValueError(f"{value} is too large") from None


def parse_line(line: bytes) -> Record | None:
    """The record in a line; None if it is torn or none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also UnicodeDecodeError: a torn line may end inside a character
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _strict(value: Value) -> Value:
    # JSON knows no NaN. A string, and not null, tells a diverged loss from one that was not measured.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class RecordFile:
    """Appends records to metrics.jsonl, first cut to the lines up to `start_step`.

    Each line is handed to the operating system at once, so that kill -9 loses none that was written.

    Args:
        path: the file; its folder must exist.
        start_step: optimizer steps already done; later lines come from a run that was stopped after its last
            checkpoint, and will be written again.
        validation_due: the validation of `start_step` will be written, perhaps again.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start_step: int, validation_due: bool = False) -> None:
        self.path = path
        self.num_dropped, self.kept = 0, list[Record]()
        with self._explain_unwritable():
            if path.is_file():
                self._cut(start_step, validation_due)
            self._file = path.open("ab", buffering=0)

    def _cut(self, start_step: int, validation_due: bool) -> None:
        before = self.path.read_bytes()
        lines = before.splitlines()
        # The final test is dropped, too: a run that stopped after it repeats it.
        kept = list[bytes]()
        for line in lines:
            record = parse_line(line)
            if record is None or "test/n" in record:
                continue
            if record["step"] < start_step + (not (validation_due and "val/n" in record)):
                kept.append(line)
                self.kept.append(record)
        after = b"".join(line + b"\n" for line in kept)
        self.num_dropped = len(lines) - len(kept)
        if after != before:
            write_bytes_atomic(self.path, after)

    def append(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Write one line.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        record = {"step": step, **{key: _strict(value) for key, value in metrics.items()}}
        rest = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with self._explain_unwritable():
            while rest:  # a nearly full disk takes a part of a line and refuses the next
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Sync to disk and close; a second call does nothing.

        Raises:
            UserError: the disk is full or failed.
        """
        if not self._file.closed:
            with self._file, self._explain_unwritable():
                os.fsync(self._file.fileno())

    @contextmanager
    def _explain_unwritable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the metrics {self.path}: {error.strerror or error}. "
                f"Make room or choose another run.dir, then resume with --run.resume auto."
            ) from error
