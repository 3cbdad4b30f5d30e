"""Score a checkpoint: `python -m cifar_dist.evaluate --checkpoint PATH`, or under torchrun on any number of devices."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cifar_dist.cli import parse
from cifar_dist.config import Device
from cifar_dist.errors import reported
from cifar_dist.processes import quick_imports, run_and_exit


@dataclass(frozen=True)
class EvaluateArguments:
    checkpoint: Path
    """A step-*.pt file of a run."""
    split: Literal["test", "validation"] = "test"
    """Which images to score; validation exists for runs with data.train_on train."""
    data_dir: Path | None = None
    """Holds the .beton files; the run's own data.dir if not given."""
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    json: Path | None = None
    """Write the result to this file, too."""


def main() -> None:
    with reported(alike=True):
        arguments = parse(EvaluateArguments, sys.argv[1:], "evaluate", description="Score a checkpoint.")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open one of the GPUs
    with quick_imports():
        from cifar_dist.distributed import joined
        from cifar_dist.training.scoring import score_checkpoint

    with reported(), joined(arguments.device) as world:
        score_checkpoint(
            arguments.checkpoint, world, arguments.split == "validation", arguments.data_dir, arguments.json
        )


if __name__ == "__main__":
    run_and_exit(main)
