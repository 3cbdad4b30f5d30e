"""The checkpoint that a path and --which name. Resuming is tested in tests/runs/ and in test_checkpoint.py."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.training import checkpoint
from cifar_dist.training.run_directory import find_checkpoint, find_start, newest_valid, open_for_run, refusal


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With checkpoints of the steps 5, 10 and 15, of which the first is the best."""
    for step in (5, 10, 15):
        state = {"model": {"x": torch.zeros(1)}, "config": to_yaml(Config()), "best": [5, 0.9]}
        checkpoint.write(tmp_path / "run" / "checkpoints", step, checkpoint.encode(step, state))
    return tmp_path / "run"


@pytest.mark.parametrize(("which", "step"), [("last", 15), ("best", 5), (10, 10)])
def test_of_a_run(run_dir: Path, which: str | int, step: int) -> None:
    expected = checkpoint.path_of(run_dir / "checkpoints", step)
    assert find_checkpoint(run_dir, which) == expected
    assert find_checkpoint(run_dir / "checkpoints", which) == expected


def test_a_file_is_itself(run_dir: Path) -> None:
    path = checkpoint.path_of(run_dir / "checkpoints", 5)
    assert find_checkpoint(path) == path
    with pytest.raises(UserError, match=r"--which best chooses a checkpoint of a run directory, but .*5\.pt is a file"):
        find_checkpoint(path, "best")


def test_a_link_is_what_it_links_to(run_dir: Path, tmp_path: Path) -> None:
    """So its digest is checked. One with a digest of its own is itself."""
    path, link = checkpoint.path_of(run_dir / "checkpoints", 5), tmp_path / "link.pt"
    link.symlink_to(path)
    assert find_checkpoint(link) == path
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"5\.pt is damaged"):
        find_start(replace(Config(), run=replace(Config().run, resume=link)), tmp_path / "new", print)
    checkpoint.digest_path(link).touch()
    assert find_checkpoint(link) == link


def test_missing_ones_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint of step 7\. It has those of the steps 5, 10, 15\."):
        find_checkpoint(run_dir, 7)
    checkpoint.path_of(run_dir / "checkpoints", 5).unlink()
    with pytest.raises(UserError, match=r"no checkpoint of step 5\. It has those of the steps 10, 15\."):
        find_checkpoint(run_dir, "best")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no checkpoint\. Give a run directory"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(UserError, match=r"typo does not exist\. Give a run directory") as caught:
        find_checkpoint(tmp_path / "typo")
    assert caught.value.exit_code == 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: File name too long\. Give a run directory"):
        find_checkpoint(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("given", "fits"), [("auto", True), ("bf16", True), ("fp32", False)])
def test_what_auto_meant_may_be_given(given: Any, fits: bool, tmp_path: Path) -> None:
    """On another machine auto may mean another precision, which `TrainStep.restore` refuses."""
    state = {"model": {}, "config": to_yaml(Config()), "precision": "bf16", "best": [None, -1.0]}
    checkpoint.write(tmp_path, 5, checkpoint.encode(5, state))
    config = replace(Config(), train=replace(Config().train, precision=given))
    if fits:
        assert newest_valid(tmp_path, config, print) is not None
    else:
        with pytest.raises(CheckpointError, match=r"train\.precision was auto, is now fp32"):
            newest_valid(tmp_path, config, print)


def test_without_a_validation(run_dir: Path) -> None:
    state = {"model": {}, "config": to_yaml(Config()), "best": [None, -1.0]}
    checkpoint.write(run_dir / "checkpoints", 20, checkpoint.encode(20, state))
    with pytest.raises(UserError, match=r"has no best checkpoint, as no validation was done"):
        find_checkpoint(run_dir, "best")


def test_a_damaged_newest_one_is_no_reason_to_take_another(run_dir: Path) -> None:
    """The model would be an older one than asked for. `read_verified` refuses the file."""
    path = checkpoint.path_of(run_dir / "checkpoints", 15)
    path.write_bytes(path.read_bytes()[:-1])
    assert find_checkpoint(run_dir, "last") == path
    with pytest.raises(CheckpointError, match="is damaged"):
        find_checkpoint(run_dir, "best")


REPLACE = replace(Config(), run=replace(Config().run, resume="replace"))
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "logs/rank-0.log", "report.html", "status.json")
OWN = ("notes.txt", "logs/mine.log", "checkpoints/mine.pt", ".lock", "wandb/offline-run/x", "../other/config.yaml")


def leave(run_dir: Path, config: str) -> None:
    for name in (*FILES, *OWN):
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (run_dir / "config.yaml").write_text(config)


def test_replace_removes_the_files_of_a_run_and_no_others(run_dir: Path) -> None:
    leave(run_dir, to_yaml(REPLACE))
    open_for_run(REPLACE, run_dir)
    assert not any((run_dir / name).exists() for name in FILES)
    assert all((run_dir / name).exists() for name in OWN)
    assert checkpoint.all_steps(run_dir / "checkpoints") == []
    assert refusal(Config(), run_dir) == ""


A_PATH = replace(Config(), run=replace(Config().run, resume=Path("replace")))


@pytest.mark.parametrize(
    "config",
    [to_yaml(Config()), to_yaml(A_PATH), "run: {", "", "run: replace"],
    ids=["never", "a path of this name", "damaged", "empty", "odd"],
)
def test_replace_leaves_other_runs(config: str, run_dir: Path) -> None:
    leave(run_dir, config)
    with pytest.raises(UserError, match=r"already holds a run, whose config\.yaml does not say run\.resume replace"):
        open_for_run(REPLACE, run_dir)
    (run_dir / "config.yaml").unlink()  # then the checkpoints are a run, of nobody knows which kind
    with pytest.raises(UserError, match="already holds a run"):
        open_for_run(REPLACE, run_dir)
    assert checkpoint.all_steps(run_dir / "checkpoints") == [5, 10, 15]
    assert all((run_dir / name).exists() for name in (*FILES[1:], *OWN))


def test_replace_removes_nothing_where_no_run_is(tmp_path: Path) -> None:
    names = (
        "metrics.jsonl",
        "status.json",
        "summary.json",
        "report.html",
        "predictions.csv",
        "logs/rank-0.log",
        "checkpoints/step-a.pt",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    open_for_run(REPLACE, tmp_path)
    assert all((tmp_path / name).exists() for name in names)
    (tmp_path / "config.yaml").write_text(to_yaml(REPLACE))
    open_for_run(REPLACE, tmp_path)
    assert [name for name in names if (tmp_path / name).exists()] == ["checkpoints/step-a.pt"]


def test_an_interrupted_replacement_is_continued(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(run_dir, to_yaml(REPLACE))
    unlink = Path.unlink

    def full(path: Path, missing_ok: bool = False) -> None:
        if path.name == "summary.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", full)
    with pytest.raises(KeyboardInterrupt):
        open_for_run(REPLACE, run_dir)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert not (run_dir / "metrics.jsonl").exists()
    open_for_run(REPLACE, run_dir)
    assert not any((run_dir / name).exists() for name in FILES)


AUTO = replace(Config(), run=replace(Config().run, resume="auto"))


@pytest.mark.parametrize("config", [REPLACE, AUTO], ids=["replace", "auto"])
def test_a_configuration_that_no_run_wrote_is_kept(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text := "# mine\nbase: debug\nrun: {resume: replace}\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_for_run(config, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == text
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "status.json").write_text('{"last_checkpoint_step": null}')  # a run wrote both
    open_for_run(config, tmp_path)


@pytest.mark.parametrize("left", ["summary.json", "status.json"])
def test_a_run_that_lost_its_checkpoints_is_not_started_anew(left: str, run_dir: Path) -> None:
    """One that ended, or was stopped; but one that was killed before its first checkpoint starts anew."""
    (run_dir / "config.yaml").write_text(to_yaml(AUTO))
    (run_dir / "status.json").write_text('{"last_checkpoint_step": null}')
    if left == "summary.json":
        (run_dir / left).touch()
    else:
        (run_dir / left).write_text('{"last_checkpoint_step": 15}')
    assert refusal(AUTO, run_dir) == ""
    shutil.rmtree(run_dir / "checkpoints")
    assert "has no checkpoint any more, so it cannot be resumed" in refusal(AUTO, run_dir)
    (run_dir / "summary.json").unlink(missing_ok=True)
    (run_dir / "status.json").write_text('{"last_checkpoint_step": null}')
    assert refusal(AUTO, run_dir) == ""


def test_a_newer_checkpoint_that_cannot_be_used_is_kept(run_dir: Path) -> None:
    """Under another name, as the run will save that step again."""
    newest, lines = checkpoint.path_of(run_dir / "checkpoints", 15), list[str]()
    data = newest.read_bytes()
    checkpoint.digest_path(newest).unlink()
    found = newest_valid(run_dir / "checkpoints", AUTO, lines.append)
    assert found is not None
    assert found[0].name == "step-00000010.pt"
    (line,) = lines
    assert line.startswith("warning: skipped, and renamed to step-00000015.pt.skipped: ")
    assert newest.with_name("step-00000015.pt.skipped").read_bytes() == data
    assert checkpoint.all_steps(run_dir / "checkpoints") == [5, 10]


def test_a_run_from_the_checkpoint_of_another_has_its_best(run_dir: Path, tmp_path: Path) -> None:
    path = checkpoint.path_of(run_dir / "checkpoints", 10)
    start = find_start(replace(Config(), run=replace(Config().run, resume=path)), tmp_path / "fork", print)
    assert start is not None
    assert start[0] == path
    assert checkpoint.all_steps(tmp_path / "fork/checkpoints") == [5, 10]
    assert find_checkpoint(tmp_path / "fork", "best").name == "step-00000005.pt"
