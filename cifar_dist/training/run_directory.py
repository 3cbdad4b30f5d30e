"""The run directory: its path, and the checkpoint to resume from. Used on rank 0 only."""

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cifar_dist import extension
from cifar_dist.cli import from_yaml, settings_of
from cifar_dist.config import Config
from cifar_dist.errors import CheckpointError, UserError, explain_os_error
from cifar_dist.files import read_json
from cifar_dist.training import checkpoint
from cifar_dist.yaml_file import read_entries

# Settings that define a run. The others (devices, speed, evaluation, tracking) may change in a resumed run.
FIXED = (
    "model.", "optim.", "augment.", "run.seed", "data.subset", "data.train_on", "train.epochs", "train.max_steps",
    "train.batch_size", "train.micro_batch_size", "train.precision", "train.threads", "train.exact_sum",
)  # fmt: skip
# What `run.resume replace` removes. The last two are the permission to remove the others.
_OF_A_RUN = (
    "logs/rank-*.log", "profile/rank-*",
    "tensorboard/events.*", "wandb_id.txt", "metrics.jsonl", "summary.json", "curves.png",
    "predictions.csv", "mistakes.png", "filters.png", "report.html", "config.yaml", "status.json",
)  # fmt: skip


def path_of(config: Config) -> Path:
    """The directory that a run with `config` gets if it starts now."""
    if config.run.dir is not None:
        return config.run.dir
    if config.run.name is not None:
        return Path("runs") / config.run.name
    name = config.model.name.replace(":", ".")  # a colon separates paths in lists, and hosts from paths
    return _unused(Path("runs") / f"{name}-seed{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}")


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 and so on, that does not exist."""
    others = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(free for free in itertools.chain([path], others) if not free.exists())


def open_for_run(config: Config, directory: Path) -> None:
    """Refuse a directory that holds a run, unless `run.resume` is auto, or is replace, as it was for that run, too.

    The files of a run that is replaced are removed, and temporary files of a process that was killed while writing.
    The folder of checkpoints is made. Call with the run lock held.

    Raises:
        UserError: it holds a run.
        OSError: files cannot be removed, or the folder cannot be made.
    """
    if problem := refusal(config, directory):
        raise UserError(problem)
    if config.run.resume == "replace" and _is_replaceable(directory):  # else there is no run
        for step in checkpoint.all_steps(directory / "checkpoints"):
            path = checkpoint.path_of(directory / "checkpoints", step)
            path.unlink()
            checkpoint.digest_path(path).unlink(missing_ok=True)
        for pattern in _OF_A_RUN:
            for path in directory.glob(pattern):
                path.unlink()
    (directory / "checkpoints").mkdir(exist_ok=True)
    for folder in (directory, directory / "checkpoints"):
        checkpoint.sweep(folder)


def refusal(config: Config, directory: Path) -> str:
    """Why a run with `config` may not start in `directory`; empty if it may."""
    resume, steps = config.run.resume, checkpoint.all_steps(directory / "checkpoints")
    if not steps and not (directory / "config.yaml").exists():
        return ""
    if resume == "auto":
        return "" if steps else _refusal_without_checkpoint(directory)
    if resume == "replace" and _is_replaceable(directory):
        return ""
    which = ", whose config.yaml does not say run.resume replace" if resume == "replace" else ""
    return (
        f"the run directory {directory} already holds a run{which}. Resume it by --run.resume auto, choose another "
        f"--run.name, or remove the directory."
    )


def _refusal_without_checkpoint(directory: Path) -> str:
    """Why no run may start, as if killed before its first checkpoint, where a config.yaml is; empty if one may."""
    status = directory / "status.json"
    instead = "choose another --run.name or --run.dir, or remove"
    if not status.exists():  # each run writes it before config.yaml
        return f"{directory}/config.yaml is not of a run, and a run there would replace it. Move it, or {instead} it."
    if (directory / "summary.json").exists() or read_json(status).get("last_checkpoint_step") is not None:
        text = f"the run in {directory} has no checkpoint any more, so it cannot be resumed, and would start anew"
        return f"{text}. Restore {directory}/checkpoints, {instead} the directory."
    return ""


def _is_replaceable(directory: Path) -> bool:
    """Whether config.yaml says that the run may be replaced."""
    if not (directory / "status.json").exists():  # written before config.yaml, which is then the user's
        return False
    try:
        section = read_entries((directory / "config.yaml").read_bytes(), "config.yaml")["run"].value
    except (OSError, UserError, KeyError):
        return False
    return isinstance(section, dict) and "resume" in section and section["resume"].value == "replace"


def find_start(config: Config, directory: Path, log: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The checkpoint to resume from, with its bytes; None to start at step 0. `log` gets a line per skipped file.

    A checkpoint that `run.resume` names is copied to `directory`, if it lies elsewhere.

    Raises:
        CheckpointError: it is damaged, or of a run with other settings.
    """
    if config.run.resume == "never" or config.run.resume == "replace":  # mypy narrows the type by each of these
        return None
    if config.run.resume == "auto":
        return newest_valid(directory / "checkpoints", config, log)
    path = checkpoint.target(config.run.resume)
    data = checkpoint.read_verified(path, need_digest=False)
    state = _decode_own(data, config, path)
    if not path.is_relative_to(directory):
        # Copied, so that a run that stops before its first checkpoint can resume without the other run.
        checkpoint.write(directory / "checkpoints", state["step"], data)
        best = state["best"][0]
        if best not in (None, state["step"]):  # else `evaluate --which best` would look for it here
            with suppress(CheckpointError):
                source = checkpoint.path_of(path.parent, best)
                checkpoint.write(directory / "checkpoints", best, checkpoint.read_verified(source))
    return path, data


def newest_valid(directory: Path, config: Config, log: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """The newest checkpoint that is valid and of a run with `config`, with its bytes; None if there are no checkpoints.

    Newer ones, which are skipped, are renamed, as this run will have checkpoints of these steps. `log` gets a line
    about each.

    Raises:
        CheckpointError: there are checkpoints, but none is valid, or none belongs to this run.
    """
    steps = checkpoint.all_steps(directory)
    damaged, others = list[tuple[Path, CheckpointError]](), list[tuple[Path, CheckpointError]]()
    for step in reversed(steps):
        path = checkpoint.path_of(directory, step)
        try:
            data = checkpoint.read_verified(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        try:
            saved = _decode_own(data, config, path)["step"]
            if saved != step:
                raise CheckpointError(f"{path} holds step {saved}, unlike its name.")
        except CheckpointError as error:
            others.append((path, error))
            continue
        for skipped, why in (*damaged, *others):
            log(f"warning: skipped, and renamed to {_set_aside(skipped).name}: {why}")
        return path, data
    for _, why in damaged:
        log(f"warning: skipped: {why}")
    if others:
        raise CheckpointError(f"{others[0][1]}\nNone here fits; start a new run under another --run.name.")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {directory} is valid; see the warnings above. "
            f"Restore one with its .sha256, or choose another --run.name for a new run."
        )
    return None


def _set_aside(path: Path) -> Path:
    target = _unused(path.with_name(f"{path.name}.skipped"))
    for file in (checkpoint.digest_path(path), path):
        if file.exists():
            file.rename(file.with_name(file.name + target.name.removeprefix(path.name)))
    return target


def find_checkpoint(path: Path, which: str | int = "last") -> Path:
    """The file of a checkpoint.

    Args:
        path: that file, a run directory, or its folder of checkpoints.
        which: of a run: last, best (by validation accuracy), or a step.

    Raises:
        UserError: there is no such checkpoint.
    """
    with explain_os_error(f"{path} cannot be read", "Give a run directory, such as runs/NAME, or a step-*.pt file."):
        return _find_checkpoint(path, which)


def _find_checkpoint(path: Path, which: str | int) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a run directory, such as runs/NAME, or a step-*.pt file.")
    if not path.is_dir():
        if which != "last":
            raise UserError(f"--which {which} chooses a checkpoint of a run directory, but {path} is a file.")
        return checkpoint.target(path)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = checkpoint.all_steps(directory)
    if not steps:
        raise UserError(f"{path} holds no checkpoint. Give a run directory, such as runs/NAME, or a step-*.pt file.")
    found = f"It has those of the steps {', '.join(map(str, steps))}."
    step = steps[-1] if which == "last" else which
    if which == "best":
        newest = checkpoint.path_of(directory, steps[-1])
        step = checkpoint.decode(checkpoint.read_verified(newest), str(newest))["best"][0]
        if step is None:
            raise UserError(f"{path} has no best checkpoint, as no validation was done (data.train_on). {found}")
    if step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}. {found}")
    return checkpoint.path_of(directory, int(step))


def config_of(text: str, origin: str) -> Config:
    """The configuration that a checkpoint holds as YAML.

    Raises:
        CheckpointError: this version cannot read it.
    """
    try:
        config = from_yaml(text, origin)
        extension.check_names(config)  # a name of a later version
    except UserError as error:
        raise CheckpointError(f"{origin} has a configuration that this version cannot use: {error}") from None
    return config


def _decode_own(data: bytes, config: Config, path: Path) -> dict[str, Any]:
    """The state in the bytes of a checkpoint.

    Raises:
        CheckpointError: it cannot be used, or is of a run whose fixed settings differ from those of `config`.
    """
    state = checkpoint.decode(data, str(path))
    old, new = settings_of(config_of(state["config"], str(path))), settings_of(config)
    if old["train.precision"] == "auto" and new["train.precision"] == state.get("precision"):
        old["train.precision"] = new["train.precision"]  # what auto meant where the run began
    changed = [name for name in new if name.startswith(FIXED) and old[name] != new[name]]
    if changed:
        lines = "".join(f"\n  {name} was {old[name]}, is now {new[name]}" for name in changed)
        raise CheckpointError(
            f"{path} is of a run with other settings, so resuming would mix the two. Give the old values, or start a "
            f"new run under another --run.name without --run.resume.{lines}"
        )
    return state
