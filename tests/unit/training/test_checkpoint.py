"""Checkpoints: which stay, which are valid, and what a full disk leaves."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.files import write_bytes_atomic
from cifar_dist.models.architectures import inception_v1
from cifar_dist.training import checkpoint
from cifar_dist.training.run_directory import newest_valid
from cifar_dist.training.summary import sha256_of_parameters


def state(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((1000,), value)}, "config": "run: {}"}


def save(directory: Path, step: int, values: dict[str, Any]) -> Path:
    return checkpoint.write(directory, step, checkpoint.encode(step, values))


def test_checkpoints_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 20, 3, 100_000_000, 7):
        save(tmp_path, step, state(step))
    assert checkpoint.all_steps(tmp_path) == [1, 3, 7, 20, 100_000_000]
    checkpoint.retain(tmp_path, current=100_000_000, num_newest=2, also=[3])
    assert checkpoint.all_steps(tmp_path) == [3, 20, 100_000_000]
    assert len(list(tmp_path.iterdir())) == 6
    # A later one must not push out those of this run.
    save(tmp_path, 30, state(30))
    checkpoint.retain(tmp_path, current=30, num_newest=2, also=[])
    assert checkpoint.all_steps(tmp_path) == [20, 30, 100_000_000]
    subprocess.run(["sha256sum", "--quiet", "-c", "step-00000020.pt.sha256"], cwd=tmp_path, check=True)


def test_sweep_removes_what_a_kill_left(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1.0))
    (tmp_path / ".step-00000002.pt.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "step-00000002.pt.sha256").write_text("0  step-00000002.pt\n")
    own = [".cache.tmp", ".notes.tmp", "step-2.pt.sha256"]
    (tmp_path / own[0]).mkdir()
    for name in own[1:]:
        (tmp_path / name).touch()
    checkpoint.sweep(tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [*own[:2], "step-00000001.pt", "step-00000001.pt.sha256", own[2]]


def test_sweep_knows_the_names_that_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cifar_dist.files.replace", kill)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "config.yaml", b"half")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_saving_a_step_again_never_damages_it(
    interrupted_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the digests were written, or after the new file was."""
    save(tmp_path, 5, state(1.0))
    writes = 0

    def interrupted(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes > interrupted_after:
            raise KeyboardInterrupt
        write_bytes_atomic(path, data)

    monkeypatch.setattr(checkpoint, "write_bytes_atomic", interrupted)
    monkeypatch.setattr(checkpoint, "write_text_atomic", lambda path, text: interrupted(path, text.encode()))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, state(2.0))
    found = checkpoint.decode(checkpoint.read_verified(checkpoint.path_of(tmp_path, 5)), "it")
    assert found["model"]["weight"][0] == (1.0 if interrupted_after == 1 else 2.0)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no digest", "directory"])
def test_newest_valid_passes_over_damage(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1, state(1.0))
    path = save(tmp_path, 2, state(2.0))
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:2000] + bytes([data[2000] ^ 4]) + data[2001:])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no digest":
        path.with_name(path.name + ".sha256").unlink()
    else:
        path.unlink()
        path.mkdir()
    warnings: list[str] = []
    found = newest_valid(tmp_path, Config(), warnings.append)
    assert found is not None
    assert found[0] == checkpoint.path_of(tmp_path, 1)
    assert checkpoint.decode(found[1], "it")["model"]["weight"][0] == 1.0
    assert len(warnings) == 1
    assert str(path) in warnings[0]


def test_no_valid_checkpoint_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing", Config(), print) is None
    save(tmp_path, 1, state(1.0)).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, Config(), lambda _: None)


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: a small file system needs root")
def test_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    try:
        first = save(tmp_path, 1, state(1.0))
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            save(tmp_path, 2, {"model": {"weight": torch.zeros(200_000)}, "config": ""})
        assert checkpoint.all_steps(tmp_path) == [1]
        assert hashlib.sha256(first.read_bytes()).hexdigest() == digest
        assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_file_is_refused_with_another_error() -> None:
    """Whatever its first bytes are, such as those of a config.yaml."""
    texts = [bytes([first]) + b"n:\n  name: x\nabcdef\x00\x01\x02" for first in range(256)]
    for data in (*texts, b"", b"epoch,loss\n1,2.5\n"):
        with pytest.raises(CheckpointError, match=r"it is not a checkpoint: it is no file of PyTorch.* Give runs/NAME"):
            checkpoint.decode(data, "it")


def test_files_that_are_not_loaded(tmp_path: Path) -> None:
    """Torch's own text would advise to load them without care."""
    path = tmp_path / "x.pt"
    torch.save({"model": Path("y")}, path)
    with pytest.raises(CheckpointError, match="holds other objects than tensors, numbers and strings, so it was not"):
        checkpoint.decode(path.read_bytes(), "it")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/a.json", "{}")
    with pytest.raises(CheckpointError, match=r"it is not a checkpoint: it is an export, or damaged\. Give runs/NAME"):
        checkpoint.decode(path.read_bytes(), "it")


def test_what_could_not_be_loaded_is_not_saved() -> None:
    """Such as the state of an own optimizer after its first step."""
    with pytest.raises(UserError, match=r"optimizer \(model\.name, optim\.name\) holds .*numpy\S*\.scalar.*, so no"):
        checkpoint.encode(1, state(1.0) | {"optimizer": {"state": {0: {"mean": np.float64(1)}}}})


def test_other_peoples_files(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of cifar_dist"):
        checkpoint.decode(checkpoint.read_verified(path, need_digest=False), "x.pt")
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(nn.Linear(2, 2), {"weight": torch.zeros(3, 2)}, "x.pt")


def test_model_digest_ignores_memory_order_and_sees_every_bit() -> None:
    torch.manual_seed(0)
    model = inception_v1(stem="strided", width=0.125)
    digest = sha256_of_parameters(model)
    named = model.named_parameters()
    by_hand = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for _, p in named)).hexdigest()
    assert digest == by_hand
    model.to(memory_format=torch.channels_last)
    assert sha256_of_parameters(model) == digest
    with torch.no_grad():
        model.classifier.bias[3] = torch.nextafter(model.classifier.bias[3], torch.tensor(9.0))
    assert sha256_of_parameters(model) != digest
