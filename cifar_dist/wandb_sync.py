"""Upload what W&B has recorded offline: `python -m cifar_dist.wandb_sync [RUN_DIR...]`, or launch/wandb-sync."""

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cifar_dist import cli
from cifar_dist.errors import UserError, exit_on_error, one_line
from cifar_dist.fault_tolerance.liveness import living_owners
from cifar_dist.process import run_and_exit
from cifar_dist.tracking.wandb_files import HEADER, without_password
from cifar_dist.tracking.wandb_run import reason_of, unset_empty_variables

_ANSWER_S = 20


@dataclass(frozen=True)
class SyncArguments:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")] = (Path("runs"),)
    """Run directories, or folders of them."""
    dry_run: bool = False
    """Print what would be uploaded, and upload nothing."""


def main() -> None:
    """Upload each run that the command line names, and print a line about it."""
    text = (
        "Upload what W&B has recorded offline, in the order in which it was recorded. "
        "Example: python -m cifar_dist.wandb_sync runs --dry_run True"
    )
    with exit_on_error():
        arguments = cli.parse(SyncArguments, sys.argv[1:], "wandb_sync", description=text)
        segments = _segments(arguments.runs)
        if not arguments.dry_run and any(not _is_uploaded(file) for files in segments.values() for file in files):
            _check_connection()
        failed = [run for run, files in segments.items() if not _sync(run, files, arguments.dry_run)]
        if failed:
            raise UserError(f"{len(failed)} of {len(segments)} runs were not uploaded; see above. Repeat the command.")


def _segments(paths: tuple[Path, ...]) -> dict[Path, list[Path]]:
    """By run directory, the .wandb files of the starts that were offline."""
    found, seen = dict[Path, list[Path]](), set[tuple[int, int]]()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder. Give run directories, such as runs/NAME, or folders of them.")
        for file in sorted(_files_below(path.absolute(), seen)):
            if file.stat().st_size > len(HEADER):  # else its process was killed in its first second
                found.setdefault(_shown(file.parents[2]), []).append(file)
    if not found:
        raise UserError(f"no run below {', '.join(map(str, paths))} has been recorded offline by W&B (track.wandb).")
    return found


def _files_below(path: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The files that W&B wrote offline in `path` and below it, through links, too; each folder counts once (`seen`)."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}. Name the run directories to upload.")

    for folder, names, files in os.walk(path, onerror=refuse, followlinks=True):
        found = os.stat(folder)  # noqa: PTH116 - os.walk gives text
        if (found.st_dev, found.st_ino) in seen:
            names.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        names[:] = sorted({*names} - {"latest-run"})  # W&B's link to one of the others
        if Path(folder).name.startswith("offline-run-"):
            yield from (Path(folder, name) for name in files if name.endswith(".wandb"))


def _shown(run: Path) -> Path:
    """The path of a run directory as people write it."""
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def _is_uploaded(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()  # by wandb


def _sync(run: Path, files: list[Path], dry_run: bool) -> bool:
    """Upload the `files` of a run and tell so. Returns whether nothing failed."""
    pending = [file for file in files if not _is_uploaded(file)]
    parts = f"{len(pending)} part{'s' * (len(pending) != 1)}"
    if not pending:
        print(f"{run}: uploaded already")
    elif living_owners([run]):
        print(f"{run}: still running; not uploaded, as what follows would be left out")
    elif dry_run:
        print(f"{run}: {parts} to upload")
    else:
        # wandb sorts the parts by time, and uploads those of one run one after another.
        command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in pending)]
        own = ("WANDB_SILENT", "WANDB_QUIET", "WANDB_RESUME", "WANDB_RUN_ID")  # the first two hide why it fails
        kept = {name: value for name, value in os.environ.items() if name not in own}
        environment = {"WANDB_DIR": str(run), "WANDB__GRAPHQL_RETRY_MAX": "3"} | kept
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        if not all(map(_is_uploaded, pending)):
            print(f"{run}: not uploaded: {one_line(result.stdout.strip().rpartition(chr(10))[2])}", flush=True)
            return False
        print(f"{run}: uploaded {parts}", flush=True)
    return True


def _check_connection() -> None:
    """Raise a UserError without a login, or if the server does not answer: wandb would retry for many minutes."""
    os.environ["WANDB_SILENT"] = "true"
    unset_empty_variables()
    import wandb  # here, so that --help is fast

    try:
        wandb.login(verify=False)
        server = without_password(wandb.setup().settings.base_url)  # which urlopen takes for a port
    except wandb.errors.UsageError as error:
        raise UserError(f"W&B: {one_line(error)} Or set WANDB_API_KEY.") from None
    except Exception as error:  # noqa: BLE001 - W&B's settings may be wrong in many ways
        raise UserError(f"W&B: {reason_of(error)}") from None
    try:
        with urllib.request.urlopen(server, timeout=_ANSWER_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"W&B's server {server} does not answer: {one_line(error)}. Try where it can be reached."
        ) from None


if __name__ == "__main__":
    run_and_exit(main)
