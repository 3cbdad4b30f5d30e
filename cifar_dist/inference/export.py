"""Writes a trained network as files that need no cifar_dist, and checks them: `python -m cifar_dist.export`."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist import extension
from cifar_dist.data import augment, cifar10
from cifar_dist.data.prepare.beton import read_arrays
from cifar_dist.errors import UserError, explain_os_error, one_line
from cifar_dist.files import read_json, sha256_of_file, to_json, write_bytes_atomic
from cifar_dist.inference import formats
from cifar_dist.inference.card import Measured, model_card
from cifar_dist.inference.classifier import Classifier, load
from cifar_dist.inference.variants import FromUint8, prepare
from cifar_dist.models import architectures
from cifar_dist.models.network import InceptionNetwork
from cifar_dist.training import weights
from cifar_dist.training.summary import sha256_of_tensors

TABLES = {
    "inception_v1": architectures.V1,
    "inception_v2": architectures.V2,
    "inception_v2_slim": architectures.V2_SLIM,
}
WRITTEN_BY = "cifar_dist.export"
NUM_CHECKED, MAX_DIFFERENCE = 1_000, 1e-4
CARD, CONFIG = "README.md", "config.json"


@dataclass(frozen=True)
class Options:
    """What the exported network computes; see the options of the command."""

    fold_batch_norm: bool = False
    merge_1x1: bool = False
    uint8_input: bool = False


@dataclass(frozen=True)
class Request:
    """What to export; the fields are the options of `python -m cifar_dist.export`."""

    run: Path
    formats: Sequence[str]
    which: Literal["last", "best"] | int = "last"
    out: Path | None = None
    data_dir: Path | None = None
    options: Options = Options()


class Samples(NamedTuple):
    """Images uint8 (N, 3, 32, 32) to check with; `labels` (N,) if they are all test images, in `told` what they are."""

    images: Tensor
    labels: Tensor | None
    told: str


def export(request: Request, log: Callable[[str], None]) -> list[str]:
    """Write the files, check them, and put them into the folder. Returns what failed.

    Raises:
        UserError: the checkpoint, an option or the folder cannot be used, or a package is missing.
    """
    formats.require_packages(request.formats)
    model = load(request.run, request.which, "cpu")
    out = request.out or model.origin.directory / "export"
    network = model.network.float().to(memory_format=torch.contiguous_format)
    settings = _settings(model, network, request.options)
    with explain_os_error(f"the folder {out} cannot be written", "Choose another --out."):
        earlier = _earlier(out)
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    samples = _samples(request.data_dir, model.config.data.dir, log)
    plain = partial(prepare, network, request.options.fold_batch_norm, request.options.merge_1x1)
    with extension.explained("the network to export"):
        try:
            exported = FromUint8(plain(), augment.MEAN, augment.STD) if request.options.uint8_input else plain()
        except ValueError as error:
            raise UserError(one_line(error)) from None
        accuracy = _accuracy(exported, samples, request.options.uint8_input, log)
    checks, failures, new = dict[str, str](), list[str](), dict[str, Path]()
    temporary = explain_os_error("temporary files cannot be written", "Set TMPDIR to another folder.")
    with temporary, tempfile.TemporaryDirectory(prefix="cifar_dist-export-") as name:
        for format_ in request.formats:
            folder = Path(name, format_)
            try:
                folder.mkdir()
                formats.write(format_, folder, exported, settings)
                checks[format_] = check(format_, folder, network, samples, plain)
                new |= {file.name: file for file in sorted(folder.iterdir()) if file.name in formats.FILES[format_]}
            except CheckError as error:
                failures.append(f"{format_} is not written: {error}")
            except Exception as error:  # noqa: BLE001 - the exporters raise errors of many types
                failures.append(f"{format_} is not written: {type(error).__name__}: {one_line(error)}")
            else:
                log(f"{format_}: {checks[format_]}")
        if checks:
            del new[CONFIG]  # `_put` writes one for all formats
            same = _is_of(out, settings)
            kept = {path.name: path for path in earlier if same and path.name not in (*new, CARD)}
            card, measured = Path(name, CARD), Measured(accuracy, samples.told, checks)
            card.write_text(model_card(model, settings, measured, new | kept), encoding="utf-8")
            with explain_os_error(f"the folder {out} cannot be written", "Choose another --out."):
                _put(out, earlier, {**new, **kept, CARD: card}, settings, log)
    return failures


class CheckError(Exception):
    """Written files do not compute what the network computes."""


def check(format_: str, folder: Path, network: nn.Module, samples: Samples, plain: Callable[[], nn.Module]) -> str:
    """Compare the logits of the written files of one format with those of `network`, in fp32. Returns the result.

    Raises:
        CheckError: they differ, or the files cannot be read back.
    """
    images = samples.images[:NUM_CHECKED]
    normalized = augment.normalize(images, torch.float32)
    given = images if read_json(folder / CONFIG)["uint8_input"] else normalized.contiguous()
    with torch.inference_mode():
        expected = torch.cat([network(batch) for batch in torch.split(normalized, 200)])
    try:
        found = formats.outputs(format_, folder, given, plain)
    except Exception as error:
        raise CheckError(f"it cannot be read back: {type(error).__name__}: {one_line(error)}") from error
    difference = float((found - expected).abs().max())
    equal = int((found.argmax(1) == expected.argmax(1)).sum())
    text = (
        f"logits differ from the network's by at most {difference:.1e}, "
        f"top-1 equal on {equal:,} of {len(images):,} {samples.told}"
    )
    if not difference < MAX_DIFFERENCE or equal < len(images):  # NaN is not below
        raise CheckError(f"{text}; valid: below {MAX_DIFFERENCE:.0e}, equal on all")
    return text


def _settings(model: Classifier, network: nn.Module, options: Options) -> dict[str, Any]:
    """The content of config.json. It has "rows" if the network is one of this package."""
    config, settings = model.config.model, dict[str, Any]()
    if isinstance(network, InceptionNetwork) and config.name in TABLES:
        branch5x5 = config.branch5x5 if config.name == "inception_v1" else "double3x3"
        settings = {
            "rows": TABLES[config.name],
            "branch5x5": branch5x5,
            "stem": config.stem,
            "width": config.width,
            "variant": asdict(network.variant),
        }
    return {
        "written_by": WRITTEN_BY,
        "model_type": config.name,
        "model": weights.decisive(config),
        "model_sha256": model.origin.model_sha256,
        # Of a moving average another than the trained parameters'.
        "network_sha256": sha256_of_tensors((*network.parameters(), *network.buffers())),
        "step": model.origin.step,
        "classes": model.classes,
        "mean": augment.MEAN,
        "std": augment.STD,
        **asdict(options),
        **settings,
    }


def _samples(given: Path | None, of_run: Path, log: Callable[[str], None]) -> Samples:
    """The test images, if they are in the folder `given`, or else `of_run`; else random ones.

    Raises:
        UserError: those in `given` cannot be read.
    """
    path, why = (given or of_run) / cifar10.TEST, "is missing or not CIFAR-10"
    try:
        if path.is_file() and sha256_of_file(path) == cifar10.BETON_FILES[cifar10.TEST].sha256:
            images, labels = read_arrays(path)
            return Samples(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), "test images")
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        if given is not None:
            raise UserError(f"{path} {why}. Choose another --data_dir.") from None
    log(f"checking with random images, as {path} {why}")
    random = torch.randint(0, 256, (NUM_CHECKED, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Samples(random.to(torch.uint8), None, "random images")


@torch.inference_mode()
def _accuracy(model: nn.Module, samples: Samples, uint8_input: bool, log: Callable[[str], None]) -> float | None:
    """Fraction of right answers over all test images; None without them."""
    if samples.labels is None:
        return None
    log(f"scoring {len(samples.labels):,} test images in fp32")
    correct = 0
    for images, labels in zip(torch.split(samples.images, 500), torch.split(samples.labels, 500), strict=True):
        given = images if uint8_input else augment.normalize(images, torch.float32)
        correct += int((model(given).argmax(1) == labels).sum())
    return correct / len(samples.labels)


def _earlier(out: Path) -> list[Path]:
    """The files in `out` that an earlier export wrote, but for config.json.

    Raises:
        UserError: there are files of such names that config.json does not list with their SHA-256.
    """
    before, found = read_json(out / CONFIG), list[Path]()
    ours = before.get("written_by") == WRITTEN_BY
    listed, others = before.get("files", {}) if ours else {}, list[str]()
    for name in sorted({CARD, *(name for files in formats.FILES.values() for name in files)}):
        path = out / name
        if name in listed and path.is_file() and sha256_of_file(path) == listed[name]:
            found.append(path)
        elif (path.exists() or path.is_symlink()) and not (name == CONFIG and ours):
            others.append(name)
    if others:
        raise UserError(
            f"{out} holds {', '.join(others)}, which no export wrote, or which changed since. Choose another --out."
        )
    return found


def _is_of(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the earlier files in `out` are of the same model, with the same options."""
    before = read_json(out / CONFIG)
    before.pop("files", None)
    same: bool = before == json.loads(to_json(settings))
    return same


def _put(
    out: Path, earlier: list[Path], files: dict[str, Path], settings: dict[str, Any], log: Callable[[str], None]
) -> None:
    """Replace the `earlier` files in `out` by `files`, some of which may be there already.

    Whenever it is interrupted, the files in `out` are of one model, and config.json lists them.
    """
    for path in earlier:
        if files.get(path.name) != path:
            path.unlink()
        if path.name not in files:
            log(f"removed {path}, of an earlier export of another model or with other options")
    listed = {name: sha256_of_file(path) for name, path in files.items()}
    write_bytes_atomic(out / CONFIG, to_json({**settings, "files": listed}).encode())
    for name, path in files.items():
        if path.parent != out:
            write_bytes_atomic(out / name, path.read_bytes())
    log(f"written to {out}: {', '.join(sorted([CONFIG, *files]))}")
