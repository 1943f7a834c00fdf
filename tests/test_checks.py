"""Checks of numbers, steps and weights: what passes, and errors with the value, the reason and the next move."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchreg._checks import nonnegative
from torchreg._tensors import checked_step, checked_weights, widened


@pytest.mark.parametrize("value", [0, 0.0, 2, 2.5, 1e-300, Fraction(1, 3), np.float64(2.5), np.float32(2), np.int64(2)])
def test_a_finite_number_from_0_up_comes_back_as_a_float(value):
    number = nonnegative("rate", value, "write 0.1")
    assert type(number) is float
    assert number == float(value)


@pytest.mark.parametrize(
    "value", [-1, -1e-300, math.inf, -math.inf, math.nan, np.float64("nan"), pytest.param(10**400, id="10**400")]
)
def test_a_number_that_is_negative_or_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"^rate=.+ must be finite and at least 0; write 0\.1$") as caught:
        nonnegative("rate", value, "write 0.1")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, Decimal(1), torch.tensor(1.0), [1.0]], ids=repr)
def test_what_is_no_real_number_is_refused(value):
    with pytest.raises(TypeError, match=rf"^rate=.+ is a {type(value).__name__}, not a number; write 0\.1$"):
        nonnegative("rate", value, "write 0.1")


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 1), (1, 3), (2, 3)], ids=str)
def test_a_step_is_a_tensor_that_broadcasts_to_the_weights(shape):
    step = torch.rand(shape)
    assert checked_step(step, torch.Size([2, 3])) is step


def test_a_step_is_a_number():
    assert checked_step(1, torch.Size([3])) == 1.0
    assert checked_step(np.float32(0.5), torch.Size([])) == 0.5


def test_a_half_precision_step_is_widened():
    for dtype in (torch.float16, torch.bfloat16):
        assert checked_step(torch.ones(3, dtype=dtype), torch.Size([3])).dtype == torch.float32


def test_an_empty_step_fits_empty_weights_alone():
    assert checked_step(torch.ones(0), torch.Size([0])).numel() == 0
    assert checked_step(torch.ones(1), torch.Size([0])).numel() == 1
    with pytest.raises(ValueError, match=r"step of shape \(0,\) does not broadcast to weights of shape \(3,\); pass a"):
        checked_step(torch.ones(0), torch.Size([3]))


def test_a_meta_step_is_not_looked_at():
    step = torch.empty(3, device="meta")
    assert checked_step(step, torch.Size([3])) is step


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.complex128, torch.complex128),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_widened_is_float32_or_wider_and_copies_nothing_that_is_wide(dtype, wide):
    w = torch.ones(3, dtype=dtype)
    assert widened(w).dtype == wide
    assert (widened(w) is w) == (dtype == wide)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_widened_takes_half_complex_numbers_to_complex64():
    assert widened(torch.ones(3, dtype=torch.complex32)).dtype == torch.complex64


def test_weights_are_floating_or_complex_tensors():
    for dtype in (torch.float64, torch.float16, torch.complex64):
        w = torch.ones(3, dtype=dtype)
        assert checked_weights("L1", w) is w
    with pytest.raises(TypeError, match=r"^L1 needs floating or complex weights, got torch\.bool; convert them with"):
        checked_weights("L1", torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^L1 takes a tensor of weights, got list; for a model use Regularizer\(model"):
        checked_weights("L1", [1.0])
