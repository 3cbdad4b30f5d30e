"""Classify pictures with a trained model: `python -m cifar_dist.predict runs/NAME picture.jpg`.

The exit code is 0 if all files were read, 1 if some were not, 2 if nothing could be done, and 4 if the
checkpoint is damaged.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cifar_dist import cli
from cifar_dist.config import NUM_CLASSES, Device, Positive, Range
from cifar_dist.errors import UserError, exit_on_error
from cifar_dist.files import expand_path
from cifar_dist.process import quick_imports, run_and_exit

DESCRIPTION = "Classify pictures. Example: python -m cifar_dist.predict runs/mine cat.jpg folder --top_k 1 --tta flip"


@dataclass(frozen=True)
class PredictArguments:
    run: tyro.conf.Positional[Path]
    """A run directory or a step-*.pt file."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """PNG, JPEG, WebP, GIF, BMP or TIFF files of any size, and folders, which stand for all such files in them."""
    which: Literal["last", "best"] | int = "last"
    """Which checkpoint of a run directory: last, best (by validation) or a step."""
    top_k: Annotated[int, Range(min=1, max=NUM_CLASSES)] = 3
    """How many classes to print for each picture."""
    tta: Literal["none", "flip", "six"] = "none"
    """Test-time augmentation, as in eval.tta: the mean over 1, 2 or 6 views of each picture."""
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    batch_size: Positive = 128
    """Pictures per forward pass. The results do not depend on it."""
    format: Literal["table", "jsonl"] = "table"
    """table, or jsonl: lines like {"file": "a.png", "predictions": [{"class": "cat", "probability": 0.9}]}."""


def main() -> None:
    """Print the most probable classes of each picture, and on stderr the files that cannot be read."""
    with exit_on_error():
        arguments = cli.parse(PredictArguments, sys.argv[1:], "predict", description=DESCRIPTION)
        cli.validate_ranges(arguments)
        raise SystemExit(_predict(arguments))


def _predict(arguments: PredictArguments) -> int:
    """The exit code."""
    from cifar_dist.inference.images import SUFFIXES, find

    if not arguments.images:
        raise UserError("no picture is given, e.g. python -m cifar_dist.predict runs/mine cat.jpg")
    files, skipped = find([_path(name) for name in arguments.images])
    with quick_imports():
        from cifar_dist.inference.classifier import load
        from cifar_dist.inference.prediction import json_lines, predict_files, some, table
    if skipped:
        _note(f"note: skipped {len(skipped):,} without {', '.join(SUFFIXES)}: {some(skipped)}")
    if not files:
        raise UserError(f"there is no picture in {some(arguments.images)}.")
    model = load(arguments.run, arguments.which, arguments.device)
    bad = list[str]()

    def report(text: str) -> None:
        _note(text)
        bad.append(text)

    results = predict_files(model, files, arguments.top_k, arguments.tta, arguments.batch_size, report)
    lines = json_lines(results) if arguments.format == "jsonl" else table(results, files, model.classes)
    for line in lines:
        print(line)
    return _exit_code(files, bad)


def _path(name: str) -> str:
    """`name` with ~ and $ expanded, unless there is such a file: a shell may have found it by a pattern."""
    try:
        return name if os.path.exists(name) else expand_path(name)  # noqa: PTH110 - Path raises for some names
    except UserError:  # no such variable or user; the file is then named as missing, and the others are read
        return name


def _exit_code(files: Sequence[str], bad: Sequence[str]) -> int:
    if bad:
        _note(f"{len(bad):,} of {len(files):,} files could not be read")
    return 0 if not bad else 2 if len(bad) == len(files) else 1


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_and_exit(main)
