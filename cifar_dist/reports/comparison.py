"""The pages of several runs side by side, and of a single run of another program that W&B recorded."""

from collections.abc import Mapping, Sequence
from functools import partial

from cifar_dist.reports.charts import Chart, draw
from cifar_dist.reports.finished_runs import EQUAL, MAY_DIFFER
from cifar_dist.reports.markup import (
    Html,
    LeftOutError,
    details,
    element,
    joined,
    page,
    sections,
    table,
    tiles,
)
from cifar_dist.reports.run_charts import (
    MAX_LINES,
    Group,
    by_prefix,
    charts_over_each_other,
    points_per_series,
)
from cifar_dist.reports.run_data import RunData
from cifar_dist.reports.run_report import HINT, duration
from cifar_dist.reports.seeds import Spread, spread

SEED = "run.seed"
MAX_ROWS, MAX_RUNS = 60, 500  # of a table of settings or of a summary; of the table of runs


def page_of_foreign_run(run: RunData) -> str:
    """The page of a run that another program left in W&B's folder."""
    header = element("header", element("h1", run.name), _notes([run]), tiles({"state": run.state, **run.facts}))
    makers = {
        "Curves": partial(curves, [Group("", [run])]),
        "Summary": partial(_pairs, run.summary, "summary"),
        "Configuration": partial(_pairs, run.settings, "configuration"),
    }
    return page(f"{run.name} · W&B run {run.facts.get('id', '')}", header, sections(makers))


def _pairs(values: Mapping[str, object], name: str) -> Html:
    if not values:
        raise LeftOutError(f"the run has no {name}.")
    rows = [(key, element("span", f"{value!s:.300}")) for key, value in values.items()]
    more = details(f"{len(rows) - MAX_ROWS} more", table((), rows[MAX_ROWS:])) if len(rows) > MAX_ROWS else ""
    return joined([table((), rows[:MAX_ROWS]), more])


def page_of_runs(runs: Sequence[RunData]) -> str:
    """The page of two or more runs."""
    labels = labels_of(runs)
    groups = groups_of(runs, labels)
    header = element("header", element("h1", f"{len(runs)} runs"), _notes(runs, labels))
    makers = {
        "Results": lambda: results(runs, labels),
        **({"Seeds": lambda: seeds(groups)} if any(len(group.runs) > 1 for group in groups) else {}),
        "Settings that differ": lambda: differing_settings(runs, labels),
        "Curves": lambda: curves(groups),
    }
    return page(f"{len(runs)} runs · cifar_dist", header, sections(makers))


def _notes(runs: Sequence[RunData], labels: Sequence[str] = ("",)) -> Html:
    notes = [f"{label}: {note}".removeprefix(": ") for run, label in zip(runs, labels, strict=True)
             for note in run.notes]  # fmt: skip
    return joined(element("p", note, class_="note") for note in notes)


def labels_of(runs: Sequence[RunData]) -> list[str]:
    """The names of the runs, or their paths where names are equal, or where paths are, too, with a number."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.directory) for run in runs]
    return [label if labels.count(label) == 1 else f"{label} ({k})" for k, label in enumerate(labels, 1)]


def groups_of(runs: Sequence[RunData], labels: Sequence[str]) -> list[Group]:
    """Runs that differ only in the seed together, in the order of the first of each; others by themselves."""
    found: dict[object, list[int]] = {}
    described = _described(runs)
    for k, run in enumerate(runs):
        known = run.settings and not run.facts  # of other programs it is not known which setting is the seed
        found.setdefault(tuple(described[k].items()) if known else k, []).append(k)
    members = []
    for group in found.values():
        seeds_of = {runs[k].settings.get(SEED) for k in group}
        members += [group] if len(seeds_of) == len(group) else [[k] for k in group]
    names = sorted(_differing([described[group[0]] for group in members]), key=EQUAL.__contains__)
    num_told = min(3, sum(name not in EQUAL for name in names))  # more, and figures, only to tell groups apart
    of_seeds = [described[group[0]] for group in members if len(group) > 1]
    while num_told < len(names) and len({_told(one, names[:num_told]) for one in of_seeds}) < len(of_seeds):
        num_told += 1
    groups = []
    for group in members:
        what = _told(described[group[0]], names[:num_told])
        many = f"{len(group)} seeds{': ' * bool(what)}{what}"
        groups.append(Group(many if len(group) > 1 else labels[group[0]], [runs[k] for k in group]))
    return groups


def _described(runs: Sequence[RunData]) -> list[dict[str, str]]:
    """Of each run the settings and figures that it has in common with its other seeds.

    A run that is not finished gets the figures of the first finished one with equal settings.
    """
    settings = [{name: v for name, v in run.settings.items() if not name.startswith(MAY_DIFFER)} for run in runs]
    figures = [{name: f"{run.summary[name]!s:.16}" for name in EQUAL if name in run.summary} for run in runs]
    finished: dict[str, dict[str, str]] = {}
    for own, known in zip(settings, figures, strict=True):
        if known:
            finished.setdefault(str(own), known)
    return [own | (known or finished.get(str(own), {})) for own, known in zip(settings, figures, strict=True)]


def _told(values: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values.get(name, '-')}" for name in names)


def _differing(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of the values in which runs differ, besides seed, names and paths."""
    names = dict.fromkeys(name for run in runs for name in run if not name.startswith(MAY_DIFFER))
    return [name for name in names if len({run.get(name) for run in runs if run}) > 1]


def results(runs: Sequence[RunData], labels: Sequence[str]) -> Html:
    """A row per run: state, accuracies, time, devices."""
    rows = []
    for run, label in zip(runs[:MAX_RUNS], labels, strict=False):
        interval, seconds = run.test_interval, run.figure("train_seconds")
        rows.append((
            label,
            element("span", run.state),
            _percent(run.figure("test_accuracy")),
            "-" if interval is None else "{:.2f} to {:.2f}".format(*(100 * end for end in interval)),
            _count(run.figure("test_n")),
            _percent(run.figure("test_accuracy_tta")),
            _percent(run.figure("val_accuracy")),
            f"{run.num_steps:,}",
            "-" if seconds is None else duration(seconds),
            _count(run.figure("images_per_second")),
            element("span", run.devices or "-"),
        ))  # fmt: skip
    head = (
        "run", "state", "test accuracy (%)", "95 % interval", "n", "with TTA (%)", "validation (%)", "steps",
        "training time", "images/s", "devices",
    )  # fmt: skip
    text = "Interval: Wilson score interval over the test images. TTA: test-time augmentation."
    if len(runs) > MAX_RUNS:
        text += f" {len(runs) - MAX_RUNS} more runs are left out; `python -m cifar_dist.runs` lists all."
    return joined([table(head, rows, "results"), element("p", text, class_="note")])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def seeds(groups: Sequence[Group]) -> Html:
    """Mean, standard deviation and interval of the mean of each group of finished runs."""
    columns = {"test_accuracy": "test", "test_accuracy_tta": "with TTA", "val_accuracy": "validation"}
    rows = []
    for group in groups:
        if len(group.runs) == 1:
            continue
        for name, title in columns.items():
            values = [value for run in group.runs if (value := run.figure(name)) is not None]
            if values:
                rows.append((group.label, element("span", title), str(len(values)), *_cells(spread(values))))
    if not rows:
        raise LeftOutError("none of these runs is finished.")
    head = ("settings", "accuracy", "runs", "mean (%)", "standard deviation", "95 % interval of the mean (%)")
    text = "Runs that differ only in the seed. Standard deviation: divided by n - 1. Interval: Student's t."
    return joined([table(head, rows), element("p", text, class_="note")])


def _cells(value: Spread) -> tuple[str, str, str]:
    if value.standard_deviation is None or value.interval_95 is None:
        return f"{100 * value.mean:.2f}", "-", "-"
    low, high = value.interval_95
    return f"{100 * value.mean:.2f}", f"{100 * value.standard_deviation:.2f}", f"{100 * low:.2f} to {100 * high:.2f}"


def differing_settings(runs: Sequence[RunData], labels: Sequence[str]) -> Html:
    """A row per setting in which runs differ, a column per run."""
    known = [(run, label) for run, label in zip(runs, labels, strict=True) if run.settings]
    seeds_differ = len({run.settings.get(SEED) for run, _ in known}) > 1
    differ = [SEED] * seeds_differ + _differing([run.settings for run, _ in known])
    if not differ:
        raise LeftOutError("there are none.")
    rows = [
        (name, *(element("span", f"{run.settings.get(name, 'no such setting'):.200}") for run, _ in known))
        for name in differ[:MAX_ROWS]
    ]
    more = element("p", f"{len(differ) - MAX_ROWS} more.", class_="note") if len(differ) > MAX_ROWS else ""
    return joined([table(("setting", *(label for _, label in known)), rows), more])


def curves(groups: Sequence[Group]) -> Html:
    """A chart per curve with a line per group, under headings by the prefixes of their names."""
    charts, num_left_out = charts_over_each_other(groups)
    if not charts:
        raise LeftOutError("there are no numbers over the steps.")
    limit = points_per_series(charts)
    texts = [HINT]
    if any(len(group.runs) > 1 for group in groups):
        texts.append("Lines of several seeds: mean at the steps that all have; band: lowest to highest value.")
    if num_left_out:
        texts.append(f"{num_left_out} more curves are left out.")
    if len(groups) > MAX_LINES:
        texts.append(f"{sum(len(g.runs) for g in groups[MAX_LINES:])} more runs are left out of the charts.")
    foreign = any(run.facts for group in groups for run in group.runs)
    parts: list[object] = [element("p", text, class_="hint") for text in texts]
    for prefix, found in by_prefix(charts) if foreign else [("", charts)]:
        parts += [element("h3", prefix)] if prefix else []
        parts.append(_grid(found, limit))
    return joined(parts)


def _grid(charts: Sequence[Chart], limit: int) -> Html:
    return element("div", *(draw(chart, limit) for chart in charts), class_="charts")
