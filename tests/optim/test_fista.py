"""FISTA reaches the solutions of scikit-learn, whatever its first step, and knows that it has."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn import linear_model
from torch import nn
from torch.nn import functional as F

import torchreg as tr
from tests import cases
from tests.models import L1_LOGISTIC, Bare, Lazy, mlp, same, snapshot
from tests.oracles import diabetes


@dataclass
class Problem:
    """A linear model on the diabetes data with its regularizer, and a count of the closure's calls."""

    model: nn.Linear
    reg: tr.Regularizer
    x: torch.Tensor
    y: torch.Tensor
    logistic: bool
    calls: int = 0

    def loss(self):
        outputs = self.model(self.x)[:, 0]
        if self.logistic:
            return F.binary_cross_entropy_with_logits(outputs, self.y)
        return 0.5 * F.mse_loss(outputs, self.y)

    def closure(self):
        self.calls += 1
        loss = self.loss()
        loss.backward()
        return loss

    def objective(self, w=None, b=0.0):
        if w is not None:
            with torch.no_grad():
                self.model.weight.copy_(torch.from_numpy(w).reshape(1, -1))
                if self.model.bias is not None:
                    self.model.bias.fill_(float(b))
        return (self.loss() + self.reg()).item()

    def fista(self, **settings):
        return tr.optim.FISTA(self.model.parameters(), regularizer=self.reg, **settings)

    def solve(self, optimizer, limit=2000):
        """The number of steps until it has converged."""
        for count in range(limit):
            optimizer.step(self.closure)
            if optimizer.converged:
                return count + 1
        raise AssertionError(f"not converged: {optimizer.stationarity}")


def problem(penalty, *, logistic=False, bias=False, spread=1.0, dtype=torch.float64):
    """`spread` is the ratio of the largest column's scale to the smallest's."""
    x, y = diabetes()
    x = x * torch.logspace(-0.5, 0.5, 10, base=spread, dtype=torch.float64)
    y = (y > 0).double() if logistic else y / y.std()
    torch.manual_seed(0)
    model = nn.Linear(10, 1, bias=bias, dtype=dtype)
    return Problem(model, tr.Regularizer(model, penalty), x.to(dtype), y.to(dtype), logistic)


# ---------------------------------------------------------------------- the solution


@pytest.mark.parametrize(
    ("ratio", "bias", "spread"),
    [(1.0, False, 1.0), (1.0, True, 100.0), (0.5, False, 1.0), (0.5, True, 10.0)],
    ids=["lasso", "lasso, scales 100:1", "elastic net", "elastic net, scales 10:1"],
)
def test_it_reaches_the_solution_of_scikit_learn(ratio, bias, spread):
    p = problem(tr.ElasticNet.from_sklearn(0.1, ratio), bias=bias, spread=spread)
    optimizer = p.fista(tol=1e-10)
    p.solve(optimizer)
    assert tr.duality_gap(p.reg, p.loss) < 1e-10
    kind = linear_model.ElasticNet(alpha=0.1, l1_ratio=ratio, fit_intercept=bias, tol=1e-15, max_iter=10**6)
    fit = kind.fit(p.x.numpy(), p.y.numpy())
    w, reached = p.model.weight.detach().numpy()[0].copy(), p.objective()
    assert ((w != 0) == (fit.coef_ != 0)).all()
    assert reached - p.objective(fit.coef_, fit.intercept_) < 1e-14


@pytest.mark.parametrize("strength", [0.05, 0.01])
def test_it_reaches_the_logistic_regression_of_scikit_learn(strength):
    p = problem(tr.L1(strength), logistic=True, bias=True)
    p.solve(p.fista(tol=1e-10))
    assert tr.duality_gap(p.reg, p.loss) < 1e-10
    kind = linear_model.LogisticRegression(
        C=1 / (strength * len(p.y)), solver="saga", tol=1e-12, max_iter=10**5, **L1_LOGISTIC
    )
    fit = kind.fit(p.x.numpy(), p.y.numpy())
    w, reached = p.model.weight.detach().numpy()[0].copy(), p.objective()
    assert ((w != 0) == (fit.coef_[0] != 0)).all()
    assert abs(reached - p.objective(fit.coef_, fit.intercept_[0])) < 1e-12


def test_it_takes_far_fewer_steps_than_the_plain_proximal_gradient():
    p = problem(tr.L1(0.03), spread=10.0)
    optimizer = p.fista(tol=1e-8)
    steps = p.solve(optimizer)
    p = problem(tr.L1(0.03), spread=10.0)
    curvature = torch.linalg.eigvalsh(p.x.T @ p.x / len(p.y))[-1].item()
    plain = tr.optim.ProxSGD(p.model.parameters(), lr=1 / curvature, regularizer=p.reg)
    for _ in range(5 * steps):
        plain.zero_grad()
        p.closure()
        plain.step()
    assert tr.stationarity(p.reg, p.loss).relative > 1e-6


@pytest.mark.parametrize("penalty", [tr.L1(0.05), tr.L2(0.05), tr.ElasticNet(0.05, 0.01)], ids=str)
def test_several_terms_scales_and_anchors_converge_too(penalty):
    x, y = diabetes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 3, dtype=torch.float64), nn.Softmax(dim=1))
    model.append(nn.Linear(3, 1, dtype=torch.float64)).requires_grad_(False)
    model[0].requires_grad_(True)
    labels = torch.bucketize(y, torch.tensor([-40.0, 40.0], dtype=torch.float64))
    reg = tr.Regularizer(
        model,
        {"0.weight": penalty, "0.bias": tr.L1(0.01)},
        toward={"0.weight": torch.full((3, 10), 0.05), "0.bias": torch.zeros(3)},
        scale=lambda name, w: 0.5,
    )
    frozen = model[2].weight.clone()
    optimizer = tr.optim.FISTA(model[0].parameters(), regularizer=reg, tol=1e-9)

    def closure():
        loss = F.cross_entropy(model[0](x), labels)
        loss.backward()
        return loss

    while not optimizer.converged:
        optimizer.step(closure)
    assert tr.duality_gap(reg, lambda: F.cross_entropy(model[0](x), labels)) < 1e-8
    assert torch.equal(model[2].weight, frozen)


def test_complex_weights_converge_too():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.complex128)
    y = x @ torch.tensor([1 + 2j, 0, 0, -1j, 0, 0], dtype=torch.complex128) + 0.1 * torch.randn(40)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(6, dtype=torch.complex128))
    reg = tr.Regularizer(model, tr.L1(0.5), include="w")
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-10)

    def loss():
        return 0.5 * (x @ model.w - y).abs().square().mean()

    def closure():
        value = loss()
        value.backward()
        return value

    while not optimizer.converged:
        optimizer.step(closure)
    assert tr.duality_gap(reg, loss) < 1e-10
    assert (model.w != 0).tolist() == [True, False, False, True, False, False]


@cases.every_convex_case
def test_it_solves_with_every_penalty(case):
    x, y = diabetes()
    targets = torch.stack([y, y.square(), (y / 30).sin()], dim=1)
    targets = (targets - targets.mean(0)) / targets.std(0)
    torch.manual_seed(0)
    model = nn.Linear(10, 3, bias=False, dtype=torch.float64)
    anchor = {"weight": case.anchor(model.weight.detach())} if case.anchored else None
    reg = tr.Regularizer(model, case.penalty.scaled(0.1), toward=anchor)
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg, tol=1e-7)

    def loss():
        return 0.5 * (model(x) - targets).square().sum(1).mean()

    def closure():
        value = loss()
        value.backward()
        return value

    for _ in range(200 if case.penalty.is_zero else 400):
        optimizer.step(closure)
        if optimizer.converged:
            break
    if case.penalty.is_zero:
        assert torch.allclose(model.weight, torch.linalg.lstsq(x, targets).solution.T, atol=1e-6)
    else:
        assert optimizer.converged
        assert tr.duality_gap(reg, loss) < 1e-6


# ---------------------------------------------------------------------- its step and its stop


@pytest.mark.parametrize("logistic", [False, True], ids=["squares", "logistic"])
@pytest.mark.parametrize("lr", [1e-30, 1e-9, 1e9, 1e300])
def test_any_first_step_serves(lr, logistic):
    calls = []
    for first in (1.0, lr):
        p = problem(tr.L1(0.05), logistic=logistic)
        p.solve(p.fista(lr=first))
        assert tr.duality_gap(p.reg, p.loss) < 1e-7
        calls.append(p.calls)
    assert calls[1] - calls[0] < 400


@pytest.mark.parametrize("lr", [1e-9, 1.0, 1e300])
@pytest.mark.parametrize("logistic", [False, True], ids=["squares", "logistic"])
def test_float32_reaches_its_precision_and_stays_there(logistic, lr):
    exact = problem(tr.L1(0.05), logistic=logistic)
    exact.solve(exact.fista())
    p = problem(tr.L1(0.05), logistic=logistic, dtype=torch.float32)
    optimizer = p.fista(lr=lr, tol=0.0)
    for _ in range(100):
        optimizer.step(p.closure)
    before = p.calls
    for _ in range(60):
        optimizer.step(p.closure)
        assert optimizer.stationarity < 1e-4
    assert p.calls - before < 150  # no endless search for a step
    assert optimizer.param_groups[0]["step_size"] > 1e-3
    assert ((p.model.weight != 0) == (exact.model.weight != 0)).all()
    assert (p.model.weight - exact.model.weight).abs().max() < 1e-5


def test_once_converged_a_step_leaves_every_weight_until_the_strength_changes():
    p = problem(tr.L1(0.1))
    optimizer = p.fista()
    assert (optimizer.converged, optimizer.stationarity) == (False, math.inf)
    first = p.solve(optimizer)
    solution, p.calls = snapshot(p.model), 0
    for _ in range(3):
        loss = optimizer.step(p.closure)
    assert p.calls == 3
    assert same(solution, snapshot(p.model))
    assert loss.item() == p.loss().item()
    p.reg["l1"].strength = 0.099
    second = p.solve(optimizer)
    assert not same(solution, snapshot(p.model))
    assert tr.duality_gap(p.reg, p.loss) < 1e-8
    assert second < first


def test_its_stationarity_and_what_it_leaves_in_grad_are_those_of_the_weights():
    p = problem(tr.ElasticNet(0.05, 0.01), logistic=True, bias=True)
    optimizer = p.fista()
    (group,) = optimizer.param_groups
    for _ in range(10):
        loss = optimizer.step(p.closure)
        assert loss.item() == p.loss().item()
        assert optimizer.attachment.step_size(group, {}, p.model.weight) == group["step_size"]
        assert tr.stationarity(p.reg) == tr.stationarity(p.reg, p.loss)
        assert optimizer.stationarity == pytest.approx(tr.stationarity(p.reg).relative, rel=1e-12)


def test_without_a_penalty_it_is_the_accelerated_gradient():
    p = problem(tr.L1(0.1), bias=True)
    optimizer = p.fista(tol=0.0)
    exact = torch.linalg.lstsq(p.x, p.y[:, None]).solution.T
    with p.reg.disabled():
        for _ in range(300):
            optimizer.step(p.closure)
    assert (p.model.weight - exact).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_a_loss_without_curvature_does_not_make_the_step_overflow(dtype, rtol):
    torch.manual_seed(0)
    slope = 1e-3 * torch.randn(1, 50, dtype=dtype)
    model = nn.Linear(50, 1, bias=False, dtype=dtype)
    reg = tr.Regularizer(model, tr.L2(0.7))
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg, tol=0.0)

    def closure():
        loss = (slope * model.weight).sum()
        loss.backward()
        return loss

    for _ in range(400):  # the step grows tenfold each time
        optimizer.step(closure)
    assert torch.allclose(model.weight, -slope / 1.4, rtol=rtol, atol=0)


def test_a_closure_may_write_every_gradient_into_the_same_memory():
    p, q = problem(tr.L1(0.1)), problem(tr.L1(0.1))
    buffer = torch.zeros_like(q.model.weight)

    def closure():
        loss = q.loss()
        q.model.weight.grad = buffer.copy_(torch.autograd.grad(loss, q.model.weight)[0])
        return loss

    optimizer, other = p.fista(), q.fista()
    for _ in range(20):
        optimizer.step(p.closure)
        other.step(closure)
    assert same(snapshot(p.model), snapshot(q.model))


def test_weights_that_were_changed_meanwhile_are_where_it_goes_on():
    p = problem(tr.L1(0.01))
    optimizer = p.fista(tol=1e-9)
    for _ in range(20):
        optimizer.step(p.closure)
    nn.init.constant_(p.model.weight, 100.0)
    start = p.objective()
    optimizer.step(p.closure)
    assert p.objective() < start
    p.solve(optimizer)
    assert tr.duality_gap(p.reg, p.loss) < 1e-9


# ---------------------------------------------------------------------- one route


def test_it_is_the_carrier_of_its_parameters():
    p = problem(tr.L1(0.1), bias=True)
    first = p.fista()
    assert not p.reg().requires_grad
    assert "prox (FISTA)" in p.reg.explain()
    second = p.fista()
    with pytest.raises(RuntimeError, match="no longer carries the penalty of weight: a newer FISTA"):
        first.step(p.closure)
    second.step(p.closure)


def test_what_it_refuses_leaves_the_carrier_of_before():
    p = problem(tr.MCP(0.1), bias=True)
    optimizer = tr.optim.ProxSGD(p.model.parameters(), lr=0.1, regularizer=p.reg)
    with pytest.raises(ValueError, match="not convex"):
        p.fista()
    assert [binding.carrier for binding in p.reg.bindings()] == [optimizer.attachment]


def test_a_closure_that_adds_the_penalty_is_harmless():
    solutions = []
    for add in (False, True):
        p = problem(tr.L1(0.1))
        optimizer = p.fista()
        criterion = tr.RegularizedLoss(nn.MSELoss(), p.reg)

        def closure(p=p, criterion=criterion, optimizer=optimizer, add=add):
            optimizer.zero_grad(set_to_none=False)
            loss = (criterion(p.model(p.x)[:, 0], p.y) + p.reg()) / 2 if add else p.loss()
            loss.backward()
            return loss

        for _ in range(30):
            optimizer.step(closure)
        assert p.reg.enabled
        solutions.append(snapshot(p.model))
    assert same(*solutions)


def test_once_its_prox_is_removed_the_penalty_in_the_loss_counts():
    p = problem(tr.L2(0.1))
    optimizer = p.fista(tol=0.0)
    optimizer.attachment.remove()
    assert p.reg().requires_grad

    def closure():
        loss = p.loss() + p.reg()
        loss.backward()
        return loss

    for _ in range(100):
        optimizer.step(closure)
    assert tr.stationarity(p.reg, p.loss).relative < 1e-6


def test_partial_leaves_the_rest_to_another_optimizer():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(ValueError, match=r"^FISTA does not hold the selected fc1.weight; give it these parameters"):
        tr.optim.FISTA(model.fc2.parameters(), regularizer=reg)
    head = tr.optim.FISTA(model.fc2.parameters(), regularizer=reg, partial=True)
    body = tr.optim.ProxSGD(model.fc1.parameters(), lr=0.1, regularizer=reg, partial=True)
    assert "prox (FISTA)" in reg.explain()
    assert "prox (ProxSGD)" in reg.explain()
    del head, body


def test_attach_is_refused_and_nothing_has_changed():
    p = problem(tr.L1(0.1))
    optimizer = p.fista()
    optimizer.attachment.remove()
    for step_size in (None, tr.optim.learning_rate):
        with pytest.raises(
            ValueError, match=r"^FISTA takes its prox inside its line search, .*: FISTA\(params, regular"
        ):
            tr.optim.attach(optimizer, p.reg, step_size=step_size)
    assert p.reg().requires_grad
    assert not optimizer._optimizer_step_post_hooks


# ---------------------------------------------------------------------- copies and checkpoints


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_exactly_as_the_original(copied):
    p = problem(tr.L1(0.01), bias=True)
    optimizer = p.fista()
    for _ in range(7):
        optimizer.step(p.closure)
    model, reg, other = copied((p.model, p.reg, optimizer))
    q = Problem(model, reg, p.x, p.y, p.logistic)
    assert other.stationarity == optimizer.stationarity
    for _ in range(10):
        optimizer.step(p.closure)
        other.step(q.closure)
    assert same(snapshot(p.model), snapshot(q.model))
    assert not reg().requires_grad
    assert other.regularizer is reg


def test_a_copy_alone_keeps_the_strength_of_that_moment():
    p = problem(tr.L1(0.05), bias=True)
    model, optimizer = copy.deepcopy((p.model, p.fista()))
    p.reg["l1"].strength = 5.0
    q = Problem(model, tr.Regularizer(model, tr.L1(0.05)), p.x, p.y, p.logistic)
    q.solve(optimizer)
    assert tr.duality_gap(q.reg, q.loss) < 1e-8


def test_a_checkpoint_goes_on_exactly_as_the_original():
    p, q = (problem(tr.L1(0.01), bias=True) for _ in range(2))
    optimizer, other = p.fista(), q.fista(lr=3.0, tol=1.0)
    for _ in range(7):
        optimizer.step(p.closure)
    file = io.BytesIO()
    torch.save({"model": p.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    q.model.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert other.stationarity == optimizer.stationarity
    assert p.solve(optimizer) == q.solve(other)
    assert same(snapshot(p.model), snapshot(q.model))


def test_step_hooks_fire_once_a_step():
    p = problem(tr.L1(0.1))
    optimizer, fired = p.fista(), []
    optimizer.register_step_pre_hook(lambda *args: fired.append("before"))
    optimizer.register_step_post_hook(lambda *args: fired.append("after"))
    optimizer.step(p.closure)
    assert fired == ["before", "after"]


# ---------------------------------------------------------------------- errors


@dataclass(frozen=True)
class Bent(tr.L1):
    """L1 that says it is not convex."""

    convex: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("penalty", "error", "message"),
    [
        (
            Bent(0.1),
            ValueError,
            r"^weight has the penalty Bent\(strength=0\.1\).*, which is not convex: .* use ProxSGD",
        ),
        (Bare(0.1), NotImplementedError, r"^Bare cannot certify a solution yet; .* method nearest_subgradient"),
    ],
)
def test_a_penalty_that_it_cannot_solve_is_refused_and_keeps_its_route(penalty, error, message, caplog):
    p = problem(penalty)
    with pytest.raises(error, match=message):
        p.fista()
    assert p.reg().requires_grad
    assert not caplog.records


def test_a_step_needs_a_closure_that_returns_a_number():
    p = problem(tr.L1(0.1))
    optimizer, before = p.fista(), snapshot(p.model)
    with pytest.raises(
        TypeError, match=r"^FISTA evaluates the loss several times a step, so it needs a closure: optim"
    ):
        optimizer.step()
    with pytest.raises(TypeError, match=r"^the closure returned NoneType; it must return the loss, a single number$"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match=r"^the closure returned a tensor of shape \(2,\); it must return the loss"):
        optimizer.step(lambda: torch.ones(2))
    with pytest.raises(
        RuntimeError, match=r"^the closure left no gradient in the optimizer's parameters; call loss\.back"
    ):
        optimizer.step(p.loss)
    assert same(before, snapshot(p.model))


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_after_an_error_the_weights_are_those_before_the_step(calls):
    p = problem(tr.L1(0.01))
    optimizer = p.fista()
    for _ in range(5):
        optimizer.step(p.closure)
    before, left = snapshot(p.model), [calls]

    def failing():
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return p.closure()

    if calls < 2:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(failing)
        assert same(before, snapshot(p.model))
    optimizer.step(p.closure)
    assert not same(before, snapshot(p.model))


def test_a_closure_that_is_finite_only_now_and_then_is_no_endless_loop():
    p = problem(tr.L1(0.01))
    optimizer, before, turns = p.fista(), snapshot(p.model), []

    def closure():
        turns.append(1)
        return p.closure() * (1 if len(turns) == 1 else math.nan)

    with pytest.raises(
        RuntimeError, match=r"^no step is short enough for a finite loss, .* make the closure determini"
    ):
        optimizer.step(closure)
    assert same(before, snapshot(p.model))


def test_a_loss_that_is_not_finite_is_refused_at_the_weights_and_avoided_elsewhere():
    p = problem(tr.L1(0.001))
    p.y = p.y.abs() + 0.1
    nn.init.zeros_(p.model.weight)

    def barrier():  # finite where every output is below 0.2
        return (p.y * p.model(p.x)[:, 0]).mean() - (0.2 - p.model(p.x)[:, 0]).log().mean()

    def closure():
        loss = barrier()
        loss.backward()
        return loss

    optimizer = p.fista(lr=1e3, tol=1e-7)
    while not optimizer.converged:
        optimizer.step(closure)
        assert math.isfinite(barrier().item())
    nn.init.constant_(p.model.weight, math.nan)
    with pytest.raises(
        RuntimeError, match=r"^the loss is nan and its gradient's norm nan, and a step needs both finite"
    ):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, r"^lr=0 never moves; it is the first trial of the line search, such as 1\.0$"),
        ({"lr": -1.0}, ValueError, r"^lr=-1\.0 must be finite and at least 0; it is the first trial"),
        ({"lr": math.inf}, ValueError, r"^lr=inf must be finite"),
        ({"lr": "1"}, TypeError, r"^lr='1' is a str, not a number; it is the first trial"),
        ({"tol": -1e-8}, ValueError, r"^tol=-1e-08 must be finite and at least 0; it is the relative distance"),
    ],
)
def test_a_setting_that_cannot_serve_is_refused(settings: dict[str, Any], error, message):
    p = problem(tr.L1(0.1))
    with pytest.raises(error, match=message):
        p.fista(**settings)
    with pytest.raises(error, match=message):
        tr.optim.FISTA([{"params": p.model.parameters(), **settings}], regularizer=p.reg)
    assert p.reg().requires_grad


def test_several_groups_are_refused():
    p = problem(tr.L1(0.1), bias=True)
    with pytest.raises(ValueError, match=r"^FISTA has one step for all parameters, so it takes one group; join them"):
        tr.optim.FISTA([{"params": [p.model.weight]}, {"params": [p.model.bias]}], regularizer=p.reg)
    assert p.reg().requires_grad
    optimizer = tr.optim.FISTA([{"params": [p.model.weight]}], regularizer=p.reg)
    with pytest.raises(ValueError, match=r"^FISTA has one step for all parameters"):
        optimizer.add_param_group({"params": [p.model.bias]})
    assert len(optimizer.param_groups) == 1


def test_lazy_modules_may_get_their_shape_later():
    model = Lazy()
    reg = tr.Regularizer(model, tr.L1(0.01))
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    model(x)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


def test_its_signature_is_its_own():
    names = list(inspect.signature(tr.optim.FISTA).parameters)
    assert names == ["params", "lr", "tol", "regularizer", "partial"]
    assert np.isinf(problem(tr.L1(0.1)).fista().stationarity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_by_default_it_stops_at_what_the_precision_of_the_weights_can_reach(dtype):
    x, y = diabetes()
    x, y = x.to(dtype), (y / y.std()).to(dtype)
    model = nn.Linear(10, 1, bias=False, dtype=dtype)
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=tr.Regularizer(model, tr.L1(0.1)))

    def closure():
        loss = (model(x)[:, 0] - y).square().mean() / 2
        loss.backward()
        return loss

    for _ in range(500):
        optimizer.step(closure)
        if optimizer.converged:
            break
    assert optimizer.converged
    assert optimizer.stationarity <= 4e-4 if dtype == torch.float32 else optimizer.stationarity <= 2e-8


@pytest.mark.parametrize("tol", [None, 1e-9])
def test_a_checkpoint_of_another_optimizer_starts_the_line_search_anew(tol):
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    stock = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = tr.optim.FISTA(model.parameters(), regularizer=tr.Regularizer(model, tr.L1(0.1)), tol=tol)
    optimizer.load_state_dict(stock.state_dict())

    def closure():
        loss = (model.weight - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(50):
        optimizer.step(closure)
    assert optimizer.converged
    assert torch.allclose(model.weight, torch.full_like(model.weight, 0.95))
