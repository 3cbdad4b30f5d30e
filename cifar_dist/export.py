"""Export a trained model: `python -m cifar_dist.export runs/NAME`.

The exit code is 0 if all files were written, 1 if a format could not be written or failed its check, 2 if the
arguments are wrong, and 4 if the checkpoint is damaged.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cifar_dist import cli
from cifar_dist.errors import exit_on_error
from cifar_dist.process import quick_imports, run_and_exit

DESCRIPTION = (
    "Write a trained model as files that work without cifar_dist, checked, with a model card. "
    "Example: python -m cifar_dist.export runs/mine --format onnx --fold_batch_norm True"
)


@dataclass(frozen=True)
class ExportArguments:
    run: tyro.conf.Positional[Path]
    """A run directory or a step-*.pt file."""
    format: Literal["safetensors", "onnx", "torch_export", "all"] = "all"
    """safetensors: weights, with model.py that rebuilds the network; onnx; torch_export: a .pt2 file."""
    out: Path | None = None
    """Folder for the files; default: `export` in the run directory. Other files in it stay as they are."""
    which: Literal["last", "best"] | int = "last"
    """Which checkpoint of a run directory: last, best (by validation) or a step."""
    fold_batch_norm: bool = False
    """Compute batch norm as a part of the convolutions. model.weights takes only files without this and the next."""
    merge_1x1: bool = False
    """Compute the 1x1 convolutions on the input of an Inception module as one."""
    uint8_input: bool = False
    """Take uint8 images and normalise them inside."""
    data_dir: Path | None = None
    """Holds test.beton, to score and check the files with; the run's own data.dir if not given."""


def main() -> None:
    """Write, check and list the files."""
    with exit_on_error():
        arguments = cli.parse(ExportArguments, sys.argv[1:], "export", description=DESCRIPTION)
        with quick_imports():
            from cifar_dist.inference.export import Options, Request, export
            from cifar_dist.inference.formats import FILES

        formats = list(FILES) if arguments.format == "all" else [arguments.format]
        options = Options(arguments.fold_batch_norm, arguments.merge_1x1, arguments.uint8_input)
        request = Request(arguments.run, formats, arguments.which, arguments.out, arguments.data_dir, options)
        failures = export(request, print)
        for text in failures:
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    run_and_exit(main)
