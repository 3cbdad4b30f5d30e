"""Writes a trained network as files that need no cifar_dist, and checks them: `python -m cifar_dist.export`."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist.data import augment, cifar10
from cifar_dist.data.prepare.beton import read_arrays
from cifar_dist.errors import UserError, explain_os_error, one_line
from cifar_dist.files import read_json, sha256_of_file, write_bytes_atomic
from cifar_dist.inference import formats
from cifar_dist.inference.card import Measured, model_card
from cifar_dist.inference.classifier import Classifier, load
from cifar_dist.inference.variants import FromUint8, prepare
from cifar_dist.models import architectures
from cifar_dist.models.network import InceptionNetwork

TABLES = {
    "inception_v1": architectures.V1,
    "inception_v2": architectures.V2,
    "inception_v2_slim": architectures.V2_SLIM,
}
WRITTEN_BY = "cifar_dist.export"
NUM_CHECKED, MAX_DIFFERENCE = 1_000, 1e-4
CARD = "README.md"


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
    """Write the files, check them, and put them into the folder, the model card last. Returns what failed.

    Raises:
        UserError: the checkpoint, an option or the folder cannot be used, or a package is missing.
    """
    formats.require_packages(request.formats)
    model = load(request.run, request.which, "cpu")
    out = request.out or model.origin.directory / "export"
    network = copy.deepcopy(model.network).float().to(memory_format=torch.contiguous_format)
    settings = _settings(model, network, request.options)
    earlier = _earlier(out, settings)
    with explain_os_error(f"the folder {out} cannot be written", "Choose another --out."):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    try:
        plain = partial(prepare, network, request.options.fold_batch_norm, request.options.merge_1x1)
        exported = FromUint8(plain(), augment.MEAN, augment.STD) if request.options.uint8_input else plain()
    except ValueError as error:
        raise UserError(one_line(error)) from None
    samples = _samples(request.data_dir or model.config.data.dir)
    accuracy = _accuracy(exported, samples, request.options.uint8_input, log)
    checks, failures = dict[str, str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="cifar_dist-export-") as name:
        for format_ in request.formats:
            folder = Path(name, format_)
            folder.mkdir()
            try:
                formats.write(format_, folder, exported, settings)
                checks[format_] = check(format_, folder, network, samples, plain)
                log(f"{format_}: {checks[format_]}")
            except CheckError as error:
                failures.append(f"{format_} is not written: {error}")
        with explain_os_error(f"the folder {out} cannot be written", "Choose another --out."):
            for format_ in checks:
                for file in sorted(Path(name, format_).iterdir()):
                    write_bytes_atomic(out / file.name, file.read_bytes())
            for path in earlier if checks else ():
                _remove_unless_new(path, checks, log)
            if checks:
                measured = Measured(accuracy, samples.told, checks)
                write_bytes_atomic(out / CARD, model_card(model, settings, measured, out).encode())
                log(f"written to {out}: {', '.join(sorted(path.name for path in _ours(out)))}")
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
    given = images if read_json(folder / "config.json")["uint8_input"] else normalized.contiguous()
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
        "model_sha256": model.origin.model_sha256(),
        "step": model.origin.step,
        "classes": model.classes,
        "mean": augment.MEAN,
        "std": augment.STD,
        **asdict(options),
        **settings,
    }


def _samples(data_dir: Path) -> Samples:
    """The test images, if they are in `data_dir`; else random ones."""
    path = data_dir / cifar10.TEST
    if path.is_file() and sha256_of_file(path) == cifar10.BETON_FILES[cifar10.TEST].sha256:
        images, labels = read_arrays(path)
        return Samples(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), "test images")
    random = torch.randint(0, 256, (NUM_CHECKED, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Samples(random.to(torch.uint8), None, f"random images, as {path} is missing or not CIFAR-10")


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


def _ours(out: Path) -> list[Path]:
    """The files in `out` with names of an export."""
    names = {CARD, *(name for files in formats.FILES.values() for name in files)}
    return [path for path in (out / name for name in sorted(names)) if path.exists()]


def _earlier(out: Path, settings: dict[str, Any]) -> list[Path]:
    """The files in `out` of an earlier export of another model, or with other options.

    Raises:
        UserError: there are files of such names that no export wrote.
    """
    found, before = _ours(out), read_json(out / "config.json")
    if found and before.get("written_by") != WRITTEN_BY:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{out} holds {names}, which no export wrote. Choose another --out.")
    keys = ("model_sha256", "step", *asdict(Options()))
    return [] if all(before.get(key) == settings[key] for key in keys) else found


def _remove_unless_new(path: Path, checks: dict[str, str], log: Callable[[str], None]) -> None:
    if path.name != CARD and not any(path.name in formats.FILES[format_] for format_ in checks):
        path.unlink()
        log(f"removed {path}, of an earlier export of another model or with other options")
