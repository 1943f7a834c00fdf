"""What every supported version of torch does, the oldest included."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchreg as tr
from tests.models import TORCH, batch, mlp

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def trained(compiling: bool) -> dict[str, Tensor]:
    """Four steps of a loss with one penalty and a prox of another; both strengths change on the way."""
    torch.compiler.reset()
    model = mlp()
    prox = tr.Regularizer(model, {"fc1.weight": tr.L1(0.5)})
    added = tr.Regularizer(model, {"fc2.weight": tr.ElasticNet(1e-2, 1e-2)})
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=1e-2, regularizer=prox)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - y).square().mean() + added()

    step = optimizer.step
    if compiling:
        loss, step = torch.compile(loss, backend="aot_eager"), torch.compile(step, backend="aot_eager")
    for i in range(4):
        if i == 2:
            prox["fc1.weight"].strength, added["fc2.weight"].l1 = 0.1, 0.3
        optimizer.zero_grad()
        loss(*batch()).backward()
        step()
    return model.state_dict()


def test_a_compiled_training_ends_where_one_that_is_not_ends():
    compiled, plain = trained(True), trained(False)
    assert (plain["fc1.weight"] == 0).any()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_the_torch_at_hand_is_one_that_is_supported():
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', PROJECT)
    assert (int(oldest[1]), int(oldest[2])) <= TORCH


def test_the_version_is_written_once_as_a_literal_that_setuptools_reads_without_an_import():
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "torchreg").rglob("*.py")]
    assert [path.name for path in sources if tr.__version__ in path.read_text(encoding="utf-8")] == ["__init__.py"]
    assert f'\n__version__ = "{tr.__version__}"\n' in (ROOT / "torchreg" / "__init__.py").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in PROJECT
    assert 'version = { attr = "torchreg.__version__" }' in PROJECT


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == tr.__version__


def test_every_listed_python_is_one_that_make_tests():
    listed = re.findall(r"Python :: (3\.\d+)", PROJECT)
    tested = re.search(r"^PYTHONS \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested[1].split() == [f"python{version}" for version in listed]
    assert f'requires-python = ">={listed[0]}"' in PROJECT


def test_a_python_that_is_not_installed_is_skipped_with_a_message(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    try:
        run = subprocess.run(
            ["make", "--no-print-directory", "test-versions", "PYTHONS=python3.0 nowhere/python"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no make")
    assert (run.returncode, run.stdout.splitlines()) == (
        0,
        ["skipped: python3.0 is not installed", "skipped: nowhere/python is not installed"],
    )
    assert "torch==2.6" in (tmp_path / ".venv-versions" / "oldest.txt").read_text().splitlines()
