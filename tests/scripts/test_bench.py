"""`python -m cifar_dist.bench` with little work: tables, JSON, comparison, refusals."""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.bench import _TIME_IS_UP, _measure
from cifar_dist.benchmarks import baselines, report, scaling, step
from cifar_dist.benchmarks.measure import Row, Table, interleaved
from cifar_dist.benchmarks.settings import PARTS, BenchConfig
from cifar_dist.benchmarks.step import cost_of
from cifar_dist.config import ModelConfig
from cifar_dist.distributed import World
from cifar_dist.errors import UserError
from cifar_dist.models.layers import num_parameters
from cifar_dist.training.precision import Precision
from tests.support.runs import CPUS, ON_ONE_CPU, REPOSITORY

FP32 = Precision("fp32", "cpu")


def bench(
    *args: str | Path, timeout_s: float = 250, prefix: tuple[str, ...] = ON_ONE_CPU
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "cifar_dist.bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=REPOSITORY)


def test_cases_are_interleaved() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    config = BenchConfig("step", repeats=3, seconds=0.05)
    fast, slow = interleaved({"a": (100, lambda: work("a", 0.02)), "b": (100, lambda: work("b", 0.05))}, config)
    # Three calls to warm up, one to find out how many fit into 0.05 s; then that many, interleaved.
    assert calls[:8] == ["a"] * 4 + ["b"] * 4
    num = calls[8:].index("b")
    assert 2 <= num <= 3
    assert calls[8:] == [*["a"] * num, "b"] * 3
    assert len(fast.values) == len(slow.values) == 3
    assert all(rate <= 100 / 0.02 for rate in fast.values)
    assert all(rate <= 100 / 0.05 for rate in slow.values)


def test_ratios_are_of_medians() -> None:
    rows = [Row("own loader", [30.0, 10.0, 20.0]), Row("torchvision", [5.0, 4.0, 6.0])]
    for reference, ratios in (("torchvision", [4.0, 1.0]), ("", [None, None])):
        table = Table("rates", "images/s", rows, reference).to_json()
        assert [row["ratio"] for row in table["rows"]] == ratios


LITTLE_WORK = ("--repeats", "2", "--width", "0.0625", "--micro_batch_size", "16", "--compile", "off")


def measured(part: str, data_dir: Path, file: Path, *args: str) -> dict[str, Any]:
    """The JSON of a benchmark with little work; checks that it prints the same figures."""
    result = bench(part, "--data.dir", data_dir, *LITTLE_WORK, *args, "--json", file, timeout_s=540)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = report.read(file)
    for content in figures["parts"].values():
        assert content["tables"]
        for table in content["tables"]:
            for row in table["rows"]:
                assert row["median"] == statistics.median(row["values"])
                assert 0 < row["median"] < float("inf")
    printed = result.stdout
    assert printed == report.text(figures) + "\n"
    assert figures["hardware"] in printed
    assert f"ffcv {figures['versions']['ffcv']}" in printed
    return figures


@pytest.mark.data
@pytest.mark.run
def test_step(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = measured("step", data_dir, file, "--seconds", "0.02")
    assert list(figures["parts"]) == ["step"]
    _check_step(figures)
    compared = bench("compare", file, file)
    assert compared.returncode == 0
    assert re.search(r"^0 of \d+ rows changed by more than their spread.$", compared.stdout, flags=re.M)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.run
@pytest.mark.timeout(600)
def test_all(data_dir: Path, tmp_path: Path) -> None:
    figures = measured("all", data_dir, tmp_path / "figures.json", "--seconds", "0.05")
    assert list(figures["parts"]) == list(PARTS)
    one_core = figures["parts"]["loader"]["tables"][0]
    _check_loader(one_core)
    _check_step(figures)
    (training,) = figures["parts"]["train"]["tables"]
    names = ["training, end to end", "the same, images from memory", "bare step"]
    assert [row["name"] for row in training["rows"]] == names
    simulated = figures["parts"]["scaling"]["tables"][-1]
    assert simulated["title"].startswith("simulated")
    assert simulated["notes"][0].startswith("SIMULATION")


def _check_loader(one_core: dict[str, Any]) -> None:
    """Bounds far below the ratios on an idle machine, but far above those with a mistake."""
    rates = {row["name"]: row["median"] for row in one_core["rows"]}
    assert rates["this project, uint8"] > 10 * rates["torchvision v2 + DataLoader"]
    assert rates["this project, uint8"] > rates["this project, augmented"] > 3 * rates["torchvision v2 + DataLoader"]


def _check_step(figures: dict[str, Any]) -> None:
    *limits, augmentation, steps = figures["parts"]["step"]["tables"]
    assert [table["unit"] for table in limits] == ["TFLOP/s", "GB/s"]
    assert [row["name"] for row in augmentation["rows"]] == ["eager", "normalised only"]
    networks = ["V1, plain", "V1, 1x1 merged", "V2, plain", "V2, 1x1 merged", "V1, as trained by default, with Muon"]
    assert [row["name"] for row in steps["rows"]] == networks
    assert all(0 < row["% of product"] < 100 for row in steps["rows"])
    plain, *_, with_muon = (row["TFLOP/s"] / row["median"] for row in steps["rows"])
    assert with_muon > plain


@pytest.mark.data
def test_parts_that_exceed_the_time_limit_are_left_out(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = bench("all", "--data.dir", data_dir, "--limit_minutes", "0.05", "--json", file)
    assert result.returncode == 2
    assert "loader, step, train, scaling could not be measured; see above." in result.stderr
    assert result.stdout.count("FAILED: not measured: the time was up (--limit_minutes)") == len(PARTS)
    assert list(report.read(file)["parts"]) == list(PARTS)


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        ({"train": _TIME_IS_UP}, None),
        ({"train": _TIME_IS_UP, "step": "OSError: x"}, "step, train could not"),
        (dict.fromkeys(PARTS, _TIME_IS_UP), "loader, step, train, scaling could not"),
    ],
)
def test_parts_without_time_are_no_failure(
    failures: dict[str, str], error: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If others were measured. launch/measure then keeps the result."""
    parts: dict[str, dict[str, Any]] = {part: {"tables": [], "seconds": 0.0} for part in PARTS}
    for part, reason in failures.items():
        parts[part]["failure"] = reason
    monkeypatch.setattr("cifar_dist.bench._all_parts", lambda _: parts)
    monkeypatch.setattr("cifar_dist.data.prepare.install.verify", lambda *_, **__: None)
    with contextlib.nullcontext() if error is None else pytest.raises(UserError, match=error):
        _measure(BenchConfig(part="all", json=tmp_path / "figures.json"))
    assert list(report.read(tmp_path / "figures.json")["parts"]) == list(PARTS)


def test_other_networks_are_measured_after_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    build_step = baselines.project_step

    def build(config: ModelConfig, *arguments: Any, **named: Any) -> baselines.BareStep:
        if config.name == "inception_v2":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return build_step(config, *arguments, **named)

    monkeypatch.setattr(baselines, "project_step", build)
    config = BenchConfig("step", repeats=1, seconds=0.01, width=0.0625, micro_batch_size=(4,), device="cpu")
    table = step.measure(config.resolve(on_gpu=False))[-1]
    names = ["V1, plain", "V1, 1x1 merged", "V1, as trained by default, with Muon"]
    assert [row.name for row in table.rows] == names
    assert (
        table.notes[0] == "V2, plain: not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    )


@pytest.mark.parametrize("stem", ["cifar", "pooled", "strided"])
def test_torchvision_googlenet_has_as_many_parameters(stem: Any) -> None:
    """It has the stem of this project, and 3x3 in place of 5x5."""
    network = baselines.torchvision_googlenet(stem)
    own = baselines.project_step(ModelConfig(stem=stem, branch5x5="3x3"), 2, FP32).model
    assert num_parameters(network) == num_parameters(own)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_torchvision_googlenet_does_as_many_operations() -> None:
    """Flop of forward and backward agree, so the feature maps have the same sizes."""
    own = ModelConfig(stem="strided", branch5x5="3x3", merge_1x1="off")
    steps = baselines.torchvision_step("strided", 2, FP32), baselines.project_step(own, 2, FP32)
    first, second = (cost_of(one)[0] for one in steps)
    assert first == second > 0


def test_bare_step_trains() -> None:
    torch.manual_seed(0)
    bare = baselines.project_step(ModelConfig(stem="strided", width=0.125), 16, FP32)
    for group in bare.optimizer.param_groups:
        group["lr"] = 0.05
    first = bare.loss().item()
    for _ in range(10):
        bare()
    assert bare.loss().item() < 0.7 * first


def test_cost_of_a_known_operation() -> None:
    a, b = torch.ones(64, 32), torch.ones(32, 16)
    flops, num_bytes = cost_of(lambda: (a @ b).view(-1))
    assert flops == 2 * 64 * 32 * 16
    assert num_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_simulated_exchange() -> None:
    cluster = scaling.Cluster(8, inner_gb_per_s=100, inner_us=0, outer_gb_per_s=10, outer_us=1000)
    assert scaling.exchange_seconds(80e6, 1, cluster) == 0
    # 2 x 7/8 of 80 MB at 100 GB/s.
    assert scaling.exchange_seconds(80e6, 8, cluster) == pytest.approx(1.4e-3)
    # And then 2 x 3/4 of an eighth of it at 10 GB/s, and 6 messages.
    assert scaling.exchange_seconds(80e6, 32, cluster) == pytest.approx(1.4e-3 + 1.5e-3 + 6e-3)


def test_amounts_of_work_on_a_part_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four take part: with a micro-batch of 4 images each, or half of the global batch of all four each."""
    monkeypatch.setattr(torch.distributed, "new_group", lambda _: None)
    step = baselines.project_step(ModelConfig(stem="strided", width=0.0625), 4, FP32)
    steps, exchanges = dict[str, Any](), dict[str, Any]()
    scaling._add_cases(step, 2, World(3, 4, 3, 4, torch.device("cpu")), steps, exchanges)
    amounts = {"global batch 8": 8, "global batch 16": 16, "global batch 8, gradients not exchanged": 8}
    assert {name: amount for name, (amount, _) in steps.items()} == {f"2 processes, {k}": v for k, v in amounts.items()}
    assert exchanges["2 processes"][0] == 4e-9 * num_parameters(step.model)


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.skipif(len(CPUS) < 2, reason="has one processor")
def test_scaling_of_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = bench("scaling", *LITTLE_WORK, "--seconds", "0.05", "--json", file, prefix=())
    assert result.returncode == 0, result.stdout + result.stderr
    tables = report.read(file)["parts"]["scaling"]["tables"]
    steps, exchange, v1, v2, simulated = (table["rows"] for table in tables)
    num = min(len(CPUS), 8)
    names = [row["name"] for row in steps]
    assert names[:2] == ["1 process, global batch 16", f"1 process, global batch {16 * num}"]
    largest = f"{num} processes, global batch {16 * num}"
    assert names[-2:] == [largest, f"{largest}, gradients not exchanged"]
    assert exchange[-1]["name"] == f"{num} processes"
    for rows in (v1, v2):
        assert [row["name"] for row in rows] == [f"{num} processes, exact_sum {mode}" for mode in ("off", "on")]
    assert all(row["median"] > 0 for row in (*steps, *exchange, *v1, *v2))
    assert simulated[0]["median"] == pytest.approx(steps[0]["median"])
    assert simulated[0]["% efficiency"] == pytest.approx(100)
    assert simulated[-1]["% efficiency"] < simulated[-1]["% with exact_sum off"] < 100


def _report(**rates: list[float]) -> report.Report:
    table = Table("one core", "images/s", [Row(name, values) for name, values in rates.items()])
    return {**report.header(), "parts": {"loader": {"seconds": 1.0, "tables": [table.to_json()]}}}


def test_compare_marks_changes_beyond_the_spread() -> None:
    old = _report(same=[10.0, 12.0], up=[10.0, 12.0], down=[10.0, 12.0], gone=[1.0])
    new = _report(same=[11.9, 14.0], up=[12.1, 14.0], down=[9.9, 9.0], come=[1.0])
    text = report.compare(old, new)
    words = [line.split() for line in text.splitlines() if line.startswith("  loader / ")]
    marks = {line[line.index("/", 3) + 1]: line[-1] for line in words}
    assert marks["up"] == "faster"
    assert marks["down"] == "slower"
    assert marks["same"] not in ("slower", "faster")
    assert "2 of 3 rows changed by more than their spread." in text
    assert "In one file only: loader / one core / gone" in text
    assert "In one file only: loader / one core / come" in text


def test_compare_does_not_mark_single_values() -> None:
    assert "0 of 1 rows" in report.compare(_report(a=[1.0]), _report(a=[9.0]))


def test_compare_reports_different_hardware() -> None:
    old, new = _report(a=[1.0]), _report(a=[1.0])
    new["hardware"] = "another"
    assert "The hardware differs" in report.compare(old, new)
    assert "The hardware differs" not in report.compare(old, old)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "{}",
        '{"format": "cifar_dist bench, format 2"}',
        '{"format": "cifar_dist bench, format 2", "date": "", "hardware": "", "parts": {"a": {"tables": [{"title": "",'
        ' "rows": [{"name": "x", "median": "1", "values": []}]}]}}}',
    ],
)
def test_compare_refuses_other_files(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    result = bench("compare", file, file)
    assert result.returncode == 2
    assert f"{file} is missing or damaged, or was not written by bench --json" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["loadr"], 2, "loadr"),
        ([], 2, "loader"),
        (["loader", "--repeat", "5"], 2, "--repeats"),
        (["loader", "--repeats", "0"], 2, "repeats is 0; valid: 1 or more."),
        (["step", "--micro_batch_size", "16", "1"], 2, "micro_batch_size is 1; valid: 2 to 16384."),
        (["step", "--seconds", "-1"], 2, "seconds is -1.0; valid: above 0, at most 600."),
        (
            ["loader", "--json", "/nowhere/a.json"],
            2,
            "--json /nowhere/a.json cannot be written: No such file or directory.",
        ),
        (["loader", "--json", f"/tmp/{300 * 'a'}"], 2, "cannot be written: File name too long."),
        (["loader", "--data.dir", "/nowhere"], 3, "/nowhere/test.beton"),
        (["train", "--data.dir", "/nowhere"], 3, "/nowhere/test.beton"),
        (["all", "--data.dir", "/nowhere"], 3, "cifar_dist.prepare --data.dir /nowhere"),
        (["step", "--device", "cuda"], 2, "torch finds no GPU here"),
        (["scaling", "--device", "cuda"], 2, "device is cuda, but torch finds no GPU here"),
        (["scaling", "--limit_minutes", "0"], 2, "limit_minutes is 0.0; valid: above 0."),
        (["compare", "a.json"], 2, "NEW"),
    ],
)
def test_wrong_arguments_are_refused(args: list[str], code: int, message: str) -> None:
    result = bench(*args)
    assert result.returncode == code
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom cifar_dist import bench\ntry:\n    bench.main()\nfinally:\n    "
    code += "print(*(name for name in ('torch', 'numpy', 'ffcv') if name in sys.modules), file=sys.stderr)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY)
    assert result.returncode == 0
    assert "--micro_batch_size" in result.stdout
    assert result.stderr == "\n"
