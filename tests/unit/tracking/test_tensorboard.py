"""Event files, as TensorBoard's own reader reads them."""

from __future__ import annotations

import json
import signal
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from cifar_dist.process import kill_process_tree
from tests.support import runs
from tests.support.tracked import start, strict_lines

ON = {"TEST_TRACK": '{"tensorboard": true}'}


def read(run: Path) -> Any:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(run)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """The values of metrics.jsonl by their keys."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in strict_lines(run):
        for key in (key for key, value in record.items() if key != "step" and value is not None):
            found.setdefault(key, []).append((record["step"], pytest.approx(record[key], rel=1e-6)))
    return found


def test_each_line_once_after_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (192, 128), "red").save(run / "mistakes.png")
    assert start(run, "disabled", event="killed", env=ON).returncode == -signal.SIGKILL
    result = start(run, "disabled", start=50, env=ON)
    assert (result.returncode, result.stderr) == (0, "")
    assert scalars(run) == expected(run)
    assert [step for step, _ in scalars(run)["train/loss"]] == [20, 40, 60, 80, 100]
    events = read(run)
    (image,) = events.Images("mistakes")
    assert (image.step, image.width, image.height) == (100, 768, 512)
    text = events.Tensors("configuration/text_summary")[-1]  # one for each start
    assert text.tensor_proto.string_val[0] == b"    optim:\n      lr: 0.05"


def test_the_program_itself(tmp_path: Path) -> None:
    """`tensorboard --logdir runs` reads files with a reader of its own."""
    start(tmp_path / "runs/mine", "disabled", event="killed", env=ON)
    start(tmp_path / "runs/mine", "disabled", start=50, env=ON)
    port = runs.free_port()
    command = [str(runs.BIN / "tensorboard"), "--logdir", "runs", "--port", port]
    process = runs.start_command(command, tmp_path)
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?tag=train/loss&run=mine/tensorboard"
    found: list[int] = []

    def reads() -> bool:
        with suppress(OSError), urllib.request.urlopen(url) as answer:
            found[:] = [step for _, step, _ in json.load(answer)]
        return bool(found)

    try:
        runs.wait_until(reads, process)
    finally:
        kill_process_tree(process.pid)
        process.communicate()
    assert found == [20, 40, 60, 80, 100]


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """The thread that writes prints no traceback of its own."""
    run = tmp_path / "run"
    result = start(run, "disabled", event="full disk", env=ON)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("warning: TensorBoard failed at") == 1
    assert "File too large" in result.stdout
    assert len(strict_lines(run)) == 7


def test_deleted_folder_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = start(run, "disabled", event="deleted folder", env=ON)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(strict_lines(run)) == 7


def test_package_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "shadow/tensorboard").mkdir(parents=True)
    (tmp_path / "shadow/tensorboard/__init__.py").write_text("raise ModuleNotFoundError('no tensorboard')\n")
    result = start(tmp_path / "run", "disabled", env=ON | {"TEST_PATH": str(tmp_path / "shadow")})
    assert result.returncode == 2
    assert result.stderr == (
        "error: track.tensorboard is True, but tensorboard cannot be imported: no tensorboard\n"
        "Run `pip install 'cifar_dist[tensorboard]'`, or leave the setting out.\n"
    )
    assert strict_lines(tmp_path / "run") == []
