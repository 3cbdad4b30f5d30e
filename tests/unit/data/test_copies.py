"""Copies of CIFAR-10 as people have them: found by content, put in order by digests, proved by the six MD5s."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from cifar_dist.data.cifar10 import CLASSES
from cifar_dist.data.prepare import contents, install
from cifar_dist.data.prepare.collection import DIGESTS, Bytes, Cifar10
from cifar_dist.data.prepare.contents import Item, Walk
from cifar_dist.data.prepare.forms import label_of
from cifar_dist.data.prepare.sources import fetch
from cifar_dist.errors import DataError
from tests.conftest import cifar10_records
from tests.support.image_digests import digests
from tests.unit.data.test_sources import Lines, assert_same, png

pytestmark = pytest.mark.data


def refused(source: Path) -> str:
    """The message, which fits on one screen and says what to do."""
    with pytest.raises(DataError) as error:
        fetch(str(source), Lines())
    text = str(error.value)
    assert len(text.splitlines()) <= 10
    assert "--data.source" in text or "data.source" in text.splitlines()[0]
    return text


def test_table_of_digests(data_dir: Path) -> None:
    table = digests(data_dir)
    assert table == DIGESTS.read_bytes()
    assert len({table[start : start + 5] for start in range(0, len(table), 5)}) == 60_000


# The test set in many forms, beside the training set as five files of the binary version


def add_to_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def add_to_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pictures(images: Bytes, labels: Bytes, name: str) -> dict[str, bytes]:
    """PNG files; in `name`, {k} is the number in this order, {label} and {cls} the class."""
    found = enumerate(zip(images, labels.tolist(), strict=True))
    return {name.format(k=k, label=label, cls=CLASSES[label]): png(image) for k, (image, label) in found}


def class_folders(folder: Path, images: Bytes, labels: Bytes) -> None:
    for name, content in pictures(images, labels, "a b/test/{cls}/{k:05}.png").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a b/readme.txt").write_text("notes")
    Image.new("RGB", (400, 300)).save(folder / "a b/overview.png")


def numbered_folders_in_zip(folder: Path, images: Bytes, labels: Bytes) -> None:
    add_to_zip(folder / "x.zip", {"x/notes.gz": b"no gzip", **pictures(images, labels, "x/valid/{label}/{k}.png")})


def class_in_file_name_in_renamed_tar(folder: Path, images: Bytes, labels: Bytes) -> None:
    add_to_tar(folder / "backup", pictures(images, labels, "cifar/test/{k}_{cls}.png"), "w")


def zip_in_tar_gz(folder: Path, images: Bytes, labels: Bytes) -> None:
    add_to_zip(folder / "inner", pictures(images, labels, "{cls}/{k}.png"))
    content = {"some/where/inner.zip": (folder / "inner").read_bytes()}
    (folder / "inner").unlink()
    add_to_tar(folder / "outer.tgz", content, "w:gz")


def parquet(folder: Path, images: Bytes, labels: Bytes) -> None:
    """Three shards of the hub's form, with several row groups."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for k, part in enumerate(np.array_split(np.arange(len(labels)), 3)):
        column = [{"bytes": png(images[i]), "path": f"{i}.png"} for i in part]
        table = pa.table({"img": column, "label": pa.array(labels[part].tolist(), pa.int64())})
        pq.write_table(table, folder / f"test-{k:05}-of-00003.parquet", row_group_size=1500)


def parquet_with_names(folder: Path, images: Bytes, labels: Bytes) -> None:
    """Other columns, another order, plain bytes and labels as text."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = [CLASSES[label] for label in labels]
    columns = {"split": ["test"] * len(labels), "labels": names, "image": [png(image) for image in images]}
    pq.write_table(pa.table(columns), folder / "0000")


def npz(folder: Path, images: Bytes, labels: Bytes) -> None:
    np.savez(folder / "cifar.npz", x_test=images, y_test=labels.astype(np.int64)[:, None], x_train=images[:5])


def npy(folder: Path, images: Bytes, labels: Bytes) -> None:
    np.save(folder / "test_images.npy", images.transpose(0, 3, 1, 2))
    np.save(folder / "test_labels.npy", labels)


def shuffled_records(folder: Path, images: Bytes, labels: Bytes) -> None:
    (folder / "all.dat").write_bytes(cifar10_records(images, labels))


def bz2_of_a_file(folder: Path, images: Bytes, labels: Bytes) -> None:
    (folder / "test.bin.bz2").write_bytes(bz2.compress(cifar10_records(images, labels), 1))


def xz_tar(folder: Path, images: Bytes, labels: Bytes) -> None:
    add_to_tar(folder / "t.tar", {"a/b/c/test": cifar10_records(images, labels)}, "w")
    (folder / "t.txz").write_bytes(lzma.compress((folder / "t.tar").read_bytes(), preset=0))
    (folder / "t.tar").unlink()


FORMS = (
    class_folders, numbered_folders_in_zip, class_in_file_name_in_renamed_tar, zip_in_tar_gz, parquet,
    parquet_with_names, npz, npy, shuffled_records, bz2_of_a_file, xz_tar,
)  # fmt: skip
FAST = (class_folders, parquet, npz, shuffled_records)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in FAST else pytest.mark.slow, id=form.__name__) for form in FORMS]
)
def test_forms(
    form: Callable[[Path, Bytes, Bytes], None], binary_dir: Path, cifar: Cifar10, tmp_path: Path
) -> None:  # fmt: skip
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}.bin").symlink_to(binary_dir / f"data_batch_{k}.bin")
    order = np.random.default_rng(0).permutation(10_000)
    form(tmp_path, cifar.test_images[order], cifar.test_labels[order])
    found = fetch(str(tmp_path), Lines())
    assert_same(found, cifar)
    assert found.origin == str(tmp_path)


def test_plain_tar_renamed_and_deep(binary_dir: Path, cifar: Cifar10, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "download (1)"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        archive.add(binary_dir, "x/y/z")
    found = fetch(str(tmp_path), Lines())
    assert_same(found, cifar)
    assert found.origin == str(path)


@pytest.mark.slow
def test_60000_pictures_in_a_tar(cifar: Cifar10, tmp_path: Path) -> None:
    files = pictures(cifar.train_images, cifar.train_labels, "cifar10/train/{cls}/{k}.png")
    files |= pictures(cifar.test_images, cifar.test_labels, "cifar10/test/{cls}/{k}.png")
    add_to_tar(tmp_path / "cifar10", dict(sorted(files.items())), "w")
    lines = Lines()
    assert_same(fetch(str(tmp_path / "cifar10"), lines), cifar)
    assert lines[0].startswith(f"{tmp_path}/cifar10: 50,000 files read, ")


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("train/airplane/0001.png", 0), ("Train/Cars/1.jpg", 1), ("0/1.png", 0), ("test/09/x.png", 9),
        ("class_3/1.png", 3), ("cifar/3_cat/bird_dog_s_1.png", 3), ("train/25_frog.png", 6), ("1.png", None),
        ("cat_dog/1.png", None), ("train/10/1.png", None), ("frogs.zip/horse/cat.png", 7),
    ],
)  # fmt: skip
def test_label_of_a_path(path: str, label: int | None) -> None:
    assert label_of(PurePosixPath(path)) == label


# auto


@pytest.mark.parametrize("where", ["data/cifar-10-batches-bin", "data/cifar-10.tar", "home/.keras/datasets/cifar-10-x"])
def test_auto_finds_a_copy_before_it_downloads(
    where: str, binary_dir: Path, cifar: Cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            archive.add(binary_dir, binary_dir.name)
    else:
        path.symlink_to(binary_dir)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines = Lines()
    found = fetch("auto", lines, data_dir=tmp_path / "data")
    assert_same(found, cifar)
    assert found.origin == str(path)
    assert sum("MD5" in line for line in lines) == 6


def test_preparing_uses_the_copy_in_data_dir(binary_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").symlink_to(binary_dir)
    lines = Lines()
    install.ensure(tmp_path, "auto", lines)
    assert lines[-1].startswith(f"dataset {tmp_path}: prepared from {tmp_path}/cifar-10-batches-bin in ")


# What is refused


def few(cifar: Cifar10) -> tuple[Bytes, Bytes]:
    return cifar.test_images[:300], cifar.test_labels[:300]


def test_lossy_pictures(cifar: Cifar10, tmp_path: Path) -> None:
    for k, (image, label) in enumerate(zip(*few(cifar), strict=True)):
        path = tmp_path / CLASSES[label] / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path, quality=95)
    Image.fromarray(cifar.test_images[0]).resize((64, 64)).save(tmp_path / "cat" / "large.png")
    (tmp_path / "cat" / "cut.png").write_bytes(png(cifar.test_images[0])[:200])
    text = refused(tmp_path)
    assert "images that are not CIFAR-10's: 300 JPEG (is lossy)" in text
    assert "1 PNG of another size (is not 32 x 32 pixels)" in text
    assert "1 damaged PNG (cannot be read)" in text
    assert "found: none of CIFAR-10's 60,000 images." in text


def test_part_of_the_pictures(cifar: Cifar10, tmp_path: Path) -> None:
    add_to_zip(tmp_path / "a.zip", pictures(*few(cifar), "train/{cls}/{k}.png"))
    assert "found: 0 of 50,000 training images, 300 of 10,000 test images (PNG: 300)." in refused(tmp_path)


def test_wrong_labels(binary_dir: Path, tmp_path: Path) -> None:
    for path in binary_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = bytearray((binary_dir / "test_batch.bin").read_bytes())
    content[0], content[3073] = content[3073], content[0]
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "test_batch.bin").write_bytes(content)
    assert "the labels of images of test_batch.bin are not CIFAR-10's" in refused(tmp_path)


SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c" + bytes(100)
KAGGLE = {
    "as downloaded": {"train.7z": SEVEN_ZIP, "test.7z": SEVEN_ZIP, "trainLabels.csv": b"id,label\n1,frog\n"},
    "one file": {"test.7z": SEVEN_ZIP},
    "labels renamed": {"labels (1).csv": b"id,label\n1,frog\n"},
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", [*KAGGLE, "unpacked"])
def test_kaggle(kind: str, zipped: bool, cifar: Cifar10, tmp_path: Path) -> None:
    files = KAGGLE.get(kind) or {
        **pictures(*few(cifar), "train/{k}.png"), **pictures(*few(cifar), "test/{k}.png"),
        "trainLabels.csv": b"id,label\n1,frog\n",
    }  # fmt: skip
    if zipped:
        add_to_zip(tmp_path / "cifar-10.zip", files)
    for name, content in {} if zipped else files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = refused(tmp_path)
    assert "Kaggle's copy cannot be used: its 300,000 test images have no labels" in text
    assert ("no folder or file is named after a class: 600" in text) == (kind == "unpacked")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # the import fails
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    text = refused(tmp_path)
    assert f"parquet needs pyarrow to be read: uv pip install --python {sys.executable} pyarrow" in text


def write_encrypted(path: Path) -> None:
    add_to_zip(path, {"data_batch_1.bin": b"\x03" * 3073})
    content = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + at] |= 1
    path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], object]] = {
    "a.zip": write_encrypted,
    "b.zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(300)),
    "c.tar.xz": lambda path: path.write_bytes(lzma.compress(bytes(10_000_000))[:-20]),
    "d.tar.bz2": lambda path: path.write_bytes(b"BZh9" + bytes(300)),
    "e.npz": lambda path: path.write_bytes(b""),
    "f.parquet": lambda path: path.write_bytes(b"PAR1" + bytes(50) + b"PAR1"),
    "h.npy": lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True),
    "i.npy": lambda path: path.write_bytes(b"\x93NUMPY\x01\0\x10\0{'descr': '<u1', ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    BROKEN[name](tmp_path / name)
    assert name.removesuffix(".xz").removesuffix(".bz2") in refused(tmp_path)


def test_pickle_of_another_name_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    content = pickle.dumps({"data": Evil(), "x": bytes(31_050_000)}, protocol=2)
    add_to_zip(tmp_path / "a.zip", {"renamed": content})
    assert "renamed is not CIFAR-10's and was not unpickled: MD5" in refused(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bytes of a tar archive whose member would have 1 TB, then zeros; and an archive in an archive."""
    member = tarfile.TarInfo("data_batch_1.bin")
    member.size = 1 << 40
    (tmp_path / "a.tgz").write_bytes(gzip.compress(member.tobuf() + bytes(64 << 20), 1))
    monkeypatch.setattr(contents, "MAX_UNPACKED_BYTES", 16 << 20)
    assert "unpacked content: name the path of the copy itself" in refused(tmp_path)
    content = b"x"
    for _ in range(6):
        content = gzip.compress(content)
    (tmp_path / "a.tgz").write_bytes(content)
    assert "more than 4 archives in each other" in refused(tmp_path)


def test_walk_is_bounded(tmp_path: Path) -> None:
    """Loops of symbolic links end, a bound on the number of files holds, and what is no file is not opened."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    for k in range(20):
        (tmp_path / "a" / str(k)).write_text("x")
    (tmp_path / "a" / "known").write_text("x")
    seen, notes = list[str](), list[str]()

    def visit(item: Item) -> bool:
        seen.append(item.name.name)
        return False

    Walk(visit, notes.append, {"known"}).below(tmp_path)
    assert (len(seen), seen[0], notes) == (21, "known", [])
    seen.clear()
    Walk(visit, notes.append, max_files=10).below(tmp_path)
    assert len(seen) <= 10
    assert len(notes) == 1
    assert notes[0].endswith("files were looked at: name the path of the copy itself.")
    add_to_zip(tmp_path / "many.zip", {str(k): b"x" for k in range(20)})
    notes.clear()
    Walk(visit, notes.append, max_files=10).below(tmp_path / "many.zip")
    assert len(notes) == 1
    assert "after 10 files in archives" in notes[0]
