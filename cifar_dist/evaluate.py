"""Score a checkpoint: `python -m cifar_dist.evaluate --checkpoint PATH`, or under torchrun on any number of devices."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cifar_dist.cli import parse
from cifar_dist.config import Device
from cifar_dist.errors import exit_on_error
from cifar_dist.process import quick_imports, run_and_exit


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
    with exit_on_error(on_all_ranks=True):
        arguments = parse(EvaluateArguments, sys.argv[1:], "evaluate", description="Score a checkpoint.")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open one of the GPUs
    with quick_imports():
        from cifar_dist.distributed import init_distributed
        from cifar_dist.fault_tolerance.lost_peers import report_lost_peers
        from cifar_dist.training.score_checkpoint import score_checkpoint

    with exit_on_error(), init_distributed(arguments.device) as world, report_lost_peers(world):
        score_checkpoint(
            arguments.checkpoint, world, arguments.split == "validation", arguments.data_dir, arguments.json
        )


if __name__ == "__main__":
    run_and_exit(main)
