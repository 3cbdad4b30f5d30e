"""The W&B run of a run directory, and those of its further nodes."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError, one_line
from cifar_dist.files import write_text_atomic
from cifar_dist.process import quiet_descriptors, stop_signals_blocked
from cifar_dist.tracking.metrics_file import Value, number
from cifar_dist.tracking.wandb_files import Held, held_in, without_password
from cifar_dist.tracking.wandb_media import log_checkpoint, media, summary_values

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 30.0  # a preempted job may have no more; what is not uploaded stays on disk
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_TAG, _MAX_PROJECT = 64, 128  # characters, of W&B
FLUSH_S = 1.0  # W&B's own 15 s are what a killed run would lose of its .wandb file
# Values of WANDB_MODE; run and dryrun are W&B's older names of online and offline.
ENVIRONMENT_MODES = ("online", "run", "offline", "dryrun", "disabled")


def start_wandb(
    config: TrackConfig, run_dir: Path, run_config: dict[str, Any], name: str, log: Callable[[str], None]
) -> WandbRun | None:
    """Start the W&B run of this run directory, or resume it; None: there is none. For the arguments see `Tracker`.

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
        return None
    _tags(config)
    if len(config.project) > _MAX_PROJECT or re.search(r"[/\\#?%:]", config.project):
        limits = f"at most {_MAX_PROJECT} characters, without / \\ # ? % :"
        raise UserError(f"track.project is {config.project!r:.150}; W&B takes {limits}. A team is track.entity.")
    for attempt in (mode,) if explicit else ("auto", "offline"):
        try:
            run = _init(attempt, config, run_dir, _run_id(run_dir), name, run_config)
            if run.disabled:  # by `wandb disabled`
                return None
            held = held_in(run_dir, run.id, None if run.offline else run.starting_step)
        except Exception as error:
            _teardown()  # else the failed run keeps its id occupied
            reason = reason_of(error)
            if explicit:
                others = "offline or disabled" if mode in ("online", "run") else "disabled"
                raise UserError(
                    f"W&B {mode} was asked for and failed: {reason}\nTo go without: --track.wandb {others}."
                ) from error
            instead = "it works offline now" if attempt == "auto" else "metrics go to metrics.jsonl only"
            log(f"W&B failed, so {instead}: {reason}")
            continue
        if run.offline:
            log(f"W&B offline: `launch/wandb-sync {run_dir}` uploads it")
        else:
            for part in run_dir.glob(f"wandb/offline-run-*-{run.id}/*.wandb"):
                part.with_name(f"{part.name}.synced").touch()  # this start sends these rows itself, in their order
            log(f"W&B online: {without_password(run.url or '')}")
        return WandbRun(run, held, config.artifact, log)
    return None


@contextmanager
def system_metrics_of_node(
    config: TrackConfig, run_dir: Path, main: tuple[str, str], node: int, name: str, log: Callable[[str], None]
) -> Iterator[None]:
    """Inside, W&B records the system metrics of this node, in a run of its own. A failure is a line, and no error.

    W&B records those of rank 0's node in the run itself. Its way of several processes in one run, the mode "shared", is
    experimental, needs a connection, and knows no steps. So each further node has a run of the job type node, in the
    group of the run itself.

    Args:
        main: id and mode of the run itself.
        node: its number, from 1.
    """
    run = None
    try:
        run_id, mode = main
        run = _init(mode, replace(config, job_type="node"), run_dir, f"{run_id}-node-{node}", f"{name}-node-{node}", {})
    except Exception as error:  # noqa: BLE001 - a tracker never stops a run
        _teardown()
        log(f"W&B records no system metrics of node {node}: {reason_of(error)}")
    try:
        yield
    finally:
        with suppress(Exception):
            if run is not None:
                run.finish()


def _init(mode: str, config: TrackConfig, run_dir: Path, id_: str, name: str, run_config: dict[str, Any]) -> wandb.Run:
    os.environ["WANDB_SILENT"] = "true"
    # No crash reports to a third party: offline means no network at all.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Tables wait here for their upload. W&B's own place is in the home directory, of this node.
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").absolute()))
    unset_empty_variables()
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
        "x_transaction_log_flush_interval": FLUSH_S,
    }
    run = wandb.init(
        project=config.project, entity=config.entity, dir=str(run_dir), id=id_, resume="allow", name=name,
        group=config.group, job_type=config.job_type, tags=_tags(config), notes=config.notes,
        config=run_config, settings=wandb.Settings(**settings),
    )  # fmt: skip
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _tags(config: TrackConfig) -> list[str] | None:
    tags = [tag.strip() for tag in (config.tags or "").split(",") if tag.strip()]
    if long := [tag for tag in tags if len(tag) > _MAX_TAG]:
        raise UserError(f"track.tags: {long[0]!r} has {len(long[0])} characters; W&B takes {_MAX_TAG}.")
    return tags or None


def reason_of(error: BaseException) -> str:
    """The text of an error of W&B without the value of a setting, which may hold a password."""
    return one_line(error).partition(" [type=")[0]


def unset_empty_variables() -> None:
    """Remove W&B's environment variables that are empty, which count as unset: W&B refuses some of them."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]


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
    """The id of the W&B run of this run directory, which wandb_id.txt keeps.

    Raises:
        UserError: the file holds no id.
    """
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        given = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # of the agent of a sweep
        if not _ID.fullmatch(given):
            raise UserError(f"WANDB_RUN_ID is {given[:80]!r}; valid: at most 64 letters, digits, - and _.")
        write_text_atomic(path, f"{given}\n")
    found = path.read_text(errors="replace").strip()
    if not _ID.fullmatch(found):
        raise UserError(f"{path} holds no W&B run id: {found[:80]!r}. Delete it for a new W&B run.")
    return found


def _teardown() -> None:
    with suppress(Exception):  # its process may be dead already
        import wandb

        wandb.teardown()


class WandbRun:
    """A started W&B run. Its methods raise whatever W&B raises, and do not wait for the network, except `finish`.

    The history has one row for each line of metrics.jsonl, with W&B's `_step` as the number of the line. W&B cannot
    take rows back, so a resumed run does not log again what W&B has already: the lines between the checkpoint from
    which it resumes and the end of the run before, which it computes again.

    Args:
        held: what W&B has of the history.
        artifact: whether `add_results` saves a checkpoint.
    """

    name = "W&B"

    def __init__(self, run: wandb.Run, held: Held, artifact: bool, log: Callable[[str], None]) -> None:
        self.main = (run.id, "offline" if run.offline else "online")  # for `system_metrics_of_node`
        self._run, self._held, self._artifact, self._log = run, held, artifact, log
        self._next_row = held.rows
        self._step, self._nth = -1, 0  # of the last line: its step, and which of that step it is
        self._test = dict[str, Any]()

    def log(self, index: int, step: int, metrics: Mapping[str, Value]) -> None:
        """Log line `index` of metrics.jsonl. That of the final test waits for `add_results`, as a resume repeats it."""
        self._nth = self._nth + 1 if step == self._step else 0
        self._step = step
        if self._held.has(index, step, self._nth):
            return
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        if "test/n" in metrics:
            self._test = row
        else:
            self._log_row(row)

    def _log_row(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=self._next_row, commit=True)
        self._next_row += 1

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="ERROR")

    def add_results(self, results: Mapping[str, Any], directory: Path) -> None:
        """Add the results of a run that is complete: the summary, media, and the checkpoint if asked for."""
        self._run.summary.update(summary_values(results))
        if self._test and not self._try(
            "the pictures", lambda: self._log_row({**self._test, **media(results, directory)})
        ):
            self._log_row(self._test)
        if self._artifact:
            self._try("the checkpoint", lambda: log_checkpoint(self._run, directory))

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        """Call for at most FINISH_TIMEOUT_S, as artifacts wait for the network. Returns whether it worked."""
        errors = [f"no answer for {FINISH_TIMEOUT_S:.0f} s"]

        def work() -> None:
            try:
                call()
                errors.clear()
            except Exception as error:  # noqa: BLE001
                errors[0] = one_line(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT_S)
        if errors:
            self._log(f"warning: W&B did not get {what}: {errors[0]}")
        return not errors

    def finish(self, exit_code: int) -> None:
        """Close within FINISH_TIMEOUT_S."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._log(f"W&B: not all was uploaded; `wandb sync {self._run.settings.sync_dir}` uploads the rest.")

    def abandon(self) -> None:
        """After a failure: free W&B's process, if it is still there."""
        _teardown()


def _plain(value: Value) -> Value:
    """The value, with nan, inf and -inf as metrics.jsonl has them turned back."""
    return number(value) if value in ("nan", "inf", "-inf") else value
