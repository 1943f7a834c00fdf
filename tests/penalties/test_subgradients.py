"""Subgradient, dual norm and conjugate of each penalty, judged by its value and its prox."""

import pytest
import torch

import torchreg as tr
from tests import cases
from tests.cases import every_case, every_convex_case
from tests.models import Bare
from torchreg.penalties.base import inner

DTYPES = [torch.float64, torch.complex128]
every_precise_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def points(case, dtype):
    """Weights with a row, a column and single entries at the minimum."""
    w = cases.weights((5, 4), dtype, seed=1)
    corner = case.anchor(w)
    for at in [(3, slice(None)), (slice(None), 1), (0, 0)]:
        w[at] = corner[at]
    yield w
    yield corner


def gradients(dtype):
    """From far inside the penalty's reach to far outside it, zeros among them."""
    for size in [0.0, 0.01, 0.3, 1.0, 30.0]:
        yield size * cases.weights((5, 4), dtype, seed=2).clone()


def fine(a, b, *sizes):
    """a ≥ b up to the rounding of numbers of these sizes."""
    return a >= b - 1e-12 * sum(abs(size) for size in (a, b, *sizes))


# ---------------------------------------------------------------------- subgradient


@every_precise_dtype
@every_convex_case
def test_it_is_a_subgradient(case, dtype):
    for w in points(case, dtype):
        penalty = case.on(w)
        for gradient in gradients(dtype):
            v = penalty.subgradient(w, gradient)
            for seed, zoom in enumerate([10.0, 1.0, 1.0, 0.1, 1e-3, 1e-3]):
                u = w + zoom * cases.weights(w.shape, dtype, seed=3 + seed)
                rise = inner(v, u - w).item()
                assert fine(penalty(u).item(), penalty(w).item() + rise, rise, case.size(w).sum().item())


@every_precise_dtype
@every_case
def test_it_is_the_nearest_to_minus_the_gradient(case, dtype):
    # The prox of gradient·u + Ω(u) moves w by step·(the least subgradient), as the step goes to 0.
    step = 1e-9
    for w in points(case, dtype):
        for gradient in gradients(dtype):
            moved = (w - case.on(w).prox(w - step * gradient, step)) / step
            least = gradient + case.on(w).subgradient(w, gradient)
            assert (moved - least).abs().max() <= 1e-4 * (1 + gradient.abs().max())


@every_case
def test_it_keeps_shape_and_dtype(case):
    for dtype in cases.DTYPES:
        w = cases.weights((5, 4), dtype)
        v = case.on(w).subgradient(w, torch.ones_like(w))
        assert (v.shape, v.dtype) == (w.shape, dtype)


@every_convex_case
def test_a_nan_certifies_nothing(case):
    w = case.anchor(torch.zeros(5, 4, dtype=torch.float64))
    gradient = torch.full_like(w, torch.nan)
    assert (gradient + case.on(w).subgradient(w, gradient)).isnan().any()
    assert not case.on(w).dual_norm(gradient).item() < torch.inf
    assert not case.on(w).conjugate(gradient).item() < torch.inf
    assert case.on(w).subgradient(gradient, torch.zeros_like(w)).isnan().any()


def test_a_gradient_of_another_shape_or_kind_is_refused():
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^gradient has shape \(3, 2\) and the weights \(2, 3\); pass"):
        tr.L1(0.1).subgradient(w, torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"^gradient has dtype torch.complex64 and the weights torch.float32; pass"):
        tr.L1(0.1).subgradient(w, torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^L1 takes a tensor of weights, got NoneType"):
        tr.L1(0.1).subgradient(w, None)


# ---------------------------------------------------------------------- dual norm


@every_precise_dtype
@every_convex_case
def test_the_dual_norm_is_the_scale_at_which_the_prox_stays_at_the_minimum(case, dtype):
    minimum = case.anchor(torch.zeros(5, 4, dtype=dtype))
    penalty = case.on(minimum)
    for gradient in gradients(dtype):
        norm = penalty.dual_norm(gradient)
        assert norm.shape == ()
        if norm.isinf():
            assert not torch.equal(penalty.scaled(1e6).prox(minimum - gradient, 1.0), minimum)
        elif norm == 0:
            assert not gradient.any()
        else:
            # Not at a step of 1: an anchor that is added and subtracted would round a small gradient away.
            held, freed = (
                penalty.scaled(norm.item() * scale).prox(minimum - 1e3 * gradient, 1e3) for scale in [1.000001, 0.9999]
            )
            assert torch.equal(held, minimum)
            assert not torch.equal(freed, minimum)


@every_convex_case
def test_no_gradient_needs_no_penalty(case):
    w = torch.zeros(5, 4)
    assert case.on(w).dual_norm(w).item() == 0
    assert case.on(w).dual_norm(w[:0]).item() == 0


# ---------------------------------------------------------------------- conjugate


@every_precise_dtype
@every_convex_case
def test_fenchel_and_young_agree(case, dtype):
    for w in points(case, dtype):
        penalty = case.on(w)
        for gradient in gradients(dtype):
            v = penalty.subgradient(w, gradient)
            inside = v * (1 - 1e-12)  # a norm that rounds up is outside its ball
            size = case.size(w).sum().item() * v.abs().max().item()
            conjugate = penalty.conjugate(inside)
            assert conjugate.shape == ()
            assert penalty(w).item() + conjugate.item() == pytest.approx(
                inner(v, w).item(), rel=1e-10, abs=1e-10 * size
            )
            for seed in range(3):
                u = cases.weights(w.shape, dtype, seed=40 + seed)
                product = inner(inside, u).item()
                assert fine(penalty(u).item() + conjugate.item(), product, size, case.size(u).sum().item())


@every_precise_dtype
@every_convex_case
def test_the_conjugate_is_the_supremum(case, dtype):
    # ⟨v, u⟩ − Ω(u) less |u|²/(2·step) is greatest at prox(step·v, step): a long step gives the supremum.
    for v in gradients(dtype):
        penalty, step = case.on(v), 1e9
        u = penalty.prox(step * v, step)
        reached = (inner(v, u) - penalty(u)).item()
        conjugate = penalty.conjugate(v).item()
        if conjugate == torch.inf:
            assert reached > 1e3
        else:
            assert reached == pytest.approx(conjugate, rel=1e-5, abs=1e-5)


# ---------------------------------------------------------------------- a penalty without them


def test_a_penalty_of_value_and_prox_alone_works_and_says_what_a_certificate_needs():
    w = torch.tensor([2.0, -0.25])
    assert Bare(0.5)(w).item() == 1.125
    assert Bare(0.5).prox(w, 1.0).tolist() == [1.5, 0.0]
    with pytest.raises(NotImplementedError, match=r"^Bare cannot certify .*; give it the method nearest_subgradient"):
        Bare(0.5).subgradient(w, w)
    with pytest.raises(NotImplementedError, match=r"^Bare .* the method dual_norm\(self, gradient\) that returns"):
        Bare(0.5).dual_norm(w)
    with pytest.raises(NotImplementedError, match=r"^Bare .* the method conjugate\(self, v\) that returns"):
        Bare(0.5).conjugate(w)
