"""Score a checkpoint: `python -m cifar_dist.evaluate runs/NAME`, or under torchrun on any number of devices."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cifar_dist import cli
from cifar_dist.config import Device, PrecisionName
from cifar_dist.errors import UserError, exit_on_error, is_main_process
from cifar_dist.files import to_json
from cifar_dist.process import quick_imports, run_and_exit

DESCRIPTION = "Score a checkpoint of a run. Example: python -m cifar_dist.evaluate runs/mine --which best"


@dataclass(frozen=True)
class EvaluateArguments:
    run: tyro.conf.Positional[Path | None] = None
    """A run directory or a step-*.pt file."""
    which: Literal["last", "best"] | int = "last"
    """Which checkpoint of a run directory: last, best (by validation) or a step."""
    checkpoint: Path | None = None
    """The same as PATH."""
    split: Literal["test", "validation"] = "test"
    """Which images to score; validation exists for runs with data.train_on train."""
    data_dir: Path | None = None
    """Holds the .beton files; the run's own data.dir if not given."""
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    precision: PrecisionName | None = None
    """Precision of the computation; that of the run if not given. Exported models compute in fp32."""
    write_statistics: bool = False
    """Compute the batch-norm statistics from training images, and write the checkpoint again with them. Checkpoints of
    versions before 0.2, and of runs that were killed while they stopped, lack them."""
    json: Path | None = None
    """Write the result to this file, too."""


def main() -> None:
    """Score the checkpoint that the command line names, print the figures as JSON, and write them to --json."""
    with exit_on_error(on_all_ranks=True):
        arguments = cli.parse(EvaluateArguments, sys.argv[1:], "evaluate", description=DESCRIPTION)
        path = arguments.checkpoint if arguments.run is None else arguments.run
        if path is None or (arguments.run is not None and arguments.checkpoint is not None):
            raise UserError("give one run directory or checkpoint, e.g. python -m cifar_dist.evaluate runs/mine")
        if arguments.write_statistics and arguments.precision is not None:
            raise UserError("--write-statistics computes in the precision of the run; leave out --precision.")
        write_json = cli.json_writer(arguments.json if is_main_process() else None)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open one of the GPUs
    with quick_imports():
        from cifar_dist.distributed import init_distributed
        from cifar_dist.fault_tolerance.watchdog import Watchdog
        from cifar_dist.training.score_checkpoint import Request, score_checkpoint

    request = Request(
        path, arguments.which, arguments.split, arguments.data_dir, arguments.precision, arguments.write_statistics
    )
    with exit_on_error(), init_distributed(arguments.device) as world, Watchdog(world, timeout_s=0):
        figures = score_checkpoint(request, world)
        if world.is_main:
            print(to_json(figures), end="")
        write_json(figures)


if __name__ == "__main__":
    run_and_exit(main)
