"""Cross-validation, with scikit-learn's LassoCV and ElasticNetCV as judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNetCV, LassoCV
from sklearn.model_selection import KFold
from torch import nn
from torch.nn import functional as F

import torchreg as tr

SPLITS = KFold(4, shuffle=True, random_state=0)
TIGHT = {"tol": 1e-10, "max_iter": 100_000}


class Diabetes:
    """Rows of the data, which are not centred, with an intercept, and FISTA on any of its rows."""

    def __init__(self, penalty: tr.Penalty) -> None:
        x, y = load_diabetes(return_X_y=True)
        self.inputs, self.targets = x[:100] * 21, y[:100]  # so few that a λ within the grid is the best
        self.x, self.y = torch.from_numpy(self.inputs), torch.from_numpy(self.targets)[:, None]
        self.model = nn.Linear(10, 1, dtype=torch.float64)
        self.reg = tr.Regularizer(self.model, penalty)

    def alphas(self, n):
        """As scikit-learn has them for the lasso on all the data, down to a hundredth."""
        centred = self.targets - self.targets.mean()
        return np.geomspace(1, 1e-2, n) * np.abs(self.inputs.T @ centred).max() / len(centred)

    def fold(self, rows, held_out):
        x, y = self.x[rows], self.y[rows]

        def fit(model, reg):
            optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-7)

            def closure():
                loss = 0.5 * F.mse_loss(model(x), y)
                loss.backward()
                return loss

            for _ in range(2000):
                optimizer.step(closure)
                if optimizer.converged:
                    return
            raise AssertionError(f"not solved: {optimizer.stationarity}")

        return fit, lambda model: -F.mse_loss(model(self.x[held_out]), self.y[held_out]).item()

    def cross_validated(self, n=12):
        rows = range(len(self.y))
        fit, _ = self.fold(rows, rows)
        grid = tr.lambda_grid(self.reg, fit, lambda: 0.5 * F.mse_loss(self.model(self.x), self.y), n=n, ratio=1e-2)
        return tr.cross_validate(self.reg, [self.fold(*split) for split in SPLITS.split(self.x)], grid), fit


@pytest.fixture(scope="module")
def lasso():
    problem = Diabetes(tr.L1(1.0))
    problem.before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    judge = LassoCV(alphas=problem.alphas(12), cv=SPLITS, **TIGHT)
    return problem, *problem.cross_validated(), judge.fit(problem.inputs, problem.targets)


def test_the_scores_and_the_choice_are_those_of_lasso_cv(lasso):
    _, cv, _, judge = lasso
    np.testing.assert_allclose(cv.lambdas, judge.alphas_, rtol=1e-6)
    np.testing.assert_allclose(-cv.scores.numpy().T, judge.mse_path_, rtol=1e-5)
    assert cv.best == pytest.approx(judge.alpha_, rel=1e-6)
    assert cv.lambdas[0] > cv.best > cv.lambdas[-1]


def test_one_standard_error_is_as_by_hand_from_lasso_cv_s_errors(lasso):
    _, cv, _, judge = lasso
    mean, error = judge.mse_path_.mean(1), judge.mse_path_.std(1, ddof=1) / np.sqrt(4)
    np.testing.assert_allclose(cv.standard_error.numpy(), error, rtol=1e-3)
    worst = mean.min() + error[mean.argmin()]
    assert cv.one_standard_error == pytest.approx(judge.alphas_[mean <= worst].max(), rel=1e-6)
    assert cv.one_standard_error > cv.best


def test_a_refit_on_all_the_data_is_lasso_cv_s_model(lasso):
    problem, cv, fit, judge = lasso
    assert all(torch.equal(problem.before[key], value) for key, value in problem.model.state_dict().items())
    assert problem.reg["l1"].strength == 1.0
    tr.path(problem.reg, fit, lambdas=[cv.best])
    np.testing.assert_allclose(problem.model.weight.detach().numpy()[0], judge.coef_, atol=1e-3)
    assert problem.model.bias.item() == pytest.approx(judge.intercept_, rel=1e-5)
    np.testing.assert_array_equal(problem.model.weight.detach().numpy()[0] == 0, judge.coef_ == 0)


def test_the_choice_and_the_refit_are_elastic_net_cv_s():
    problem = Diabetes(tr.ElasticNet.from_sklearn(1.0, l1_ratio=0.5))
    cv, fit = problem.cross_validated(n=6)
    alphas = 2 * problem.alphas(6)  # λ is l1, half of alpha
    judge = ElasticNetCV(l1_ratio=0.5, alphas=alphas, cv=SPLITS, **TIGHT).fit(problem.inputs, problem.targets)
    np.testing.assert_allclose(-cv.scores.numpy().T, judge.mse_path_, rtol=1e-5)
    assert 2 * cv.best == pytest.approx(judge.alpha_, rel=1e-6)
    tr.path(problem.reg, fit, lambdas=[cv.best])
    np.testing.assert_allclose(problem.model.weight.detach().numpy()[0], judge.coef_, atol=1e-3)


def scored(*folds, lambdas):
    """The cross-validation of folds with these scores, one list each."""
    reg = tr.Regularizer(nn.Linear(2, 1), tr.L1(1.0))
    iterators = [iter(scores) for scores in folds]
    return tr.cross_validate(reg, [(lambda *_: None, lambda _, it=it: next(it)) for it in iterators], lambdas=lambdas)


def test_the_choice_does_not_depend_on_the_direction_of_the_walk():
    down = scored([1, 3, 4, 4], [2, 4, 5, 5], lambdas=[8, 4, 2, 1])
    up = scored([4, 4, 3, 1], [5, 5, 4, 2], lambdas=[1, 2, 4, 8])
    assert down.best == up.best == 2, "of equal ones the largest"
    assert down.standard_error.tolist() == [0.5] * 4
    assert down.one_standard_error == up.one_standard_error == 2
    wide = scored([1, 3, 4, 4], [2, 5, 7, 7], lambdas=[8, 4, 2, 1])
    assert (wide.best, wide.one_standard_error) == (2, 4)


def test_a_lambda_at_which_a_fold_fails_is_not_chosen():
    cv = scored([1, math.nan, 2], [1, 9, 2], lambdas=[4, 2, 1])
    assert (cv.best, cv.one_standard_error) == (1, 1)
    with pytest.raises(ValueError, match="at no λ have all folds a score"):
        _ = scored([math.nan], [1], lambdas=[4]).best


def test_every_fold_starts_from_the_same_weights_and_keeps_none():
    reg = tr.Regularizer(nn.Linear(2, 1), tr.L1(1.0))
    before, seen = reg.model.weight.detach().clone(), []

    def fit(model, reg):
        seen.append((reg["l1"].strength, model.weight.detach().clone()))
        with torch.no_grad():
            model.weight += 1

    cv = tr.cross_validate(reg, [(fit, lambda _: 0.0)] * 2, [3, 2])
    assert [strength for strength, _ in seen] == [3, 2, 3, 2]
    for (_, w), moved in zip(seen, [0, 1, 0, 1], strict=True):
        torch.testing.assert_close(w, before + moved)
    assert [point.state for path in cv.paths for point in path[:-1]] == [None, None]
    assert torch.equal(reg.model.weight, before)


def test_the_table_marks_both_choices():
    cv = scored([1, 3, 4], [2, 5, 7], lambdas=[8, 4, 2])
    lines = str(cv).splitlines()
    assert len(lines) == 5
    assert [line.partition("  2.0")[2].strip() for line in lines[2:]] == ["", "one standard error", "best"]
    assert lines[3].split()[:3] == ["4", "4", "1"]


@pytest.mark.parametrize(
    ("folds", "kind", "message"),
    [
        ([], ValueError, "0 folds give no standard error"),
        ([(print, print)], ValueError, r"1 folds give .* path\(reg, fit, lambdas=lambdas, score=score\).best"),
        ([(print, 1)], TypeError, "is not a pair of functions"),
        ([print], TypeError, "is not a pair of functions"),
    ],
)
def test_it_refuses_what_gives_no_choice(folds, kind, message):
    with pytest.raises(kind, match=message):
        tr.cross_validate(tr.Regularizer(nn.Linear(2, 1), tr.L1(1.0)), folds, [1])
