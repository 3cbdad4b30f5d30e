"""report.html: all that one run left, on one page."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from cifar_dist.reports import score_sections
from cifar_dist.reports.charts import draw
from cifar_dist.reports.markup import (
    Html,
    LeftOutError,
    details,
    element,
    joined,
    page,
    percent,
    save,
    sections,
    table,
    tiles,
)
from cifar_dist.reports.run_charts import charts_of_run, points_per_series
from cifar_dist.reports.run_data import RunData, default_settings, read

MAX_RECEIPTS = 300  # for the size of the page; summary.json has all
HINT = "To read values, point at a chart, or reach it with Tab and press the arrow keys."


def write(directory: Path) -> Path:
    """Write report.html of the run in `directory`, from its files alone.

    Raises:
        UserError: the directory holds no run, or the page cannot be written.
    """
    path = directory / "report.html"
    save(path, page_of(read(directory)))
    return path


def page_of(run: RunData) -> str:
    """The page of one run of this package."""
    score = run.figure("test_accuracy")
    title = run.name if score is None else f"{run.name}: {percent(score)}"
    makers = {
        "Curves": curves, "Classes": score_sections.classes, "Confusion matrix": score_sections.confusion_matrix,
        "Calibration": score_sections.calibration, "Most confident mistakes": score_sections.mistakes,
        "First filters": score_sections.filters, "Configuration": configuration, "Environment": environment,
        "Receipts": receipts,
    }  # fmt: skip
    content = sections({name: partial(make, run) for name, make in makers.items()})
    return page(f"{title} · cifar_dist", headline(run), content)


def headline(run: RunData) -> Html:
    """The score with its interval, the state, and what was trained on what."""
    parts: list[object] = [element("p", f"Run in {run.directory.resolve()}", class_="path"), element("h1", run.name)]
    accuracy, n, interval = run.figure("test_accuracy"), run.figure("test_n"), run.test_interval
    if accuracy is not None and interval is not None:
        low, high = interval
        told = f"test accuracy; 95 % interval {100 * low:.2f} to {percent(high)}, n = {n:,.0f} images"
        score = element("span", percent(accuracy), class_="score", id="test-accuracy")
        parts.append(element("p", score, element("span", told, class_="interval"), class_="headline"))
    parts.append(_state(run))
    parts += [element("p", note, class_="note") for note in run.notes]
    return element("header", *parts, tiles(_facts(run)))


def _state(run: RunData) -> Html:
    time = str(run.status.get("time", "an unknown time"))
    texts = {
        "running": "This run is not finished; its process is running.",
        "killed": f"This run was killed, after {time}. Resume it with --run.resume auto.",
        "stopped": f"This run was stopped on {time}. Resume it with --run.resume auto.",
        "failed": f"This run failed on {time}.",
        "unknown": "This run is not finished, or its files are damaged.",
    }
    message = str(run.status.get("message", ""))
    parts = [element("p", texts[run.state])] if run.state != "done" else []
    parts += [element("pre", message)] if message and run.state != "done" else []
    return element("div", *parts, class_=f"state {run.state}") if parts else Html()


def _facts(run: RunData) -> Mapping[str, str]:
    """Facts beside the score; those that are not known are empty."""
    tta, validation, params = (run.figure(name) for name in ("test_accuracy_tta", "val_accuracy", "params"))
    val_n, seconds, rate = (run.figure(name) for name in ("val_n", "train_seconds", "images_per_second"))
    steps, epochs = run.figure("steps"), run.figure("epochs")
    network = str(run.summary.get("model") or run.settings.get("model.name", ""))
    return {
        "with test-time augmentation": percent(tta) if tta is not None else "",
        "validation": f"{percent(validation)}, n = {val_n:,.0f}" if validation is not None and val_n else "",
        "network": f"{network}, {params:,.0f} parameters" if params else network,
        "devices": run.devices,
        "training": duration(seconds) if seconds is not None else "",
        "throughput": f"{rate:,.0f} images/s" if rate else "",
        "steps": f"{steps:,.0f} (epochs: {epochs:g})" if steps and epochs else f"{run.num_steps:,} so far",
    }


def duration(seconds: float) -> str:
    """A time for people, such as 3 min 54 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def curves(run: RunData) -> Html:
    """All charts over the steps."""
    charts = charts_of_run(run)
    if not charts:
        raise LeftOutError("metrics.jsonl has no values yet, or is missing.")
    limit = points_per_series(charts)
    grid = element("div", *(draw(chart, limit) for chart in charts), class_="charts")
    return joined([element("p", HINT, class_="hint"), grid])


def configuration(run: RunData) -> Html:
    """The command, what differs from the defaults, and all settings."""
    if not run.settings:
        raise LeftOutError("config.yaml is missing or damaged.")
    defaults = default_settings()
    rows = [(name, element("span", value)) for name, value in run.settings.items()]
    changed = [
        (name, value, element("span", defaults.get(name, "no setting of this version")))
        for (name, value), text in zip(rows, run.settings.values(), strict=True)
        if defaults.get(name) != text
    ]
    parts: list[object] = []
    if command := run.summary.get("command"):
        processes = run.figure("world_size") or 1
        title = "Command" if processes == 1 else f"Command of each of {processes:.0f} processes"
        parts += [element("h3", title), element("pre", command, class_="copy", tabindex=0)]
    parts += [element("h3", f"{len(changed)} settings differ from the defaults")]
    parts.append(table(("setting", "this run", "default"), changed))
    return joined([*parts, details(f"All {len(rows)} settings", table(("setting", "value"), rows))])


def environment(run: RunData) -> Html:
    """Devices, versions and the state of the code."""
    summary = run.summary
    if not summary:
        raise LeftOutError("summary.json is written at the end of a run.")
    versions = summary.get("versions")
    facts = {
        "processes": summary.get("world_size"),
        "nodes": summary.get("num_nodes"),
        "precision": summary.get("precision"),
        "global batch": summary.get("batch_size"),
        "micro-batch": summary.get("micro_batch_size"),
        "accumulated micro-batches": summary.get("accumulation"),
        "training images": summary.get("train_n"),
        "seed": summary.get("seed"),
        "host": run.status.get("host"),
        **(versions if isinstance(versions, dict) else {}),
        "git commit": summary.get("git_commit") or "unknown",
        "SHA-256 of changed files": summary.get("git_diff_sha256") or "none are changed",
    }
    return tiles(facts)


def receipts(run: RunData) -> Html:
    """Digests that are equal for equal results."""
    digest, data = run.summary.get("model_sha256"), run.summary.get("data_receipt")
    if digest is None or not isinstance(data, list):
        raise LeftOutError("summary.json is written at the end of a run.")
    text = "Equal data receipts: the same samples with the same augmentation. Equal model_sha256: the same model."
    rows = [(f"data_receipt, epoch {k}", element("code", value)) for k, value in enumerate(data[:MAX_RECEIPTS], 1)]
    title = f"{len(data)} data receipts" + (f", the first {MAX_RECEIPTS}" if len(data) > MAX_RECEIPTS else "")
    model = table((), [("model_sha256", element("code", digest))])
    return joined([element("p", text), model, details(title, table((), rows))])
