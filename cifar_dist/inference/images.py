"""Pictures of any size and mode as the network's input: uint8 (3, 32, 32). docs/models.md has the rules."""

import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cifar_dist.errors import UserError, one_line

SIZE = 32
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
BACKGROUND = "white"  # behind transparent pixels

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor
"""A file, a PIL image, uint8 (H, W, 3), or a uint8 tensor (3, H, W)."""


class ImageError(UserError):
    """A picture cannot be read; the text is the reason, without its name."""


def to_uint8(pictures: Picture | Sequence[Picture]) -> Tensor:
    """uint8 (N, 3, 32, 32) of one picture, a list of them, or a uint8 tensor (N, 3, H, W).

    Pixels of RGB pictures of 32 x 32 stay as they are.

    Raises:
        ImageError: a picture cannot be used.
    """
    several = pictures.ndim == 4 if isinstance(pictures, Tensor) else isinstance(pictures, list | tuple)
    found = [_one(picture) for picture in (pictures if several else [pictures])]  # type: ignore[union-attr, arg-type]
    return torch.stack(found) if found else torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)


def _one(picture: Picture) -> Tensor:
    if isinstance(picture, str | os.PathLike):
        try:
            return _tensor(read(Path(picture)))
        except ImageError as error:
            raise ImageError(f"{os.fspath(picture)}: {error}") from None
    if isinstance(picture, Image.Image):
        with _damage_explained():  # a file that was opened is decoded now
            return _tensor(fit(picture))
    shape = tuple(getattr(picture, "shape", ()))
    usable = len(shape) == 3 and all(shape)
    if usable and isinstance(picture, Tensor) and picture.dtype == torch.uint8 and shape[0] == 3:
        pixels = picture.cpu()
        return pixels if shape[1:] == (SIZE, SIZE) else _one(pixels.permute(1, 2, 0).numpy())
    if usable and isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and shape[2] == 3:
        return _tensor(fit(Image.fromarray(np.ascontiguousarray(picture))))
    told = f"{type(picture).__name__} {getattr(picture, 'dtype', '')} {shape or ''}".strip()
    raise ImageError(
        f"{told} is no picture. Give a path, a PIL image, a uint8 array (H, W, 3), or a uint8 tensor (3, H, W) or "
        f"(N, 3, H, W)."
    )


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read(path: Path) -> Image.Image:
    """The first frame of a file as RGB of 32 x 32.

    Raises:
        ImageError: it is missing, damaged, too large, or of another format than `FORMATS`.
    """
    with _damage_explained():
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            os.scandir(path).close()  # or the reason is that it cannot be listed
            raise ImageError("is a folder")
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise ImageError("is no regular file")
        if not found.st_size:
            raise ImageError("is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(FORMATS)) as image:
                return fit(image)


@contextmanager
def _damage_explained() -> Iterator[None]:
    """Convert errors of the system and of Pillow inside to `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("is no PNG, JPEG, WebP, GIF, BMP or TIFF picture") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except OSError as error:
        raise ImageError(error.strerror or one_line(error)) from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise errors of many types for damaged files
        raise ImageError(f"is damaged: {one_line(error)}") from None


def fit(image: Image.Image) -> Image.Image:
    """RGB of 32 x 32: turned as EXIF says, shorter side resized to 32 (bicubic, antialiased), centre cropped.

    Raises:
        ImageError: its values have no known range.
    """
    image.load()  # so that what is suppressed comes from the EXIF
    with suppress(SyntaxError, struct.error, ValueError, LookupError, TypeError):
        image = ImageOps.exif_transpose(image)
    rgb = _to_rgb(image)
    return ImageOps.fit(rgb, (SIZE, SIZE), Image.Resampling.BICUBIC)  # a picture of 32 x 32 is copied


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, BACKGROUND), front).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: npt.NDArray[Any], mode: str) -> npt.NDArray[np.uint8]:
    """Grey values (H, W) of 16 bits, or of 32 bits or floats, whose largest value tells the range, as 0 to 255."""
    ranges = (65_535,) if mode.startswith("I;16") else (255, 65_535) if mode == "I" else (1, 255)
    low, high = float(values.min()), float(values.max())
    top = next((top for top in ranges if low >= 0 and high <= top), None)  # of NaN none
    if top is None:
        raise ImageError(f"has values from {low:g} to {high:g}; valid for mode {mode}: 0 to {ranges[-1]:,}")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def find(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that `names` mean, and the files that are skipped: those in folders without a suffix of `SUFFIXES`.

    A folder stands for all files in it and in its subfolders, sorted by name. Links to folders are not followed. A
    folder that cannot be listed counts as a file, which `read` refuses.
    """
    files, skipped = list[str](), list[str]()
    for name in names:
        if not os.path.isdir(name):  # noqa: PTH112 - Path raises for some names
            files.append(name)
            continue
        for folder, subfolders, inside in os.walk(name, onerror=lambda error: files.append(error.filename)):
            subfolders.sort()
            for path in (os.path.join(folder, file) for file in sorted(inside)):  # noqa: PTH118 - Path would drop a ./
                (files if path.lower().endswith(SUFFIXES) else skipped).append(path)
    return files, skipped
