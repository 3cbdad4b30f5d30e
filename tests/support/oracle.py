"""Numbers that a change of structure must not change.

    python -m tests.support.oracle > FILE

Run it in the checkout before the change and in the one after, on one machine, and compare the files.

Three runs (1, 2 and 3 processes), a resume on 3 and an evaluation on 2, in fp32: takes two minutes. Prints digests of
weights and samples and every line of metrics, without times and rates. The digests depend on the processor and on the
version of torch, so both checkouts have to run on one machine. The data is read as in the tests.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.support import runs

DATA = Path(os.environ.get("CIFAR_DIST_TEST_DATA", runs.REPOSITORY / "data"))
COMMON = (
    *runs.SMALL, "--data.dir", str(DATA), "--train.precision", "fp32", "--data.subset", "960",
    "--train.max_steps", "24", "--train.log_every_steps", "3", "--train.checkpoint_every_steps", "12",
    "--eval.every_epochs", "1", "--eval.bn_samples", "200",
)  # fmt: skip
HEADS = ("--model.auxiliary", "True", "--model.dropout", "0.2", "--optim.ema_decay", "0.9")
MUON = ("--model.stem", "whiten", "--optim.name", "muon", "--optim.norm_scales", "fixed")
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, (*HEADS, *MUON, "--data.train_on", "train", "--eval.tta", "six")),
    "two": (2, ("--model.name", "inception_v2", "--data.train_on", "train", "--optim.name", "sgd",
                "--optim.grad_clip", "1", "--optim.schedule", "cosine",
                "--augment.low_resolution_share", "0.25", "--augment.flip", "random")),
    "three": (3, (*HEADS, *MUON, "--data.train_on", "all", "--train.micro_batch_size", "8")),
}  # fmt: skip
DIGESTS = ("model_sha256", "data_receipt", "test_confusion", "test_loss", "steps", "accumulation", "train_n", "params")
TIMES = {"seconds", "images_per_second", "data_wait", "time"}
MIDDLE = Path("checkpoints/step-00000012.pt")


def report(name: str, run_dir: Path) -> None:
    """Print what `run_dir` holds of the run `name`."""
    summary = runs.summary(run_dir)
    for key in DIGESTS:
        print(f"{name} {key} {json.dumps(summary[key])}")
    for record in runs.records(run_dir):
        print(f"{name} {json.dumps({key: value for key, value in sorted(record.items()) if key not in TIMES})}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, (world_size, options) in RUNS.items():
            runs.run(world_size, *COMMON, *options, "--run.dir", folder / name)
            report(name, folder / name)
            print(f"{name} done", file=sys.stderr)
        world_size, options = RUNS["three"]
        resumed = ("--run.dir", folder / "resumed", "--run.resume", folder / "three" / MIDDLE)
        runs.run(world_size, *COMMON, *options, *resumed)
        report("resumed", folder / "resumed")
        scores, checkpoint = folder / "scores.json", folder / "one/checkpoints/step-00000024.pt"
        evaluated = ("--checkpoint", checkpoint, "--data_dir", DATA, "--split", "validation", "--json", scores)
        runs.run(2, *evaluated, module="evaluate")
        for key, value in json.loads(scores.read_text()).items():
            if key != "checkpoint":
                print(f"evaluated {key} {json.dumps(value)}")


if __name__ == "__main__":
    main()
