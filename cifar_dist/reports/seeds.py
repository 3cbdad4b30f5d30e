"""Mean, standard deviation and confidence interval over runs that differ only in the seed, as a table and as figures.

Does not import torch, so that a table appears at once.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cifar_dist.cli import aligned, command_line
from cifar_dist.files import write_json
from cifar_dist.reports.finished_runs import FinishedRun, read_runs, settings_of

# Title and number format of each column. Accuracies are shown in percent.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "val_accuracy": ("validation", ".2f"),
    "test_accuracy": ("test", ".2f"),
    "test_accuracy_tta": ("test, TTA", ".2f"),
    "train_seconds": ("train seconds", ",.1f"),
    "images_per_second": ("images/s", ",.0f"),
}
TITLES = tuple(title for title, _ in COLUMNS.values())
STATISTICS = {"mean": "mean", "standard deviation": "standard_deviation", "95% interval of the mean": "interval_95"}


class Spread(NamedTuple):
    """Of one value per run. With one run there is neither a standard deviation nor an interval."""

    mean: float
    standard_deviation: float | None = None  # divides by n - 1
    interval_95: tuple[float, float] | None = None  # of the mean, by Student's t


def t_quantile(n: int) -> float:
    """Half the width of the 95 % interval of a mean over `n` runs, in standard errors of the mean."""
    from scipy.special import stdtrit  # importing it takes as long as everything else here

    return float(stdtrit(n - 1, 0.975))


def spread(values: Sequence[float]) -> Spread:
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(mean)
    deviation = statistics.stdev(values)
    half = t_quantile(n) * deviation / math.sqrt(n)
    return Spread(mean, deviation, (mean - half, mean + half))


def spreads(runs: Sequence[FinishedRun]) -> dict[str, Spread | None]:
    """The spread of each column, in the units of summary.json.

    None for a figure that a run does not have, and for times if the runs had different machines.
    """
    values = {name: [run.figures[name] for run in runs] for name in COLUMNS}
    if len(_machines(runs)) > 1:
        values |= {"train_seconds": [None], "images_per_second": [None]}
    return {name: None if None in column else spread(column) for name, column in values.items()}


def report(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """All figures for JSON; accuracies are fractions."""
    first = runs[0]
    return {
        "command": command_line(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in settings_of(first.config).items()},
        "num_runs": len(runs),
        "test_n": first.figures["test_n"],
        "val_n": first.figures["val_n"],
        "t_quantile": t_quantile(len(runs)) if len(runs) > 1 else None,
        **{name: value and value._asdict() for name, value in spreads(runs).items()},
        "runs": [{"summary": str((run.directory / "summary.json").resolve()), **run.figures} for run in runs],
    }


def table(runs: Sequence[FinishedRun]) -> str:
    """One line per seed, then mean, standard deviation and interval."""
    rows = [["", *TITLES, "commit"]]
    for run in runs:
        cells = [_cell(name, run.figures[name]) for name in COLUMNS]
        rows.append([f"seed {run.figures['seed']}", *cells, _commit(run)])
    rows.append([])
    for label, key in STATISTICS.items():
        rows.append([label, *(_cell(name, getattr(value, key, None)) for name, value in spreads(runs).items())])
    note = "standard deviation (divided by n - 1) and interval (Student's t, n - 1 degrees of freedom) need n > 1 runs"
    return "\n".join([*_heading(runs), "", *aligned(rows), "", note, "", "for a README:", "", *markdown(runs)])


def markdown(runs: Sequence[FinishedRun]) -> list[str]:
    """The lines of a table for a README, and a text with what its figures include and what they leave out."""
    figures, config, num = runs[0].figures, runs[0].config, len(runs)
    tta = {} if config.eval.tta == "none" else {f"test accuracy, TTA {config.eval.tta}": "test_accuracy_tta"}
    row = {
        "network": f"{config.model.name}, {figures['params']:,} parameters",
        "seeds": str(num),
        "training": _time(runs, [run.figures["train_seconds"] for run in runs]),
        "with preparation": _time(runs, [_with_preparation(run) for run in runs]),
    }
    for title, name in ({"test accuracy": "test_accuracy"} | tta).items():
        accuracy = spread([run.figures[name] for run in runs])
        row[title] = _with_deviation(name, accuracy, " %")
        if num > 1:
            row[title] += f" ({_cell(name, accuracy.interval_95).replace('..', ' to ')} %)"
    seeds = ", ".join(str(run.figures["seed"]) for run in runs)
    mean = f"Mean +- standard deviation over seeds {seeds} (95 % interval of the mean)" if num > 1 else f"Seed {seeds}"
    how = [figures["precision"], *([f"started from {config.model.weights}"] if config.model.weights else [])]
    how += ["scored with averaged weights"] if config.optim.ema_decay is not None else []
    commits = dict.fromkeys(_commit(run) for run in runs)
    return [
        f"| {' | '.join(row)} |",
        "|" + "---|" * len(row),
        f"| {' | '.join(row.values())} |",
        "",
        f"{mean}. Accuracy: after the last step, on all {figures['test_n']:,} test images, by which no checkpoint was "
        f"chosen. Training: {figures['steps']:,} steps of {figures['batch_size']} images, {figures['epochs']:g} epochs "
        f"of {figures['train_n']:,} images, in {', '.join(how)}. Preparation: everything from "
        f"the start of the process to the end of the first step, which training includes, too; with caches and dataset "
        f"as found; of a resumed run, the last start. Not included: torchrun's start, logging, validation, "
        f"checkpoints, statistics of batch norms, the test. On {' and on '.join(_machines(runs))}; "
        f"commit {', '.join(commits)}.",
    ]


def _with_preparation(run: FinishedRun) -> float | None:
    """Seconds; None for a run whose last start trained no step."""
    first = run.figures["first_step_seconds"]
    return None if first is None else float(first + run.figures["train_seconds"])


def _time(runs: Sequence[FinishedRun], seconds: Sequence[float | None]) -> str:
    """Their mean, unless one is missing or the runs had different machines."""
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds) or len(_machines(runs)) > 1:
        return "-"
    return _with_deviation("train_seconds", spread(known), " s")


def _with_deviation(column: str, value: Spread, unit: str) -> str:
    """The mean and, of several runs, the standard deviation in the format of `column`."""
    deviation = "" if value.standard_deviation is None else f" +- {_cell(column, value.standard_deviation)}"
    return f"{_cell(column, value.mean)}{unit}{deviation}"


def compare(groups: Mapping[str, Sequence[Path]], output: Path) -> str:
    """The table of a sweep, whose figures are also written to `output`; with one group the table of its seeds.

    Args:
        groups: runs, or folders of runs, by the settings that these runs have in common.
    """
    found = {name: read_runs(paths) for name, paths in groups.items()}
    reports = {name: report(runs) for name, runs in found.items()}
    write_json(output, next(iter(reports.values())) if len(reports) == 1 else {"settings": reports})
    if len(found) == 1:
        return table(next(iter(found.values())))
    rows = [["settings", "runs", *TITLES]]
    for name, runs in found.items():
        rows.append([name, str(len(runs))])
        for column, value in spreads(runs).items():
            mean, deviation = (_cell(column, getattr(value, key, None)) for key in ("mean", "standard_deviation"))
            rows[-1].append(f"{mean} +- {deviation}".removesuffix(" +- -"))
    return "\n".join([*aligned(rows), "", "mean +- standard deviation over the seeds; accuracies in percent"])


def _heading(runs: Sequence[FinishedRun]) -> list[str]:
    figures, config, num = runs[0].figures, runs[0].config, len(runs)
    val_n = figures["val_n"]
    validation = "none, trained on all" if val_n is None else f"n = {val_n:,} images held out from training"
    return [
        f"{num} run{'s that differ only in the seed' if num > 1 else ''}: {config.model.name}, "
        f"{figures['params']:,} parameters, {figures['epochs']:g} epochs of batch {figures['batch_size']}, "
        f"{figures['precision']}",
        f"test accuracy, last epoch, n = {figures['test_n']:,} images, TTA: {config.eval.tta}; validation accuracy: "
        f"{validation}; in percent",
        f"on {', and on '.join(_machines(runs))}",
    ]


def _machines(runs: Sequence[FinishedRun]) -> list[str]:
    """The devices of each run and their version of torch, each once."""
    found = []
    for run in runs:
        devices, torch = run.figures["device_names"], run.figures["versions"].get("torch")
        found.append(f"{len(devices)} x {', '.join(dict.fromkeys(devices))}; torch {torch}")
    return list(dict.fromkeys(found))


def _commit(run: FinishedRun) -> str:
    commit, dash, dirty = (run.figures["git_commit"] or "-").partition("-")
    return commit[:7] + dash + dirty


def _cell(column: str, value: float | Sequence[float] | None) -> str:
    """A number, or the ends of an interval, in the format of `column`."""
    if value is None:
        return "-"
    ends = value if isinstance(value, Sequence) else [value]
    return "..".join(format(100 * end if "accuracy" in column else end, COLUMNS[column][1]) for end in ends)
