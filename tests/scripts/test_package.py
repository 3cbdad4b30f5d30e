"""The wheel of this project, installed into an empty environment in another folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

from cifar_dist import __version__
from cifar_dist.__main__ import COMMANDS
from tests.support import runs
from tests.support.wheels import uv

pytestmark = [pytest.mark.run, pytest.mark.slow]
FEW = ("--train.max_steps", "4", "--debug.overfit_steps", "0", "--model.width", "0.0625", "--eval.tta", "none")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from a copy of what it is made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("cifar_dist", "configs"):
        shutil.copytree(runs.REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.REPOSITORY / name, source)
    command = [uv(), "build", "--quiet", "--wheel", "--out-dir", str(source / "dist"), str(source)]
    runs.finish(runs.start_command(command))
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def place(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment of its own, which has the wheel, and the dependencies of the one at work."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = folder / "environment"
    runs.finish(runs.start_command([uv(), "venv", "--quiet", "--python", str(runs.BIN / "python"), str(environment)]))
    python = environment / "bin/python"
    install = [uv(), "pip", "install", "--quiet", "--no-deps", "--no-index", "--python", str(python), str(built)]
    runs.finish(runs.start_command(install))
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Not as a folder of .pth files: that of the checkout has no effect.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def call(place: Path, *words: str | Path, code: int = 0) -> str:
    """The output of a command of the environment, started in `place`."""
    outside = ("PYTHONPATH", "CIFAR_DIST_PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    process = subprocess.Popen(
        [str(place / "environment/bin" / words[0]), *map(str, words[1:])],
        cwd=place, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return runs.finish(process, code)


def test_contents(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Parser().parsestr(archive.read(metadata).decode())
    project = tomllib.loads((runs.REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [text for text in described.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert described["Version"] == __version__
    assert len(needed) == len(project["dependencies"])
    configs = {path.name for path in (runs.REPOSITORY / "configs").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("cifar_dist/configs/")} == configs
    assert {name.split("/")[0] for name in names} == {"cifar_dist", metadata.split("/")[0]}


def test_commands_answer(place: Path) -> None:
    assert call(place, "cifar-dist", "--version") == f"cifar-dist {__version__}\n"
    where = call(place, "python", "-c", "import cifar_dist; print(cifar_dist.__file__)")
    assert Path(where).is_relative_to(place)
    assert call(place, "cifar-dist", "--help") == call(place, "python", "-m", "cifar_dist", "--help")
    for name in COMMANDS.keys() - {"models"}:
        assert f"usage: python -m cifar_dist.{name} " in call(place, "cifar-dist", name, "--help")
    assert "Did you mean debug?" in call(place, "cifar-dist", "train", "--config", "debugg", code=2)
    assert "train.epochs is 0" in call(place, "cifar-dist", "train", "--config", "debug", "--train.epochs", "0", code=2)


@pytest.mark.data
def test_trains_scores_and_repeats(place: Path, data_dir: Path) -> None:
    small = (*FEW, "--data.dir", data_dir)
    call(place, "cifar-dist", "train", "--config", "debug", "--run.name", "mine", *small)
    figures = runs.summary(place / "runs/mine")
    assert (figures["steps"], figures["test_n"], figures["world_size"]) == (4, 10_000, 1)
    (written,) = re.findall(r"\{.*\}", call(place, "cifar-dist", "evaluate", "runs/mine"), flags=re.S)
    assert json.loads(written)["accuracy"] == figures["test_accuracy"]
    # torchrun with the installed package.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cifar_dist.train")
    both = (*small, "--train.micro_batch_size", "32", "--train.max_steps", "2")
    call(place, "python", *torchrun, "--config", "debug", "--run.name", "two", *both)
    assert runs.summary(place / "runs/two")["world_size"] == 2
    output = call(place, "cifar-dist", "sweep", "debug", "1", "--run.name", "several", *both)
    assert re.search(r"^seed 0 ", output, flags=re.M)
    Image.new("RGB", (40, 30), "navy").save(place / "navy.png")
    output = call(place, "cifar-dist", "predict", "runs/mine", "navy.png", "--format", "jsonl")
    assert [len(json.loads(line)["predictions"]) for line in output.splitlines() if line.startswith("{")] == [3]
    call(place, "cifar-dist", "export", "runs/mine", "--format", "safetensors")
    assert {path.name for path in (place / "runs/mine/export").iterdir()} >= {
        "model.safetensors",
        "model.py",
        "README.md",
    }
