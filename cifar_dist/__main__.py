"""All commands as one program: `cifar-dist NAME`, or `python -m cifar_dist NAME`, is `python -m cifar_dist.NAME`.

No command is imported before it is named, so each is as fast as by itself.
"""

import difflib
import importlib
import io
import runpy
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from cifar_dist import __version__
from cifar_dist.errors import UserError, exit_on_error
from cifar_dist.process import run_and_exit

# Of each command the dataclass of its arguments, for completion, and what it does. A command is added by one line.
COMMANDS = {
    "train": ("config:Config", "train a network, on one device or under torchrun"),
    "evaluate": ("evaluate:EvaluateArguments", "score a run or a checkpoint"),
    "predict": ("predict:PredictArguments", "classify pictures with a trained model"),
    "export": ("export:ExportArguments", "write a trained model as safetensors, ONNX and torch.export"),
    "prepare": ("prepare:PrepareConfig", "get CIFAR-10, check it and write it as .beton files"),
    "plan": ("plan:PlanArguments", "print what a run will do, or why it cannot work"),
    "sweep": ("sweep:SweepArguments", "train with several seeds, or over a grid of settings"),
    "seeds": ("seeds:SeedsArguments", "print mean and spread of runs that differ in the seed"),
    "runs": ("runs:RunsArguments", "list runs with their states"),
    "compare": ("compare:CompareArguments", "show where runs differ"),
    "report": ("report:ReportArguments", "write runs as an HTML file to look at"),
    "doctor": ("doctor:DoctorArguments", "check this machine: packages, devices, data, disk, limits"),
    "wandb_sync": ("wandb_sync:SyncArguments", "upload what W&B has recorded offline"),
    "bench": ("benchmarks.settings:BenchConfig", "measure this machine"),
    "models": ("models.__main__:NoArguments", "check parameter counts against the literature"),
}
USAGE = """\
usage: cifar-dist COMMAND [ARGUMENTS]

{commands}

`cifar-dist COMMAND --help` explains a command; `python -m cifar_dist.COMMAND` is the same.
`cifar-dist --version` prints the version, `cifar-dist --completion bash` (or zsh) a script that completes words.
Example: cifar-dist train --config quickstart
"""


def main() -> None:
    """Run the command that the first word names, as the program of this process."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        run_and_exit(_answer)
    del sys.argv[1]
    runpy.run_module(f"cifar_dist.{name}", run_name="__main__", alter_sys=True)


def _answer() -> None:
    """Answer what is no command."""
    with exit_on_error():
        word, *more = sys.argv[1:] or [""]
        if word in ("-h", "--help"):
            print(_usage(), end="")
        elif word == "--version":
            print(f"cifar-dist {__version__}")
        elif word == "--completion":
            _print_completion(more)
        elif word:
            best = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"Did you mean {best[0]}? " if best else ""
            raise UserError(f"there is no command {word}. {hint}Valid: {', '.join(COMMANDS)}.")
        else:
            raise UserError(f"no command is given.\n{_usage()}")


def _usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()))


def _print_completion(shells: list[str]) -> None:
    """Print tyro's script for a shell."""
    import tyro

    from cifar_dist import options

    if shells not in (["bash"], ["zsh"]):
        raise UserError("--completion needs the name of a shell; valid: bash, zsh.")
    kinds: list[Any] = []
    for name, (place, _) in COMMANDS.items():
        module, _, kind = place.partition(":")
        arguments = getattr(importlib.import_module(f"cifar_dist.{module}"), kind)
        if name == "train":  # whose load_config answers this option itself
            arguments = make_dataclass("Train", [("config", Path | None, None)], bases=(arguments,), frozen=True)
        kinds.append(Annotated[arguments, tyro.conf.subcommand(name)])
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):
        tyro.cli(  # type: ignore[call-overload]  # a union that is computed
            Union[tuple(kinds)],  # noqa: UP007
            prog="cifar-dist",
            args=["--tyro-print-completion", *shells],
            use_underscores=True,
            registry=options.registry,
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands),
        )
    for line in script.getvalue().splitlines():
        # Texts of several lines would become words to choose from.
        print(line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC = ") else line)


if __name__ == "__main__":
    main()
