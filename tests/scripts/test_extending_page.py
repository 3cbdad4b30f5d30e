"""docs/extending.md: its files in an empty folder, its commands run there as printed, and what they leave."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data, pytest.mark.timeout(600)]
PAGE = (runs.REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:python|torchrun) .+)$", PAGE, flags=re.M)


def run(line: str, folder: Path, expected: int = 0) -> str:
    """What `line` prints in `folder`, where `python` and `torchrun` are those of the environment."""
    program, *words = shlex.split(line)
    programs = {"python": [*runs.ON_ONE_CPU, sys.executable], "torchrun": [str(runs.BIN / "torchrun")]}
    result = subprocess.run(
        [*programs[program], *words], cwd=folder, env=os.environ | {"PYTHONPATH": str(runs.REPOSITORY)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == expected, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the files of the page, the dataset, and the runs of all commands on the page."""
    folder = tmp_path_factory.mktemp("own")
    files = re.findall(r"^```\w+\n# (\S+)\n(.+?)^```$", PAGE, flags=re.M | re.S)
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "data").symlink_to(data_dir.resolve())
    assert len(files) == 5
    assert len(COMMANDS) == 6
    for line in COMMANDS:
        output = run(line, folder)
        if "evaluate" in line:
            (folder / "score.json").write_text(output)
    return folder


def test_network(folder: Path) -> None:
    """ResNet with batch norms: 4, 8 and 16 channels. `evaluate` scores it as its run did, on all images."""
    figures = runs.summary(folder / "runs/network")
    filters = sum(9 * a * b + 9 * b * b + a * b for a, b in ((3, 4), (4, 8), (8, 16)))
    assert figures["params"] == filters + 3 * 2 * (4 + 8 + 16) + 17 * 10
    assert figures["model"] == "my_network:small_resnet"
    score = json.loads((folder / "score.json").read_text())
    assert (score["n"], score["step"]) == (10_000, 6)
    assert 0.05 < score["accuracy"] < 0.5
    state = torch.load(folder / "runs/network/checkpoints/step-00000006.pt", weights_only=True)["model"]
    assert state["0.main.1.num_batches_tracked"] == 1  # one chunk of 200 images before the test
    assert state["0.main.1.running_var"].ne(1).all()


def test_optimizer(folder: Path) -> None:
    state = torch.load(folder / "runs/optimizer/checkpoints/step-00000006.pt", weights_only=True)["optimizer"]
    assert [group["peak_lr"] for group in state["param_groups"]] == pytest.approx([0.001, 0.001])
    assert {key for values in state["state"].values() for key in values} == {"step", "exp_avg", "exp_avg_sq"}
    rates = [record["lr"] for record in runs.records(folder / "runs/optimizer") if "lr" in record]
    assert rates[0] > rates[1] > rates[2] > 0  # after the warm-up of 1.2 steps


def test_augmentation(folder: Path) -> None:
    """Its words are in the data receipt; that of runs without it is another, and the same whatever else is own."""
    names = ("network", "optimizer", "hooks", "augmentation", "together")
    receipts = [runs.summary(folder / "runs" / name)["data_receipt"] for name in names]
    assert receipts[0] == receipts[1] == receipts[2] != receipts[3] == receipts[4]


def test_hooks(folder: Path) -> None:
    with (folder / "runs/hooks/losses.csv").open() as file:
        rows = [(int(step), float(loss)) for step, loss in csv.reader(file)]
    records = runs.records(folder / "runs/hooks")
    assert rows == [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    assert [step for step, _ in rows] == [2, 4, 6]


def test_profile(folder: Path) -> None:
    profile = folder / "runs/together/profile"
    for rank in (0, 1):
        table = (profile / f"rank-{rank}.txt").read_text()
        assert table.startswith(f"2 steps of rank {rank}\n")
        assert "aten::convolution_backward" in table
        events = json.loads(gzip.decompress((profile / f"rank-{rank}.json.gz").read_bytes()))["traceEvents"]
        assert {event["name"] for event in events if "ProfilerStep" in event["name"]} == {
            "ProfilerStep#3", "ProfilerStep#4",
        }  # fmt: skip
    assert not (folder / "runs/network/profile").exists()


def test_one_process_resumed_in_the_middle_gives_the_same(folder: Path) -> None:
    """To the bit, with all four and without the profile, from the checkpoint that two processes wrote."""
    command = COMMANDS[-1].replace("torchrun --nproc_per_node=2", "python").replace("--debug.profile 2", "")
    middle = "--run.resume runs/together/checkpoints/step-00000003.pt"
    run(command.replace("--run.name together", f"--run.name resumed {middle}"), folder)
    whole, resumed = (runs.summary(folder / "runs" / name) for name in ("together", "resumed"))
    assert (whole.pop("world_size"), resumed.pop("world_size")) == (2, 1)
    for key in ("model_sha256", "data_receipt", "test_confusion", "test_loss"):
        assert resumed[key] == whole[key], key


@pytest.mark.slow
def test_one_process_from_the_start_gives_the_same(folder: Path) -> None:
    command = COMMANDS[-1].replace("torchrun --nproc_per_node=2", "python").replace("--debug.profile 2", "")
    run(command.replace("--run.name together", "--run.name alone"), folder)
    runs.assert_same(folder / "runs/alone", folder / "runs/together")


@pytest.mark.slow
def test_without_the_file_a_checkpoint_names_it(folder: Path, tmp_path: Path) -> None:
    """And an own name is part of the settings that may not change, but for hooks."""
    path = folder / "runs/network/checkpoints/step-00000006.pt"
    words = [*runs.command(1, "evaluate"), "--checkpoint", str(path)]
    output = runs.finish(runs.start_command(words, cwd=tmp_path), expected=2)
    assert f"error: {path} needs its network: model.name is my_network:small_resnet, but there is no module" in output
    assert "PYTHONPATH" in output
    again = "python -m cifar_dist.train --config quick.yaml --run.resume auto"
    hooks = "--augment.extra my_augmentation:Contrast --run.name augmentation --run.hooks my_hooks:Table"
    assert "this run is complete" in run(f"{again} {hooks}", folder)
    run(f"{again} --run.name augmentation", folder, expected=4)
