"""Offline folders that W&B itself wrote, whole, resumed, torn and damaged, read back and shown."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from cifar_dist.reports.comparison import page_of_foreign_run
from cifar_dist.reports.run_data import RunData
from cifar_dist.reports.wandb_folder import _SECRET, files_in, read_runs
from cifar_dist.tracking.wandb_files import BLOCK, HEADER, records
from tests.support import runs

PROGRAM = """
import math, sys, wandb

def record(id, steps, config, **more):
    run = wandb.init(project="theirs", id=id, name="a <b>name</b>", mode="offline", dir=".", config=config, **more)
    run.define_metric("val/*", step_metric="epoch")
    for k in steps:
        run.log({"loss": math.nan if k == 7 else 2 / (k + 1), "train": {"nested": {"deep": k}}, "text": "words",
                 "peak": math.inf if k == 3 else 1.0, "histogram": wandb.Histogram([1, 2, 3]), "flag": True})
        if k % 10 == 9:
            run.log({"epoch": k // 10, "val/accuracy": k / 100, "table": wandb.Table(columns=["a"], data=[[k]])})
    run.summary["best"] = 0.25
    run.summary["connection"] = "postgres://me:canary@host/db"
    return run

record("one", range(3000), {"model": {"depth": 3}, "lr": 0.1, "wandb_api_key": "canary", "list": [1, 2]}).finish()
record("two", range(0, 10), {"lr": 0.1}, resume="allow").finish()
record("two", range(10, 20), {"lr": 0.2}, resume="allow").finish()
record("three", range(5), {}).finish(exit_code=1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder wandb/ of a program that records four runs, one of them a resumed one; only to be read."""
    base = tmp_path_factory.mktemp("foreign")
    runs.finish(runs.start_command([sys.executable, "-c", PROGRAM, "--password=canary"], cwd=base))
    return base / "wandb"


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, RunData]:
    return {run.facts["id"]: run for run in read_runs(files_in(folder))}


def file_of(folder: Path, run_id: str) -> Path:
    return next(folder.glob(f"offline-run-*/run-{run_id}.wandb"))


def test_curves_of_all_numbers(found: dict[str, RunData]) -> None:
    run = found["one"]
    assert list(run.curves) == ["epoch", "loss", "peak", "train.nested.deep", "val/accuracy"]
    deep = run.curves["train.nested.deep"]
    # Each tenth call of log() is followed by another, which is a step, too.
    assert deep == [(k + k // 10, k) for k in range(3000)]
    assert run.curves["val/accuracy"] == [(k, (10 * k + 9) / 100) for k in range(300)]
    assert (run.x_names["val/accuracy"], run.x_names["loss"]) == ("epoch", "W&B step")
    assert math.isnan(run.curves["loss"][7][1])
    assert run.curves["peak"][3][1] == math.inf


def test_configuration_summary_and_facts(found: dict[str, RunData]) -> None:
    run = found["one"]
    assert run.settings == {"model.depth": "3", "lr": "0.1", "wandb_api_key": "not shown", "list": "[1, 2]"}
    assert (run.summary["best"], run.summary["train.nested.deep"], run.summary["text"]) == (0.25, 2999, "words")
    assert not [key for key in run.summary if key.startswith(("histogram", "table", "_"))]
    assert (run.name, run.facts["project"], run.state, run.notes) == ("a <b>name</b>", "theirs", "done", [])
    assert run.summary["connection"] == "postgres://host/db"
    assert run.facts["python"].startswith("CPython 3.")
    assert found["three"].state == "failed"


@pytest.mark.parametrize("name", [
    "private_key", "ACCESS_KEY", "nested.pass", "passphrase", "hf_auth", "auth", "oauth", "password", "args", "argv",
])  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert _SECRET.search(name)


@pytest.mark.parametrize("name", ["author", "bypass", "num_passes", "args.lr", "key", "max_tokens", "compass"])
def test_names_of_no_secrets(name: str) -> None:
    assert not _SECRET.search(name)


def test_a_resumed_run_is_one(found: dict[str, RunData]) -> None:
    assert found.keys() == {"one", "two", "three"}
    run = found["two"]
    assert [value for _, value in run.curves["train.nested.deep"]] == list(range(20))
    steps = [step for step, _ in run.curves["train.nested.deep"]]
    assert steps == [k + k // 10 for k in range(20)]
    assert run.settings == {"lr": "0.2"}
    assert run.notes == ["The run was resumed: it is made of 2 recordings."]


def test_the_page(found: dict[str, RunData]) -> None:
    page = page_of_foreign_run(found["one"])
    assert len(page.encode()) <= 500_000
    assert "canary" not in page
    assert "<b>name" not in page
    charts = [json.loads(text) for text in re.findall(r'application/json">(.*?)</script>', page)]
    assert {chart["series"][0]["label"] for chart in charts} == found["one"].curves.keys()
    assert re.findall("<h2>([^<]*)</h2>", page) == ["Curves", "Summary", "Configuration"]
    assert re.findall("<h3>([^<]*)</h3>", page) == ["train", "val"]
    assert '<th scope="row">best</th><td class="text"><span>0.25</span>' in page


@pytest.mark.parametrize("where", ["", "one", "file"])
def test_what_a_path_names(folder: Path, where: str) -> None:
    file = file_of(folder, "one")
    path = {"": folder, "one": file.parent, "file": file}[where]
    assert files_in(path) == (sorted(folder.glob("offline-run-*/*.wandb")) if where == "" else [file])
    assert files_in(folder.parent) == files_in(folder)


@pytest.mark.parametrize("lost", [1, 6, 7, 100, 40_000])
def test_a_torn_end_is_told(folder: Path, tmp_path: Path, lost: int) -> None:
    """As if the process had been killed, or the file copied while it grew."""
    file = Path(shutil.copy(file_of(folder, "one"), tmp_path / "run-one.wandb"))
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    (run,) = read_runs([file])
    values = [value for _, value in run.curves["train.nested.deep"]]
    assert values == list(range(len(values)))
    assert len(values) > 2500
    assert run.state == "running"
    assert run.notes[-1] == "The recording has no end: the run is running, or was killed."
    torn = len(content) - lost not in ends_of_records(content)
    assert run.notes[:-1] == torn * [
        "run-one.wandb is damaged: its last record is incomplete. What can be read of it is shown."
    ]
    assert "running" in page_of_foreign_run(run)


def ends_of_records(content: bytes) -> set[int]:
    place, ends = len(HEADER), set()
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
        place += 7 + int.from_bytes(content[place + 4 : place + 6], "little")
        ends.add(place)
    return ends


def test_a_damaged_record_costs_at_most_its_block(folder: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(file_of(folder, "one"), tmp_path / "run-one.wandb"))
    content = bytearray(file.read_bytes())
    content[3 * BLOCK + 5000] ^= 0xFF
    file.write_bytes(content)
    (run,) = read_runs([file])
    whole = len(read_runs([file_of(folder, "one")])[0].curves["train.nested.deep"])
    kept = len(run.curves["train.nested.deep"])
    assert 0 < whole - kept < 60
    assert run.notes[0].startswith("run-one.wandb is damaged: a record at byte ")
    assert run.curves["train.nested.deep"][-1][1] == 2999


def test_no_file_of_wandb(tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    for content in (b"text", b":W&B\xe1\xbe\x01"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"run-x.wandb is no file of W&B, or of a version that is not known"):
            read_runs([path])
    path.write_bytes(HEADER)
    assert read_runs([path])[0].curves == {}
    assert files_in(tmp_path / "nothing") == []


def part(kind: int, content: bytes) -> bytes:
    """A part of a record, as LevelDB's format prescribes it."""
    checked = bytes([kind]) + content
    return struct.pack("<IH", zlib.crc32(checked), len(content)) + checked


def test_records_over_several_blocks() -> None:
    """A record of 70,000 bytes in three parts, and one after it."""
    long = bytes(range(250)) * 280
    first, second = BLOCK - len(HEADER) - 7, BLOCK - 7
    pieces = [part(2, long[:first]), part(3, long[first : first + second]), part(4, long[first + second :])]
    data = HEADER + b"".join(pieces) + part(1, b"end")
    assert list(records(data)) == [long, b"end"]
    assert list(records(data + bytes(100))) == [long, b"end"]
    assert list(records(data[:-1])) == [long, "its last record is incomplete"]
    assert list(records(data + b"x")) == [long, b"end", "its last record is incomplete"]
    assert list(records(data[:BLOCK])) == ["its last record is incomplete"]
    for place, lost in ((100, "at byte 7 "), (BLOCK + 100, "at byte 32,768 ")):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        reason, *others = records(damaged)
        assert isinstance(reason, str)
        assert lost in reason
        assert others == [b"end"]
    hole = HEADER + part(1, b"a") + bytes(BLOCK - len(HEADER) - 8) + part(1, b"b")
    assert list(records(hole)) == [b"a", "a record at byte 15 is damaged", b"b"]


def test_the_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifar_dist.report", str(file_of(folder, "one").parent)]
    output = subprocess.check_output([*command, "--out", str(tmp_path / "x.html")], text=True, timeout=60)
    assert output.startswith(f"{tmp_path / 'x.html'} (")
    assert not (file_of(folder, "one").parent / "report.html").exists()
