"""Train: `python -m cifar_dist.train`, or under torchrun on any number of devices and machines."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

from cifar_dist.cli import load_config
from cifar_dist.config import accumulation_steps
from cifar_dist.errors import reported


def main() -> None:
    with reported(alike=True):
        config = load_config(sys.argv[1:], "train", "Train GoogLeNet on CIFAR-10.")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        accumulation_steps(config.train.batch_size, config.train.micro_batch_size, world_size)
    # torch is imported only now, so that --help and mistakes are answered at once.
    from cifar_dist.distributed import joined
    from cifar_dist.training.run import run

    with reported(), joined(config.train.device) as world, ExitStack() as stack:
        run(config, world, stack)


if __name__ == "__main__":
    main()
