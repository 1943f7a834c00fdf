"""Regularization paths, against scikit-learn's, and against themselves without an interruption."""

from __future__ import annotations

import gc
import io
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso, LogisticRegression, enet_path, lasso_path
from torch import nn
from torch.nn import functional as F

import torchreg as tr
from tests.models import L1_LOGISTIC
from tests.oracles import diabetes


def solve(optimizer, loss):
    """How many steps FISTA takes to the solution."""

    def closure():
        value = loss()
        value.backward()
        return value

    for step in range(2000):
        optimizer.step(closure)
        if optimizer.converged:
            return step
    raise AssertionError(f"not solved: {optimizer.stationarity}")


class Problem:
    """½·MSE of a linear model on the diabetes data, and its solution by FISTA."""

    def __init__(self, penalty: tr.Penalty, bias: bool = False, shift: float = 0.0) -> None:
        self.x, y = diabetes()
        self.y = y + shift
        torch.manual_seed(0)
        self.model = nn.Linear(10, 1, bias=bias, dtype=torch.float64)
        self.reg = tr.Regularizer(self.model, penalty)
        self.fits = 0

    def loss(self):
        return 0.5 * F.mse_loss(self.model(self.x)[:, 0], self.y)

    def fit(self, model, reg):
        self.fits += 1
        solve(tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-8), self.loss)


def small(seed=0):
    """A network of 4 weights with dropout, 40 rows for it, and a fit that shuffles by torch's global generator."""
    torch.manual_seed(seed)
    x = torch.randn(40, 3)
    y = x[:, :1] - 0.5 * x[:, 1:2]
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    reg = tr.Regularizer(model, tr.L1(0.01))

    def fit(model, reg):
        model.train()
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.01, regularizer=reg)
        for rows in torch.randperm(40).split(10):
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()

    return reg, fit, lambda: F.mse_loss(model(x), y)


def states(walked):
    return [{**point.state, "λ": point.strength, "loss": point.loss, "penalty": point.penalty} for point in walked]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(states(one), states(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


class Interrupted(Exception):
    pass


def breaking_off(fit, after):
    """`fit`, which raises in the middle of its fit number `after`, counted from 0."""
    count = 0

    def broken(model, reg):
        nonlocal count
        count += 1
        fit(model, reg)
        if count == after + 1:
            raise Interrupted

    return broken


# ---------------------------------------------------------------------- scikit-learn's paths


@pytest.fixture(scope="module")
def lasso():
    problem = Problem(tr.L1(1.0))
    grid = tr.lambda_grid(problem.reg, problem.fit, problem.loss, n=12, ratio=1e-2)
    return problem, tr.path(problem.reg, problem.fit, problem.loss, lambdas=grid)


def test_the_path_is_scikit_learn_s_lasso_path(lasso):
    problem, walked = lasso
    x, y = problem.x.numpy(), problem.y.numpy()
    alphas = np.geomspace(1, 1e-2, 12) * np.abs(x.T @ y).max() / len(y)
    _, coefficients, _ = lasso_path(x, y, alphas=alphas, tol=1e-12, max_iter=100_000)
    np.testing.assert_allclose(walked.lambdas, alphas, rtol=1e-12)
    np.testing.assert_allclose(walked.weights().numpy(), coefficients.T, atol=1e-4)  # of up to 30
    assert walked[0].left == 0  # at λ_max, where an old scikit-learn leaves what it rounds
    np.testing.assert_array_equal(walked.weights().numpy()[1:] != 0, coefficients.T[1:] != 0)
    assert problem.fits == len(walked) == 12, "nothing but the points is fitted where all weights are penalized"


def test_the_default_grid_is_scikit_learn_s():
    problem = Problem(tr.L1(1.0))
    walked = tr.path(problem.reg, lambda *_: None, problem.loss, keep=lambda path: [])
    lambdas, _, _ = lasso_path(problem.x.numpy(), problem.y.numpy())
    np.testing.assert_allclose(walked.lambdas, lambdas, rtol=1e-12)
    assert len(walked) == 100


def test_a_point_says_what_scikit_learn_s_solution_is_worth(lasso):
    problem, walked = lasso
    x, y = problem.x.numpy(), problem.y.numpy()
    for i in (0, 5, 11):
        w = Lasso(walked[i].strength, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y).coef_
        assert walked[i].left == walked[i].features == np.count_nonzero(w)
        assert walked[i].sparsity == np.mean(w == 0)
        assert walked[i].loss == pytest.approx(0.5 * np.mean((y - x @ w) ** 2), rel=1e-9)
        assert walked[i].penalty == pytest.approx(walked[i].strength * np.abs(w).sum(), rel=1e-6)
        assert walked[i].objective == walked[i].loss + walked[i].penalty


def test_warm_starts_save_steps():
    def steps(warm):
        problem, count = Problem(tr.L1(1.0)), 0

        def counted(model, reg):
            nonlocal count
            if not warm:
                nn.init.zeros_(model.weight)
            count += solve(tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-4), problem.loss)

        tr.path(problem.reg, counted, lambdas=tr.lambda_grid(problem.reg, counted, problem.loss, n=12, ratio=0.02))
        return count

    assert steps(warm=True) < 0.8 * steps(warm=False)


def test_all_strengths_move_in_proportion_as_in_enet_path():
    problem = Problem(tr.ElasticNet.from_sklearn(1.0, l1_ratio=0.5))
    alphas = np.array([30.0, 3.0, 0.3])
    walked = tr.path(problem.reg, problem.fit, lambdas=0.5 * alphas)  # λ is l1
    x, y = problem.x.numpy(), problem.y.numpy()
    _, coefficients, _ = enet_path(x, y, l1_ratio=0.5, alphas=alphas, tol=1e-12, max_iter=100_000)
    np.testing.assert_allclose(walked.weights().numpy(), coefficients.T, atol=1e-6)
    last = walked[-1].strengths["elastic_net"]
    assert last == pytest.approx({"l1": 0.15, "l2": 0.075, "factor": 1.0})
    assert problem.reg.state_dict() == {"elastic_net": last}


def test_terms_keep_their_proportion_to_one_another():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    reg = tr.Regularizer(model, {"0.weight": tr.L1(0.5), "1.weight": tr.ElasticNet(0.1, 0.0)})
    walked = tr.path(reg, lambda model, reg: None, lambdas=[10.0])
    assert walked[0].strengths["1.weight"] == pytest.approx({"l1": 2.0, "l2": 0.0, "factor": 1.0})


# ---------------------------------------------------------------------- the grid


def test_the_grid_starts_where_scikit_learn_s_does_though_the_intercept_is_not_fitted_yet():
    problem = Problem(tr.L1(1.0), bias=True, shift=100.0)
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    grid = tr.lambda_grid(problem.reg, problem.fit, problem.loss, n=4, ratio=0.125)
    largest = lasso_path(problem.x.numpy(), problem.y.numpy() - 100)[0][0]
    assert grid == pytest.approx([largest, largest / 2, largest / 4, largest / 8], rel=1e-6)
    assert problem.fits == 1
    assert all(torch.equal(before[key], value) for key, value in problem.model.state_dict().items())
    assert problem.reg.state_dict() == {"l1": {"strength": 1.0, "factor": 1.0}}
    assert all(w.requires_grad for w in problem.model.parameters())


def test_the_largest_lambda_is_the_first_at_which_nothing_is_left():
    x, y = load_digits(n_class=3, return_X_y=True)
    x = torch.tensor(x / 16)
    target = torch.tensor(y)
    model = nn.Linear(64, 3, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.L1(1.0))

    def fit(model, reg):
        solve(tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-9), lambda: F.cross_entropy(model(x), target))

    (largest,) = tr.lambda_grid(reg, fit, lambda: F.cross_entropy(model(x), target), n=1)
    walked = tr.path(reg, fit, lambdas=[largest * (1 + 1e-6), largest * (1 - 1e-3)])
    assert [point.left for point in walked] == [0, pytest.approx(1, abs=1)]
    assert walked[1].left > 0
    judge = LogisticRegression(**L1_LOGISTIC, solver="saga", tol=1e-7, max_iter=5000)
    for share, some in ((1 + 1e-3, False), (1 - 2e-2, True)):
        judge.set_params(C=1 / (largest * share * len(y))).fit(x.numpy(), y)
        assert np.any(judge.coef_) == some


def test_nothing_is_left_at_the_start_of_the_grid_however_the_intercept_is_rounded():
    problem = Problem(tr.L1(1.0), bias=True, shift=100.0)
    x, y = problem.x + 1.0, problem.y  # so that the intercept takes part in every gradient
    left = []
    for rows in torch.arange(440).chunk(10):
        problem.x, problem.y = x[rows], y[rows]
        (largest,) = tr.lambda_grid(problem.reg, problem.fit, problem.loss, n=1)
        walked = tr.path(problem.reg, problem.fit, lambdas=[largest, 0.999 * largest])
        left.append([point.left for point in walked])
    assert left == 10 * [[0, 1]]


@pytest.mark.parametrize("penalties", [(tr.L1(1.0), tr.L1(4.0)), (tr.L1(1.0), tr.L2(1.0)), (tr.L2(1.0), tr.L1(1.0))])
def test_of_several_terms_the_last_to_die_starts_the_path(penalties):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

        def forward(self):
            return 3 * self.a.weight.sum() + 8 * self.b.weight.sum()  # at its zeros |gradient| = 3, or 8

    model = Sum().double()
    reg = tr.Regularizer(model, dict(zip(("a.weight", "b.weight"), penalties, strict=True)))
    steps = [3 / penalties[0].strength if penalties[0].name == "l1" else 0]
    steps += [8 / penalties[1].strength if penalties[1].name == "l1" else 0]
    grid = tr.lambda_grid(reg, lambda model, reg: None, lambda: model(), n=1)
    assert grid == pytest.approx([max(steps)])


def test_toward_pretrained_weights_the_others_are_fitted_at_the_anchor():
    x, y = diabetes()
    anchor = torch.linspace(-20, 20, 10, dtype=torch.float64)[None]
    problem = Problem(tr.L1(1.0), bias=True)
    problem.x = problem.x + 1.0  # not centred: the intercept depends on the weights
    state = {"weight": anchor, "bias": torch.zeros(1)}
    problem.reg = tr.Regularizer(problem.model, tr.L1(1.0), toward=state)
    (largest,) = tr.lambda_grid(problem.reg, problem.fit, problem.loss, n=1)
    residual = (y - (x + 1.0) @ anchor[0]).numpy()
    assert largest == pytest.approx(np.abs((x + 1.0).numpy().T @ (residual - residual.mean())).max() / len(y))


def test_a_network_without_gradient_at_zero_has_no_lambda_max():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    reg, x = tr.Regularizer(model, tr.L1(1.0)), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"λ_max is 0: .* pass lambdas, from small to large"):
        tr.path(reg, lambda model, reg: None, lambda: model(x).square().mean())


def test_without_a_term_that_makes_zeros_there_is_no_lambda_max():
    problem = Problem(tr.L2(1.0))
    with pytest.raises(ValueError, match=r"no term that holds a weight at zero .* pass lambdas"):
        tr.lambda_grid(problem.reg, problem.fit, problem.loss)


def test_a_grid_is_walked_as_it_stands():
    seen = []
    reg = tr.Regularizer(nn.Linear(3, 1), tr.L1(7.0))
    walked = tr.path(reg, lambda model, reg: seen.append(reg["l1"].strength), lambdas=torch.tensor([0.0, 0.5, 0.25]))
    assert seen == [0.0, 0.5, 0.25] == [point.strength for point in walked]


def test_a_schedule_within_a_fit_moves_the_factor_of_each_anew():
    seen = []

    def fit(model, reg):
        for factor in (reg["l1"].factor, 0.5):
            reg["l1"].factor = factor
            seen.append(reg["l1"].penalty.strength)

    reg = tr.Regularizer(nn.Linear(3, 1), tr.L1(1.0))
    reg["l1"].factor = 0.1
    tr.path(reg, fit, lambdas=[4.0, 2.0])
    assert seen == [4.0, 2.0, 2.0, 1.0]


# ---------------------------------------------------------------------- broken off, and gone on with


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_path_that_broke_off_goes_on_as_if_it_had_not(after):
    lambdas = [0.01, 0.02, 0.04, 0.08]
    reg, fit, closure = small()
    whole = tr.path(reg, fit, closure, lambdas=lambdas)
    assert not torch.equal(whole.weights()[0], whole.weights()[-1])

    reg, fit, closure = small()
    walked = tr.RegularizationPath()
    with pytest.raises(Interrupted):
        tr.path(reg, breaking_off(fit, after), closure, lambdas=lambdas, into=walked)
    assert len(walked) == after
    torch.rand(7)
    assert tr.path(reg, fit, closure, into=walked) is walked
    assert_same(walked, whole)


def test_a_checkpoint_goes_on_in_another_process_s_model():
    lambdas = [0.01, 0.02, 0.04, 0.08]
    reg, fit, closure = small()
    whole = tr.path(reg, fit, closure, lambdas=lambdas)

    reg, fit, closure = small()
    file = io.BytesIO()

    def save(walked):
        file.seek(0)
        torch.save(walked.state_dict(), file)

    with pytest.raises(Interrupted):
        tr.path(reg, breaking_off(fit, 2), closure, lambdas=lambdas, stop=save)
    file.seek(0)
    walked = tr.RegularizationPath()
    walked.load_state_dict(torch.load(file, weights_only=True))
    assert (len(walked), walked.lambdas) == (2, tuple(lambdas))

    reg, fit, closure = small(seed=0)
    nn.init.ones_(reg.model[0].weight)
    random.seed(1)
    torch.manual_seed(9)
    assert_same(tr.path(reg, fit, closure, into=walked), whole)


def test_a_path_takes_more_points():
    reg, fit, closure = small()
    whole = tr.path(reg, fit, closure, lambdas=[0.01, 0.02, 0.04])
    reg, fit, closure = small()
    walked = tr.path(reg, fit, closure, lambdas=[0.01, 0.02])
    tr.path(reg, fit, closure, lambdas=[0.01, 0.02, 0.04], into=walked)
    assert_same(walked, whole)


def test_a_finished_path_fits_nothing_more():
    problem = Problem(tr.L1(1.0))
    walked = tr.path(problem.reg, problem.fit, lambdas=[40.0, 20.0], stop=lambda path: len(path) == 1)
    assert (len(walked), problem.fits) == (1, 1)
    tr.path(problem.reg, problem.fit, into=walked, stop=lambda path: len(path) == 1)
    assert (len(walked), problem.fits) == (1, 1)
    tr.path(problem.reg, problem.fit, into=walked)
    tr.path(problem.reg, problem.fit, into=walked)
    assert (len(walked), problem.fits) == (2, 2)


@pytest.mark.parametrize("after", [0, 2])
def test_an_exception_leaves_model_and_strengths_at_the_last_point(after):
    reg, fit, closure = small()
    before = {key: value.clone() for key, value in reg.model.state_dict().items()}
    walked = tr.RegularizationPath()
    with pytest.raises(Interrupted):
        tr.path(reg, breaking_off(fit, after), closure, lambdas=[0.1, 0.2, 0.3], into=walked)
    expected = walked[-1].state if after else before
    assert all(torch.equal(expected[key], value) for key, value in reg.model.state_dict().items())
    assert reg["l1"].strength == (0.2 if after else 0.01)
    assert reg().requires_grad, "the optimizer of the fit that broke off lets go, though its traceback holds it"


def test_a_score_that_raises_loses_no_point_before_it():
    reg, fit, _ = small()
    scores = iter([0.5, 0.6, "high"])
    walked = tr.RegularizationPath()
    with pytest.raises(TypeError, match="score returned str; it must return a number"):
        tr.path(reg, fit, lambdas=[0.1, 0.2, 0.3], score=lambda model: next(scores), into=walked)
    assert [point.score for point in walked] == [0.5, 0.6]


def test_a_fit_s_optimizer_goes_even_where_a_trainer_holds_itself(caplog):
    problem = Problem(tr.L1(1.0))

    def fit(model, reg):
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
        optimizer.trainer = {"optimizer": optimizer}
        for _ in range(3):
            optimizer.zero_grad()
            problem.loss().backward()
            optimizer.step()

    gc.disable()  # what holds itself is not collected by chance
    try:
        tr.path(problem.reg, fit, problem.loss, lambdas=[3.0, 2.0, 1.0])
    finally:
        gc.enable()
    assert not caplog.records, "each fit's optimizer is expected to die"
    assert problem.reg().requires_grad


def test_an_optimizer_that_outlives_the_fits_stays_attached():
    problem = Problem(tr.L1(1.0))
    optimizer = tr.optim.ProxSGD(problem.model.parameters(), lr=0.1, regularizer=problem.reg)
    tr.path(problem.reg, lambda model, reg: optimizer.step(), lambdas=[3.0, 2.0])
    assert not problem.reg().requires_grad


# ---------------------------------------------------------------------- what is kept, and how it ends


def test_keep_says_whose_weights_stay():
    reg, fit, _ = small()
    scores = iter([0.1, 0.5, 0.3, 0.2])
    walked = tr.path(
        reg, fit, lambdas=[0.1, 0.2, 0.3, 0.4], score=lambda _: next(scores), keep=lambda path: [path.best()]
    )
    assert [point.state is not None for point in walked] == [False, True, False, True], "and the last"
    with pytest.raises(ValueError, match=r"the weights at λ=0.1 were not kept; .* lambdas=\[0.1\]"):
        walked[0].load_into(reg)
    with pytest.raises(ValueError, match="were not kept"):
        walked.weights()


def test_a_point_is_loaded_with_its_strengths():
    reg, fit, closure = small()
    walked = tr.path(reg, fit, closure, lambdas=[0.1, 0.2, 0.3])
    walked[0].load_into(reg)
    assert reg["l1"].strength == 0.1
    assert torch.equal(reg.model[0].weight.flatten(), walked.weights("0.weight")[0])
    with torch.no_grad():
        reg.model.eval()
        assert closure().item() == walked[0].loss


def test_states_are_copies_that_training_does_not_touch():
    reg, fit, closure = small()
    walked = tr.path(reg, fit, closure, lambdas=[0.1])
    before = walked.weights().clone()
    nn.init.zeros_(reg.model[0].weight)
    walked[0].strengths["l1"]["strength"] = 5.0
    assert torch.equal(walked.weights(), before)
    assert reg["l1"].strength == 0.1


def test_the_best_point_is_the_highest_score_at_the_largest_lambda():
    scores = iter([0.1, math.nan, 0.5, 0.5, 0.2])
    reg = tr.Regularizer(nn.Linear(3, 1), tr.L1(1.0))
    walked = tr.path(reg, lambda *_: None, lambdas=[5, 4, 1, 2, 3], score=lambda _: torch.tensor(next(scores)))
    assert walked.best() is walked[3]


@pytest.mark.parametrize(
    ("scores", "walked"),
    [([1, 2, 3, 4, 5], 5), ([3, 1, 1, 4, 5], 3), ([3, 3, 3, 4, 5], 3), ([1, 2, math.nan, 1, 5], 4)],
)
def test_patience_ends_a_path_that_does_not_improve(scores, walked):
    left = iter(scores)
    reg = tr.Regularizer(nn.Linear(3, 1), tr.L1(1.0))
    found = tr.path(reg, lambda *_: None, lambdas=range(5), score=lambda _: next(left), stop=tr.Patience(2))
    assert len(found) == walked


def test_score_and_loss_see_the_model_in_evaluation_mode_and_fit_in_its_own():
    reg, _, _closure = small()
    reg.model[1].eval()  # a frozen part
    modes = []

    def look(model, *_):
        modes.append(([module.training for module in model.modules()], torch.is_grad_enabled()))
        return 0.0

    tr.path(reg, look, lambda: look(reg.model), lambdas=[0.1, 0.2], score=look)
    fitting, scoring = ([True, True, False, True], True), ([False] * 4, False)
    assert modes == [fitting, scoring, scoring] * 2


def test_batch_norm_counts_only_what_it_is_trained_on():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(8, 3)
    reg = tr.Regularizer(model, tr.L1(1.0), include="0.weight")
    tr.path(reg, lambda *_: None, lambda: model(x).square().mean(), lambdas=[0.1])
    assert model[1].num_batches_tracked == 0


def test_a_path_pickles_and_prints():
    reg, fit, closure = small()
    walked = tr.path(reg, fit, closure, lambdas=[0.1, 0.2], score=lambda _: 0.25)
    again = pickle.loads(pickle.dumps(walked))
    assert_same(again, walked)
    assert str(again) == str(walked)
    header, _, first, second = str(walked).splitlines()
    assert header.split() == ["λ", "score", "zeros", "left", "features", "penalty", "objective"]
    assert first.split()[:2] == ["0.1", "0.25"]
    assert second.split()[3:5] == [str(walked[1].left), str(walked[1].features)]
    assert str(tr.RegularizationPath()).split()[0] == "λ"


# ---------------------------------------------------------------------- networks


def test_a_network_walked_up_loses_its_weights_little_by_little():
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    reg = tr.Regularizer(model, tr.L1(1.0))

    def fit(model, reg, steps=60):
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.01, regularizer=reg)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:1400]), y[:1400]).backward()
            optimizer.step()

    def accuracy(model):
        return float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())

    with reg.disabled():
        fit(model, reg, steps=100)
    lambdas = [1e-4 * 2**i for i in range(9)]
    walked = tr.path(reg, fit, lambdas=lambdas, score=accuracy)
    shares = [point.sparsity for point in walked]
    assert all(after > before - 0.02 for before, after in itertools.pairwise(shares)), shares
    assert shares[0] < 0.75 < 0.9 < shares[-1]
    assert walked[-1].features < walked[0].features <= 64
    assert walked.best().score > 0.88
    sparse = [point for point in walked if point.sparsity > 0.75]
    assert max(point.score for point in sparse) > 0.85, "which a start from nothing does not reach in so few steps"

    walked.best().load_into(reg)
    assert accuracy(model) == walked.best().score


# ---------------------------------------------------------------------- refusals


REFUSALS = {
    "no regularizer": (
        lambda reg, fit: tr.path(reg.model, fit, lambdas=[1]),
        TypeError,
        "regularizer is a Linear; build one",
    ),
    "a grid of a model": (
        lambda reg, fit: tr.lambda_grid(reg.model, fit, reg),
        TypeError,
        "regularizer is a Linear; build one",
    ),
    "folds of a model": (
        lambda reg, fit: tr.cross_validate(reg.model, [], [1]),
        TypeError,
        "regularizer is a Linear; build one",
    ),
    "no fit": (lambda reg, fit: tr.path(reg, None, lambdas=[1]), TypeError, "fit is a NoneType, which cannot be"),
    "a loss for a closure": (lambda reg, fit: tr.path(reg, fit, reg()), TypeError, "closure is a Tensor, which cannot"),
    "a word to stop": (lambda reg, fit: tr.path(reg, fit, lambdas=[1], stop="early"), TypeError, "stop is a str"),
    "a list to go on with": (lambda reg, fit: tr.path(reg, fit, lambdas=[1], into=[]), TypeError, "into is a list"),
    "neither grid nor closure": (lambda reg, fit: tr.path(reg, fit), ValueError, "there is no grid; pass lambdas"),
    "an empty grid": (lambda reg, fit: tr.path(reg, fit, lambdas=[]), ValueError, "lambdas is empty"),
    "one number": (lambda reg, fit: tr.path(reg, fit, lambdas=0.1), TypeError, "lambdas=0.1 is a float; pass numbers"),
    "a negative λ": (lambda reg, fit: tr.path(reg, fit, lambdas=[1, -1]), ValueError, "λ=-1 must be finite and"),
    "no points": (lambda reg, fit: tr.lambda_grid(reg, fit, reg, n=0), ValueError, "n=0 must be at least 1"),
    "a ratio of 1": (lambda reg, fit: tr.lambda_grid(reg, fit, reg, ratio=1), ValueError, "ratio=1.0 must lie between"),
    "no patience": (lambda reg, fit: tr.Patience(0), ValueError, "points=0 must be at least 1"),
    "patience without scores": (
        lambda reg, fit: tr.path(reg, lambda *_: None, lambdas=[1], stop=tr.Patience(1)),
        ValueError,
        "patience needs a score",
    ),
    "a best without scores": (lambda reg, fit: tr.RegularizationPath().best(), ValueError, "no point .* has a score"),
    "weights of nothing": (lambda reg, fit: tr.RegularizationPath().weights(), ValueError, "has no points yet"),
    "a state of another kind": (
        lambda reg, fit: tr.RegularizationPath().load_state_dict(reg.state_dict()),
        ValueError,
        "this is not a state of a path",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_it_refuses_before_anything_is_fitted(case):
    call, kind, message = REFUSALS[case]
    reg = tr.Regularizer(nn.Linear(3, 1), tr.L1(1.0))

    def never(model, reg):
        raise AssertionError("fitted all the same")

    with pytest.raises(kind, match=message):
        call(reg, never)


def test_a_regularizer_that_does_nothing_has_no_path():
    zero = tr.Regularizer(nn.Linear(3, 1), tr.L1(0.0))
    with pytest.raises(ValueError, match=r"every strength of .* is 0, .* write L1\(1.0\)"):
        tr.path(zero, lambda *_: None, lambdas=[1])
    disabled = tr.Regularizer(nn.Linear(3, 1), tr.L1(1.0))
    with disabled.disabled(), pytest.raises(ValueError, match=r"regularizer is disabled, .* call reg\.enable"):
        tr.path(disabled, lambda *_: None, lambdas=[1])


@pytest.mark.parametrize(
    ("penalty", "lambdas", "message"),
    [
        (tr.L1(1.0), [2, 1, 0.5], "lambdas does not begin with the 2 λ that into has walked already, 3 to 2; append"),
        (tr.L2(1.0), [3, 2, 1], "into was walked with strengths in the proportions"),
        (
            {"0.weight": tr.L1(1.0)},
            [3, 2, 1],
            "into is a path of 0.weight, 2.weight, and regularizer selects 0.weight",
        ),
    ],
)
def test_a_path_does_not_go_on_as_another(penalty, lambdas, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    walked = tr.path(tr.Regularizer(model, tr.L1(0.3)), lambda *_: None, lambdas=[3, 2])
    nn.init.ones_(model[0].weight)
    with pytest.raises(ValueError, match=message):
        tr.path(tr.Regularizer(model, penalty), lambda *_: None, lambdas=lambdas, into=walked)
    assert len(walked) == 2
    assert bool((model[0].weight == 1).all())
