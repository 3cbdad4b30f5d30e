"""Score a checkpoint: `python -m cifar_dist.evaluate --checkpoint PATH`, or under torchrun on any number of devices."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cifar_dist import cli
from cifar_dist.config import Device
from cifar_dist.errors import exit_on_error, is_main_process
from cifar_dist.files import to_json
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
    """Score the checkpoint that the command line names, print the figures as JSON, and write them to --json."""
    with exit_on_error(on_all_ranks=True):
        arguments = cli.parse(EvaluateArguments, sys.argv[1:], "evaluate", description="Score a checkpoint.")
        write_json = cli.json_writer(arguments.json if is_main_process() else None)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open one of the GPUs
    with quick_imports():
        from cifar_dist.distributed import init_distributed
        from cifar_dist.fault_tolerance.watchdog import Watchdog
        from cifar_dist.training.score_checkpoint import score_checkpoint

    with exit_on_error(), init_distributed(arguments.device) as world, Watchdog(world, timeout_s=0):
        figures = score_checkpoint(arguments.checkpoint, world, arguments.split, arguments.data_dir)
        if world.is_main:
            print(to_json(figures), end="")
        write_json(figures)


if __name__ == "__main__":
    run_and_exit(main)
