"""The model card of an export: README.md in the format of the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.cli import settings_of
from cifar_dist.config import NETWORKS, NUM_TEST, Config, to_plain
from cifar_dist.files import sha256_of_file
from cifar_dist.inference.classifier import Classifier
from cifar_dist.training.summary import versions

# Where files lie and how a run is watched: no part of the model.
_LOCAL = (
    "run.dir", "run.name", "run.resume", "data.dir", "data.source", "data.stage_dir", "model.weights", "track.",
    "debug.",
)  # fmt: skip
_FILES = {
    "model.safetensors": "weights in fp32; needs torch and safetensors",
    "model.py": "the network for model.safetensors",
    "model.onnx": "ONNX, any batch size; needs onnxruntime",
    "model.pt2": "torch.export, any batch size; needs torch",
}


@dataclass(frozen=True)
class Measured:
    """What was measured at the export.

    accuracy: fraction of all test images, in fp32; None without them. told: what was checked with.
    checks: the result of the check of each format that was written.
    """

    accuracy: float | None
    told: str
    checks: dict[str, str]


def model_card(model: Classifier, settings: dict[str, Any], measured: Measured, files: dict[str, Path]) -> str:
    """The text of README.md. `files`: by name, where each of them lies now."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(model, measured), sort_keys=False)}---",
        f"# {settings['model_type']} for CIFAR-10",
        f"{_introduction(model)}\n\n## Scores\n\n{_scores(model, measured)}",
        f"## Files\n\n{_files(files, measured)}",
        f"## Use\n\n{_use(files, settings)}",
        f"## Input\n\n{_input(settings)}",
        f"## Training\n\n{_training(model, settings)}",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(model: Classifier, measured: Measured) -> dict[str, Any]:
    family = ("googlenet", "inception") if model.config.model.name in NETWORKS else ()
    metadata: dict[str, Any] = {
        "tags": ["cifar10", *family, "pytorch"],
        "datasets": ["cifar10"],
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
    }
    if measured.accuracy is None:
        return metadata
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"name": "CIFAR-10", "type": "cifar10", "split": "test"},
        "metrics": [
            {"type": "accuracy", "value": measured.accuracy, "name": f"accuracy (n = {NUM_TEST:,}, one view, fp32)"}
        ],
    }
    name = f"{model.config.model.name}-cifar10"
    return metadata | {"model-index": [{"name": name, "results": [result]}]}


def _introduction(model: Classifier) -> str:
    title, step = model.config.model.title, model.origin.step
    return f"Trained with cifar_dist; {title}, step {step}. Classes: {', '.join(model.classes)}."


def _scores(model: Classifier, measured: Measured) -> str:
    rows, precision = list[tuple[str, str, str, str]](), model.origin.state["precision"]
    if measured.accuracy is not None:
        rows.append(("these files", "fp32", f"{measured.accuracy:.2%}", f"{NUM_TEST:,} test images"))
    for split, told in (("test", "test"), ("val", "validation")):
        for key, views in (("accuracy", ""), ("accuracy_tta", f", {model.config.eval.tta} views")):
            value = model.scores.get(f"{split}/{key}")
            if value is not None:
                n = int(model.scores[f"{split}/n"])
                rows.append((f"the run{views}", precision, f"{value:.2%}", f"{n:,} {told} images"))
    if not rows:
        return "Not measured: the test images were not there, and the run did not score this step."
    lines = [f"| {' | '.join(row)} |" for row in (("what", "precision", "accuracy", "n"), ("---",) * 4, *rows)]
    return "\n".join(lines)


def _files(files: dict[str, Path], measured: Measured) -> str:
    lines = ["| file | what it is | bytes | SHA-256 |", "| --- | --- | --- | --- |"]
    for name, told in _FILES.items():
        if name in files:
            lines.append(f"| {name} | {told} | {files[name].stat().st_size:,} | {sha256_of_file(files[name])} |")
    lines.append("| config.json | architecture, classes, mean and standard deviation of the pixels, SHA-256 | | |")
    checks = [f"- {format_}: {text}." for format_, text in measured.checks.items()]
    return "\n".join([*lines, "", "Checked at the export, all in fp32 on a CPU:", "", *checks])


def _use(files: dict[str, Path], settings: dict[str, Any]) -> str:
    """An example for each file, which runs in the folder of the files."""
    raw = settings["uint8_input"]
    numpy_constants = 'mean, std = (np.float32(config[key]).reshape(3, 1, 1) for key in ("mean", "std"))\n'
    torch_constants = 'mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))\n'
    examples = {
        "model.py": (
            "import torch\nfrom model import load, normalize\n",
            "",
            'model = load("model.safetensors")\n'
            "images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)  # your pictures\n"
            f"logits = model({'images' if raw else 'normalize(images, config)'})\n",
        ),
        "model.onnx": (
            "import numpy as np\nimport onnxruntime\n",
            "" if raw else numpy_constants,
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            "images = np.zeros((1, 3, 32, 32), np.uint8)  # your pictures\n"
            f'(logits,) = session.run(["logits"], {{"images": {"images" if raw else "(images - mean) / std"}}})\n',
        ),
        "model.pt2": (
            "import torch\n",
            "" if raw else torch_constants,
            'model = torch.export.load("model.pt2").module()\n'
            "images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)  # your pictures\n"
            f"logits = model({'images' if raw else '(images - mean) / std'})\n",
        ),
    }
    blocks = [
        f'```python\nimport json\n{imports}\nconfig = json.load(open("config.json"))\n{constants}{code}'
        'print([config["classes"][k] for k in logits.argmax(1).tolist()])\n```'
        for name, (imports, constants, code) in examples.items()
        if name in files
    ]
    if "model.safetensors" in files and "rows" not in settings:
        blocks.append(
            "model.safetensors has no model.py, as the network is not one of cifar_dist's. It is the state dict of "
            "that network, after `cifar_dist.inference.variants.prepare`."
        )
    return "\n\n".join(blocks)


def _input(settings: dict[str, Any]) -> str:
    kind = (
        "float32 (N, 3, 32, 32), RGB: (pixel - mean) / std, for pixels from 0 to 255, with the numbers of config.json."
    )
    if settings["uint8_input"]:
        kind = "uint8 (N, 3, 32, 32), RGB, 0 to 255; normalised inside."
    done = [name for name in ("fold_batch_norm", "merge_1x1") if settings[name]]
    return (
        f"{kind} Output: logits (N, 10); softmax gives probabilities.\n\n"
        "Pictures of other sizes: resize the shorter side to 32 pixels (bicubic, antialiased) and crop the centre."
        + (f"\n\nVariant: {', '.join(done)}." if done else "")
    )


def _training(model: Classifier, settings: dict[str, Any]) -> str:
    origin, summary = model.origin, model.origin.summary
    unseen, weights = "No test image was used in training.", ""
    lines = [f"- model_sha256: {settings['model_sha256']} (the trained parameters, as in the run's summary.json)"]
    if summary:
        lines.append(f"- commit of cifar_dist: {summary['git_commit']}; trained with {_told(summary['versions'])}")
        lines.append(
            f"- {', '.join(summary['device_names'])}; {summary['world_size']} processes, {summary['precision']}"
        )
    if model.config.model.weights is not None:
        unseen = (
            "The run used no test image in training; what the weights it started from were trained on is not known."
        )
        weights, digest = " --model.weights FILE", origin.state["weights_sha256"] or "unknown"
        lines.append(f"- started from the weights in a FILE with the SHA-256 {digest}")
    lines.append(f"- exported with {_told(versions())}")
    score = f"python -m cifar_dist.evaluate RUN --which {origin.step}"
    return "\n".join(
        [
            f"Dataset: CIFAR-10 (Krizhevsky 2009). {unseen}",
            "",
            *lines,
            "",
            f"To train the same model, which this is at step {origin.step}, save these settings, which differ from the "
            "defaults of the version above, as train.yaml:",
            "",
            f"```yaml\n{_changed(model.config)}```",
            "",
            f"    python -m cifar_dist.train --config train.yaml --run.name mine{weights}",
            "",
            "To measure the scores of the run directory RUN again, in the run's precision and in that of these files:",
            "",
            f"    {score}\n    {score} --precision fp32 --device cpu",
        ]
    )


def _told(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)


def _changed(config: Config) -> str:
    """The settings that differ from the defaults, without paths, as YAML."""
    defaults, values = settings_of(Config()), settings_of(config)
    plain = to_plain(config)
    changed: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, key = name.split(".")
        if value != defaults[name] and not name.startswith(_LOCAL):
            changed.setdefault(section, {})[key] = plain[section][key]
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


_LIMITS = """## Limits

Trained on 32 x 32 pictures of ten classes: any other picture gets one of these classes, too. Probabilities are not
calibrated. This card names no license: choose one before you publish the files."""
