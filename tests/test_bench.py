"""The benchmark itself, with few images: its table, its JSON and its refusals."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.bench import AUGMENTED, READ, TORCHVISION, measure

REPOSITORY = Path(__file__).parents[1]


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cifar_dist.bench", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=REPOSITORY)


def test_measured_in_turn() -> None:
    calls: list[str] = []

    def pipeline(name: str, seconds: float) -> int:
        calls.append(name)
        time.sleep(seconds)
        return 100

    rates = measure({"a": lambda: pipeline("a", 0.01), "b": lambda: pipeline("b", 0.05)}, repeats=3)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in rates.values()] == [3, 3]
    assert all(rate <= 100 / 0.01 for rate, _ in rates["a"])
    assert all(rate <= 100 / 0.05 for rate, _ in rates["b"])
    assert all(0 <= share < 0.9 for values in rates.values() for _, share in values)  # asleep most of the time


@pytest.mark.data
def test_loader(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--num_images", "60000", "--num_torchvision", "300", "--batch_size", "100", "--repeats", "3"]
    result = bench("loader", "--data.dir", str(data_dir), *sizes, "--json", str(file))
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [entry["name"] for entry in report["results"]] == [READ, AUGMENTED, TORCHVISION]
    assert [entry["num_images"] for entry in report["results"]] == [60_000, 60_000, 300]
    reference = report["results"][-1]["median"]
    for entry in report["results"]:
        rates = entry["images_per_second"]
        assert len(rates) == 3
        assert entry["median"] == statistics.median(rates)
        assert entry["ratio"] == pytest.approx(entry["median"] / reference)
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"{entry['name']}  "))
        assert f"{entry['median']:,.0f}" in line
        assert f"{min(rates):,.0f}..{max(rates):,.0f}" in line
        assert line.split()[-2:] == [f"{entry['ratio']:.1f}", f"{statistics.median(entry['core_share']):.0%}"]
        assert all(0 < share <= 1.05 for share in entry["core_share"])
    # Far below what a quiet machine gives, but far above what a mistake would leave.
    read, augmented, torchvision = (entry["median"] for entry in report["results"])
    assert read > 5 * torchvision
    assert read > augmented > 2 * torchvision
    assert 0 < report["first_batch_seconds"] < 60
    header = result.stdout.splitlines()[:4]
    assert header[0].endswith(
        f"-m cifar_dist.bench loader {shlex.join(['--data.dir', str(data_dir), *sizes, '--json', str(file)])}"
    )
    assert report["hardware"] in header[1]
    assert f"ffcv {report['versions']['ffcv']}" in header[2]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["loadr"], 2, "loadr"),
        ([], 2, "loader"),
        (["loader", "--num_image", "5"], 2, "--num_images"),
        (["loader", "--repeats", "0"], 2, "repeats is 0; valid: 1 or more."),
        (["loader", "--json", "/nowhere/a.json"], 2, "the folder /nowhere does not exist"),
        (["loader", "--data.dir", "/nowhere"], 3, "/nowhere/train.beton"),
    ],
)
def test_mistakes(args: list[str], code: int, message: str) -> None:
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
    assert "--num_images" in result.stdout
    assert result.stderr == "\n"
