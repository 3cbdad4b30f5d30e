"""The settings that a sweep compares, for launch/sweep and slurm/sweep.sh.

`--grid optim.lr=0.1,0.2 train.epochs=2,3` is every combination; `--grid FILE` is a file with one line of settings each.
"""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from cifar_dist.config import TrackConfig
from cifar_dist.errors import UserError
from cifar_dist.files import expand_path

_EXAMPLE = "e.g. --grid optim.lr=0.1,0.2 train.epochs=2,3, or a file with a line of settings each"
_SET_BY_SWEEP = ("run.seed", "run.resume", "run.name", "run.dir")


def settings(words: Sequence[str]) -> list[str]:
    """A line of options of cifar_dist.train for each group of runs; without `words` one empty line.

    Args:
        words: what follows --grid on a command line.

    Raises:
        UserError: they are neither NAME=VALUE,VALUE nor a file, or give the same settings twice.
    """
    if not words:
        return [""]
    if len(words) == 1 and "=" not in words[0]:
        lines = _lines(words[0])
    else:
        lines = [shlex.join(itertools.chain(*line)) for line in itertools.product(*map(_axis, words))]
        names = [word.partition("=")[0] for word in words]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"--grid has {twice[0]} twice. Give all its values at once: {twice[0]}=A,B.")
    for line in lines:
        if lines.count(line) > 1:
            raise UserError(f"--grid has the same settings twice: {line}")
        given = {word.partition("=")[0].lstrip("-") for word in shlex.split(line)}
        if taken := given.intersection(_SET_BY_SWEEP):
            raise UserError(f"--grid has {min(taken)}, which the sweep itself sets for each run.")
    return lines


def _axis(word: str) -> list[tuple[str, str]]:
    """Option and value for each value of one setting."""
    name, _, text = word.partition("=")
    values = text.split(",")
    if not name or "" in values:
        raise UserError(f"--grid {word} is not NAME=VALUE,VALUE; {_EXAMPLE}.")
    return [(f"--{name.lstrip('-')}", value) for value in values]


def _lines(name: str) -> list[str]:
    try:
        text = Path(expand_path(name)).read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        for line in found:
            shlex.split(line)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--grid {name} cannot be read: {reason}; {_EXAMPLE}.") from None
    if not found:
        raise UserError(f"--grid {name} holds no settings. Write one line per setting, e.g. --optim.lr 0.1.")
    return found


def folders(folder: Path, lines: Sequence[str]) -> list[Path]:
    """Where the runs of each line are: in `folder` itself if there is one line only."""
    return [folder] if len(lines) == 1 else [folder / f"setting-{k}" for k in range(len(lines))]


def tracking(track: TrackConfig, name: str, setting: str) -> list[str]:
    """Options that put the runs of the sweep `name` together at W&B, and those of each of several settings."""
    group = [] if track.group else ["--track.group", name]
    return group + ([] if track.job_type or not setting else ["--track.job_type", setting])
