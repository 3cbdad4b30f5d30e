"""W&B's files on disk, written by its own process."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.tracking.wandb_files import Held, held_in, read_history
from tests.support.tracked import start, strict_lines


@pytest.mark.parametrize(
    ("held", "index", "step", "nth", "expected"),
    [
        (Held(), 0, 20, 0, False),
        (Held(4, 60, 2), 5, 50, 0, True),  # between steps that W&B has
        (Held(4, 60, 2), 3, 60, 1, True),
        (Held(4, 60, 1), 9, 60, 0, True),
        (Held(4, 60, 1), 4, 60, 1, False),  # the validation of a step whose training line W&B has
        (Held(4, 60, 2), 2, 61, 0, False),
        (Held(4), 3, 60, 0, True),
        (Held(4), 4, 60, 0, False),
    ],
)
def test_what_w_and_b_has(held: Held, index: int, step: int, nth: int, expected: bool) -> None:
    assert held.has(index, step, nth) is expected


def test_history_of_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    start(tmp_path / "run", "offline")
    ((run_id, file),) = [
        (path.stem.removeprefix("run-"), path) for path in tmp_path.glob("run/wandb/offline-*/*.wandb")
    ]
    data, rows = file.read_bytes(), list(read_history(file))
    records = strict_lines(tmp_path / "run")
    assert [{key: row[key] for key in record} for row, record in zip(rows, records, strict=True)] == records
    assert held_in(tmp_path / "run", run_id, None) == Held(7, 100, 2)
    assert held_in(tmp_path / "run", run_id, 2) == Held(2, 40, 1)  # online, so what the server lacks is sent again
    assert held_in(tmp_path / "run", "other", 2) == Held(2)
    numbers = set()
    for size in range(0, len(data), 97):
        file.write_bytes(data[:size])
        found = list(read_history(file))
        assert found == rows[: len(found)]
        numbers.add(len(found))
    assert numbers >= {0, 3, 6}
    file.write_bytes(b"nothing of W&B" * 9000)
    assert list(read_history(file)) == []
