"""Mean and spread over runs that differ in nothing but the seed: `python -m cifar_dist.seeds runs/NAME`.

`launch/seeds` trains such runs one after another and ends with this; any others, wherever trained, will do as well.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tyro

from cifar_dist import cli, errors, files
from cifar_dist.training import finished
from cifar_dist.training.finished import FinishedRun

CONFIDENCE = 0.95
# Of each column: its title, and how a number in it is written. Accuracies are in percent.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "val_accuracy": ("validation", ".2f"),
    "test_accuracy": ("test", ".2f"),
    "test_accuracy_tta": ("test, {tta}", ".2f"),
    "train_seconds": ("train seconds", ",.1f"),
    "images_per_second": ("images/s", ",.0f"),
}


@dataclass(frozen=True)
class SeedsArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, their summary.json, or folders of run directories."""
    json: Path | None = None
    """Write the figures to this file, too."""
    check: Path | None = None
    """Make no table, but check that the runs, as far as there are any, have the settings in this file, which
    `cifar_dist.train --print-config` printed."""


@dataclass(frozen=True)
class Spread:
    """Over n runs: the standard deviation divides by n - 1, the interval is that of the mean; None for n = 1."""

    mean: float
    standard_deviation: float | None
    interval_95: tuple[float, float] | None


def main() -> None:
    """Print the table that the command line asks for, and write its figures."""
    arguments = cli.parse(SeedsArguments, sys.argv[1:], "seeds", description="Mean and spread of runs over seeds.")
    with errors.reported():
        if not arguments.runs:
            raise errors.UserError("no run is given. Name run directories, or a folder of them.")
        if arguments.check is not None:
            finished.refuse_others(arguments.runs, cli.read_yaml(arguments.check))
            return
        runs = finished.read_runs(finished.run_directories(arguments.runs))
        finished.refuse_unequal(runs)
        figures = report(runs)
        print(table(runs))
        if arguments.json is not None:
            text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
            try:
                files.write_text_atomic(arguments.json, text)
            except OSError as error:
                raise errors.UserError(f"json {arguments.json} cannot be written: {error.strerror}.") from None


def t_quantile(n: int) -> float:
    """How many standard errors of the mean the 95 % interval over n runs reaches to each side."""
    from scipy.special import stdtrit  # importing it takes as long as all else here

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and the mean's 95 % interval by Student's t, of one value per run."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(mean, None, None)
    deviation = statistics.stdev(values)
    half = t_quantile(n) * deviation / math.sqrt(n)
    return Spread(mean, deviation, (mean - half, mean + half))


def spreads(runs: Sequence[FinishedRun]) -> dict[str, Spread | None]:
    """The spread of each column, in the units of summary.json; None where the runs have no such figure."""
    values = {name: [run.figures[name] for run in runs] for name in COLUMNS}
    return {name: None if None in column else spread(column) for name, column in values.items()}


def report(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """All figures, accuracies as shares of 1; what each run was computed with stands beside its own figures."""
    first = runs[0]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": finished.shared_settings(first.config),
        "num_runs": len(runs),
        "test_n": first.figures["test_n"],
        "val_n": first.figures["val_n"],
        "t_quantile": t_quantile(len(runs)) if len(runs) > 1 else None,
        **{name: None if value is None else asdict(value) for name, value in spreads(runs).items()},
        "runs": [{"summary": str((run.directory / "summary.json").resolve()), **run.figures} for run in runs],
    }


def table(runs: Sequence[FinishedRun]) -> str:
    """One line per seed, then mean, standard deviation and interval, under what they are of."""
    tta = {"none": "TTA"}.get(runs[0].config.eval.tta, runs[0].config.eval.tta)
    rows = [["", *(title.format(tta=tta) for title, _ in COLUMNS.values()), "commit"]]
    for run in runs:
        cells = [_cell(name, run.figures[name]) for name in COLUMNS]
        rows.append([f"seed {run.figures['seed']}", *cells, _short(run.figures["git_commit"])])
    rows.append([])
    columns = spreads(runs).items()
    rows.append(["mean", *(_cell(name, None if of is None else of.mean) for name, of in columns)])
    if len(runs) > 1:
        deviations = [_cell(name, None if of is None else of.standard_deviation) for name, of in columns]
        rows.append(["standard deviation", *deviations])
        rows.append([f"{CONFIDENCE:.0%} interval of the mean", *(_interval(name, of) for name, of in columns)])
    return "\n".join([*_heading(runs), "", *_aligned(rows), "", *_notes(runs)])


def compare(groups: Mapping[str, Path], output: Path) -> str:
    """The table of a sweep, whose figures are also written to `output`.

    Args:
        groups: the settings that runs in one folder have in common, with that folder; one alone: only seeds differ.

    Raises:
        UserError: runs are missing, unfinished or damaged, or differ in more than the seed within one folder.
    """
    found = {name: finished.read_runs(finished.run_directories([folder])) for name, folder in groups.items()}
    for runs in found.values():
        finished.refuse_unequal(runs)
    reports = {name: report(runs) for name, runs in found.items()}
    whole = next(iter(reports.values())) if len(reports) == 1 else {"settings": reports}
    files.write_text_atomic(output, json.dumps(whole, indent=2, allow_nan=False) + "\n")
    if len(found) == 1:
        return table(next(iter(found.values())))
    rows = [["settings", "runs", *(title.format(tta="TTA") for title, _ in COLUMNS.values())]]
    for name, runs in found.items():
        rows.append([name, str(len(runs)), *(_mean(column, of) for column, of in spreads(runs).items())])
    return "\n".join([*_aligned(rows), "", "mean +- standard deviation over the seeds; accuracies in percent"])


def _mean(name: str, value: Spread | None) -> str:
    if value is None or value.standard_deviation is None:
        return _cell(name, None if value is None else value.mean)
    return f"{_cell(name, value.mean)} +- {_cell(name, value.standard_deviation)}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right; rows may be short."""
    widths = [max(len(row[k]) for row in rows if len(row) > k) for k in range(len(rows[0]))]
    lines = ("   ".join(f"{cell:{'>' if k else '<'}{widths[k]}}" for k, cell in enumerate(row)) for row in rows)
    return [line.rstrip() for line in lines]


def _heading(runs: Sequence[FinishedRun]) -> list[str]:
    config, figures = runs[0].config, runs[0].figures
    model, validation = config.model, figures["val_n"]
    apart = "none, trained on all" if validation is None else f"n = {validation:,} images kept from training"
    lines = [
        f"{len(runs)} run{'s that differ in nothing but the seed' if len(runs) > 1 else ''}: {model.name}, "
        f"{figures['params']:,} parameters, {figures['epochs']:g} epochs of batch {figures['batch_size']}, "
        f"{figures['precision']}",
        f"test accuracy, last epoch, n = {figures['test_n']:,} images; validation accuracy: {apart}; in percent",
    ]
    devices, versions = figures["device_names"], figures["versions"]
    if _kinds(runs, "device_names") == _kinds(runs, "versions") == 1:
        kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
        packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "ffcv", "python") if name in versions)
        lines.append(f"on {kinds}; {packages}")
    return lines


def _notes(runs: Sequence[FinishedRun]) -> list[str]:
    """How the last rows came about, and what else than the seed was not the same."""
    n = len(runs)
    if n == 1:
        notes = ["one run has no standard deviation and no interval"]
    else:
        notes = [
            f"standard deviation over {n} runs, dividing by {n - 1}; interval: mean +- {t_quantile(n):.3f} (Student's "
            f"t, {n - 1} degree{'s' if n > 2 else ''} of freedom) x standard deviation / sqrt({n})"
        ]
    names = {"git_commit": "commits of the code", "versions": "sets of packages", "device_names": "sets of devices"}
    numbers = {what: _kinds(runs, name) for name, what in names.items()}
    return notes + [f"note: these runs are of {number} {what}" for what, number in numbers.items() if number > 1]


def _kinds(runs: Sequence[FinishedRun], name: str) -> int:
    """How many different values a figure has."""
    return len({json.dumps(run.figures[name], sort_keys=True) for run in runs})


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return format(100 * value if "accuracy" in name else value, COLUMNS[name][1])


def _interval(name: str, value: Spread | None) -> str:
    if value is None or value.interval_95 is None:
        return "-"
    return "..".join(_cell(name, end) for end in value.interval_95)


def _short(commit: str | None) -> str:
    """The first letters of a commit, and whether the code had been changed since."""
    name, dash, dirty = (commit or "-").partition("-")
    return name[:7] + dash + dirty


if __name__ == "__main__":
    main()
