"""Train: `python -m cifar_dist.train`, or under torchrun on any number of devices and machines."""

import os
import sys
from contextlib import ExitStack

from cifar_dist.errors import begin_shutdown, exit_on_error, report_errors, write_exit_code
from cifar_dist.fault_tolerance import signals
from cifar_dist.process import quick_imports, run_and_exit


def main() -> None:
    """Train as the command line says."""
    with exit_on_error():
        signals.install_handlers()  # before anything that takes its time to be imported
        from cifar_dist.cli import load_config

        with exit_on_error(on_all_ranks=True):
            config = load_config(sys.argv[1:], "train", "Train GoogLeNet on CIFAR-10.")
        if config.train.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FFCV would open one of the GPUs
        # torch is imported only now, so that --help and mistakes are answered at once.
        with quick_imports():
            from cifar_dist.distributed import init_distributed
            from cifar_dist.training.run import Run

        joined = init_distributed(config.train.device, config.train.threads)
        with joined as world, ExitStack() as stack, report_errors():
            Run(config, world, stack).execute()
        begin_shutdown()
        write_exit_code(0)


if __name__ == "__main__":
    run_and_exit(main, needs_output=False)
