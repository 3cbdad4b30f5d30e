"""Make a lean bundle: what a GPU image lacks, in folders small enough to be carried one at a time.

`launch/bundle --lean` calls it. The folders are piece-1, piece-2 and so on, with the wheels of FFCV and of small
packages, and CIFAR-10 as lossless pictures. They are written to `.NAME.partial`, which is renamed when it is complete.
`launch/measure --lean` uses them.
"""

import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from PIL import Image

from cifar_dist import cli, errors
from cifar_dist.data.cifar10 import BETON_FILES
from cifar_dist.data.prepare import beton, forms, install
from cifar_dist.data.prepare.collection import Bytes
from cifar_dist.errors import UserError
from cifar_dist.offline.bundle import ROOT, complete_or_absent, gather_wheels, locked_requirements, log, read_target
from cifar_dist.process import run_and_exit

PACKAGES = {"docstring-parser", "filelock", "packaging", "tqdm", "typeguard", "typing-extensions", "tyro"}
"""All in Python, so they are used as unpacked files."""
HAS = "torch, torchvision, numba, OpenCV, numpy, scipy, Pillow, PyYAML, psutil and matplotlib installed"
MAX_PIECE = 60 << 20  # bytes


@dataclass(frozen=True)
class LeanConfig:
    ffcv_wheel: Path
    """FFCV's wheel, from launch/build-ffcv-wheel."""
    out: Path = Path("dist/cifar_dist-lean")
    """The folder to make."""
    python: str = "3.12"
    """Python of the other machine, major and minor version."""


def main() -> None:
    """Make the pieces and print the commands for the other machine."""
    description = "Make a bundle in small pieces for a GPU image without network."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as in bundle.main
    with errors.exit_on_error():
        make(cli.parse(LeanConfig, sys.argv[1:], "offline.lean", description=description))


def make(config: LeanConfig) -> None:
    """Make the pieces in a folder beside their place, then rename it."""
    out = config.out.absolute()
    target = read_target(config.ffcv_wheel, config.python)
    lines = {Requirement(line.split()[0]).name: line for line in locked_requirements(target, ())}
    if missing := PACKAGES - lines.keys():
        raise UserError(f"uv.lock does not name {', '.join(sorted(missing))}. Restore it: git checkout uv.lock")
    with complete_or_absent(out) as begun:
        log(f"bundle: downloading {len(PACKAGES)} packages for Python {target.python}")
        gather_wheels(begun / "wheels", [lines[name] for name in sorted(PACKAGES)], config.ffcv_wheel, target)
        write_pictures(begun)
        num_pieces = distribute([*sorted(begun.glob("wheels/*.whl")), *sorted(begun.glob("*.*"))], begun)
        shutil.rmtree(begun / "wheels")
    log(
        f"bundle: {out} has {num_pieces} pieces of at most {MAX_PIECE >> 20} MiB\n"
        f"It needs Linux on {target.machine}, Python {target.python}, glibc {target.glibc} or newer, and {HAS}.\n"
        f"Copy this checkout to such a machine, and the pieces into one folder. There, for N from 1 to 4:\n"
        f"  ./launch/measure --lean {config.out} --part N"
    )


def write_pictures(folder: Path) -> None:
    """Write CIFAR-10 as six lossless pictures, which take two thirds of the official archive, and the labels."""
    install.ensure(ROOT / "data", "auto", log)
    parts = [beton.read_arrays(ROOT / "data" / name) for name in BETON_FILES]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def write(name: str, ten_thousand: Bytes) -> None:
        Image.fromarray(forms.tiled(ten_thousand)).save(folder / name, lossless=True, quality=20, method=3)

    log("bundle: compressing CIFAR-10, which takes a minute")
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, forms.TILED, images.reshape(6, 10_000, 32, 32, 3)))
    (folder / forms.LABELS_BIN).write_bytes(labels.astype(np.uint8).tobytes())


def distribute(files: list[Path], folder: Path) -> int:
    """Move the files into piece-1, piece-2 and so on, in their order, and return the number of pieces.

    Raises:
        UserError: one file is too large for a piece.
    """
    piece, number, room = folder, 0, 0
    for file in files:
        size = file.stat().st_size
        if size > MAX_PIECE:
            raise UserError(f"{file.name} has {size >> 20} MiB, more than a piece may have.")
        if size > room:
            number, room = number + 1, MAX_PIECE
            piece = folder / f"piece-{number}"
            piece.mkdir()
        room -= size
        file.rename(piece / file.name)
    return number


if __name__ == "__main__":
    run_and_exit(main)
