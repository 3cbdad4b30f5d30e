"""Writes a .beton with FFCV, reads it back and prints as JSON how far the two are apart; see test_wheel.py.

A program of its own, because it runs in another environment, as another user, and without this package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Squeeze, ToTensor
from ffcv.writer import DatasetWriter

NUM_SAMPLES = 24
SIZE = 32
CROPPED = 12


class Images:
    """Smooth colourful pictures, which JPEG keeps, each as raw bytes, as JPEG, and once more to be resized."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, k: int) -> tuple[Any, ...]:
        row, column = np.mgrid[0:SIZE, 0:SIZE].astype("f4")
        planes = [127 + 100 * np.sin(row / 9 + k), 127 + 100 * np.cos(column / 7 + k), (row + column) * 4]
        image = np.stack(planes, axis=-1).clip(0, 255).astype("u1")
        return image, image, image, (k * 7) % 10


def write(path: Path) -> None:
    fields = {
        "raw": RGBImageField(write_mode="raw"),
        "jpeg": RGBImageField(write_mode="jpg", jpeg_quality=95),
        "resized": RGBImageField(write_mode="raw"),
        "label": IntField(),
    }
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Images())


def read(path: Path) -> list[Any]:
    """The four columns as arrays; every batch is copied, because FFCV uses its memory again."""
    pipelines = {
        "raw": [SimpleRGBImageDecoder(), ToTensor()],
        "jpeg": [SimpleRGBImageDecoder(), ToTensor()],
        "resized": [CenterCropRGBImageDecoder((CROPPED, CROPPED), ratio=1.0), ToTensor()],
        "label": [IntDecoder(), ToTensor(), Squeeze(1)],
    }
    loader = Loader(str(path), batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [[column.clone().numpy() for column in batch] for batch in loader]
    return [np.concatenate(columns) for columns in zip(*batches, strict=True)]


def main() -> None:
    path = Path(sys.argv[1])
    write(path)
    raw, jpeg, resized, label = read(path)
    samples = [Images()[k] for k in range(NUM_SAMPLES)]
    images = np.stack([sample[0] for sample in samples])
    small = np.stack([cv2.resize(image, (CROPPED, CROPPED), interpolation=cv2.INTER_AREA) for image in images])

    def farthest(read_back: Any, written: Any) -> int:
        return int(np.abs(read_back.astype(int) - written.astype(int)).max())

    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    figures = {
        "raw": farthest(raw, images),
        "jpeg": farthest(jpeg, images),
        "resized": farthest(resized, small),
        "label": farthest(label, np.array([sample[3] for sample in samples])),
        "shapes": [list(raw.shape), list(jpeg.shape), list(resized.shape), list(label.shape)],
        "libraries": sorted(mapped),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
