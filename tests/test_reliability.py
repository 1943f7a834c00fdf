"""docs/reliability.md names tests that exist, marked slow where they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<promise>.+?) \| (?P<tests>`.+`)(?P<slow> \*slow\*)? \|$", re.MULTILINE)
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = [(name, row["slow"] is not None) for row in ROW.finditer(PAGE) for name in re.findall(r"`(.+?)`", row["tests"])]


def test_every_row_names_a_promise_and_its_tests():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line != "| promise | test |"]
    assert rows == [row[0] for row in ROW.finditer(PAGE)]
    assert rows


@pytest.mark.parametrize(("name", "slow"), NAMED, ids=[name for name, _ in NAMED])
def test_the_test_exists(name, slow):
    file, test = name.split("::")
    found = [
        node
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == test
    ]
    assert len(found) == 1
    assert slow == any("mark.slow" in ast.unparse(mark) for mark in found[0].decorator_list)
