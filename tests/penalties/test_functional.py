"""Proximal maps as functions."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tests import cases, oracles
from torchreg.penalties.functional import soft_threshold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 5.0])
def test_soft_threshold_is_where_bisection_finds_the_minimum(threshold, dtype):
    w = cases.weights((40,), dtype)
    exact = torch.from_numpy(oracles.l1(threshold).prox(oracles.to_numpy(w), 1.0))
    for t in (threshold, torch.tensor(threshold, dtype=w.real.dtype), torch.full((40,), threshold, dtype=w.real.dtype)):
        # The threshold is rounded to the weights' precision, then a handful of operations follow.
        allowed = 6 * torch.finfo(dtype).eps * cases.to_double(w).abs()
        assert ((cases.to_double(soft_threshold(w, t)) - exact).abs() <= allowed).all()


@cases.SETTINGS
@given(
    w=st.floats(-1e6, 1e6, allow_subnormal=False),
    threshold=st.floats(0, 1e6, allow_subnormal=False),
    tensor=st.booleans(),
)
def test_soft_threshold_is_odd_shrinks_and_moves_by_the_threshold_at_most(w, threshold, tensor):
    t = torch.tensor([threshold], dtype=torch.float64) if tensor else threshold
    x = torch.tensor([w], dtype=torch.float64)
    p = soft_threshold(x, t).item()
    assert -soft_threshold(-x, t).item() == p
    assert abs(p) <= abs(w)
    assert (p == 0) == (abs(w) <= threshold)
    assert p == 0 or (p > 0) == (w > 0)
    assert abs(w - p) <= threshold + 1e-9  # w − (w − t) is t but for the rounding of numbers up to 1e6


def test_complex_weights_keep_their_phase_and_lose_modulus():
    w = cases.weights((40,), torch.complex128)
    p = soft_threshold(w, 0.3)
    alive = w.abs() > 0.3
    torch.testing.assert_close(p[alive].angle(), w[alive].angle(), rtol=0, atol=1e-15)
    torch.testing.assert_close(p[alive].abs(), w[alive].abs() - 0.3, rtol=1e-14, atol=1e-15)
    assert (p[~alive] == 0).all()


def test_real_weights_and_complex_weights_without_imaginary_part_agree():
    w = cases.weights((40,))
    p = soft_threshold(w.to(torch.complex128), 0.3)
    torch.testing.assert_close(p.real, soft_threshold(w, 0.3), rtol=1e-15, atol=1e-15)
    assert (p.imag == 0).all()


def test_each_weight_has_its_own_threshold_where_it_is_a_tensor():
    w = torch.tensor([[2.0, -2.0, 0.5], [2.0, -2.0, 0.5]])
    assert soft_threshold(w, torch.tensor([0.5, 1.0, 1.0])).tolist() == [[1.5, -1.0, 0.0], [1.5, -1.0, 0.0]]
    assert soft_threshold(w, torch.tensor([[0.0], [1.0]])).tolist() == [[2.0, -2.0, 0.5], [1.0, -1.0, 0.0]]


@cases.every_dtype
def test_a_new_tensor_of_the_same_dtype_with_positive_zeros(dtype):
    for size in (1, 8, 37):  # vectorized loops and their scalar tails are different code
        w = torch.cat([torch.linspace(-1, 1, size), -torch.zeros(size)]).to(dtype)
        before = w.clone()
        for threshold in (0.5, torch.tensor(0.5), torch.full((2 * size,), 0.5, dtype=w.real.dtype)):
            p = soft_threshold(w, threshold)
            zeros = p[p == 0]
            assert len(zeros) >= size
            assert not (torch.view_as_real(zeros) if dtype.is_complex else zeros).signbit().any()
            assert p.dtype == dtype
            assert p.data_ptr() != w.data_ptr()
            assert cases.same_bits(w, before)


@cases.every_dtype
def test_a_threshold_beyond_the_range_of_the_weights_dtype_makes_zeros(dtype):
    w = torch.tensor([2.0, -100.0, 0.0]).to(dtype)
    assert soft_threshold(w, 1e300).tolist() == [0, 0, 0]


@cases.every_dtype
def test_a_nan_stays_a_nan_where_it_is(dtype):
    w = torch.tensor([2.0, math.nan, -2.0, 0.0]).to(dtype)
    for threshold in (0.5, torch.tensor([0.5] * 4)):
        assert soft_threshold(w, threshold).isnan().tolist() == [False, True, False, False]


def test_gradient_is_one_beyond_the_threshold_and_zero_below_it():
    w = torch.tensor([2.0, -2.0, 0.25], dtype=torch.float64, requires_grad=True)
    soft_threshold(w, 0.5).sum().backward()
    assert w.grad.tolist() == [1.0, 1.0, 0.0]
    threshold = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_threshold, (w, threshold))
