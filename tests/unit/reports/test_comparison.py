"""Pages of several runs: results, seeds as mean and band, settings that differ, curves over each other."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cifar_dist import report
from cifar_dist.config import Config, to_yaml
from cifar_dist.reports import run_data
from cifar_dist.reports.comparison import groups_of, labels_of, page_of_runs
from cifar_dist.reports.run_data import RunData
from cifar_dist.reports.seeds import spread

ACCURACIES = (0.81, 0.83, 0.85)


def make(folder: Path, seed: int, lr: float = 0.05, accuracy: float = 0.8, name: str | None = None) -> RunData:
    """A run whose training loss is its learning rate and seed, at steps 10 to 50."""
    folder.mkdir(parents=True)
    config = Config()
    config = replace(config, run=replace(config.run, seed=seed, name=name), optim=replace(config.optim, lr=lr))
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": step, "epoch": step / 10, "train/loss": lr + seed} for step in range(10, 60, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"test_accuracy": accuracy, "test_n": 10_000, "train_seconds": 61.0, "device_names": ["GPU", "GPU"]}
    (folder / "summary.json").write_text(json.dumps(values))
    return run_data.read(folder)


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[RunData]:
    return [make(tmp_path / f"seed-{k}", k, accuracy=accuracy) for k, accuracy in enumerate(ACCURACIES)]


def charts(page: str) -> list[dict[str, object]]:
    return [json.loads(text) for text in re.findall(r'application/json">(.*?)</script>', page)]


def row(page: str, first: str) -> list[str]:
    found = re.search(rf'<tr><th scope="row">{re.escape(first)}</th>(.*?)</tr>', page)
    assert found, first
    return re.findall(r"<td[^>]*>(?:<span>)?([^<]*)", found[1])


def test_seeds_are_mean_and_band(three_seeds: list[RunData]) -> None:
    page = page_of_runs(three_seeds)
    assert charts(page)[0]["series"] == [
        {"label": "3 seeds", "colour": "c0", "x": [10, 20, 30, 40, 50], "y": [1.05] * 5}
    ]
    assert page.count('class="band c0') == 2  # in the chart and its legend
    assert "band: lowest to highest value." in page
    expected = spread(ACCURACIES)
    assert expected.standard_deviation is not None
    assert expected.interval_95 is not None
    low, high = expected.interval_95
    cells = [
        f"{100 * expected.mean:.2f}",
        f"{100 * expected.standard_deviation:.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}",
    ]
    assert row(page, "3 seeds") == ["test", "3", *cells]


def test_results_side_by_side(three_seeds: list[RunData]) -> None:
    page = page_of_runs(three_seeds)
    assert row(page, "seed-1") == [
        "done", "83.00", "82.25 to 83.72", "10,000", "-", "-", "50", "1 min 1 s", "-", "2 x GPU",
    ]  # fmt: skip
    assert row(page, "run.seed") == ["0", "1", "2"]


def test_groups_are_named_by_what_differs(three_seeds: list[RunData], tmp_path: Path) -> None:
    others = [make(tmp_path / f"other-{k}", k, lr=0.1) for k in (0, 1)]
    single = make(tmp_path / "single", 0, lr=0.2, name="mine")
    runs = [*three_seeds, *others, single]
    assert [group.label for group in groups_of(runs, labels_of(runs))] == [
        "3 seeds: optim.lr 0.05", "2 seeds: optim.lr 0.1", "mine",
    ]  # fmt: skip
    assert row(page_of_runs(runs), "optim.lr") == ["0.05"] * 3 + ["0.1"] * 2 + ["0.2"]


def test_groups_have_labels_of_their_own(three_seeds: list[RunData]) -> None:
    """Where the first three settings that differ do not tell groups apart, further ones do."""
    names = ("model.width", "train.epochs", "data.subset", "optim.lr")
    runs = [
        replace(run, settings={**run.settings, **dict(zip(names, values, strict=True))})
        for values in ("1111", "1112", "2222")
        for run in three_seeds
    ]
    labels = [group.label for group in groups_of(runs, labels_of(runs))]
    assert len(set(labels)) == 3
    values = [sorted(re.findall(" ([12])(?:,|$)", label)) for label in labels]
    assert values == [["1"] * 4, ["1", "1", "1", "2"], ["2"] * 4]


@pytest.mark.parametrize("name", ["val_n", "steps", "params", "precision", "weights_sha256"])
def test_seeds_that_did_not_do_the_same_are_no_group(name: str, three_seeds: list[RunData]) -> None:
    """As `seeds` refuses them. A run that is not finished is one of the first."""
    again = [replace(run, settings={**run.settings, "run.seed": str(k)}) for k, run in enumerate(three_seeds * 2)]
    runs = [replace(run, summary={**run.summary, name: k // 3}) for k, run in enumerate(again)]
    runs[1] = replace(runs[1], summary={})
    groups = groups_of(runs, labels_of(runs))
    assert [group.label for group in groups] == [f"3 seeds: {name} 0", f"3 seeds: {name} 1"]
    assert groups[0].runs == runs[:3]


def test_steps_of_a_run_without_metrics(three_seeds: list[RunData]) -> None:
    runs = [replace(run, curves={}, summary={**run.summary, "steps": 2580}) for run in three_seeds]
    assert "2,580" in row(page_of_runs(runs), "seed-0")


def test_a_folder_without_results_costs_no_page(
    three_seeds: list[RunData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--out", str(tmp_path / "out.html")])
    report.main()
    missing = "neither metrics.jsonl, status.json nor summary.json is there"
    assert f"left out, because {missing}: {tmp_path / 'begun'}\n" in capsys.readouterr().out
    assert f"<h1>{len(three_seeds)} runs</h1>" in (tmp_path / "out.html").read_text()


def test_equal_seeds_are_no_group(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, 0) for name in ("a/run", "b/run")]
    assert labels_of(runs) == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]
    assert [len(group.runs) for group in groups_of(runs, labels_of(runs))] == [1, 1]
    page = page_of_runs(runs)
    assert "<h2>Seeds</h2>" not in page
    assert len(charts(page)[0]["series"]) == 2  # type: ignore[arg-type]


def test_damaged_runs_and_many_runs_fit(three_seeds: list[RunData], tmp_path: Path) -> None:
    """Each with 20,000 log lines of all quantities."""
    keys = ("train/loss", "val/loss", "train/accuracy", "val/accuracy", "lr", "lr/muon", "gradient_norm", "data_wait")
    lines = "".join(json.dumps({"step": k, **dict.fromkeys(keys, 1 / (k + 1))}) + "\n" for k in range(20_000))
    runs = list(three_seeds)
    for k in range(20):
        runs.append(make(tmp_path / f"many-{k}", 0, lr=k + 1))
        (tmp_path / f"many-{k}/metrics.jsonl").write_text(lines)
        runs[-1] = run_data.read(tmp_path / f"many-{k}")
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (tmp_path / "many-3" / name).write_bytes(b"\x00\xff")
    runs[6] = run_data.read(tmp_path / "many-3")
    page = page_of_runs(runs)
    assert len(page.encode()) <= 500_000
    assert "many-3: config.yaml is missing or damaged, so there are no settings." in page
    assert row(page, "many-3")[:3] == ["unknown", "-", "-"]
    assert "9 more runs are left out of the charts." in page
