"""docs/faults.md names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.compile(r"`(test_\w+\.py)::(\w+)`")


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = NAMED.findall((TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    there = {
        (file.name, node.name)
        for file in TESTS.rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert [pair for pair in named if pair not in there] == []
