"""Writes cifar_dist/data/prepare/image_digests.bin from the verified data/: `python -m tests.support.image_digests`."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.data.cifar10 import BETON_FILES
from cifar_dist.data.prepare import beton, install
from cifar_dist.data.prepare.collection import DIGESTS, image_digest


def digests(data_dir: Path) -> bytes:
    """Those of the 50,000 training images and the 10,000 test images, in their order."""
    parts = [beton.read_arrays(data_dir / name)[0] for name in BETON_FILES]
    return b"".join(image_digest(image) for images in parts for image in images)


def main() -> None:
    data_dir = Path(__file__).parents[2] / "data"
    install.verify(data_dir, print)
    DIGESTS.write_bytes(digests(data_dir))


if __name__ == "__main__":
    main()
