"""--grid of launch/sweep and slurm/sweep.sh."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cifar_dist import sweep
from cifar_dist.cluster import grid, local_sweep
from cifar_dist.cluster.slurm import _grid
from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError


def test_every_combination_the_last_setting_fastest() -> None:
    assert grid.settings(["optim.lr=0.1,0.2", "data.dir=a b", "train.epochs=2,3"]) == [
        "--optim.lr 0.1 --data.dir 'a b' --train.epochs 2",
        "--optim.lr 0.1 --data.dir 'a b' --train.epochs 3",
        "--optim.lr 0.2 --data.dir 'a b' --train.epochs 2",
        "--optim.lr 0.2 --data.dir 'a b' --train.epochs 3",
    ]
    assert grid.settings([]) == [""]


def test_a_line_of_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my grid.txt").write_text("# rates\n--optim.lr 0.1\n\n  --optim.lr 0.2 --optim.momentum 0.8\n")
    monkeypatch.setenv("PLACE", str(tmp_path))
    lines = ["--optim.lr 0.1", "--optim.lr 0.2 --optim.momentum 0.8"]
    assert grid.settings(["$PLACE/my grid.txt"]) == lines
    words = ["--config", "debug", "--grid", "$PLACE/my grid.txt", "--optim.lr=0.3"]
    assert _grid(words) == (lines, ["--config", "debug", "--optim.lr=0.3"])
    assert _grid(["--grid", "optim.lr=1,2", "train.epochs=3", "--config", "debug"]) == (
        ["--optim.lr 1 --train.epochs 3", "--optim.lr 2 --train.epochs 3"],
        ["--config", "debug"],
    )
    assert [path.name for path in grid.folders(Path("x"), lines)] == ["setting-0", "setting-1"]
    assert grid.folders(Path("x"), lines[:1]) == [Path("x")]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--grid", "optim.lr=1,2", "train.epochs=3"],
        ["--grid", "optim.lr=1,2", "--train.threads", "1", "--grid=train.epochs=3,4"],
        ["--grid", "optim.lr=1,2", "optim.momentum=0.5", "--grid", "train.epochs=3", "model.width=1,2"],
    ],
)
def test_both_commands_take_several_grids(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Sequence[str]]()
    monkeypatch.setattr(local_sweep, "run_sweep", lambda *arguments: found.append(arguments[2]))
    monkeypatch.setattr(sys, "argv", ["sweep", "debug", *words])
    sweep.main()
    assert found == [_grid(words)[0]]
    assert len(found[0]) == 2 ** sum("," in word for word in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=0.1,"], "optim.lr=0.1, is not NAME=VALUE,VALUE"),
        (["=0.1"], "=0.1 is not NAME=VALUE,VALUE"),
        (["optim.lr=1", "train.epochs"], "train.epochs is not NAME=VALUE,VALUE"),
        (["optim.lr=1", "optim.lr=2"], "--grid has optim.lr twice"),
        (["optim.lr=1,1"], "the same settings twice: --optim.lr 1"),
        (["run.seed=1,2"], "has run.seed, which the sweep itself sets"),
        (["none.txt"], "--grid none.txt cannot be read: No such file or directory"),
        (["empty.txt"], "--grid empty.txt holds no settings"),
        (["binary.txt"], "--grid binary.txt cannot be read: 'utf-8' codec can't decode"),
        (["quote.txt"], "--grid quote.txt cannot be read: No closing quotation"),
        (["twice.txt"], "the same settings twice: --optim.lr 1"),
        (["name.txt"], "has run.name, which the sweep itself sets"),
    ],
)
def test_what_is_no_grid(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("empty", b"# nothing\n"), ("binary", b"\xff"), ("quote", b"--optim.lr '1\n"),
                       ("twice", b"--optim.lr 1\n--optim.lr 1\n"), ("name", b"--run.name=x\n")):  # fmt: skip
        (tmp_path / f"{name}.txt").write_bytes(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        grid.settings(words)


@pytest.mark.parametrize(
    ("track", "setting", "expected"),
    [
        (TrackConfig(), "", ["--track.group", "exp"]),
        (TrackConfig(), "setting-1", ["--track.group", "exp", "--track.job_type", "setting-1"]),
        (TrackConfig(group="own"), "setting-1", ["--track.job_type", "setting-1"]),
        (TrackConfig(group="own", job_type="mine"), "setting-1", []),
    ],
)
def test_runs_of_a_sweep_lie_together(track: TrackConfig, setting: str, expected: list[str]) -> None:
    assert grid.tracking(track, "exp", setting) == expected
