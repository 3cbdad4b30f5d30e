"""The W&B run of a run directory. After the start W&B can neither stall nor stop the training."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError
from cifar_dist.files import write_text_atomic
from cifar_dist.process import stop_signals_blocked
from cifar_dist.tracking.metrics_file import Value
from cifar_dist.tracking.wandb_login import Mode, resolve_mode

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 30.0  # a preempted job may have no more; what is not uploaded stays on disk


def start_wandb(
    config: TrackConfig, run_dir: Path, run_config: dict[str, Any], name: str, log: Callable[[str], None]
) -> WandbRun | None:
    """Start the W&B run of this run directory, or resume it; None if W&B is disabled. For the arguments see `Tracker`.

    Raises:
        UserError: a mode that was given explicitly failed. In mode auto, offline replaces a server that fails, and
            nothing replaces a wandb that fails; a line tells so.
    """
    mode, explicit = resolve_mode(config.wandb)
    if mode == "disabled":
        return None
    run_id = _run_id(run_dir)
    modes: tuple[Mode, ...] = (mode,) if explicit or mode == "offline" else ("online", "offline")
    for attempt in modes:
        try:
            run = _init(attempt, config.project, run_dir, run_id, run_config, name)
        except Exception as error:
            _teardown()  # else the failed run keeps its id occupied
            reason = " ".join(str(error).split()) or type(error).__name__
            if explicit:
                others = "offline or disabled" if attempt == "online" else "disabled"
                raise UserError(
                    f"W&B {attempt} was asked for and failed: {reason}\nTo go without: --track.wandb {others}."
                ) from error
            instead = "it works offline now" if attempt == "online" else "metrics go to metrics.jsonl only"
            log(f"W&B {attempt} failed, so {instead}: {reason}")
            continue
        where = run.url if attempt == "online" else f"`wandb sync {run.settings.sync_dir}` uploads it"
        log(f"W&B {attempt}: {where}")
        return WandbRun(run, explicit, log)
    return None


def _init(mode: Mode, project: str, run_dir: Path, run_id: str, run_config: dict[str, Any], name: str) -> wandb.Run:
    # No crash reports to a third party: offline means no network at all.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # here, because it takes half a second

    settings: dict[str, Any] = {
        "console": "off",
        "silent": True,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,  # a remote's address may hold a token
        "x_disable_meta": True,  # it stores the command line and every SLURM_* variable, SLURM_JWT among them
        "init_timeout": INIT_TIMEOUT_S,
    }
    if "finish_timeout" in wandb.Settings.model_fields:  # older ones wait without end
        settings |= {"finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True}
    with stop_signals_blocked():  # its process must outlive this one's last step
        wandb.setup(wandb.Settings(silent=True))
    run = wandb.init(
        mode=mode, project=project, dir=str(run_dir), id=run_id, resume="allow", name=name, config=run_config,
        settings=wandb.Settings(**settings),
    )  # fmt: skip
    # W&B's own step cannot go back, as it does when a run resumes; ours is a metric like the others.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    try:
        if path.exists():
            run_id = path.read_text().strip()
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
                raise UserError(f"{path} holds no W&B run id: {run_id[:80]!r}. Delete it for a new W&B run.")
            return run_id
        run_id = secrets.token_hex(4)
        write_text_atomic(path, run_id + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read or write {path}: {error}.") from error
    return run_id


def _teardown() -> None:
    import wandb

    with suppress(Exception):  # its process may be dead already
        wandb.teardown()


class WandbRun:
    """A started run. When W&B fails, for whatever reason, it logs one line and ignores all that follows."""

    def __init__(self, run: wandb.Run, explicit: bool, log: Callable[[str], None]) -> None:
        self._run: wandb.Run | None = run
        self._explicit = explicit
        self._log = log
        self._failure: str | None = None

    def log(self, record: Mapping[str, Value]) -> None:
        """Hand one record, with its "step", to W&B's process; does not wait for the network."""
        if self._run is None:
            return
        try:
            self._run.log(dict(record))
        except Exception as error:  # noqa: BLE001 - a tracker never stops a run
            self._give_up(f"W&B stopped at step {record.get('step')} ({error}); metrics.jsonl continues.")

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        """Write the summary and close, within FINISH_TIMEOUT_S; a second call does nothing."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.summary.update(dict(summary))
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self._log(f"W&B: not all was uploaded; `wandb sync {run.settings.sync_dir}` uploads the rest.")
        except Exception as error:  # noqa: BLE001
            self._give_up(f"W&B failed at the end of the run ({error}); metrics.jsonl is complete.")

    def check(self) -> None:
        """Raise a UserError if W&B failed although its mode was given explicitly."""
        if self._failure is not None and self._explicit:
            raise UserError(f"{self._failure} The run itself is complete.")

    def _give_up(self, failure: str) -> None:
        self._failure = failure
        self._run = None
        self._log(failure)
        _teardown()
