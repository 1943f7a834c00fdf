"""examples/path.py, run as a user runs it: the path and the choice are scikit-learn's, computed here in another way."""

from __future__ import annotations

import os
import re
import subprocess

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from sklearn.model_selection import KFold

from tests import ROOT
from tests.models import STRICT

SCRIPT = ROOT / "examples" / "path.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    result = subprocess.run(
        [*STRICT, SCRIPT, "--points", "8", "--folds", "3", "--ratio", "0.02"],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout, folder


@pytest.fixture(scope="module")
def rows():
    """Inputs standardized by the training rows, targets, and the rows to train and to test."""
    data = load_diabetes()
    order = np.random.default_rng(0).permutation(442)
    train, test = order[:150], order[150:]
    return (data.data - data.data[train].mean(0)) / data.data[train].std(0), data.target, train, test


def lasso(alpha, x, y):
    return Lasso(alpha, tol=1e-10, max_iter=100_000).fit(x, y)


def table(printed, *header):
    """The rows of the table whose header begins with these words, as words."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[: len(header)] == list(header)) + 2
    return [line.split() for line in lines[start : lines.index("", start)]]


def test_each_point_of_the_path_is_worth_what_the_lasso_there_is(run, rows):
    x, y, train, test = rows
    points = table(run[0], "λ", "score")
    centred = y[train] - y[train].mean()
    largest = np.abs(x[train].T @ centred).max() / 150
    assert [float(point[0]) for point in points] == pytest.approx(np.geomspace(largest, 0.02 * largest, 8), rel=1e-3)
    for point, alpha in zip(points, np.geomspace(largest * (1 + 1e-8), 0.02 * largest, 8), strict=True):
        judge = lasso(alpha, x[train], y[train])
        assert float(point[1]) == pytest.approx(-np.mean((judge.predict(x[test]) - y[test]) ** 2), rel=1e-3)
        assert int(point[3]) == np.count_nonzero(judge.coef_)
    assert float(re.search(r"lasso_path: (\S+)", run[0])[1]) < 1e-4


def test_the_choice_and_the_standard_errors_are_those_of_the_folds(run, rows):
    x, y, train, _ = rows
    chosen = table(run[0], "λ", "mean")
    largest = np.abs(x[train].T @ (y[train] - y[train].mean())).max() / 150
    errors = []
    for fit, held_out in KFold(3, shuffle=True, random_state=0).split(train):
        fit, held_out = train[fit], train[held_out]
        judges = [lasso(alpha, x[fit], y[fit]) for alpha in np.geomspace(largest, 0.02 * largest, 8)]
        errors.append([np.mean((judge.predict(x[held_out]) - y[held_out]) ** 2) for judge in judges])
    mean, error = np.mean(errors, 0), np.std(errors, 0, ddof=1) / np.sqrt(3)
    assert [-float(row[1]) for row in chosen] == pytest.approx(mean, rel=1e-3)
    assert [float(row[2]) for row in chosen] == pytest.approx(error, rel=1e-2)
    best = mean.argmin()
    sparser = np.flatnonzero(mean <= mean[best] + error[best])[0]
    assert sparser < best
    assert {i: " ".join(row[4:]) for i, row in enumerate(chosen) if row[4:]} == {
        best: "best",
        sparser: "one standard error",
    }


def test_it_draws_the_path(run):
    assert (run[1] / "path.png").read_bytes().startswith(b"\x89PNG")
