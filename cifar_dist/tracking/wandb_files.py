"""Reads .wandb files, in which W&B keeps what it records on this disk: RUN/wandb/[offline-]run-TIME-ID/run-ID.wandb.

A run that was resumed has one file for each start. The format is LevelDB's log: blocks of 32 KiB with records, in parts
where a record crosses a block, each record a protobuf message of W&B.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILE_HEADER, _BLOCK, _HEADER = 7, 32_768, 7  # in bytes
_WHOLE, _LAST = 1, 4  # kinds of parts


class Held(NamedTuple):
    """How much of metrics.jsonl W&B has: its first `rows` lines, of which the last `of_step` are those of `step`."""

    rows: int = 0
    step: int | None = None  # unknown where only the server has the last row
    of_step: int = 0

    def has(self, index: int, step: int, nth: int) -> bool:
        """Whether W&B has line `index`, the `nth` of its step (from 0).

        The step tells more than the index, as a resumed run may log at other steps than before.
        """
        if self.step is None:
            return index < self.rows
        return step < self.step or (step == self.step and nth < self.of_step)


def held_in(run_dir: Path, run_id: str, at_server: int | None) -> Held:
    """What W&B has of the run in `run_dir`.

    Args:
        at_server: rows that its server has. What was recorded offline counts, too, as it will be uploaded. None: it is
            offline now, so all that is on this disk counts.
    """
    steps, rows = dict[int, int](), at_server or 0
    for file in run_dir.glob(f"wandb/*run-*-{run_id}/*.wandb"):
        found = {row["_step"]: row["step"] for row in read_history(file) if "step" in row}
        steps |= found
        if at_server is None or file.parent.name.startswith("offline-"):
            rows = max([rows, *(row + 1 for row in found)])
    last = steps.get(rows - 1)
    return Held(rows, last, sum(step == last for row, step in steps.items() if row < rows))


def read_history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of the history; ends where the file is torn or damaged.

    Raises:
        OSError: it cannot be read.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    message_type: Any = wandb_internal_pb2  # which has no types
    for message in _messages(file.read_bytes()):
        record = message_type.Record()
        try:
            record.ParseFromString(message)
        except DecodeError:
            return
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _messages(data: bytes) -> Iterator[bytes]:
    position, message = _FILE_HEADER, b""
    while position < len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # the rest of a block is empty
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6 : position + 7]
        position += _HEADER + size
        if not kind or kind[0] not in range(_WHOLE, _LAST + 1) or position > len(data):
            return
        message += data[position - size : position]
        if kind[0] in (_WHOLE, _LAST):
            yield message
            message = b""
