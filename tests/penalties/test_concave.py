"""The exact proxes of the concave penalties against a search of every point, and what these penalties promise."""

from __future__ import annotations

import functools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import torchreg as tr
from tests import cases, oracles
from tests.cases import CONCAVE, REWEIGHTED, Case
from torchreg.penalties.functional import firm_threshold, hard_threshold, soft_threshold

LIVE = [case for case in CONCAVE if not case.penalty.is_zero]
every_concave_case = pytest.mark.parametrize("case", CONCAVE, ids=str)
every_live_case = pytest.mark.parametrize("case", LIVE, ids=str)

# ---------------------------------------------------------------------- the prox


def switches(case: Case) -> list[float]:
    """The steps at which a closed form goes over into another, and their neighbours."""
    penalty: Any = case.penalty
    found = {
        tr.MCP: lambda: [penalty.gamma],
        tr.SCAD: lambda: [penalty.a - 1, penalty.a, penalty.a + 1],
        tr.LogSum: lambda: [penalty.epsilon**2 / penalty.strength],
        tr.TransformedL1: lambda: [penalty.a**2 / (2 * (penalty.a + 1) * penalty.strength)],
        tr.CappedL1: lambda: [2 * penalty.theta / penalty.strength],
        tr.L0: list,
    }[type(penalty)]()
    return [step * factor for step in found for factor in (0.5, 0.99, 1.0, 1.01, 2.0)]


@functools.cache
def problems(case: Case) -> tuple[Tensor, Tensor]:
    """Steps from 1e-6 to 1e5 and about the switches, with weights about where their prox becomes nonzero."""
    step = np.array([*np.geomspace(1e-6, 1e5, 23), *switches(case)])[:, None]
    low, high = np.zeros_like(step), 100 * (step + np.sqrt(step) + 1)
    for _ in range(15):
        middle = (low + high) / 2
        dead = case.oracle.prox(middle, step) == 0
        low, high = np.where(dead, middle, low), np.where(dead, high, middle)
    w = torch.from_numpy(high * np.array([0.3, -0.9, 0.99, -0.9999, 1.0001, -1.01, 1.1, -1.5, 3.0, -30.0]))
    return w, torch.from_numpy(step)


def assert_minimizes(case: Case, w: Tensor, step: Tensor, p: Tensor, eps: float) -> None:
    """Equal to the oracle's up to a dozen roundings, enlarged as the problem does; at a near tie either minimizer."""
    modulus, steps = oracles.to_numpy(w.abs()), oracles.to_numpy(step)
    found, exact = oracles.to_numpy(p.abs()), np.abs(case.oracle.prox(oracles.to_numpy(w), steps))
    allowed = 12 * eps * modulus * case.oracle.condition(exact, steps)
    at_found, at_exact = (case.oracle.objective(u, modulus, steps) for u in (found, exact))
    tie = (at_found - at_exact <= 12 * eps * (modulus**2 + np.abs(at_exact))) & (
        (found == 0)
        | (exact == 0)
        | (case.oracle.condition(exact, steps) > 1e3)
        | (np.abs(found - modulus) <= allowed)
        | (np.abs(exact - modulus) <= allowed)
    )
    worst = np.argmax(np.where(tie, 0, np.abs(found - exact) - allowed))
    at = [x.ravel()[worst] for x in (modulus, np.broadcast_to(steps, modulus.shape), found, exact)]
    assert ((np.abs(found - exact) <= allowed) | tie).all(), at
    assert (at_found <= at_exact + 12 * eps * (modulus**2 + np.abs(at_exact))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
@every_live_case
def test_prox_is_where_the_search_finds_the_minimum(case: Case, dtype: torch.dtype) -> None:
    w, step = (x.to(dtype.to_real()) for x in problems(case))
    w = w * torch.exp(1j * torch.arange(float(w.numel())).reshape(w.shape)).to(dtype) if dtype.is_complex else w
    eps = torch.finfo(dtype).eps
    p = case.penalty.prox(w, step.expand(w.shape))
    assert_minimizes(case, w, step, p, eps)
    kept = p != 0
    assert torch.allclose(p[kept].sgn(), w[kept].sgn(), rtol=0, atol=4 * eps)
    rows = [case.penalty.prox(row, own.item()) for row, own in zip(w, step, strict=True)]
    assert_minimizes(case, w, step, torch.stack(rows), eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_live_case
def test_half_precision_is_the_prox_in_float32_rounded_once(case: Case, dtype: torch.dtype) -> None:
    w = torch.linspace(-3, 3, 201).to(dtype)
    for step in (0.37, torch.linspace(0.1, 2, 201)):
        assert torch.equal(case.penalty.prox(w, step), case.penalty.prox(w.float(), step).to(dtype))


@cases.SETTINGS
@given(
    w=st.floats(-1e3, 1e3, allow_subnormal=False),
    step=st.floats(1e-6, 1e6),
    strength=st.floats(1e-6, 1e3),
    width=st.floats(1e-3, 1e3),
)
def test_no_rival_has_a_lower_objective(w: float, step: float, strength: float, width: float) -> None:
    penalties = [tr.MCP(strength, width), tr.SCAD(strength, 1 + width), tr.L0(strength), tr.LogSum(strength, width)]
    x = torch.tensor([w], dtype=torch.float64)
    for penalty in [*penalties, tr.TransformedL1(strength, width), tr.CappedL1(strength, width)]:
        p = penalty.prox(x, step)

        def objective(u: Tensor, penalty: tr.Penalty = penalty) -> float:
            return ((u - x).square() / 2).item() + step * penalty(u).item()

        best = objective(p)
        for share in (0.0, 1e-6, 1e-3, *np.linspace(0.05, 1, 40)):
            rival = objective(share * x)
            assert best <= rival + 1e-14 * (w * w + rival), penalty
        assert abs(p.item()) <= abs(w)
        assert p.item() * w >= 0


@pytest.mark.parametrize(
    ("penalty", "step", "tie"),
    [
        (tr.MCP(0.5, gamma=2.0), 8.0, 2.0),
        (tr.MCP(0.5, gamma=2.0), 2.0, 1.0),
        (tr.SCAD(0.5, a=3.0), 16.0, 4.0),
        (tr.SCAD(0.5, a=3.0), 3.0, 1.75),
        (tr.L0(0.5), 4.0, 2.0),
        (tr.CappedL1(0.5, theta=1.0), 2.0, 1.5),
        (tr.CappedL1(0.5, theta=1.0), 16.0, 4.0),
    ],
    ids=str,
)
def test_at_a_tie_it_is_the_smaller_minimizer(penalty: tr.Penalty, step: float, tie: float) -> None:
    w = torch.tensor([tie, -tie, tie * (1 + 1e-6)], dtype=torch.float64)
    for s in (step, torch.full_like(w, step)):
        p = penalty.prox(w, s)
        assert p[2] == w[2], "beyond the jump it is w"
        assert torch.equal(p[:2], soft_threshold(w[:2], 0.5 * step) if tie in (1.75, 1.5) else torch.zeros(2).double())


@every_concave_case
def test_infinite_weights_stay_infinite(case: Case) -> None:
    w = torch.tensor([math.inf, -math.inf, 1.0])
    for step in (0.7, torch.full_like(w, 0.7)):
        assert torch.equal(case.penalty.prox(w, step)[:2], w[:2])


@every_live_case
def test_the_gradient_of_the_prox_is_finite_everywhere_and_right_off_the_jumps(case: Case) -> None:
    w = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    for step in (0.05, 5.0, 500.0, torch.full((41,), 0.05, dtype=torch.float64)):
        (gradient,) = torch.autograd.grad(case.penalty.prox(w, step).sum(), w)
        assert gradient.isfinite().all()
    off = (w.detach() + 0.0123).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: case.penalty.prox(w, 0.05), (off,))


# ---------------------------------------------------------------------- slopes


@every_concave_case
def test_the_slope_is_the_gradient_of_the_value(case: Case) -> None:
    w = torch.linspace(0.013, 7, 200, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(case.penalty(w), w)
    slope = case.penalty.slope(w.detach())
    torch.testing.assert_close(slope, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, torch.from_numpy(np.asarray(case.oracle.slope(w.detach().numpy()))) + 0 * slope)
    at_zero = case.penalty.slope(torch.zeros((), dtype=torch.float64)).item()
    assert at_zero == pytest.approx(float(case.oracle.slope(np.zeros(1))[0]))


@pytest.mark.parametrize("case", [*CONCAVE, *REWEIGHTED[:3]], ids=str)
def test_a_nan_has_no_slope(case: Case) -> None:
    w, nan = torch.tensor([0.0, 1.0]), torch.tensor([math.nan, math.nan])
    assert case.penalty.subgradient(nan, w).isnan().all()
    assert (nan + case.penalty.subgradient(w, nan)).isnan().all()


def test_l0_in_a_loss_counts_and_pulls_at_nothing() -> None:
    w = torch.tensor([2.0, 0.0, -1e-30], requires_grad=True)
    value = tr.L0(0.5)(w)
    value.backward()
    assert value.item() == 1.0
    assert w.grad.tolist() == [0.0, 0.0, 0.0]


def test_l0_has_no_lambda_max_and_says_why() -> None:
    model = torch.nn.Linear(2, 1)
    reg = tr.Regularizer(model, tr.L0(0.1))
    with pytest.raises(
        NotImplementedError, match=r"^L0 has no least strength at which zero is stationary: zero is stationary at every"
    ):
        tr.lambda_max(reg, lambda: model(torch.ones(1, 2)).sum())
    assert tr.measure(reg)["overview/penalty"] == pytest.approx(0.2)


# ---------------------------------------------------------------------- limits

W = torch.tensor([2.0, -0.3, 0.01, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "penalty",
    [tr.MCP(0.3, gamma=1e9), tr.SCAD(0.3, a=1e9), tr.TransformedL1(0.3, a=1e9), tr.CappedL1(0.3, theta=1e9)],
    ids=str,
)
def test_without_an_end_they_are_l1(penalty: tr.Penalty) -> None:
    torch.testing.assert_close(penalty(W), tr.L1(0.3)(W), rtol=1e-8, atol=0)
    torch.testing.assert_close(penalty.prox(W, 0.5), tr.L1(0.3).prox(W, 0.5), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "penalty", [tr.MCP(math.sqrt(0.6e9), gamma=1e-9), tr.TransformedL1(0.3, a=1e-9), tr.CappedL1(0.3e9, 1e-9)], ids=str
)
def test_with_an_early_end_they_are_l0(penalty: tr.Penalty) -> None:
    torch.testing.assert_close(penalty(W), tr.L0(0.3)(W), rtol=1e-6, atol=0)
    torch.testing.assert_close(penalty.prox(W, 0.05), tr.L0(0.3).prox(W, 0.05), rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- thresholds as functions


def test_firm_threshold_is_soft_at_low_and_shrinks_nothing_beyond_high() -> None:
    w = torch.linspace(-3, 3, 61, dtype=torch.float64)
    line = np.interp(w.abs().numpy(), [0, 1, 2, 3], [0, 0, 2, 3])
    for low, high in [(1.0, 2.0), (torch.tensor(1.0), 2.0), (1.0, torch.full_like(w, 2.0))]:
        np.testing.assert_allclose(firm_threshold(w, low, high).numpy(), np.sign(w.numpy()) * line, atol=1e-14)
    assert torch.equal(firm_threshold(w, 1.0, 1.0), hard_threshold(w, 1.0))
    assert torch.equal(firm_threshold(w, torch.full_like(w, 1.0), 0.5), hard_threshold(w, 1.0))
    assert torch.equal(firm_threshold(w, 0.0, 2.0), w)


@cases.every_dtype
def test_thresholds_keep_dtype_nan_and_positive_zeros(dtype: torch.dtype) -> None:
    w = torch.tensor([2.0, -0.5, -0.0, math.nan]).to(dtype)
    for threshold in (0.5, torch.full((4,), 0.5, dtype=w.real.dtype), 1e300):
        for p in (hard_threshold(w, threshold), firm_threshold(w, threshold, 1.0)):
            assert p.dtype == dtype
            assert p.data_ptr() != w.data_ptr()
            assert p[3].isnan()
            zeros = torch.view_as_real(p[1:3]) if dtype.is_complex else p[1:3]
            assert (zeros == 0).all()
            assert not zeros.signbit().any()


# ---------------------------------------------------------------------- errors: value, reason, next move

PARAMETERS = [
    (tr.MCP, "gamma", 0.0, r"must be more than 0; write MCP\(1e-4, gamma=3.0\)"),
    (tr.SCAD, "a", 1.0, r"must be more than 1; write SCAD\(1e-4, a=3.7\)"),
    (tr.LogSum, "epsilon", 0.0, r"must be more than 0; write LogSum\(1e-4, epsilon=0.1\)"),
    (tr.TransformedL1, "a", 0.0, r"must be more than 0; write TransformedL1\(1e-4, a=1.0\)"),
    (tr.CappedL1, "theta", 0.0, r"must be more than 0; write CappedL1\(1e-4, theta=0.1\)"),
]
every_parameter = pytest.mark.parametrize(("kind", "name", "floor", "text"), PARAMETERS, ids=lambda x: str(x)[:20])


@every_parameter
def test_a_width_that_is_none_is_refused(kind: Any, name: str, floor: float, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}={floor} {text}$"):
        kind(0.1, floor)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^{name}={bad} must be finite"):
            kind(0.1, bad)
    with pytest.raises(TypeError, match=f"^{name}='3' is a str, not a number; write {kind.__name__}"):
        kind(0.1, "3")
    with pytest.raises(ValueError, match=r"^strength=-0\.1 must be finite and at least 0; write"):
        kind(-0.1, 3.0)


@every_parameter
def test_a_width_is_no_strength(kind: Any, name: str, floor: float, text: str) -> None:
    reg = tr.Regularizer(torch.nn.Linear(2, 1), kind(0.1, 2.0))
    (key,) = reg
    assert reg.state_dict() == {key: {"strength": 0.1, "factor": 1.0}}
    assert getattr(kind(0.1, 2).scaled(3.0), name) == 2.0


# ---------------------------------------------------------------------- check_penalty sees what is wrong


class ForgetsTheStep(tr.MCP):
    """As if no step were ever γ or longer."""

    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return firm_threshold(w, self.strength * step, self.gamma * self.strength)


class EarlyJump(tr.L0):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return hard_threshold(w, 0.9 * (2 * self.strength * step) ** 0.5)


class StaysAtTheRoot(tr.LogSum):
    """Never compares with 0."""

    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        root = (w.abs() + self.epsilon).square() - 4 * self.strength * step
        return torch.where(root > 0, w.sgn() * (w.abs() - self.epsilon + root.clamp(min=0).sqrt()).clamp(min=0) / 2, 0)


class OffSlope(tr.SCAD):
    def slope(self, modulus: Tensor) -> Tensor:
        return 1.01 * super().slope(modulus)


class Secant(tr.Reweighted):
    """A line that crosses the penalty."""

    def linearized(self, w: Tensor) -> Any:
        return super().linearized(2 * w)


BROKEN = [
    (ForgetsTheStep(0.3), "prox is not the argmin"),
    (EarlyJump(0.3), "prox is not the argmin"),
    (StaysAtTheRoot(0.3), "prox is not the argmin"),
    (OffSlope(0.3), "is not the one nearest"),
    (Secant(tr.MCP(0.3)), "is not a tangent from above|has other subgradients"),
]


@pytest.mark.parametrize(("penalty", "fault"), BROKEN, ids=lambda x: type(x).__name__)
def test_a_broken_penalty_is_not_certified(penalty: tr.Penalty, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        tr.testing.check_penalty(penalty)
