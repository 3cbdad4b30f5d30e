"""Reads .wandb files, in which W&B keeps what it records on this disk: RUN/wandb/[offline-]run-TIME-ID/run-ID.wandb.

A run that was resumed has one file for each start. The format is LevelDB's log ("Log format" in its documentation):
blocks of 32 KiB with records, in parts where a record crosses a block, each part with its CRC-32. A record is a
protobuf message, for which the wandb package has the classes.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER, BLOCK = b":W&B\xe1\xbe\x00", 32_768  # name, magic number 0xBEE1, version 0
_KINDS = _FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4  # a whole record or a part of one


def without_password(text: str) -> str:
    """`text` without the names and passwords in its addresses, such as https://name:password@host."""
    return re.sub(r"//[^/\s]*@", "//", text)


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
        at_server: rows that its server has, which are all that count online. None: W&B is offline now, so what is
            recorded on this disk counts.
    """
    steps, rows = dict[int, int](), at_server or 0
    for file in run_dir.glob(f"wandb/*run-*-{run_id}/*.wandb"):
        found = {row["_step"]: row["step"] for row in read_history(file) if "step" in row}
        steps |= found
        if at_server is None:
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
    for message in records(file.read_bytes()):
        if isinstance(message, str):
            return
        record = message_type.Record()
        try:
            record.ParseFromString(message)
        except DecodeError:
            return
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(data: bytes) -> Iterator[bytes | str]:
    """The records of a .wandb file; a text is the reason for which bytes before the next one, or the end, are lost."""
    place, parts = len(HEADER), list[bytes]()
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # no record begins in the last bytes of a block
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        end = place + 7 + length
        if not (checksum or length or kind or any(data[place:])):
            return  # zeros, which a crash of the machine left
        if length + 7 <= left and end > len(data):
            break
        if length + 7 > left or zlib.crc32(data[place + 6 : end]) != checksum or kind not in _KINDS:
            yield f"a record at byte {place:,} is damaged"
            parts.clear()
            place += left  # lengths cannot be trusted, so go on with the next block
            continue
        if kind in (_FULL, _FIRST):
            parts.clear()
        if kind in (_FULL, _FIRST) or parts:  # else its beginning is lost
            parts.append(data[place + 7 : end])
        if kind in (_FULL, _LAST) and parts:
            yield b"".join(parts)
            parts.clear()
        place = end
    if parts or any(data[place:]):
        yield "its last record is incomplete"
