"""Files beside summary.json that tell what was learnt: each answer of the final test, and two pictures."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Indices
from cifar_dist.files import write_bytes_atomic, write_text_atomic
from cifar_dist.training.evaluation import PROBABILITY_UNITS, Score

NUM_MISTAKES, MISTAKES_PER_ROW, FILTERS_PER_ROW = 24, 6, 16


def write_answers(path: Path, score: Score, samples: Indices) -> None:
    """Write a line for each of `samples` (n,) of the test set, to which `score` belongs: its answer for one view."""
    lines = ["image,label,predicted,probability"]
    for image, (label, predicted, units) in zip(samples.tolist(), score.answers.tolist(), strict=True):
        lines.append(f"{image},{label},{predicted},{units / PROBABILITY_UNITS:.6f}")
    write_text_atomic(path, "\n".join(lines) + "\n")


def worst_mistakes(score: Score, samples: Indices) -> Indices:
    """The samples that were classified wrongly, by falling probability of the predicted class."""
    label, predicted, units = score.answers.cpu().numpy().T
    wrong = np.flatnonzero(label != predicted)
    return samples[wrong[np.lexsort((samples[wrong], -units[wrong]))]]


def write_mistakes(path: Path, score: Score, samples: Indices, loader: BetonLoader) -> None:
    """Write the `NUM_MISTAKES` worst mistakes as one PNG; a white one if there is none. `loader` reads the test set."""
    shown = worst_mistakes(score, samples)[:NUM_MISTAKES]
    pixels = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    if len(shown):
        pixels = next(loader.read(shown, len(shown))).images.cpu()
    _write_png(path, _tiled(pixels.permute(0, 2, 3, 1).numpy(), MISTAKES_PER_ROW, gap=0))


def write_filters(path: Path, model: nn.Module) -> None:
    """Write the filters of the first convolution as one PNG, each scaled to 0..255.

    Raises:
        LookupError: no filter has three channels.
    """
    found = [tensor for tensor in model.state_dict().values() if tensor.ndim == 4 and tensor.shape[1] == 3]
    if not found:
        raise LookupError("no filter of the network has three channels")
    filters: Tensor = found[0].detach().cpu().float().permute(0, 2, 3, 1)
    low, high = (extreme(filters, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    scaled = (filters - low) / (high - low).clamp(min=1e-12)
    _write_png(path, _tiled((255 * scaled).round().to(torch.uint8).numpy(), FILTERS_PER_ROW, gap=1))


def _tiled(images: npt.NDArray[np.uint8], per_row: int, gap: int) -> npt.NDArray[np.uint8]:
    """`images` (N, H, W, 3) in rows, with `gap` white pixels between them."""
    n, height, width, _ = images.shape
    rows, columns = -(-n // per_row), min(n, per_row)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        y, x = k // per_row * (height + gap), k % per_row * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())
