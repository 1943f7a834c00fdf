"""The pages of docs/: every example runs as it stands, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tests.models import SHARDS, TORCH

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def said(text: str) -> str:
    """All of it; on an older torch, which draws and sums in other orders, all but the figures and their columns."""
    return text if TORCH >= (2, 15) else re.sub(r"[-\d.e]*\d|[ -]+", "", text)


def test_the_pages_are_found():
    assert "where-it-ends" in {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_prints_what_the_page_says(page):
    if page.stem == "many-processes" and not SHARDS:
        pytest.skip("processes on gloo, with a fully_shard that runs on a CPU")
    names: dict[str, object] = {}  # a page reads from top to bottom
    for code, expected in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert said(printed.getvalue()) == said(expected), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_fits_on_a_screen(page):
    text = page.read_text(encoding="utf-8")
    examples = [code for code, _ in EXAMPLE.findall(text)]
    assert len(examples) == text.count("```python")
    assert all(len(code.splitlines()) <= 15 for code in examples)
    assert all(len(line) <= 120 for code in examples for line in code.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"(?:benchmarks|docs|examples|notebooks|tests)/[\w/.-]+\.\w+", page.read_text(encoding="utf-8"))
    # Names of tests are relative to tests/, whose folders mirror the library's and the examples.
    assert not [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "tests"))]
