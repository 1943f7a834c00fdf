"""The public API is what tests/public_api.txt says: nothing of it changes by accident."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
import torch

import torchreg
from tests import public_api

LISTED = Path(__file__).with_name("public_api.txt").read_text(encoding="utf-8")


def test_the_public_api_is_the_listed_one():
    changed = [
        line
        for line in difflib.unified_diff(LISTED.splitlines(), public_api.listing().splitlines(), n=2, lineterm="")
        if not line.startswith(("---", "+++"))
    ]
    if changed:
        pytest.fail(
            "the public API is not the one that tests/public_api.txt lists (- listed, + found):\n\n"
            + "\n".join(changed)
            + "\n\nIf users are meant to see this change, write a line in CHANGELOG.md, and the list anew:\n"
            "python -m tests.public_api > tests/public_api.txt",
            pytrace=False,
        )


@pytest.mark.parametrize(
    "line",
    [
        "class torchreg.L1(Penalty)",
        "    __init__(self, strength: float) -> None",
        "    classmethod from_sklearn(cls, alpha: float, l1_ratio: float = 0.5) -> ElasticNet",
        "    staticmethod twice(w: Tensor) -> Tensor",
        "    enabled: bool",
        "    target: float (settable)",
        "def torchreg.optim.learning_rate(group: Group, state: State, parameter: Tensor) -> Step",
        "$ torchreg report CHECKPOINT --key --json --near-zero",
    ],
)
def test_the_list_has_every_kind_of_name(line, monkeypatch):
    class Odd:
        target = property(torchreg.TargetSparsity.target.fget, lambda self, value: None)

        @staticmethod
        def twice(w: Tensor) -> Tensor:  # noqa: F821  annotations are text
            return 2 * w

    Odd.__module__ = "torchreg.odd"
    monkeypatch.setitem(public_api.NAMES, "torchreg.Odd", Odd)
    assert line in public_api.listing().splitlines()


def test_the_page_on_versions_names_every_public_module():
    page = (Path(__file__).parents[1] / "docs" / "versions.md").read_text(encoding="utf-8")
    rule = page.partition("## What is public")[2].partition("\n- ")[2].partition("\n- ")[0]
    named = {f"torchreg.{name}" for name in re.findall(r"`tr\.(\w+)`", rule)}
    assert named == {*public_api.MODULES} - {"torchreg"}


def test_a_change_of_a_default_is_seen(monkeypatch):
    def soft_threshold(w: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
        return w

    monkeypatch.setitem(public_api.NAMES, "torchreg.functional.soft_threshold", soft_threshold)
    with pytest.raises(pytest.fail.Exception, match=r"\n\+def torchreg\.functional\.soft_threshold\(w: .* = 1\.0\)"):
        test_the_public_api_is_the_listed_one()


def test_no_line_holds_what_differs_from_run_to_run():
    assert " at 0x" not in LISTED
