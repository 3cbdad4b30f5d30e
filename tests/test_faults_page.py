"""docs/faults.md names a test for every fault, and each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/faults.md"


def test_named_tests_exist() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) >= 50
    for row in faults:
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", row)
        assert named or "by hand" in row, row
        for file, name in named:
            functions = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if hasattr(node, "name")}
            assert name in functions, f"{file}::{name}"
