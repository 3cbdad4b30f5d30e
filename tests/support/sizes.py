"""Sizes of the package, for tests/unit/test_imports.py and for people: `python -m tests.support.sizes`."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cifar_dist"
SIDE_ROOMS = ("cifar_dist.data.prepare", "cifar_dist.models.published")
# The path of an optimizer step, a checkpoint and a score, and modules in its rooms that are not on it.
CORE = ("cifar_dist.config", "cifar_dist.distributed", "cifar_dist.data", "cifar_dist.models", "cifar_dist.training")
BESIDE = (
    *SIDE_ROOMS, "cifar_dist.models.__main__", "cifar_dist.training.debug", "cifar_dist.training.score_checkpoint",
    "cifar_dist.training.weights", "cifar_dist.training.summary", "cifar_dist.training.whitening",
)  # fmt: skip
MODULES = {
    ".".join(["cifar_dist", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def in_room(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def imported(source: str, everywhere: bool = True) -> set[str]:
    """Modules of this package that `source` imports: everywhere, or only while it is imported itself."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if not everywhere and isinstance(node, ast.FunctionDef):
            continue
        if not everywhere and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module or ""}
        todo.extend(ast.iter_child_nodes(node))
    return {name for name in found if name.split(".")[0] == "cifar_dist"}


def lines(module: str) -> int:
    return len(MODULES[module].read_text(encoding="utf-8").splitlines())


def closure(module: str) -> set[str]:
    """`module` and all that importing it imports, without empty packages."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += imported(MODULES[name].read_text(encoding="utf-8"), everywhere=False)
    return {name for name in found if lines(name)}


def core() -> list[str]:
    return [name for name in MODULES if in_room(name, CORE) and not in_room(name, BESIDE) and lines(name)]


def total(modules: object) -> int:
    assert isinstance(modules, (set, list, dict))
    return sum(map(lines, modules))


def main() -> None:
    trainer = closure("cifar_dist.training.trainer")
    whole = closure("cifar_dist.train") | closure("cifar_dist.training.run")
    print(f"package: {len([m for m in MODULES if lines(m)])} modules, {total(MODULES)} lines")
    print(f"core: {len(core())} modules, {total(core())} lines")
    print(f"imported by training/trainer.py: {len(trainer)} modules, {total(trainer)} lines")
    print(f"imported by python -m cifar_dist.train: {len(whole)} modules, {total(whole)} lines")
    rooms: dict[str, list[str]] = {}
    for name in MODULES:
        parts = name.split(".")
        room = ".".join(parts[1:-1]) if len(parts) > 2 else "top level"
        rooms.setdefault(room, []).append(name)
    for room, names in rooms.items():
        print(f"  {room:<20} {len([n for n in names if lines(n)]):>3} modules {total(names):>6} lines")


if __name__ == "__main__":
    main()
