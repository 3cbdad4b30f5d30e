"""Pictures of every mode as 32 x 32 RGB. Expected pixels are worked out by hand, or by numpy alone."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist import predict
from cifar_dist.inference import images
from cifar_dist.inference.images import ImageError, read, to_uint8

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = NOISE[:, :, 0]


def pixels(image: Image.Image, tmp_path: Path, name: str = "a.png", **options: Any) -> np.ndarray[Any, Any]:
    image.save(tmp_path / name, **options)
    return np.asarray(read(tmp_path / name))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_rgb_of_32x32_stays_as_it_is(tmp_path: Path, name: str) -> None:
    assert (
        pixels(Image.fromarray(NOISE), tmp_path, name, **({"lossless": True} if "webp" in name else {})) == NOISE
    ).all()


def test_inputs_in_memory_are_the_same() -> None:
    expected = torch.from_numpy(NOISE).permute(2, 0, 1)[None]
    batch = torch.cat([expected, expected.flip(3)])
    for given in (NOISE, Image.fromarray(NOISE), expected[0], expected, [NOISE], (expected[0],)):
        assert torch.equal(to_uint8(given), expected)
    assert torch.equal(to_uint8(batch), batch)
    assert torch.equal(to_uint8([NOISE, batch[1]]), batch)
    assert to_uint8([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "given",
    [NOISE.astype(np.float32), GREY, NOISE[:0], NOISE.transpose(2, 0, 1), torch.zeros(3, 32, 32), torch.zeros(2, 2), 5],
)
def test_other_inputs_are_refused(given: Any) -> None:
    with pytest.raises(ImageError, match=r"is no picture. Give a path, a PIL image, a uint8 array \(H, W, 3\)"):
        to_uint8(given)


def test_a_damaged_picture_that_was_opened() -> None:
    """Pillow decodes it when its pixels are needed."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(buffer, "PNG")
    with pytest.raises(ImageError):
        to_uint8(Image.open(io.BytesIO(buffer.getvalue()[:200])))


def test_grey_and_palette(tmp_path: Path) -> None:
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    assert (pixels(Image.fromarray(GREY), tmp_path) == grey).all()
    palette = Image.fromarray(NOISE // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert (pixels(palette, tmp_path) == NOISE // 128 * 255).all()
    assert (pixels(palette, tmp_path, "a.gif") == NOISE // 128 * 255).all()
    assert (pixels(Image.fromarray(GREY > 127), tmp_path) == (grey > 127) * 255).all()


def test_transparency_is_over_white(tmp_path: Path) -> None:
    alpha = np.zeros((32, 32), np.uint8)
    alpha[:16], alpha[16:20] = 255, 51
    over_white = NOISE * (alpha[:, :, None] / 255) + (255 - alpha[:, :, None])
    found = pixels(Image.fromarray(np.dstack([NOISE, alpha])), tmp_path).astype(int)
    assert np.abs(found - over_white).max() <= 1
    grey = GREY[:, :, None] * (alpha[:, :, None] / 255) + (255 - alpha[:, :, None])
    assert np.abs(pixels(Image.fromarray(np.dstack([GREY, alpha])), tmp_path).astype(int) - grey).max() <= 1
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (pixels(palette, tmp_path, transparency=1) == 255).all()
    assert (pixels(palette, tmp_path, transparency=0) == [40, 50, 60]).all()


def test_numbers_of_more_than_8_bits_are_scaled(tmp_path: Path) -> None:
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    wide = GREY.astype(np.uint16) * 257
    for name in ("a.png", "a.tiff"):
        assert (pixels(Image.fromarray(wide), tmp_path, name) == grey).all()
    for values in (GREY, GREY.astype(np.int32) * 257):  # TIFF of 32 bits
        assert (pixels(Image.fromarray(values.astype(np.int32)), tmp_path, "a.tiff") == grey).all()
    for divisor in (1, 255):
        assert (pixels(Image.fromarray((GREY / divisor).astype(np.float32)), tmp_path, "a.tiff") == grey).all()
    for value in (-1.0, 300.0, float("nan")):
        with pytest.raises(ImageError, match="valid for mode F: 0 to 255"):
            pixels(Image.fromarray(np.full((32, 32), value, np.float32)), tmp_path, "a.tiff")


def test_cmyk_and_orientation(tmp_path: Path) -> None:
    cmyk = Image.merge("CMYK", [Image.new("L", (32, 32), value) for value in (255, 0, 0, 0)])
    assert (pixels(cmyk, tmp_path, "a.tiff") == [0, 255, 255]).all()
    assert np.abs(pixels(cmyk, tmp_path, "a.jpg").astype(int) - [0, 255, 255]).max() <= 2
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the first row is the right side
    assert (pixels(Image.fromarray(NOISE), tmp_path, exif=exif) == np.rot90(NOISE, -1)).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_broken_exif_of_an_intact_picture(tmp_path: Path, name: str) -> None:
    grey = Image.new("RGB", (32, 32), (9, 9, 9))
    assert (pixels(grey, tmp_path, name, exif=b"Exif\0\0garbagegarbage") == 9).all()


def test_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        options = {"lossless": True} if name == "a.webp" else {}
        found = pixels(frames[0], tmp_path, name, save_all=True, append_images=frames[1:], **options)
        assert (found == [255, 0, 0]).all(), name


def test_sizes(tmp_path: Path) -> None:
    assert (pixels(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path) == [1, 2, 3]).all()
    long = Image.new("RGB", (20_000, 1), (9, 9, 9))
    assert (pixels(long, tmp_path) == 9).all()
    wide = np.zeros((64, 640, 3), np.uint8)
    wide[:, 288:352] = np.repeat(np.repeat(NOISE, 2, axis=0), 2, axis=1)  # the square in the centre
    found = pixels(Image.fromarray(wide), tmp_path).astype(int)
    by_hand = Image.fromarray(wide).resize((320, 32), Image.Resampling.BICUBIC).crop((144, 0, 176, 32))
    assert (found == np.asarray(by_hand)).all()
    thin = np.full((4096, 4096, 3), 255, np.uint8)
    thin[:, ::4] = 0  # without antialiasing some columns would be black
    assert np.abs(pixels(Image.fromarray(thin), tmp_path).astype(int) - 191).max() <= 2


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(NOISE).resize((300, 300)).save(tmp_path / "whole.png")
    Image.fromarray(NOISE).save(tmp_path / "bomb.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "damaged.png").write_bytes(content[:100] + b"\0" * 1000 + content[1100:])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture\n")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "cut.png": "truncated", "damaged.png": "broken|damaged|truncated", "empty.png": "is empty",
        "text.png": "is no PNG, JPEG, WebP, GIF, BMP or TIFF picture", "folder.png": "is a folder",
        "pipe.png": "is no regular file", "nowhere.png": "No such file or directory",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=rf"{name}: .*({reason})"):
            to_uint8(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bomb\.png: has more than 1,000 pixels"):
        to_uint8(str(tmp_path / "bomb.png"))


def test_names_that_the_system_refuses_are_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too long, one in a folder that may not be searched, and names of no variable and no user."""
    for name in ("$HERE.png", "~.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", "there")
    names = ["x" * 300, "gone$NOPE.png", "~nobody_here/a.png", "$HERE.png", "./$HERE.jpg"]
    expected = [*names[:4], "./there.jpg"]
    assert [predict._path(name) for name in names] == expected
    assert images.find(expected) == (expected, [])
    with pytest.raises(ImageError, match=r"x: File name too long"):
        to_uint8(names[0])
    locked = tmp_path / "locked"
    (locked / "folder").mkdir(parents=True)
    stat = os.stat

    def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:  # root may search every folder
        if Path(path).is_relative_to(locked / "folder"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    name = str(locked / "folder/a.png")
    assert images.find([predict._path(name)]) == ([name], [])
    with pytest.raises(ImageError, match=r"a\.png: Permission denied"):
        to_uint8(name)


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpeg", "a/x.webp", "a/notes.txt", "z.gif", ".hidden/h.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    files, skipped = images.find(["given.txt", str(tmp_path)])
    order = ("z.gif", ".hidden/h.png", "a/x.webp", "b/1.jpeg", "b/2.PNG")
    assert files == ["given.txt", *(f"{tmp_path}/{name}" for name in order)]
    assert skipped == [f"{tmp_path}/a/notes.txt"]
