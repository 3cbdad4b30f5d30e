"""The rooms of the package and what each may import; ceilings on sizes; nothing happens at import.

A room is a package of docs/architecture.md; `ground` are its base modules. A room imports from the rooms named in
ALLOWED, and nobody imports commands.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.sizes import MODULES, PACKAGE, SIDE_ROOMS, closure, core, imported, in_room, lines, total

GROUND = {
    "config", "cli", "errors", "distributed", "environment", "extension", "files", "filesystem", "hashing",
    "machine_code", "network",
    "options", "phase", "process", "suggestions", "yaml_file",
}  # fmt: skip
PARTS = {"ground", "data", "models", "tracking"}
ALLOWED = {
    "ground": set[str](),
    "data": {"ground"},
    "models": {"ground"},
    "tracking": {"ground"},
    "training": PARTS,
    "fault_tolerance": {"ground"},
    "reports": {"ground", "tracking", "training", "fault_tolerance"},
    "cluster": {"ground", "fault_tolerance", "reports"},
    "diagnosis": {"ground", "data", "tracking", "cluster", "offline"},
    "planning": PARTS | {"training", "fault_tolerance"},
    "benchmarks": PARTS | {"training", "fault_tolerance"},
    "offline": {"ground", "data", "training"},
    "inference": {"ground", "data", "models", "training"},
}
# Imports against these rules, each with its reason.
EXCEPTIONS = {
    ("cifar_dist", "inference"): "cifar_dist.load, imported when it is used",
    ("cifar_dist.tracking.wandb_media", "cifar_dist.data.cifar10"): "names of the classes",
    ("cifar_dist.training.run", "fault_tolerance"): "connects training with fault tolerance",
    ("cifar_dist.training.run", "reports"): "writes report.html",
    ("cifar_dist.reports.score_sections", "cifar_dist.data.cifar10"): "names of the classes",
    ("cifar_dist.fault_tolerance.status", "cifar_dist.training.checkpoint"): "names the newest checkpoint",
}
MAX_LINES, MIN_CORE_LINES = 300, 60
CONSTANTS = {"cifar_dist.data.cifar10"}  # may be shorter
# Ceilings in lines; an issue that adds to the core may raise one, with the reason in its commit.
MAX_PACKAGE, MAX_CORE, MAX_TRAINER_MODULES, MAX_TRAINER_LINES = 19_860, 4_960, 33, 4_830
# Calls that change or query the process or the machine; an import must not make them.
UNDOES_FFCV = "torch.set_num_threads"  # importing ffcv sets torch to one thread
NOT_AT_IMPORT = (
    "torch.cuda.", "torch.set_", "torch.manual_seed", "random.seed", "np.random.seed", "os.sched", "signal.",
    "warnings.", "logging.basicConfig", "logging.FileHandler", "argparse.", "tyro.cli", "print",
)  # fmt: skip


def room(module: str) -> str:
    """The room of a module like cifar_dist.data.order; "ground" or "command" for modules at the top level."""
    name = module.split(".")[1] if "." in module else "ground"
    if name in ALLOWED:
        return name
    return "ground" if name in GROUND or module == "cifar_dist" else "command"


def violations(module: str, source: str) -> set[str]:
    """What `source`, as the text of `module`, imports against the rules."""
    own = room(module)
    if own == "command":
        return set()
    wrong = {name for name in imported(source) if room(name) not in ALLOWED[own] | {own}}
    return {name for name in wrong if not {(module, name), (module, room(name))} & EXCEPTIONS.keys()}


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
    assert lines(module) <= MAX_LINES
    allowed = UNDOES_FFCV if module.startswith("cifar_dist.data.") else ""
    assert [call for call in calls_at_import(source) if call.startswith(NOT_AT_IMPORT) and call != allowed] == []
    if MODULES[module].name == "__init__.py" and module != "cifar_dist":  # which has the version and `load`
        assert source == "", "no re-exports"


def test_all_rooms_are_there() -> None:
    assert {room(module) for module in MODULES} == {*ALLOWED, "command"}
    assert {f"cifar_dist.{name}" for name in GROUND} <= set(MODULES)


def test_the_package_imports_torch_only_for_load() -> None:
    code = "import sys, cifar_dist; a = 'torch' in sys.modules; cifar_dist.load; print(a, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "False True\n"


def test_exceptions_are_needed() -> None:
    for module, target in EXCEPTIONS:
        assert any(target in (name, room(name)) for name in imported(MODULES[module].read_text(encoding="utf-8")))


def test_sizes() -> None:
    trainer = closure("cifar_dist.training.trainer")
    assert total(MODULES) <= MAX_PACKAGE
    assert total(core()) <= MAX_CORE
    assert len(trainer) <= MAX_TRAINER_MODULES
    assert total(trainer) <= MAX_TRAINER_LINES
    assert [name for name in core() if lines(name) < MIN_CORE_LINES and name not in CONSTANTS] == []


def test_training_imports_no_side_room() -> None:
    imports = closure("cifar_dist.train") | closure("cifar_dist.training.run")
    assert [name for name in imports if in_room(name, SIDE_ROOMS)] == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("cifar_dist.data.order", "from cifar_dist.models.layers import scaled", "cifar_dist.models.layers"),
        ("cifar_dist.models.layers", "from cifar_dist.data import augment, order", "cifar_dist.data.augment"),
        ("cifar_dist.tracking.tracker", "import cifar_dist.training.run", "cifar_dist.training.run"),
        ("cifar_dist.training.run", "from cifar_dist import train", "cifar_dist.train"),
        ("cifar_dist.training.trainer", "from cifar_dist.fault_tolerance import health",
         "cifar_dist.fault_tolerance.health"),
        ("cifar_dist.config", "from cifar_dist.data import loader", "cifar_dist.data.loader"),
        ("cifar_dist.data.order", "def f():\n    from cifar_dist.training import optim", "cifar_dist.training.optim"),
    ],
)  # fmt: skip
def test_the_checker_sees_a_violation(module: str, line: str, wrong: str) -> None:
    assert wrong in violations(module, MODULES[module].read_text(encoding="utf-8") + "\n" + line)


def test_the_checker_allows_the_right_direction() -> None:
    assert violations("cifar_dist.training.run", "from cifar_dist.data import order\nimport torch") == set()
    assert violations("cifar_dist.data.order", "from cifar_dist import config, errors, hashing") == set()
    assert violations("cifar_dist.train", "from cifar_dist.training.run import Run") == set()


def test_the_checker_sees_calls() -> None:
    source = "N = torch.cuda.device_count()\ndef f():\n    torch.cuda.synchronize()\nclass A:\n    x = print(1)"
    assert set(calls_at_import(source)) == {"torch.cuda.device_count", "print"}


@pytest.fixture(scope="module")
def after_importing_everything() -> dict[str, bool]:
    """What a fresh process finds unchanged after importing every module of the package."""
    names = list(MODULES)
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
