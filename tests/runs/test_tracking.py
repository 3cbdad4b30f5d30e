"""A killed and resumed run of two ranks, as W&B and TensorBoard have it, and secrets in the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifar_dist.process import kill_process_tree
from cifar_dist.training import checkpoint
from tests.scripts.test_launch import start as launch
from tests.support import runs
from tests.support.wandb_server import KEY, Server, serve
from tests.unit.tracking.test_tensorboard import expected, scalars

pytestmark = [pytest.mark.run, pytest.mark.data]
SECRETS = {"WANDB_API_KEY": KEY, "HF_TOKEN": "secret-in-hf-token", "SLURM_JWT": "secret-in-slurm-jwt"}
TIMES = {"seconds", "images_per_second", "data_wait", "gpu_memory_bytes"}  # what a repeated step may change


@pytest.fixture(scope="module")
def resumed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run directory, and its metrics.jsonl when it was killed."""
    run_dir = tmp_path_factory.mktemp("tracking") / "run"
    options = (*runs.TWO_RANKS, "--data.train_on", "train", "--eval.every_epochs", "1", "--train.log_every_steps", "1",
               "--train.checkpoint_every_steps", "30", "--track.wandb", "offline", "--track.tensorboard", "True",
               "--track.artifact", "True", "--data.dir", data_dir, "--run.dir", run_dir)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        process = runs.start(2, *options)
        runs.wait_until(lambda: checkpoint.all_steps(run_dir / "checkpoints") and _rows_on_disk(run_dir) > 33, process)
        kill_process_tree(process.pid)
        process.communicate()
        killed = runs.records(run_dir)
        runs.run(2, *options)
    return run_dir, killed


def _rows_on_disk(run_dir: Path) -> int:
    return sum(path.read_bytes().count(b"train/accuracy") for path in run_dir.glob("wandb/offline-*/*.wandb")) // 2


@pytest.fixture(scope="module")
def uploaded(resumed: tuple[Path, list[dict[str, Any]]]) -> Server:
    run_dir, _ = resumed
    with serve() as server:
        output = runs.finish(launch("wandb-sync", run_dir, **server.login))
        assert output == f"{run_dir}: uploaded 2 parts\n"
        assert runs.finish(launch("wandb-sync", run_dir)) == f"{run_dir}: uploaded already\n"
    return server


def test_history_equals_metrics(resumed: tuple[Path, list[dict[str, Any]]], uploaded: Server) -> None:
    """One W&B run with each line of metrics.jsonl once; steps that were computed twice have the times of the first."""
    run_dir, killed = resumed
    (run,) = uploaded.runs.values()
    records = [{"_step": index, **record} for index, record in enumerate(runs.records(run_dir))]
    history = run.history()
    assert len(history) == len(records)
    twice = [row["_step"] for row, record in zip(history, records, strict=True) if row.items() < record.items() or
             any(row[key] != value for key, value in record.items())]  # fmt: skip
    assert twice
    for index in twice:
        before = {"_step": index, **killed[index]}
        assert history[index] == before
        assert {k: v for k, v in before.items() if k not in TIMES} == {
            k: v for k, v in records[index].items() if k not in TIMES
        }
    assert history[-1].keys() - records[-1].keys() >= {"confusion_matrix_table", "curves"}
    others = [index for index in range(len(records) - 1) if index not in twice]
    assert [history[index] for index in others] == [records[index] for index in others]


def test_summary_and_files(resumed: tuple[Path, list[dict[str, Any]]], uploaded: Server) -> None:
    figures = runs.summary(resumed[0])
    (run,) = uploaded.runs.values()
    assert run.summary["model_sha256"] == figures["model_sha256"]
    assert run.summary["data_receipt"] == figures["data_receipt"][-1]
    assert run.summary["test_accuracy"] == figures["test_accuracy"]
    assert "command" not in run.summary
    assert run.exit_code == 0
    assert any(name.startswith("media/images/curves") for name in uploaded.files)
    assert "model" in [request["input"]["artifactTypeName"] for request in uploaded.asked("CreateArtifact")]


def test_tensorboard_equals_metrics(resumed: tuple[Path, list[dict[str, Any]]]) -> None:
    assert scalars(resumed[0]) == expected(resumed[0])


def test_no_secret_in_any_file(resumed: tuple[Path, list[dict[str, Any]]], uploaded: Server) -> None:
    run_dir, _ = resumed
    contents = {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert len([name for name in contents if "tensorboard" in name]) == 2
    for name, content in {**contents, **uploaded.files}.items():
        assert not [secret for secret in SECRETS.values() if secret.encode() in content], name
