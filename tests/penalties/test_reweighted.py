"""Reweighted: its rest points are the penalty's critical points, under every optimizer and step."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from tests import oracles
from tests.cases import weights
from tests.models import Make, attached
from torchreg.optim.step_sizes import STOCK

PENALTIES: dict[str, tuple[tr.Concave, oracles.Concave]] = {
    "mcp": (tr.MCP(0.1), oracles.mcp(0.1)),
    "scad": (tr.SCAD(0.1), oracles.scad(0.1)),
    "log_sum": (tr.LogSum(0.02), oracles.log_sum(0.02)),
    "transformed_l1": (tr.TransformedL1(0.05), oracles.transformed_l1(0.05)),
    "capped_l1": (tr.CappedL1(0.1, theta=0.2), oracles.capped_l1(0.1, 0.2)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.2},
    "ASGD": {"lr": 0.2, "lambd": 0},
    "AdamW": {"lr": 0.01, "weight_decay": 0},
    # With a small eps these turn gradients that are rounding errors into steps of the size of lr.
    "RMSprop": {"lr": 0.01, "eps": 0.1},
    "Adagrad": {"lr": 0.1, "eps": 1.0},
    "Adamax": {"lr": 0.01, "eps": 0.1},
    "Adadelta": {"lr": 1.0},
}


OPTIMIZERS: dict[str, Make] = {
    # Adafactor divides by the size of a whole matrix's gradient, which may be rounding errors too.
    **{
        kind.__name__: attached(kind, **SETTINGS.get(kind.__name__, {"lr": 0.01}))
        for kind in STOCK
        if kind.__name__ != "Adafactor"
    },
    "SGD, momentum": attached(torch.optim.SGD, lr=0.02, momentum=0.8),
    "SGD, nesterov": attached(torch.optim.SGD, lr=0.02, momentum=0.8, nesterov=True),
    "ProxSGD": lambda params, reg: tr.optim.ProxSGD(params, lr=0.02, momentum=0.8, regularizer=reg),
    "ProxAdam": lambda params, reg: tr.optim.ProxAdam(params, lr=0.01, regularizer=reg),
    "ProxAdamW, amsgrad": lambda params, reg: tr.optim.ProxAdamW(
        params, lr=0.01, weight_decay=0, amsgrad=True, regularizer=reg
    ),
}

REACHING = [
    "SGD",
    "SGD, momentum",
    "SGD, nesterov",
    "Adam",
    "AdamW",
    "NAdam",
    "RMSprop",
    "ProxSGD",
    "ProxAdamW, amsgrad",
]


class Problems(nn.ModuleDict):
    """½·MSE on the diabetes data: a linear model for each penalty, trained side by side."""

    def __init__(self, start: Tensor | dict[str, Tensor] | None = None) -> None:
        super().__init__({name: nn.Linear(10, 1, bias=False, dtype=torch.float64) for name in PENALTIES})
        x, y = oracles.diabetes()
        y = y / y.std()
        self.gram, self.target = x.T @ x / len(y), x.T @ y / len(y)
        for name, part in self.items():
            with torch.no_grad():
                part.weight.copy_(torch.tensor(0.3) if start is None else start[name])

    def train_with(self, make: Make, wrap: Any, steps: int, decay: float = 1.0) -> Problems:
        rules = {f"{name}.weight": wrap(penalty) for name, (penalty, _) in PENALTIES.items()}
        optimizer = make(self.parameters(), tr.Regularizer(self, rules))
        for _ in range(steps):
            for w in self.parameters():
                w.grad = w.detach() @ self.gram - self.target
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= decay
        return self

    def violation(self, name: str) -> float:
        """The distance from a critical point at its worst weight, by the oracle's slope."""
        w = self[name].weight.detach()[0].numpy()
        gradient = (self[name].weight.detach() @ self.gram - self.target)[0].numpy()
        slope = PENALTIES[name][1].slope(np.abs(w))
        return float(np.where(w != 0, np.abs(gradient + slope * np.sign(w)), np.abs(gradient) - slope).max())

    def solution(self) -> dict[str, Tensor]:
        return {name: part.weight.detach().clone() for name, part in self.items()}


@pytest.fixture(scope="module")
def critical() -> dict[str, Tensor]:
    """Critical points to the last bits, with zeros and nonzeros."""
    found = Problems().train_with(attached(torch.optim.SGD, lr=0.4), tr.Reweighted, 800)
    for name in PENALTIES:
        assert found.violation(name) < 1e-14, name
        assert 2 <= found[name].weight.count_nonzero() <= 4, name
    return found.solution()


# ---------------------------------------------------------------------- where it rests


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_critical_point_rests_under_every_optimizer(critical: dict[str, Tensor], optimizer: str) -> None:
    model = Problems(critical).train_with(OPTIMIZERS[optimizer], tr.Reweighted, 10)
    for name, w in model.solution().items():
        assert torch.equal(w == 0, critical[name] == 0), name
        assert (w - critical[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("optimizer", ["Adam", "NAdam", "ProxAdam"])
def test_the_exact_prox_leaves_it_where_the_step_is_a_tensor(critical: dict[str, Tensor], optimizer: str) -> None:
    model = Problems(critical).train_with(OPTIMIZERS[optimizer], lambda penalty: penalty, 10)
    for name in ("mcp", "scad", "capped_l1"):  # these let large weights go free, so that their gradient is 0
        assert model.violation(name) > 0.02, name


@pytest.mark.parametrize("optimizer", REACHING)
def test_every_optimizer_reaches_a_critical_point(optimizer: str) -> None:
    model = Problems().train_with(OPTIMIZERS[optimizer], tr.Reweighted, 500)
    for name in PENALTIES:
        assert model.violation(name) < 1e-5, name
        assert 2 <= model[name].weight.count_nonzero() <= 4, name


def test_the_exact_prox_under_adam_comes_to_no_rest() -> None:
    worst = []
    for penalty in (tr.Reweighted(tr.MCP(0.1)), tr.MCP(0.1)):
        model = Problems()
        w, found = model["mcp"].weight, []
        reg = tr.Regularizer(model["mcp"], penalty)
        optimizer = tr.optim.ProxAdam([w], lr=0.01, betas=(0.9, 0.9), regularizer=reg)
        for _ in range(600):
            w.grad = w.detach() @ model.gram - model.target
            optimizer.step()
            found.append(model.violation("mcp"))
        worst.append(max(found[500:]))
    reweighted, exact = worst
    assert reweighted < 0.02 < 0.1 < exact


@pytest.mark.parametrize("name", PENALTIES)
def test_stationarity_is_the_distance_to_the_critical_points(critical: dict[str, Tensor], name: str) -> None:
    model = Problems(critical)
    for penalty in (PENALTIES[name][0], tr.Reweighted(PENALTIES[name][0])):
        reg = tr.Regularizer(model, {f"{name}.weight": penalty})

        def closure() -> Tensor:
            w = model[name].weight
            return 0.5 * (w @ model.gram * w).sum() - (w @ model.target).sum()

        assert tr.stationarity(reg, closure).by_term[f"{name}.weight"] < 1e-13
        with torch.no_grad():
            model[name].weight[0, 2] += 0.01
        assert tr.stationarity(reg, closure).by_term[f"{name}.weight"] > 1e-3
        with torch.no_grad():
            model[name].weight.copy_(critical[name])


def test_the_duality_gap_is_refused_with_the_reason() -> None:
    model = nn.Linear(3, 1)
    reg = tr.Regularizer(model, tr.Reweighted(tr.MCP(0.1)))
    with pytest.raises(ValueError, match="is not convex, so there is no dual bound; use stationarity"):
        tr.duality_gap(reg, lambda: model(torch.ones(1, 3)).square().sum())
    with pytest.raises(ValueError, match="is not convex: momentum and the line search need that it is; use ProxSGD"):
        tr.optim.FISTA(model.parameters(), regularizer=reg)


# ---------------------------------------------------------------------- the tangent is that of the step's start


@pytest.mark.parametrize("route", ["swap-in", "attached", "with a closure", "toward"])
def test_the_tangent_is_taken_where_the_step_starts(route: str) -> None:
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    start, gradient = weights((3, 4)).clamp(-1, 1), weights((3, 4), seed=1)
    anchor = torch.full((3, 4), 0.1, dtype=torch.float64) if route == "toward" else torch.zeros(3, 4).double()
    toward = {"weight": anchor} if route == "toward" else None
    reg = tr.Regularizer(model, tr.Reweighted(tr.LogSum(0.3)), toward=toward)
    if route == "attached":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        tr.optim.attach(optimizer, reg)
    else:
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    with torch.no_grad():
        model.weight.copy_(start)

    def closure() -> float:
        model.weight.grad = gradient.clone()
        return 0.0

    if route == "with a closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    moved = (start - 0.1 * gradient - anchor).numpy()
    threshold = 0.1 * 0.3 / (0.1 + np.abs((start - anchor).numpy()))
    expected = anchor.numpy() + np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_a_parameter_without_a_gradient_and_a_skipped_step_stay() -> None:
    model = nn.Linear(4, 3)
    reg = tr.Regularizer(model, tr.Reweighted(tr.MCP(0.3)))
    optimizer = tr.optim.ProxAdam(model.parameters(), fused=True, regularizer=reg)
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())  # as GradScaler sets them
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_strengths_factors_and_disabling_act_at_the_next_step() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.Reweighted(tr.MCP(0.1)))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=1.0, regularizer=reg)

    def stepped(start: float = 0.2) -> float:
        nn.init.constant_(model.weight, start)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        return model.weight.item()

    assert list(reg) == ["reweighted_mcp"]
    assert stepped() == pytest.approx(0.2 - (0.1 - 0.2 / 3))
    reg["reweighted_mcp"].strength = 0.2
    assert stepped() == pytest.approx(0.2 - (0.2 - 0.2 / 3))
    reg["reweighted_mcp"].factor = 0.75
    assert stepped() == pytest.approx(0.2 - (0.15 - 0.2 / 3))
    assert reg.state_dict() == {"reweighted_mcp": {"strength": 0.2, "factor": 0.75}}
    assert reg["reweighted_mcp"].penalty == tr.Reweighted(tr.MCP(0.2 * 0.75))
    assert "strength=0.15" in reg.explain()
    assert tr.measure(reg)["schedule/lambda_reweighted_mcp"] == pytest.approx(0.15)
    with reg.disabled():
        assert stepped() == 0.2
    reg["reweighted_mcp"].factor = 0.0
    assert stepped() == 0.2


def test_a_copy_of_optimizer_and_model_goes_on_alike() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.Reweighted(tr.LogSum(0.1)))
    optimizer = tr.optim.ProxAdam(model.parameters(), regularizer=reg)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        for t in range(3):
            optimizer.zero_grad()
            (model.weight - t).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    train(model, optimizer)
    model_b, _, optimizer_b = copy.deepcopy((model, reg, optimizer))
    assert torch.equal(train(model, optimizer), train(model_b, optimizer_b))


def test_a_differentiable_step_has_the_gradient_of_the_tangent_too() -> None:
    def after(start: Tensor) -> Tensor:
        model, moving = nn.Linear(3, 1, bias=False, dtype=torch.float64), start.clone()
        model._parameters["weight"] = moving
        reg = tr.Regularizer(model, tr.Reweighted(tr.LogSum(0.3, epsilon=0.5)))
        optimizer = torch.optim.SGD([moving], lr=0.1, differentiable=True)
        tr.optim.attach(optimizer, reg)
        moving.grad = torch.full_like(moving, 0.2)
        optimizer.step()
        return moving

    start = torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    moved = after(start)
    assert moved[0, 2].item() == pytest.approx(2.0 - 0.1 * (0.2 + 0.3 / 2.5), rel=1e-12)
    assert torch.autograd.gradcheck(after, (start,))


# ---------------------------------------------------------------------- an optimizer of one's own


def test_prox_in_place_of_a_regularizer_needs_the_start() -> None:
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.Reweighted(tr.LogSum(0.3)))
    nn.init.constant_(model.weight, 0.5)
    start = {name: w.detach().clone() for name, w in reg.named_parameters()}
    with torch.no_grad():
        model.weight += 0.25
    before = model.weight.detach().clone()
    for missing in (None, {}):
        with pytest.raises(ValueError, match=r"^weight has the penalty Reweighted.* and no start; clone the weights"):
            reg.prox_(0.1, missing)
    assert torch.equal(model.weight, before)
    reg.prox_(0.1, start)
    assert model.weight.tolist() == [[pytest.approx(0.75 - 0.1 * 0.3 / 0.6)] * 2]


# ---------------------------------------------------------------------- what it takes, and what explain() says


def test_an_infinite_slope_at_zero_is_refused() -> None:
    for strength in (0.0, 0.1):
        refusal = rf"^penalty=L0\(strength={strength}\).* has an infinite slope at 0, .*; use LogSum or TransformedL1"
        with pytest.raises(ValueError, match=refusal):
            tr.Reweighted(tr.L0(strength))


@pytest.mark.parametrize("penalty", [tr.L1(0.1), tr.GroupLasso(0.1), 0.1, None, tr.Reweighted(tr.MCP(0.1))], ids=repr)
def test_what_is_not_concave_is_refused(penalty: Any) -> None:
    refusal = f"^expected a concave penalty of single weights, .*, got {re.escape(repr(penalty))}; use"
    with pytest.raises(TypeError, match=refusal):
        tr.Reweighted(penalty)


def test_explain_tells_where_law_one_ends() -> None:
    model = nn.Linear(4, 3)
    said = "not convex: where weights rest depends on the step, with tr.Reweighted it does not"
    for penalty, expected in [(tr.MCP(0.1), True), (tr.Reweighted(tr.MCP(0.1)), False), (tr.L1(0.1), False)]:
        reg = tr.Regularizer(model, penalty)
        assert said not in reg.explain(), "in the loss there is no prox"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = tr.optim.attach(optimizer, reg)
        assert (said in reg.explain()) == expected
        handle.remove()


def test_a_compiled_loss_takes_the_strength_as_an_input() -> None:
    model = nn.Linear(4, 3)
    for penalty in (tr.SCAD(0.1), tr.Reweighted(tr.MCP(0.1)), tr.L0(0.1), tr.LogSum(0.1), tr.CappedL1(0.1, 0.2)):
        reg = tr.Regularizer(model, penalty)
        (term,) = reg
        compiled = torch.compile(lambda reg=reg: reg(), backend="eager", fullgraph=True)
        for strength in (0.1, 0.3):
            reg[term].strength = strength
            assert compiled().item() == pytest.approx(reg().item(), rel=1e-6)
