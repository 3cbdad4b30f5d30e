"""After training: load, predict and export, with the checkpoints of a real run and all 10,000 test images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import cifar_dist
from cifar_dist import predict
from cifar_dist.cli import read_yaml
from cifar_dist.data.prepare.collection import Cifar10
from cifar_dist.distributed import init_distributed
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.inference import formats
from cifar_dist.inference.export import Request, export
from cifar_dist.predict import PredictArguments
from cifar_dist.training import checkpoint, weights
from cifar_dist.training.score_checkpoint import Request as ScoreRequest
from cifar_dist.training.score_checkpoint import score_checkpoint
from tests.support import runs

pytestmark = [pytest.mark.run, pytest.mark.data]
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def evaluated(run: Path, step: int) -> int:
    """How many of the 10,000 test images `python -m cifar_dist.evaluate` finds right."""
    with init_distributed("cpu") as world:
        figures = score_checkpoint(ScoreRequest(run, step), world)
    return round(float(figures["accuracy"]) * 10_000)


@pytest.fixture(scope="module")
def last_score(short_run: Path) -> int:
    return evaluated(short_run, 60)


@torch.inference_mode()
def count(model: Callable[[torch.Tensor], torch.Tensor], cifar: Cifar10, batch_size: int) -> int:
    images, labels = torch.from_numpy(cifar.test_images).permute(0, 3, 1, 2), torch.from_numpy(cifar.test_labels)
    pairs = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    return sum(int((model(part).argmax(1) == right).sum()) for part, right in pairs)


@pytest.mark.parametrize(("step", "batch_size"), [(20, 333), pytest.param(40, 70, marks=pytest.mark.slow), (60, 1000)])
def test_loaded_checkpoints_score_what_evaluate_says(
    short_run: Path, cifar: Cifar10, last_score: int, step: int, batch_size: int
) -> None:
    model = cifar_dist.load(short_run, which=step, device="cpu")
    expected = last_score if step == 60 else evaluated(short_run, step)
    assert count(lambda images: model(model.preprocess(images)), cifar, batch_size) == expected > 1200
    assert not model.training
    assert model.config.run.dir == short_run
    assert model.classes[3] == "cat"
    summary = runs.summary(short_run)
    final = {"test/accuracy": summary["test_accuracy"], "test/n": 500, "test/loss": summary["test_loss"]}
    assert model.scores == (final if step == 60 else {})


def test_small_batches_and_views(short_run: Path, cifar: Cifar10) -> None:
    """Equal answers in any batch; the mean over views is what evaluation counts."""
    model = cifar_dist.load(short_run / "checkpoints/step-00000060.pt")
    pictures = [Image.fromarray(pixels) for pixels in cifar.test_images[:40]]
    whole = model.predict(pictures, top_k=10)
    single = [model.predict(picture, top_k=10)[0] for picture in pictures[:5]]
    for found, expected in ((single, whole[:5]), (model.predict(pictures, top_k=10, batch_size=7), whole)):
        assert [[answer.name for answer in row] for row in found] == [
            [answer.name for answer in row] for row in expected
        ]
        probabilities = [answer.probability for row in expected for answer in row]
        assert [answer.probability for row in found for answer in row] == pytest.approx(probabilities, abs=1e-5)
    assert [sum(found.probability for found in row) for row in whole] == pytest.approx([1.0] * 40)
    assert all(row == sorted(row, key=lambda found: -found.probability) for row in whole)
    images = model.preprocess(pictures)
    flipped = (model(images) + model(images.flip(3))) / 2
    for row, logits in zip(model.predict(pictures, top_k=1, tta="flip"), flipped, strict=True):
        assert row[0] == (model.classes[int(logits.argmax())], float(logits.double().softmax(0).max()))
    with pytest.raises(UserError, match="tta is 'seven', top_k 11"):
        model.predict(pictures, top_k=11, tta="seven")


def test_checkpoints_without_statistics_are_refused(short_run: Path, tmp_path: Path) -> None:
    state = checkpoint.decode((short_run / "checkpoints/step-00000020.pt").read_bytes(), "")
    path = checkpoint.write(tmp_path, 20, checkpoint.encode(20, state | {"statistics": False}))
    command = f"python -m cifar_dist.evaluate {path} --write_statistics True"
    with pytest.raises(CheckpointError, match=re.escape(command)):
        cifar_dist.load(path)
    with pytest.raises(UserError, match="device is 'tpu'"):
        cifar_dist.load(short_run, device="tpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("pictures")
    rgb = Image.fromarray(NOISE)
    good = {
        "a.png": rgb, "odd.jpg": rgb.resize((301, 77)), "grey.png": rgb.convert("L"),
        "palette.gif": rgb.convert("P", palette=Image.Palette.ADAPTIVE), "rgba.webp": rgb.convert("RGBA"),
        "la.png": rgb.convert("LA"), "deep.png": Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257),
        "cmyk.jpg": rgb.convert("CMYK"), "sub/日本 e\u0301 🐈 \n.bmp": rgb, "thin.tif": rgb.resize((1, 999)),
    }  # fmt: skip
    (folder / "sub").mkdir()
    for name, image in good.items():
        image.save(folder / name)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_predict_a_folder(short_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*runs.command(1, "predict"), str(short_run), str(pictures), "--format", "jsonl", "--batch_size", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    assert re.fullmatch(r"note: skipped 1 without \.png, .*notes\.txt", lines[0])
    bad = [re.escape(f"{pictures}/{name}") for name in ("cut.png", "empty.jpg", "text.png")]
    reasons = (".*truncated.*", "is empty", "is no PNG, JPEG, WebP, GIF, BMP or TIFF picture")
    for line, name, reason in zip(lines[1:4], bad, reasons, strict=True):
        assert re.fullmatch(f"{name}: {reason}", line), line
    assert lines[4] == "3 of 14 files could not be read"
    found = [json.loads(line) for line in result.stdout.splitlines()]
    files = [line["file"] for line in found]
    assert files == [*sorted(files[:-1]), f"{pictures}/sub/日本 e\u0301 🐈 \n.bmp"]
    assert len(files) == 11
    model = cifar_dist.load(short_run)
    for line, row in zip(found, model.predict(files), strict=True):  # in one batch instead of four
        assert line["predictions"] == [{"class": name, "probability": value} for name, value in row]

    arguments = PredictArguments(short_run, (str(pictures / "a.png"), files[-1]), top_k=2)
    assert predict._predict(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2
    assert table[1].startswith(f"{pictures}/sub/日本 e\u0301 🐈 \\n.bmp   ")
    cells = [f"{name:<10} {value:7.2%}" for name, value in model.predict(pictures / "a.png")[0][:2]]
    width = len(f"{pictures}/sub/") + 2 * 2 + 1 + 1 + 1 + 2 + 1 + 2 + 4  # columns of a terminal
    assert table[0] == f"{pictures / 'a.png'!s:<{min(60, width)}}   {'   '.join(cells)}"


def test_predict_says_what_is_missing(
    short_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict._predict(PredictArguments(short_run, (str(pictures / "text.png"), "nowhere.png"))) == 2
    capsys.readouterr()
    names = ("gone$NOPE.png", "~nobody_here/a.png", "x" * 300, str(pictures / "a.png"))
    assert predict._predict(PredictArguments(short_run, names)) == 1
    reasons = ["No such file or directory", "No such file or directory", "File name too long"]
    expected = [f"{name}: {reason}" for name, reason in zip(names, reasons, strict=False)]
    assert capsys.readouterr().err.splitlines() == [*expected, "3 of 4 files could not be read"]
    for images, message in (((), "no picture is given"), ((str(tmp_path),), "there is no picture in")):
        with pytest.raises(UserError, match=message):
            predict._predict(PredictArguments(short_run, images))
    with pytest.raises(UserError, match="holds no checkpoint"):
        predict._predict(PredictArguments(tmp_path, (str(pictures),)))
    assert "valid: 1 to 10" in runs.run(1, short_run, "a.png", "--top_k", "0", module="predict", expected=2)


@pytest.fixture(scope="module")
def exported(short_run: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """What `python -m cifar_dist.export` writes of short_run, in all formats."""

    def fill(folder: Path) -> None:
        output = runs.run(1, short_run, "--out", folder / "files", module="export")
        assert output.count("top-1 equal on 1,000 of 1,000 test images") == 3

    return made_once("exported", fill) / "files"


ALONE = """
import importlib.util, json, re, sys
import numpy as np, torch
assert importlib.util.find_spec("cifar_dist"), "it could be imported"
torch.set_num_threads(1)
import model as module, onnxruntime
data = np.load(sys.argv[1])
images, labels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(data["labels"])
config = json.load(open("config.json"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # as it has one processor
session = onnxruntime.InferenceSession("model.onnx", options)
models = {
    "safetensors": module.load("model.safetensors"),
    "onnx": lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
    "torch_export": torch.export.load("model.pt2").module(),
}
scores = {}
for name, model in models.items():
    with torch.inference_mode():
        parts = zip(images.split(625), labels.split(625))
        scores[name] = sum(int((model(module.normalize(x, config)).argmax(1) == y).sum()) for x, y in parts)
for block in re.findall(r"```python\\n(.*?)```", open("README.md").read(), flags=re.S):
    exec(block, {})
print(json.dumps([scores, [name for name in sys.modules if name.split(".")[0] == "cifar_dist"]]))
"""


def test_exported_files_score_what_evaluate_says_without_cifar_dist(
    exported: Path, cifar: Cifar10, last_score: int, tmp_path: Path
) -> None:
    np.savez(tmp_path / "test.npz", images=cifar.test_images, labels=cifar.test_labels)
    command = [*runs.ON_ONE_CPU, sys.executable, "-c", ALONE, str(tmp_path / "test.npz")]
    result = subprocess.run(
        command, cwd=exported, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"PYTHONPATH": str(runs.REPOSITORY)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *examples, last = result.stdout.splitlines()
    scores, imported = json.loads(last)
    assert scores.keys() == {"safetensors", "onnx", "torch_export"}
    # Equal where it was tried. Elsewhere one of 10,000 answers may hang on the last bit.
    assert all(abs(score - last_score) <= 1 for score in scores.values()), (scores, last_score)
    assert imported == []
    assert len(examples) == 3
    assert len(set(examples)) == 1


def test_model_card(exported: Path, short_run: Path, last_score: int) -> None:
    card = ModelCard.load(exported / "README.md")
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_split) == ("image-classification", "cifar10", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", last_score / 10_000)
    assert result.metric_name == "accuracy (n = 10,000, one view, fp32)"
    summary = runs.summary(short_run)
    for text in (
        summary["model_sha256"], f"| the run | fp32 | {summary['test_accuracy']:.2%} | 500 test images |",
        "python -m cifar_dist.evaluate RUN --which 60", "width: 0.0625", f"torch {torch.__version__.split('+')[0]}",
    ):  # fmt: skip
        assert text in card.text, text
    assert str(short_run) not in card.text
    settings = json.loads((exported / "config.json").read_text())
    assert settings["classes"][3] == "cat"
    # With which `model.weights` accepts the file.
    start = weights.decode((exported / "model.safetensors").read_bytes(), exported / "model.safetensors")
    assert start.settings == settings["model"] == weights.decisive(read_yaml(short_run / "config.yaml").model)


def test_a_file_that_computes_something_else_is_not_written(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = formats._write_safetensors

    def corrupt(folder: Path, model: nn.Module, settings: dict[str, Any]) -> None:
        write(folder, model, settings)
        weights = load_file(folder / "model.safetensors")
        name = max(weights, key=lambda key: weights[key].numel())
        save_file({**weights, name: weights[name] * 1.01}, folder / "model.safetensors")

    request = Request(short_run, ["safetensors"], out=tmp_path, data_dir=tmp_path)
    lines = list[str]()
    monkeypatch.setitem(formats._WRITERS, "safetensors", corrupt)
    (failure,) = export(request, lines.append)
    assert re.match(r"safetensors is not written: logits differ .* random images; valid: below 1e-04", failure)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "other.txt").touch()
    assert export(request, lines.append) == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "model.py",
        "model.safetensors",
        "other.txt",
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None, "nothing was scored"


def test_the_examples_of_the_pages(exported: Path, short_run: Path, pictures: Path) -> None:
    """README's and docs/models.md's Python runs as it stands, but for the names of the run and the picture."""
    blocks = [runs.REPOSITORY / "README.md", runs.REPOSITORY / "docs/models.md"]
    found = [block for page in blocks for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]
    card = (exported / "README.md").read_text()
    alone = [block for block in found if "import cifar_dist" not in block]
    assert len(alone) == 3
    assert all(block in card for block in alone), "as in the card, whose examples another test runs"
    for block in set(found) - set(alone):
        code = block.replace("runs/mine", str(short_run)).replace("cat.jpg", str(pictures / "a.png"))
        exec(code, {})
