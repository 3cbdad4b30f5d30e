"""report.html of one run: its numbers are those of the files, and damaged or missing files cost their section only."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.reports import run_data, run_report, score_sections
from cifar_dist.reports.run_charts import charts_of_run
from tests.support import runs
from tests.support.report_files import change_summary, write_predictions

pytestmark = [pytest.mark.data, pytest.mark.run]
SECTIONS = (
    "Curves", "Classes", "Confusion matrix", "Calibration", "Most confident mistakes", "First filters",
    "Configuration", "Environment", "Receipts",
)  # fmt: skip


@pytest.fixture
def run_dir(short_run: Path, data_dir: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, without checkpoints, with predictions and pictures."""
    copy = shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    write_predictions(copy, data_dir)
    return copy


def text_of(run_dir: Path) -> str:
    return run_report.write(run_dir).read_text(encoding="utf-8")


def left_out(text: str) -> list[str]:
    """The titles of the sections that are left out."""
    return re.findall(r"<h2>([^<]*)</h2><p class=\"note\">Left out: ", text)


def test_numbers_are_those_of_the_summary(run_dir: Path) -> None:
    figures, text = runs.summary(run_dir), text_of(run_dir)
    words = html.unescape(re.sub("<[^>]+>", " ", text)).replace("\N{NO-BREAK SPACE}", " ")
    assert f"{100 * figures['test_accuracy']:.2f} %" in words
    assert f"n = {figures['test_n']:,} images" in words
    assert f"{figures['model']}, {figures['params']:,} parameters" in words
    assert f"1 x {figures['device_names'][0]}" in words
    for name in ("command", "git_commit", "model_sha256"):
        assert figures[name] in words
    assert all(digest in words for digest in figures["data_receipt"])
    for row in re.findall(r'<tr><th scope="row">\w+</th>((?:<td class="number (?:right|wrong)[^/]*/td>){10})', text):
        counts = [int(count) for count in re.findall(r">(\d+)<", row)]
        assert counts == figures["test_confusion"].pop(0)
    assert figures["test_confusion"] == []
    assert left_out(text) == []
    assert re.findall("<h2>([^<]*)</h2>", text) == list(SECTIONS)


def test_curves_have_the_values_of_the_metrics(run_dir: Path) -> None:
    charts = [json.loads(values) for values in re.findall(r'application/json">(.*?)</script>', text_of(run_dir))]
    series = {(one["label"], len(one["x"])): one for chart in charts for one in chart["series"]}
    records = [record for record in runs.records(run_dir) if "train/accuracy" in record]
    found = series["training", len(records)]
    assert found["x"] == [record["step"] for record in records]
    assert found["y"] == pytest.approx([100 * record["train/accuracy"] for record in records], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ("", "training, with label smoothing"),
        ("auxiliary: false", "training, with label smoothing and auxiliary heads"),
        ("label_smoothing: 0.1", "training"),
    ],
)
def test_loss_of_older_runs_is_named_as_what_it_was(run_dir: Path, changed: str, label: str) -> None:
    """They logged the objective as train/loss; newer ones log both."""
    others = {"auxiliary: false": "auxiliary: true", "label_smoothing: 0.1": "label_smoothing: 0.0"}
    (run_dir / "config.yaml").write_text(to_yaml(Config()).replace(changed, others.get(changed, "")))
    record = {"step": 20, "train/loss": 2.0, "epoch": 2.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record))
    assert [chart.series[0].label for chart in charts_of_run(run_data.read(run_dir))] == [label]
    (run_dir / "metrics.jsonl").write_text(json.dumps(record | {"train/objective": 2.5}))
    assert [chart.series[0].label for chart in charts_of_run(run_data.read(run_dir))] == ["training", label]


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["lr"], ["all parameters"]),
        (["lr", "lr/muon"], ["filters and matrices (SGD)", "filters (Muon)"]),
        (["lr/biases", "lr"], ["filters and matrices (SGD)", "biases (SGD)"]),
        (["lr", "lr/1", "lr/2"], ["first group", "group 1", "group 2"]),
    ],
)
def test_learning_rates_are_one_chart(run_dir: Path, keys: list[str], labels: list[str]) -> None:
    lines = [json.dumps({"step": step, **dict.fromkeys(keys, 0.1)}) + "\n" for step in (20, 40)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    (chart,) = charts_of_run(run_data.read(run_dir))
    assert chart.title == "Learning rate"
    assert [one.label for one in chart.series] == labels


def test_learning_rates_of_other_sizes_have_charts_of_their_own(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 20, "lr": 0.1, "lr/biases": 3.2, "lr/muon": 0.03}))
    assert [chart.title for chart in charts_of_run(run_data.read(run_dir))] == [
        "Learning rate: filters and matrices (SGD)", "Learning rate: biases (SGD)", "Learning rate: filters (Muon)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("metrics.jsonl", ["Curves"]),
        ("predictions.csv", ["Calibration", "Most confident mistakes"]),
        ("mistakes.png", ["Most confident mistakes"]),
        ("filters.png", ["First filters"]),
        ("config.yaml", ["Configuration"]),
        ("summary.json", ["Classes", "Confusion matrix", "Environment", "Receipts"]),
        ("status.json", []),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff{{{: [1, 2", b'[1, {"a": null}]'])
def test_missing_and_damaged_files(run_dir: Path, name: str, sections: list[str], content: bytes | None) -> None:
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_bytes(content)
    assert left_out(text_of(run_dir)) == sections


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.csv", "mistakes.png", "filters.png", "config.yaml"])
def test_torn_files(run_dir: Path, name: str) -> None:
    content = (run_dir / name).read_bytes()
    (run_dir / name).write_bytes(content[: len(content) // 2])
    assert f"{100 * runs.summary(run_dir)['test_accuracy']:.2f}" in text_of(run_dir)


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 2.5, True, [["a"]], float("1e400")])
def test_impossible_values_in_the_summary(run_dir: Path, value: object) -> None:
    figures = runs.summary(run_dir)
    for name in figures:
        (run_dir / "summary.json").write_text(json.dumps(figures | {name: value}))
        assert "<h2>Receipts</h2>" in text_of(run_dir), name


def test_a_class_without_test_images(tmp_path: Path) -> None:
    """As with an eval.test_subset below 10."""
    confusion = [[3] + 9 * [0], *(10 * [0] for _ in range(9))]
    text = score_sections.classes(run_data.RunData(tmp_path, "x", {}, {}, {"test_confusion": confusion}))
    assert '<th scope="row">airplane</th><td class="number">100.0</td>' in text
    assert text.count('<td class="number">-</td><td class="text"></td><td class="number">-</td>') == 9


def test_predictions_of_another_test_are_not_shown(run_dir: Path) -> None:
    change_summary(run_dir, test_accuracy=runs.summary(run_dir)["test_accuracy"] + 0.01)
    text = text_of(run_dir)
    assert left_out(text) == ["Calibration", "Most confident mistakes"]
    assert "which is not the result of this run" in text


@pytest.mark.parametrize(("status", "text"), [
    ("running", "This run was killed, after 2026-11-30. Resume it with --run.resume auto."),
    ("stopped", "This run was stopped on 2026-11-30. Resume it with --run.resume auto."),
    ("failed", "This run failed on 2026-11-30.</p><pre>the loss is &lt;nan&gt;</pre>"),
    ("other", "This run is not finished, or its files are damaged."),
])  # fmt: skip
def test_runs_that_are_not_finished(run_dir: Path, status: str, text: str) -> None:
    (run_dir / "summary.json").unlink()
    values = {"status": status, "time": "2026-11-30", "message": "the loss is <nan>" if status == "failed" else ""}
    (run_dir / "status.json").write_text(json.dumps(values))
    assert text in text_of(run_dir)


def test_everything_from_files_is_escaped(run_dir: Path) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    figures = runs.summary(run_dir)
    change_summary(
        run_dir, command=evil, git_commit=evil, model=evil, precision=evil, device_names=[evil], data_receipt=[evil],
        model_sha256=evil, versions={evil: evil},
    )  # fmt: skip
    (run_dir / "config.yaml").write_text(to_yaml(Config()).replace("name: null", f"name: '{evil}'", 1))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, evil: 1.0}) + "\n")
    (run_dir / "status.json").write_text(json.dumps({"host": evil}))
    text = text_of(run_dir)
    assert figures["params"]
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert text.count("alert(1)") > 10


def test_a_long_run_stays_small(run_dir: Path) -> None:
    keys = ("train/loss", "train/objective", "train/accuracy", "lr", "lr/biases", "lr/muon", "gradient_norm",
            "data_wait", "images_per_second", "gpu_memory_bytes", "seconds", "mine/a", "mine/b")  # fmt: skip
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(
                json.dumps({"step": step, "epoch": step / 390, **{key: 1 / (step + k) for k, key in enumerate(keys)}})
                + "\n"
            )
    started = time.monotonic()
    path = run_report.write(run_dir)
    assert path.stat().st_size <= 500_000
    assert time.monotonic() - started < 60
    assert "mine/b" in path.read_text()


def test_differences_from_the_defaults(run_dir: Path) -> None:
    text = to_yaml(Config()).replace("label_smoothing: 0.1", "label_smoothing: 0.2") + "old:\n  setting: 7\n"
    (run_dir / "config.yaml").write_text(text)
    cell = r'<td class="text"><span>([^<]*)</span></td>'
    rows = re.findall(rf'<th scope="row">([a-z_.]+)</th>{cell}{cell}', text_of(run_dir))
    assert rows == [("optim.label_smoothing", "0.2", "0.1"), ("old.setting", "7", "no setting of this version")]


def test_what_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\. Give run directories"):
        run_report.write(tmp_path)
    with pytest.raises(UserError, match="holds no run, because it does not exist"):
        run_data.read(tmp_path / "none")


def test_torch_is_not_imported(run_dir: Path) -> None:
    code = "import sys; from pathlib import Path; from cifar_dist.reports.run_report import write; "
    code += "write(Path(sys.argv[1])); print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", code, str(run_dir)], text=True, timeout=60)
    assert output == "False False\n"
