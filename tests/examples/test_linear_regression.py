"""examples/linear_regression.py, run as a user runs it: what it prints is computed again here in other ways."""

import os
import re
import subprocess

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso

from tests import ROOT
from tests.models import STRICT

SCRIPT = ROOT / "examples" / "linear_regression.py"
STRENGTHS = [0.1, 0.3, 3.0]
MODELS = ["lasso", "ridge", "elastic net"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    result = subprocess.run(
        [*STRICT, SCRIPT, "--strengths", *map(str, STRENGTHS)],
        cwd=tmp_path_factory.mktemp("linear"),
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.fixture(scope="module")
def diabetes():
    """Inputs standardized by the training part, targets, and the rows of the three parts."""
    data = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(442)
    train, validation, test = order[:265], order[265:353], order[353:]
    inputs = (data.data - data.data[train].mean(axis=0)) / data.data[train].std(axis=0)
    return inputs, data.target, train, validation, test


def solve(model, strength, inputs, targets):
    """(coefficients, intercept): ridge in closed form, the others by coordinate descent."""
    if model == "ridge":
        mean, center = inputs.mean(axis=0), targets.mean()
        centered = inputs - mean
        gram = centered.T @ centered / len(targets) + strength * np.eye(inputs.shape[1])
        w = np.linalg.solve(gram, centered.T @ (targets - center) / len(targets))
        return w, center - mean @ w
    kind = Lasso(strength) if model == "lasso" else ElasticNet(strength, l1_ratio=0.5)
    fitted = kind.set_params(tol=1e-10, max_iter=100_000).fit(inputs, targets)
    return fitted.coef_, fitted.intercept_


def table(printed):
    """By row name the six numbers of each row, as they are printed."""
    _, _, body = printed.partition("feature  ")
    lines = [line for line in body.splitlines()[1:] if not line.startswith("largest")]
    return {line[:9].strip(): line[9:].split() for line in lines}


def chosen(printed):
    return {name: float(re.search(rf"^{name} .*take λ=(\S+)$", printed, re.M)[1]) for name in MODELS}


def test_by_hand_and_torchreg_agree_with_the_closed_form(printed):
    np.random.seed(42)
    x = np.random.rand(100, 1)
    y = 3 * x + 2 + np.random.randn(100, 1)
    ones = np.hstack([np.ones((100, 1)), x])
    # The gradient 2/n·Xᵀ(Xθ − y) + λ·(0, slope) is zero here.
    theta = np.linalg.solve(2 / 100 * ones.T @ ones + 0.1 * np.diag([0.0, 1.0]), 2 / 100 * ones.T @ y).ravel()
    rows = dict(re.findall(r"^(numpy|torchreg) +(.+)$", printed, re.M))
    for name in ("numpy", "torchreg"):
        assert [float(number) for number in rows[name].split()] == pytest.approx(theta, abs=1e-6)
    assert float(re.search(r"^largest difference: (\S+)$", printed, re.M)[1]) <= 1e-6
    assert re.search(r"^weight .* strength=0.05 +loss", printed, re.M)
    assert re.search(r"^bias .* bias$", printed, re.M)


def test_the_strength_is_the_best_on_the_validation_part(printed, diabetes):
    inputs, targets, train, validation, _ = diabetes
    for model in MODELS:
        errors = []
        for strength in STRENGTHS:
            w, b = solve(model, strength, inputs[train], targets[train])
            errors.append(np.mean((inputs[validation] @ w + b - targets[validation]) ** 2))
        line = re.search(rf"^{model} (.*)take", printed, re.M)[1]
        assert [float(error) for error in line.split()] == pytest.approx(errors, abs=0.051)
        assert chosen(printed)[model] == STRENGTHS[int(np.argmin(errors))]


def test_the_coefficients_are_those_of_the_problem(printed, diabetes):
    inputs, targets, train, validation, test = diabetes
    both = np.concatenate([train, validation])
    rows = table(printed)
    names = [*load_diabetes().feature_names, "intercept"]
    assert list(rows) == [*names, "test MSE", "test R²"]
    zeros = 0
    for i, (model, strength) in enumerate(chosen(printed).items()):
        w, b = solve(model, strength, inputs[both], targets[both])
        error = np.mean((inputs[test] @ w + b - targets[test]) ** 2)
        expected = [*w, b, error, 1 - error / targets[test].var()]
        for column in (2 * i, 2 * i + 1):
            texts = [rows[name][column] for name in rows]
            assert [float(text) for text in texts] == pytest.approx(expected, abs=6e-5)
            assert [text == "0" for text in texts] == [value == 0 for value in expected]
        zeros += sum(w == 0)
    assert zeros > 0, "no exact zero was there to be compared"


def test_scikit_learn_and_torchreg_differ_by_less_than_1e_6(printed):
    line = printed.splitlines()[-1]
    differences = dict(re.findall(r"(lasso|ridge|elastic net) (\S+?)(?:,|$)", line))
    assert list(differences) == MODELS
    assert max(map(float, differences.values())) <= 1e-6
