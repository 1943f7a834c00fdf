"""Stationarity, lambda_max and the duality gap, against scikit-learn, numpy and weak duality itself."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn import linear_model
from torch import nn
from torch.nn import functional as F

import torchreg as tr
from tests import cases
from tests.cases import CASES, same_bits
from tests.models import Halved, array, batch, mlp, same, snapshot
from tests.oracles import diabetes


def linear(bias=False, dtype=torch.float64, seed=0):
    """The diabetes data with a linear model at random weights, and half its mean squared error."""
    x, y = (t.to(dtype) for t in diabetes())
    y = y / y.std()
    torch.manual_seed(seed)
    model = nn.Linear(10, 1, bias=bias, dtype=dtype)
    return model, lambda: 0.5 * F.mse_loss(model(x)[:, 0], y), (x, y)


def put(model, w):
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(w))


# ---------------------------------------------------------------------- stationarity


def test_a_solution_of_scikit_learn_is_stationary_and_nothing_near_it_is():
    model, closure, (x, y) = linear(bias=True)
    reg = tr.Regularizer(model, tr.ElasticNet.from_sklearn(0.1, 0.7))
    solution = linear_model.ElasticNet(alpha=0.1, l1_ratio=0.7, tol=1e-14, max_iter=10**5).fit(x, y)
    put(model, solution.coef_)
    nn.init.constant_(model.bias, solution.intercept_)
    assert tr.stationarity(reg, closure).relative < 1e-7
    put(model, solution.coef_ * 1.001)
    assert tr.stationarity(reg, closure).relative > 1e-4


def test_the_distance_is_that_of_the_optimality_conditions_by_term():
    model, (x, y) = mlp(), batch()
    with torch.no_grad():
        model.fc1.weight[model.fc1.weight.abs() < 0.2] = 0
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(0.03), "fc2.weight": tr.L2(0.5)})
    reg["fc1.weight"].factor = 2.0
    found = tr.stationarity(reg, lambda: F.mse_loss(model(x), y))
    F.mse_loss(model(x), y).backward()
    g, w = array(model.fc1.weight.grad), array(model.fc1.weight)
    first = np.where(w != 0, np.abs(g + 0.06 * np.sign(w)), np.maximum(np.abs(g) - 0.06, 0))
    second = array(model.fc2.weight.grad) + array(model.fc2.weight)
    others = [array(p.grad) for p in (model.fc1.bias, model.norm.weight, model.norm.bias, model.fc2.bias)]
    sizes = [np.linalg.norm(first), np.linalg.norm(second), math.hypot(*map(np.linalg.norm, others))]
    assert (w == 0).any()
    assert found.by_term == pytest.approx({"fc1.weight": sizes[0], "fc2.weight": sizes[1]}, rel=1e-5)
    assert found.unpenalized == pytest.approx(sizes[2], rel=1e-5)
    assert found.total == pytest.approx(math.hypot(*sizes), rel=1e-5)


def test_relative_does_not_depend_on_the_scale_of_the_loss():
    model, closure, _ = linear(bias=True)
    reg = tr.Regularizer(model, tr.L1(0.1))
    before = tr.stationarity(reg, closure)
    reg["l1"].strength = 100.0
    after = tr.stationarity(reg, lambda: 1000 * closure())
    assert after.relative == pytest.approx(before.relative, rel=1e-12)
    assert after.total == pytest.approx(1000 * before.total, rel=1e-12)
    assert 0 < before.relative <= 2


def test_toward_and_scale_count():
    model, closure, (x, y) = linear()
    anchor = torch.linspace(-1, 1, 10, dtype=torch.float64)[None]
    reg = tr.Regularizer(model, tr.L1(0.1), toward={"weight": anchor}, scale=lambda name, w: 3.0)
    put(model, anchor)
    with torch.no_grad():
        model.weight[0, :5] += 0.5
    g = ((x @ model.weight[0] - y) @ x / len(y)).detach().numpy()
    parts = np.where(np.arange(10) < 5, np.abs(g + 0.3), np.maximum(np.abs(g) - 0.3, 0))
    assert tr.stationarity(reg, closure).total == pytest.approx(np.linalg.norm(parts), rel=1e-12)


def test_complex_weights_count_by_their_modulus():
    w = nn.Parameter(torch.tensor([3 + 4j, 0j, 0j], dtype=torch.complex128))
    model = nn.Module()
    model.register_parameter("w", w)
    reg = tr.Regularizer(model, tr.L1(1.0), include="w")
    target = torch.tensor([4.2 + 5.6j, 0.8j, 3 - 4j], dtype=torch.complex128)
    # The gradient of ½|w − t|² is w − t: −1.2 − 1.6i against 0.6 + 0.8i; within reach; 5 against 1.
    found = tr.stationarity(reg, lambda: 0.5 * (w - target).abs().square().sum())
    assert found.total == pytest.approx(math.hypot(1.0, 0.0, 4.0), rel=1e-12)


def test_nothing_changes_and_a_closure_that_adds_the_penalty_is_harmless():
    model, (x, y) = mlp(), batch()
    reg = tr.Regularizer(model, tr.L1(0.1))
    before, criterion = snapshot(model), tr.RegularizedLoss(nn.MSELoss(), reg)
    plain = tr.stationarity(reg, lambda: F.mse_loss(model(x), y))
    with torch.no_grad():
        assert tr.stationarity(reg, lambda: F.mse_loss(model(x), y) + reg()) == plain
    assert tr.stationarity(reg, lambda: criterion(model(x), y)) == plain
    assert reg.enabled
    assert same(before, snapshot(model))
    assert all(w.grad is None for w in model.parameters())
    with pytest.raises(ZeroDivisionError):
        tr.stationarity(reg, lambda: 1 / 0)
    assert reg.enabled


def test_frozen_parameters_do_not_count():
    model, (x, y) = mlp(), batch()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L1(0.1)})
    model.fc1.weight.requires_grad_(False)
    for w in [model.fc1.bias, *model.norm.parameters(), model.fc2.bias]:
        w.requires_grad_(False)
    found = tr.stationarity(reg, lambda: F.mse_loss(model(x), y))
    assert found.by_term["fc1.weight"] == found.unpenalized == 0
    assert found.total == found.by_term["fc2.weight"] > 0
    model.requires_grad_(False)
    assert tr.stationarity(reg, lambda: torch.ones((), requires_grad=True) * 2).total == 0


def test_while_disabled_the_gradient_alone_counts():
    model, closure, _ = linear()
    reg = tr.Regularizer(model, tr.L1(0.1))
    (gradient,) = torch.autograd.grad(closure(), [model.weight])
    with reg.disabled():
        found = tr.stationarity(reg, closure)
        assert not reg.enabled
    assert found.total == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert found.relative == 1


def test_no_gradient_and_no_penalty_is_stationary_and_a_nan_is_not():
    model = nn.Linear(3, 1, bias=False)
    reg = tr.Regularizer(model, tr.L1(0.0))
    assert tr.stationarity(reg, lambda: model.weight.sum() * 0) == tr.Stationarity(0.0, 0.0, {"l1": 0.0}, 0.0)
    found = tr.stationarity(reg, lambda: model.weight.sum() * math.nan)
    assert math.isnan(found.total)
    assert not found.relative <= 1e-8
    nn.init.constant_(model.weight, math.nan)
    assert not tr.stationarity(reg, lambda: 0 * torch.ones(1, requires_grad=True).sum()).relative <= 1e-8


def test_without_a_closure_the_gradients_that_are_there_are_read():
    model, (x, y) = mlp(), batch()
    reg = tr.Regularizer(model, tr.L1(0.1))
    model.unused = nn.Parameter(torch.ones(3))  # no gradient reaches it: 0

    def backward():
        model.zero_grad()
        (F.mse_loss(model(x), y) + reg()).backward()

    backward()
    with pytest.raises(ValueError, match=r"^fc1.weight, fc2.weight may be regularized in the loss, and then \.grad i"):
        tr.stationarity(reg)
    first = tr.optim.ProxSGD([model.fc1.weight], lr=0.1, regularizer=reg, partial=True)
    backward()
    with pytest.raises(ValueError, match=r"^fc2.weight may be regularized in the loss"):
        tr.stationarity(reg)
    second = torch.optim.Adam([model.fc2.weight])
    tr.optim.attach(second, reg, partial=True)
    backward()
    assert tr.stationarity(reg) == tr.stationarity(reg, lambda: F.mse_loss(model(x), y))
    first.zero_grad()
    model.zero_grad()
    with pytest.raises(
        ValueError, match=r"^no parameter has a \.grad; call stationarity after loss\.backward\(\) and before zero"
    ):
        tr.stationarity(reg)


@pytest.mark.parametrize("certify", [tr.stationarity, tr.lambda_max, tr.duality_gap])
def test_a_closure_that_gives_no_loss_is_refused_and_the_weights_are_put_back(certify):
    model, closure, (x, _) = linear()
    reg = tr.Regularizer(model, tr.L1(0.1))
    before = snapshot(model)
    with pytest.raises(
        TypeError, match=r"^closure is a Tensor; pass a function that computes the data loss: lambda: crit"
    ):
        certify(reg, closure())
    with pytest.raises(
        TypeError, match=r"^regularizer is a Linear; build one first: Regularizer\(model, L1\(1e-4\)\)$"
    ):
        certify(model, closure)
    with pytest.raises(TypeError, match=r"^the closure returned a float; it must return the data loss, a 0-d tensor$"):
        certify(reg, lambda: closure().item())
    with pytest.raises(
        ValueError, match=r"^the closure returned a tensor of shape \(442, 1\) and torch.float64 instead of"
    ):
        certify(reg, lambda: model(x))
    with pytest.raises(
        ValueError, match=r"^the closure's loss has no gradient; compute it from the model's parameters"
    ):
        certify(reg, lambda: closure().detach())
    for _ in range(2):  # into an empty .grad, and on top of what is there
        with pytest.raises(
            ValueError, match=r"^the closure changed \.grad: it calls backward\(\), which frees the graph"
        ):
            certify(reg, lambda: [loss := closure(), loss.backward()][0])
    assert same(before, snapshot(model))


@pytest.mark.parametrize("certify", [tr.stationarity, tr.lambda_max, tr.duality_gap])
def test_a_parameter_that_is_computed_is_refused(certify):
    model, closure, _ = linear()
    reg = tr.Regularizer(model, tr.L1(0.1))
    nn.utils.parametrize.register_parametrization(model, "weight", Halved())
    with pytest.raises(RuntimeError, match=r"^weight is computed by a parametrization, so it cannot be certified"):
        certify(reg, closure)


def test_a_stationarity_reads_well():
    found = tr.Stationarity(0.123456, 0.0101010, {"l1": 0.1, "l2": 1e-9}, 0.0)
    assert repr(found) == "Stationarity(total=0.123, relative=0.0101, by_term={'l1': 0.1, 'l2': 1e-09}, unpenalized=0)"


# ---------------------------------------------------------------------- lambda_max


def lasso_limit(x, y):
    return (x.T @ y).abs().max().item() / len(y)


def test_lambda_max_of_the_lasso_is_where_scikit_learn_finds_the_first_weight():
    model, closure, (x, y) = linear()
    reg = tr.Regularizer(model, tr.L1(0.3))
    reg["l1"].factor = 0.1
    before = snapshot(model)
    limit = tr.lambda_max(reg, closure)["l1"]
    assert same(before, snapshot(model))
    assert limit == pytest.approx(lasso_limit(x, y), rel=1e-14)
    for scale, count in [(1.0000001, 0), (0.999, 1)]:
        fit = linear_model.Lasso(alpha=limit * scale, fit_intercept=False, tol=1e-14, max_iter=10**5).fit(x, y)
        assert np.count_nonzero(fit.coef_) == count


@pytest.mark.parametrize("scale", [None, lambda name, w: 7.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("penalty", [tr.L1(3.0), tr.L1(0.0), tr.ElasticNet(0.3, 0.2), tr.ElasticNet(0.0, 0.0)], ids=str)
def test_training_just_above_lambda_max_gives_zeros_and_just_below_does_not(penalty, scale):
    model, closure, _ = linear()
    reg = tr.Regularizer(model, penalty, scale=scale)
    (key,) = reg
    limit = tr.lambda_max(reg, closure)[key]
    step = solver(reg, closure, tol=1e-12)
    for ratio in [1.0000001, 0.999]:
        for name, value in reg[key].strengths.items():
            first = next(iter(reg[key].strengths.values()))
            setattr(reg[key], name, ratio * limit * (value / first if first else name in ("l1", "strength")))
        assert any(step() for _ in range(500))
        assert model.weight.any().item() == (ratio < 1)


def test_with_toward_lambda_max_is_where_the_weights_reach_their_anchor():
    model, closure, (x, y) = linear()
    anchor = torch.linspace(-1, 1, 10, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.L1(1.0), toward={"weight": anchor[None]})
    assert tr.lambda_max(reg, closure)["l1"] == pytest.approx(lasso_limit(x, y - x @ anchor), rel=1e-13)


def test_what_no_strength_holds_at_zero_stays_as_it_is_and_says_inf():
    x, y = diabetes()
    model = nn.ModuleDict(
        {
            name: nn.Linear(size, 1, bias=False, dtype=torch.float64)
            for name, size in zip("abcd", [2, 3, 4, 1], strict=True)
        }
    )
    model["d"].requires_grad_(False)

    def outputs():
        columns = x.split([2, 3, 4, 1], dim=1)
        return {name: model[name](part)[:, 0] for name, part in zip("abcd", columns, strict=True)}

    reg = tr.Regularizer(
        model,
        {"a.weight": tr.L2(0.1), ("re:[bcd].weight"): tr.L1(0.1)},
        scale=lambda name, w: 0.0 if name == "c.weight" else 2.0,
    )
    before = snapshot(model)
    limits = tr.lambda_max(reg, lambda: 0.5 * (sum(outputs().values()) - y).square().mean())
    assert same(before, snapshot(model))
    residual = y - sum(value for name, value in outputs().items() if name != "b").detach()
    assert limits["a.weight"] == math.inf
    assert limits["re:[bcd].weight"] == pytest.approx(lasso_limit(x[:, 2:5], residual) / 2, rel=1e-13)


def test_a_deep_network_at_zero_has_no_gradient_and_so_a_lambda_max_of_0():
    model, (x, y) = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)), batch()
    reg = tr.Regularizer(model, tr.L1(0.1))
    assert tr.lambda_max(reg, lambda: F.mse_loss(model(x), y)) == {"l1": 0.0}


def test_every_bit_comes_back_also_after_an_error_and_a_graph_that_was_built_before_stays_valid():
    model, closure, _ = linear()
    with torch.no_grad():
        model.weight[0, :3] = torch.tensor([-0.0, math.nan, 5e-324])
    before = model.weight.detach().clone()
    reg = tr.Regularizer(model, tr.L1(0.1))
    loss = model.weight.square().sum()
    seen = []

    def failing():
        seen.append(model.weight.detach().clone())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tr.lambda_max(reg, failing)
    assert not seen[0].any()
    assert same_bits(model.weight.detach(), before)
    tr.lambda_max(reg, closure)
    assert same_bits(model.weight.detach(), before)
    loss.backward()


def test_a_nan_gradient_gives_a_nan_lambda_max():
    model = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(2)])
    reg = tr.Regularizer(model, tr.L1(0.1))
    assert math.isnan(tr.lambda_max(reg, lambda: model[0].weight.sum() + math.nan * model[1].weight.sum())["l1"])
    assert math.isnan(tr.lambda_max(reg, lambda: model[1].weight.sum() + math.nan * model[0].weight.sum())["l1"])


@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(case.penalty, tr.L0)], ids=str)
def test_from_lambda_max_on_the_weights_are_stationary_at_zero_whatever_the_penalty(case):
    x, _ = diabetes()
    targets = cases.weights((442, 3), seed=1)
    model = nn.Linear(10, 3, bias=False, dtype=torch.float64)
    corner = case.anchor(model.weight.detach())
    reg = tr.Regularizer(model, case.penalty, toward={"weight": corner} if case.anchored else None)
    (term,) = reg.terms.values()

    def closure():
        return (model(x) - targets).square().mean()

    limit = tr.lambda_max(reg, closure)[term.key]
    first = next((value for value in term.strengths.values() if value), None)
    assert limit > 0
    put(model, corner)
    if first is None or limit == math.inf:
        assert first is None or tr.stationarity(reg, closure).total > 0
        return
    for scale in [1.0000001, 0.999]:
        term.factor = scale * limit / first
        assert (tr.stationarity(reg, closure).total == 0) == (scale > 1)


# ---------------------------------------------------------------------- duality gap


@pytest.mark.parametrize("sweeps", [1, 2, 5, 20])
def test_the_gap_of_the_lasso_is_that_of_scikit_learn(sweeps):
    model, closure, (x, y) = linear()
    reg = tr.Regularizer(model, tr.L1(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged: so it is meant
        fit = linear_model.Lasso(alpha=0.01, fit_intercept=False, tol=1e-14, max_iter=sweeps).fit(x, y)
    put(model, fit.coef_)
    assert tr.duality_gap(reg, closure) == pytest.approx(fit.dual_gap_, rel=1e-9)


LOSSES = {
    "squares": lambda z, y: 0.5 * F.mse_loss(z, y),
    "squares and more": lambda z, y: F.mse_loss(z, y, reduction="sum") + 3.0,
    "logistic": lambda z, y: F.binary_cross_entropy_with_logits(z, (y > 0).double()),
    "huber": lambda z, y: F.huber_loss(z, y, delta=0.5),
    "squared hinge": lambda z, y: (1 - y.sign() * z).relu().square().mean(),
    "poisson": lambda z, y: (z.exp() - y.abs().round() * z).mean() + 5.0,
    "quartic": lambda z, y: (z - y).pow(4).mean(),
}
PENALTIES = [tr.L1(0.1), tr.L1(0.001), tr.L1(0.0), tr.L2(0.05), tr.ElasticNet(0.05, 0.02)]


def solver(reg, closure, **settings):
    """A step of FISTA, as a function."""
    optimizer = tr.optim.FISTA([w for _, w in reg.named_parameters()], regularizer=reg, **settings)

    def backward():
        loss = closure()
        loss.backward()
        return loss

    def step():
        optimizer.step(backward)
        return optimizer.converged

    return step


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_no_weights_are_better_than_the_gap_says(penalty, name):
    # Weak duality: the objective less the gap, at any point, is below the objective at every other.
    model, _, (x, y) = linear()
    reg = tr.Regularizer(model, penalty)
    uppers, lowers = [], []

    def closure():
        return LOSSES[name](model(x)[:, 0], y)

    for size in [0.0, 1e-6, 0.3]:
        put(model, size * torch.randn(1, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        step = solver(reg, closure)
        for _ in range(6):
            uppers.append((closure() + reg()).item())
            lowers.append(uppers[-1] - tr.duality_gap(reg, closure))
            step()
        del step
    assert max(lowers) <= min(uppers) * (1 + 1e-12)


@pytest.mark.parametrize("power", [1.0, 1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("delta", [None, 1e-3, 0.5, 10.0])
def test_only_a_quadratic_gets_the_sharper_bound(delta, power):
    # One weight, a loss of |w − 1| that is symmetric about 1, and λ at half the slope at 0: the minimum is at 1 or 0.
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)

    def closure():
        off = (model.weight - 1).abs().pow(power).sum()
        return F.huber_loss(off, torch.zeros_like(off), delta=delta) if power == 1 and delta else off

    reg = tr.Regularizer(model, tr.L1(1.0))
    slope = tr.lambda_max(reg, closure)["l1"]
    reg["l1"].strength = slope / 2
    start = closure().item()
    grid = np.linspace(0, 1, 10001)
    off = np.abs(grid - 1) ** power
    losses = np.where(off <= delta, off**2 / 2, delta * (off - delta / 2)) if power == 1 and delta else off
    gap = tr.duality_gap(reg, closure)
    assert gap >= start - (losses + slope / 2 * grid).min() - 1e-9
    quadratic = power == 2 or (power == 1 and delta == 10)
    assert gap == pytest.approx(start / 4 if quadratic else start / 2, rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("penalty", [tr.L1(0.1), tr.L2(0.1), tr.ElasticNet(0.05, 0.02)], ids=str)
def test_the_gap_tends_to_0(penalty, name):
    model, _, (x, y) = linear()
    reg = tr.Regularizer(model, penalty)

    def closure():
        return LOSSES[name](model(x)[:, 0], y)

    step = solver(reg, closure, tol=1e-7)
    assert any(step() for _ in range(400))
    assert tr.duality_gap(reg, closure) < 1e-6


def test_the_gap_tends_to_0_with_several_terms_an_anchor_and_an_intercept_as_it_is():
    x, y = diabetes()
    y = (y > 0).double()
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(5, 1, dtype=torch.float64) for name in "ab"})
    toward = {f"{name}.weight": torch.full((1, 5), 0.1) for name in "ab"}
    rules = {"a.weight": tr.ElasticNet(0.01, 0.002), "b.weight": tr.L1(0.01)}
    reg = tr.Regularizer(model, rules, toward=toward)

    def closure():
        return F.binary_cross_entropy_with_logits((model["a"](x[:, :5]) + model["b"](x[:, 5:]))[:, 0], y)

    first = tr.duality_gap(reg, closure)
    start = (closure() + reg()).item()
    step = solver(reg, closure, tol=1e-11)
    assert any(step() for _ in range(400))
    assert tr.duality_gap(reg, closure) < 1e-10
    assert first >= start - (closure() + reg()).item()


def test_in_float32_the_gap_is_that_of_float64_to_rounding():
    gaps = []
    for dtype in [torch.float32, torch.float64]:
        model, closure, _ = linear(dtype=dtype)
        put(model, torch.linspace(-0.3, 0.3, 10)[None].float())
        gaps.append(tr.duality_gap(tr.Regularizer(model, tr.L1(0.1)), closure))
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)


def test_the_gap_changes_no_bit_and_counts_the_penalty_once():
    model, closure, _ = linear()
    reg = tr.Regularizer(model, tr.L1(0.1))
    before = model.weight.detach().clone()
    gap = tr.duality_gap(reg, closure)
    assert tr.duality_gap(reg, lambda: closure() + reg()) == gap
    assert same_bits(model.weight.detach(), before)
    assert model.weight.grad is None
    with reg.disabled():
        assert tr.duality_gap(reg, closure) == pytest.approx(closure().item(), rel=1e-12)


def test_a_gap_of_nan_weights_is_nan():
    model, closure, _ = linear()
    reg = tr.Regularizer(model, tr.L1(0.1))
    put(model, torch.full((1, 10), math.nan))
    assert math.isnan(tr.duality_gap(reg, closure))


def test_a_negative_loss_is_refused_where_the_bound_would_be_wrong():
    model, closure, _ = linear()
    reg = tr.Regularizer(model, tr.L1(1e-3))
    with pytest.raises(ValueError, match=r"^the data loss is -.*, but the bound needs a loss that is never neg.*; add"):
        tr.duality_gap(reg, lambda: closure() - 100)
    with pytest.raises(ValueError, match=r"^the data loss is -.*, but the bound needs a loss that is never neg.*; add"):
        tr.duality_gap(reg, lambda: closure() - 0.4)  # at these weights it is positive


@dataclass(frozen=True)
class Bent(tr.L1):
    """L1 that says it is not convex."""

    convex: ClassVar[bool] = False


def test_a_penalty_that_is_not_convex_has_no_gap():
    model, closure, _ = linear()
    reg = tr.Regularizer(model, Bent(0.1))
    with pytest.raises(ValueError, match=r"^weight has the penalty Bent\(strength=0.1\), which is not convex,"):
        tr.duality_gap(reg, closure)


@pytest.mark.parametrize("certify", [tr.stationarity, tr.lambda_max, tr.duality_gap])
def test_dropout_in_training_mode_is_warned_of(certify):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
    reg = tr.Regularizer(model, tr.L1(0.1))
    x = torch.eye(3)
    with pytest.warns(UserWarning, match=r"training mode, in which dropout .* call model\.eval\(\) first"):
        certify(reg, lambda: model(x).square().mean())
    model.eval()
    certify(reg, lambda: model(x).square().mean())
