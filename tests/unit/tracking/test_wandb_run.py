"""What W&B's own process uploads, to a server on this machine."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.tracked import start, strict_lines
from tests.support.wandb_server import Server, serve

TRACK = json.dumps({"entity": "somebody", "group": "sweep", "job_type": "setting-0", "tags": "a, b c", "notes": "why"})


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as found:
        yield found


def history(server: Server, run: Path) -> list[dict[str, Any]]:
    return server.runs[(run / "wandb_id.txt").read_text().strip()].history()


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as rows of W&B's history."""
    return [{"_step": index, **record} for index, record in enumerate(strict_lines(run))]


# Sent after 1 s, in place of 15 s, and killed after that.
SENT = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "TEST_WAIT_S": "2.5"}


@pytest.mark.parametrize("sent", [True, False])
def test_online_history_after_a_kill(sent: bool, server: Server, tmp_path: Path) -> None:
    """Killed at step 60 and resumed from 50: each line once, whether W&B has those after step 50 already or not."""
    run = tmp_path / "run"
    killed = start(run, "online", event="killed", env=server.login | (SENT if sent else {}))
    assert killed.returncode == -signal.SIGKILL
    assert len(strict_lines(run)) == 4
    assert len(history(server, run)) == (4 if sent else 0)
    result = start(run, "online", start=50, env=server.login)
    assert result.returncode == 0, result.stderr
    assert "W&B online: " in result.stdout
    *rows, last = history(server, run)
    assert rows == lines(run)[:-1]
    assert last.items() >= lines(run)[-1].items()
    assert len(server.runs) == 1


def test_offline_then_online_then_uploaded(server: Server, tmp_path: Path) -> None:
    """The online start sends what was recorded offline, so nothing is left to upload."""
    run = tmp_path / "run"
    assert start(run, "offline", event="killed").returncode == -signal.SIGKILL
    assert start(run, "online", start=50, env=server.login).returncode == 0
    *rows, last = history(server, run)
    assert rows == lines(run)[:-1]
    assert last.items() >= lines(run)[-1].items()
    (uploaded,) = server.runs.values()
    assert uploaded.summary["model_sha256"] == "abcd"
    (part,) = run.glob("wandb/offline-run-*/*.wandb")
    assert part.with_name(f"{part.name}.synced").exists()


def test_a_password_in_the_address_is_not_printed(server: Server, tmp_path: Path) -> None:
    address = server.url.replace("//", "//me:my-password@")
    result = start(tmp_path / "run", "online", env=server.login | {"WANDB_BASE_URL": address})
    assert "my-password" not in result.stdout + result.stderr


def test_a_password_in_a_wrong_address_is_in_no_file(tmp_path: Path) -> None:
    result = start(tmp_path / "run", "online", env={"WANDB_BASE_URL": "https//me:my-password@host"})
    assert result.returncode == 2
    assert "W&B online was asked for and failed" in result.stderr
    assert "my-password" not in result.stdout + result.stderr


@pytest.mark.parametrize(("variables", "message"), [
    ({"WANDB_RUN_ID": "a/b"}, "WANDB_RUN_ID is 'a/b'; valid: at most 64 letters, digits, - and _."),
    ({"TEST_TRACK": json.dumps({"tags": f"short,{'x' * 65}"})}, "has 65 characters; W&B takes 64."),
    ({"TEST_TRACK": json.dumps({"project": "team/x"})}, "track.project is 'team/x'; W&B takes at most 128 characters"),
    ({"TEST_TRACK": json.dumps({"project": "x" * 129})}, "W&B takes at most 128 characters, without / \\ # ? % :."),
])  # fmt: skip
def test_names_that_w_and_b_does_not_take(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    # In mode auto a malformed WANDB_RUN_ID is no error: the run continues without W&B.
    mode = "auto" if "TEST_TRACK" in variables else "offline"
    result = start(tmp_path / "run", mode, env=variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run/wandb_id.txt").exists() or "WANDB_RUN_ID" not in variables


def test_values_that_are_not_finite(server: Server, tmp_path: Path) -> None:
    """Also those that W&B gets from metrics.jsonl, as it was off before."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 20, "train/loss": "nan"}\n{"step": 40, "train/loss": "-inf"}\n')
    assert start(run, "online", start=50, env=server.login).returncode == 0
    first, second = (float(row["train/loss"]) for row in history(server, run)[:2])
    assert math.isnan(first)
    assert second == -math.inf
    assert [row["step"] for row in history(server, run)] == [record["step"] for record in strict_lines(run)]


def test_lines_of_other_log_steps_are_not_repeated(server: Server, tmp_path: Path) -> None:
    """W&B has the steps up to 60 from a run that logged less often; of the resumed run it gets those after 60."""
    run = tmp_path / "run"
    start(run, "online", event="killed", env=server.login | SENT)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (10, 20, 30, 40, 50)))
    assert start(run, "online", start=55, env=server.login).returncode == 0
    assert [row["step"] for row in history(server, run)] == [20, 40, 60, 60, 80, 100, 100]


def test_results(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (192, 128), "red").save(run / "mistakes.png")
    Image.new("RGB", (80, 15), "blue").save(run / "filters.png")
    (run / "curves.png").write_bytes(b"damaged")
    result = start(run, "online", env=server.login | {"TEST_TRACK": TRACK})
    assert result.returncode == 0, result.stderr
    ((run_id, uploaded),) = server.runs.items()
    assert (uploaded.settings["groupName"], uploaded.settings["jobType"]) == ("sweep", "setting-0")
    assert (uploaded.settings["entity"], uploaded.settings["notes"]) == ("somebody", "why")
    assert uploaded.settings["tags"] == ["a", "b c"]
    assert uploaded.exit_code == 0
    summary = uploaded.summary
    assert (summary["model_sha256"], summary["data_receipt"], summary["seed"]) == ("abcd", "last", 3)
    assert "command" not in summary
    last = uploaded.rows[len(uploaded.rows) - 1]
    assert (last["mistakes"]["width"], last["mistakes"]["height"]) == (768, 512)
    assert (last["filters"]["width"], last["filters"]["height"]) == (720, 135)
    assert "curves" not in last
    table = json.loads(next(data for name, data in server.files.items() if name.endswith(".table.json")))
    assert table["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert table["data"][:2] + table["data"][-1:] == [
        ["airplane", "airplane", 0], ["airplane", "automobile", 1], ["truck", "truck", 99]
    ]  # fmt: skip
    assert [request["input"]["artifactTypeName"] for request in server.asked("CreateArtifact")] == ["run_table"]
    assert run_id == (run / "wandb_id.txt").read_text().strip()


@pytest.mark.parametrize("validated", [True, False])
def test_checkpoint_as_artifact(validated: bool, server: Server, tmp_path: Path) -> None:
    """The best by validation, of two equal ones the first; the last without."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    scores = {20: 0.5, 40: 0.9, 50: 0.9} if validated else {}
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "val/accuracy": {score}}}\n' for step, score in scores.items())
    )
    for step in (40, 100):
        (run / f"checkpoints/step-{step:08d}.pt").write_bytes(b"%d" % step)
    result = start(run, "online", start=60, env=server.login | {"TEST_TRACK": '{"artifact": true}'})
    assert result.returncode == 0, result.stderr
    asked = [request["input"] for request in server.asked("CreateArtifact")]
    (model,) = [each for each in asked if each["artifactTypeName"] == "model"]
    assert {each["alias"] for each in model["aliases"]} == {"latest", "best" if validated else "last"}
    assert json.loads(model["metadata"]) == {"step": 40 if validated else 100}


@pytest.mark.parametrize(("event", "title"), [("not finite", "Training stopped: not finite"),
                                              ("preempted", "Training was preempted"), ("error", "")])  # fmt: skip
def test_alerts(event: str, title: str, server: Server, tmp_path: Path) -> None:
    result = start(tmp_path / "run", "online", event=event, env=server.login)
    assert result.returncode == {"not finite": 5, "preempted": 75, "error": 1}[event]
    alerts = server.asked("NotifyScriptableRunAlert")
    assert [alert["title"] for alert in alerts] == ([title] if title else [])
    assert all("step 60" in alert["text"] for alert in alerts)
    (run,) = server.runs.values()
    assert run.exit_code == 1
