"""The direction of imports: commands -> benchmarks -> training -> (data, models, tracking) -> the ground; and small
modules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cifar_dist"
GROUND = {
    "config", "limits", "distributed", "errors", "files", "hashing", "cli", "stopping", "slurm", "roll_call",
    "processes", "place", "bundled",
}  # fmt: skip
FOLDERS = {"data", "models", "tracking"}
# What a module of each layer may import beside its own layer. Commands may import everything, and nobody them.
BELOW = {
    "ground": set(), **{name: {"ground"} for name in FOLDERS}, "training": {"ground", *FOLDERS},
    "benchmarks": {"ground", *FOLDERS, "training"},
}  # fmt: skip
MAX_LINES = 300
# What changes or asks the process or the machine, and so has no place in an import.
UNDOES_FFCV = "torch.set_num_threads"  # which importing ffcv calls with 1
NOT_AT_IMPORT = (
    "torch.cuda.", "torch.set_", "torch.manual_seed", "random.seed", "np.random.seed", "os.sched", "signal.",
    "warnings.", "logging.basicConfig", "logging.FileHandler", "argparse.", "tyro.cli", "print",
)  # fmt: skip

MODULES = {
    ".".join(["cifar_dist", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layer(module: str) -> str:
    """ground, data, models, tracking, training, benchmarks or command, of a module like cifar_dist.data.order."""
    part = module.split(".")[1]
    if part in GROUND:
        return "ground"
    return part if part in BELOW else "command"


def imported(source: str) -> set[str]:
    """The modules of this package that `source` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "cifar_dist"}


def violations(module: str, source: str) -> set[str]:
    """What `source`, as the text of `module`, imports against the direction."""
    own = layer(module)
    if own == "command":
        return set()
    return {name for name in imported(source) if layer(name) not in BELOW[own] | {own}}


def calls_at_import(source: str) -> Iterator[str]:
    """Names of the functions called while a module is being imported."""
    todo: list[ast.AST] = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert violations(module, source) == set()
    assert len(source.splitlines()) <= MAX_LINES
    allowed = UNDOES_FFCV if module == "cifar_dist.data.ffcv_parts" else ""
    assert [call for call in calls_at_import(source) if call.startswith(NOT_AT_IMPORT) and call != allowed] == []
    if module.endswith("__init__"):
        assert source == "", "no re-exports"


def test_all_layers_are_there() -> None:
    layers = {layer(module) for module in MODULES if not module.endswith("__init__")}
    assert layers == {"ground", "data", "models", "tracking", "training", "benchmarks", "command"}
    assert {f"cifar_dist.{name}" for name in GROUND} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("cifar_dist.data.order", "from cifar_dist.models.layers import scaled", "cifar_dist.models.layers"),
        ("cifar_dist.models.layers", "from cifar_dist.data import augment, order", "cifar_dist.data.augment"),
        ("cifar_dist.tracking.tracker", "import cifar_dist.training.run", "cifar_dist.training.run"),
        ("cifar_dist.training.run", "from cifar_dist import train", "cifar_dist.train"),
        ("cifar_dist.config", "from cifar_dist.data import beton", "cifar_dist.data.beton"),
        ("cifar_dist.data.order", "def f():\n    from cifar_dist.training import optim", "cifar_dist.training.optim"),
    ],
)
def test_the_checker_sees_a_violation(module: str, line: str, wrong: str) -> None:
    assert wrong in violations(module, MODULES[module].read_text(encoding="utf-8") + "\n" + line)


def test_the_checker_allows_the_right_direction() -> None:
    assert violations("cifar_dist.training.run", "from cifar_dist.data import order\nimport torch") == set()
    assert violations("cifar_dist.data.order", "from cifar_dist import config, errors, hashing") == set()
    assert violations("cifar_dist.train", "from cifar_dist.training.run import run") == set()


def test_the_checker_sees_calls() -> None:
    source = "N = torch.cuda.device_count()\ndef f():\n    torch.cuda.synchronize()\nclass A:\n    x = print(1)"
    assert set(calls_at_import(source)) == {"torch.cuda.device_count", "print"}


@pytest.fixture(scope="module")
def after_importing_everything() -> dict[str, bool]:
    """What a fresh process finds unchanged after importing every module of the package."""
    names = [module.removesuffix(".__init__") for module in MODULES]
    code = f"""
import importlib, json, logging, torch
torch.set_num_threads(2)
state = torch.random.get_rng_state()
for name in {names}:
    importlib.import_module(name)
print(json.dumps({{
    "threads": torch.get_num_threads() == 2,
    "generator": torch.equal(torch.random.get_rng_state(), state),
    "devices": not torch.cuda.is_initialized(),
    "log": not logging.getLogger("cifar_dist").handlers,
}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=120
    )
    unchanged: dict[str, bool] = json.loads(result.stdout)
    return unchanged


@pytest.mark.parametrize("what", ["generator", "devices", "log"])
def test_importing_everything_changes_nothing(after_importing_everything: dict[str, bool], what: str) -> None:
    assert after_importing_everything[what]


def test_importing_everything_leaves_torchs_threads(after_importing_everything: dict[str, bool]) -> None:
    assert after_importing_everything["threads"]
