"""What W&B gets at the end of a run: the summary, pictures, the confusion matrix, the checkpoint if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.data.cifar10 import CLASSES
from cifar_dist.tracking.metrics_file import number, read_records

if TYPE_CHECKING:
    import wandb
    from PIL.Image import Image

PICTURES = ("curves", "mistakes", "filters")
_MIN_WIDTH = 768  # in pixels, of a picture whose pixels one wants to see


def summary_values(results: Mapping[str, Any]) -> dict[str, float | int | str]:
    """The figures of summary.json, and the data receipt of the last epoch.

    Without the command line, which may contain what other readers of the W&B project should not see.
    """
    values = {key: v for key, v in results.items() if isinstance(v, (int, float, str)) and key != "command"}
    return values | {"data_receipt": results["data_receipt"][-1]}


def pictures(directory: Path) -> dict[str, Image]:
    """The pictures of a run directory that are there and whole, enlarged so that their pixels can be seen."""
    import PIL.Image

    found = {}
    for name in PICTURES:
        with suppress(OSError, SyntaxError), PIL.Image.open(directory / f"{name}.png") as image:
            factor = max(1, _MIN_WIDTH // image.width)
            size = (factor * image.width, factor * image.height)
            found[name] = image.convert("RGB").resize(size, PIL.Image.Resampling.NEAREST)
    return found


def media(results: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The confusion matrix of the final test as a chart of W&B, and `pictures`."""
    import wandb

    table = wandb.Table(
        columns=["Actual", "Predicted", "nPredictions"],
        data=[
            [actual, predicted, count]
            for actual, row in zip(CLASSES, results["test_confusion"], strict=True)
            for predicted, count in zip(CLASSES, row, strict=True)
        ],
    )
    chart = wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=table,
        fields={str(name): name for name in table.columns},
        string_fields={"title": "Confusion matrix of the final test"},
    )
    return {
        "confusion_matrix": chart,
        **{name: wandb.Image(image) for name, image in pictures(directory).items()},
    }


def log_checkpoint(run: wandb.Run, directory: Path) -> None:
    """Log the best checkpoint, or without validation the last, as an artifact; offline, its path."""
    import wandb

    files = sorted(directory.glob("checkpoints/step-*.pt"))
    scores = [(number(r.get("val/accuracy")), r["step"]) for r in read_records(directory / "metrics.jsonl")]
    best = max((score for score in scores if score[0] is not None), key=lambda score: score[0] or 0, default=None)
    path, alias = files[-1], "last"
    named = directory / "checkpoints" / f"step-{best[1] if best else 0:08d}.pt"
    if named.exists():  # not if the run started from a checkpoint of another one, whose best still counts
        path, alias = named, "best"
    artifact = wandb.Artifact(f"model-{run.id}", "model", metadata={"step": int(path.stem.removeprefix("step-"))})
    artifact.add_file(str(path), policy="immutable", skip_cache=True)  # no copy
    run.log_artifact(artifact, aliases=[alias])
