"""docs/troubleshooting.md quotes messages of the code and names a test for each; it says which ones are slow."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support import runs

PAGE = runs.REPOSITORY / "docs/troubleshooting.md"
NAMED = re.compile(r"(test_\w+\.py)::(test_\w+)(\[[^]|]*\])?")
SLOW = "(slow tier)"
# pytest itself says what it would run, as a mark can stand at a function, at one of its parameters or at a whole file.
COLLECT = """
import sys, pytest
class Tiers:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            print("TIER", "slow" if item.get_closest_marker("slow") else "default", item.nodeid)
pytest.main(["--collect-only", "-q", "-s", "-m", "", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Tiers()])
"""


def faults() -> list[str]:
    """The entries of the page, each with its comment that names the tests."""
    return PAGE.read_text(encoding="utf-8").split("\n### ")[1:]


@pytest.fixture(scope="module")
def tiers() -> dict[str, str]:
    """Of each test in the files that the page names, as file.py::name[parameters], whether it is default or slow."""
    names = {file for row in faults() for file, _, _ in NAMED.findall(row)}
    files = sorted(str(path) for path in (runs.REPOSITORY / "tests").rglob("test_*.py") if path.name in names)
    own = ("PYTEST_XDIST_WORKER", "CIFAR_DIST_TEST_SESSION")  # it is a session of its own, and no worker
    environment = {name: value for name, value in os.environ.items() if name not in own}
    result = subprocess.run(
        [sys.executable, "-c", COLLECT, *files],
        cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.findall(r"^TIER (\w+) \S*?(test_\w+\.py::.+)$", result.stdout, flags=re.M)
    assert found, result.stdout + result.stderr
    return {test: tier for tier, test in found}


def tiers_of(tiers: dict[str, str], file: str, name: str, parameters: str) -> set[str]:
    """Those of one name on the page; parameters that end in ... stand for all that begin like them."""
    test = f"{file}::{name}"
    if parameters.endswith("...]"):
        return {tier for each, tier in tiers.items() if each.startswith(test + parameters.removesuffix("...]"))}
    if parameters:
        return {tier for each, tier in tiers.items() if each == test + parameters}
    return {tier for each, tier in tiers.items() if each.split("[")[0] == test}


def test_named_tests_exist(tiers: dict[str, str]) -> None:
    assert len(faults()) >= 50
    for row in faults():
        named = NAMED.findall(row)
        assert named or "by hand" in row, row
        assert [name for name in named if not tiers_of(tiers, *name)] == [], row


def test_entries_that_only_slow_tests_show_say_so(tiers: dict[str, str]) -> None:
    """An entry says "(slow tier)" after the name of its test exactly if ./launch/test alone runs none of its tests."""
    wrong = []
    for row in faults():
        named = NAMED.findall(row)
        only_slow = bool(named) and all("default" not in tiers_of(tiers, *name) for name in named)
        if only_slow != (SLOW in row.split("<!--")[1]):
            wrong.append(f"{row.splitlines()[0]}: {'add' if only_slow else 'remove'} {SLOW} in the comment")
    assert not wrong, "\n".join(wrong)


def test_quoted_messages_are_in_the_code() -> None:
    """At least 0.3 of the characters of each quoted heading are in pieces of ten that the code holds as strings.

    The rest are names and numbers of one run. A message that was reworded has next to none.
    """
    scripts = [path for name in ("launch", "slurm") for path in (runs.REPOSITORY / name).rglob("*") if path.is_file()]
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    for path in (runs.REPOSITORY / "cifar_dist").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        values = [node.value for node in nodes if isinstance(node, ast.Constant)]
        texts += [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
    strings = "\n".join(texts)

    def share(message: str) -> float:
        starts = [start for start in range(len(message) - 9) if message[start : start + 10] in strings]
        return len({place for start in starts for place in range(start, start + 10)}) / len(message)

    quoted = [text for row in faults() for text in re.findall("`([^`]{12,})`", row.splitlines()[0])]
    assert len(quoted) >= 50
    assert share("error: somebody has forgotten all about this message.") < 0.3
    assert [text for text in quoted if share(text) < 0.3 and not text.startswith("srun: ")] == []
