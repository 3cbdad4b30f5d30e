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
from cifar_dist.errors import UserError, one_line
from cifar_dist.files import write_text_atomic
from cifar_dist.process import quiet_descriptors, stop_signals_blocked
from cifar_dist.tracking.metrics_file import Value

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 30.0  # a preempted job may have no more; what is not uploaded stays on disk
# Values of WANDB_MODE; run and dryrun are W&B's older names of online and offline.
ENVIRONMENT_MODES = ("online", "run", "offline", "dryrun", "disabled")


def start_wandb(
    config: TrackConfig, run_dir: Path, run_config: dict[str, Any], name: str, log: Callable[[str], None]
) -> WandbRun:
    """Start the W&B run of this run directory, or resume it. For the arguments see `Tracker`.

    --track.wandb gives the mode, or WANDB_MODE if that is auto. If neither does, see `stored_mode`.

    Raises:
        UserError: WANDB_MODE is unknown, or a mode that was given failed. If none was given, offline replaces what
            fails, and nothing replaces an offline W&B that fails; a line tells so.
    """
    mode = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE") or "auto"
    if mode not in ("auto", *ENVIRONMENT_MODES):
        raise UserError(f"WANDB_MODE is {mode!r}; valid: {', '.join(ENVIRONMENT_MODES)}.")
    explicit = mode != "auto"
    if mode == "disabled":
        return WandbRun(None, explicit, log)
    for attempt in (mode,) if explicit else ("auto", "offline"):
        try:
            run = _init(attempt, config.project, run_dir, run_config, name)
        except Exception as error:
            _teardown()  # else the failed run keeps its id occupied
            reason = one_line(error)
            if explicit:
                others = "offline or disabled" if mode in ("online", "run") else "disabled"
                raise UserError(
                    f"W&B {mode} was asked for and failed: {reason}\nTo go without: --track.wandb {others}."
                ) from error
            instead = "it works offline now" if attempt == "auto" else "metrics go to metrics.jsonl only"
            log(f"W&B failed, so {instead}: {reason}")
            continue
        if run.offline:
            log(f"W&B offline: `wandb sync {run.settings.sync_dir}` uploads it")
        elif not run.disabled:
            log(f"W&B online: {run.url}")
        return WandbRun(run, explicit, log)
    return WandbRun(None, explicit, log)


def _init(mode: str, project: str, run_dir: Path, run_config: dict[str, Any], name: str) -> wandb.Run:
    run_id = _run_id(run_dir)
    os.environ["WANDB_SILENT"] = "true"
    # No crash reports to a third party: offline means no network at all.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # here, because it takes half a second

    with stop_signals_blocked(), quiet_descriptors():  # its process must outlive this one's last step
        wandb.setup()
    settings: dict[str, Any] = {
        "mode": stored_mode() if mode == "auto" else mode,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,  # a remote's address may hold a token
        "x_disable_meta": True,  # it stores the command line and every SLURM_* variable, SLURM_JWT among them
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
    }
    run = wandb.init(
        project=project, dir=str(run_dir), id=run_id, resume="allow", name=name, config=run_config,
        settings=wandb.Settings(**settings),
    )  # fmt: skip
    # W&B's own step cannot go back, as it does when a run resumes; ours is a metric like the others.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def stored_mode() -> str:
    """After `wandb disabled` or `wandb offline` that mode; else online with a login, and offline without.

    W&B must be set up, and silent, so that it does not ask for a login.
    """
    import wandb

    if wandb.setup().settings.mode == "disabled":
        return "disabled"
    try:
        return "online" if wandb.login(verify=False) else "offline"  # verifying would need the network
    except wandb.errors.UsageError:  # there is no login
        return "offline"


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        given = os.environ.get("WANDB_RUN_ID")  # of the agent of a sweep
        write_text_atomic(path, (given or secrets.token_hex(4)) + "\n")
    run_id = path.read_text(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
        raise UserError(f"{path} holds no W&B run id: {run_id[:80]!r}. Delete it for a new W&B run.")
    return run_id


def _teardown() -> None:
    with suppress(Exception):  # its process may be dead already
        import wandb

        wandb.teardown()


class WandbRun:
    """A started run, or None, for which all does nothing.

    When W&B fails, for whatever reason, it logs one line and ignores all that follows.
    """

    def __init__(self, run: wandb.Run | None, explicit: bool, log: Callable[[str], None]) -> None:
        self._run = run
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
