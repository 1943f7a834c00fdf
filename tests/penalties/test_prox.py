"""The prox of a penalty: that it is the argmin, and that its zeros are zeros."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases
from tests.cases import every_case, every_convex_case, every_dtype, every_exact_case, same_bits
from torchreg import L1, L2, ElasticNet
from torchreg.penalties.toward import Toward

PRECISE = [torch.float64, torch.float32, torch.complex128, torch.complex64]

# ---------------------------------------------------------------------- it is the argmin


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@every_convex_case
def test_prox_is_where_bisection_finds_the_minimum(case, dtype):
    w = case.weights(30, dtype)
    for step in cases.steps(w):
        p = case.on(w).prox(w, step)
        # Under a dozen roundings, each relative to |w| and |anchor| at most: the prox moves no weight past its anchor.
        allowed = 12 * torch.finfo(dtype).eps * case.size(w)
        assert ((cases.to_double(p) - case.prox(w, step)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_convex_case
def test_half_precision_is_computed_in_float32_and_rounded_once(case, dtype):
    info = torch.finfo(dtype)
    w = case.shaped(torch.linspace(-3, 3, 201).to(dtype))
    for step in [0.37, case.shaped(torch.linspace(0.1, 2, 201))]:
        exact = case.prox(w, step)
        p = case.on(w).prox(w, step)
        half_a_place = info.eps / 2 * 2.0 ** exact.abs().clamp(min=info.tiny).log2().floor()
        in_float32 = 12 * cases.EPS32 * case.size(w)
        assert p.dtype == dtype
        assert ((cases.to_double(p) - exact).abs() <= half_a_place + in_float32).all()


@st.composite
def problems(draw, vectors=1):
    """Vectors of one length, real or complex, and a step: a number or one for each entry."""
    size = draw(st.integers(1, 4))
    if draw(st.booleans()):
        number, dtype = st.complex_numbers(max_magnitude=50, allow_subnormal=False), torch.complex128
    else:
        number, dtype = st.floats(-50, 50, allow_subnormal=False), torch.float64
    number |= st.sampled_from([0.0, -0.0, 0.3, -1.0])
    vector = st.lists(number, min_size=size, max_size=size)
    step = st.floats(1e-3, 100)
    steps = st.lists(step, min_size=size, max_size=size).map(lambda s: torch.tensor(s, dtype=torch.float64))
    return *(torch.tensor(draw(vector), dtype=dtype) for _ in range(vectors)), draw(step | steps)


def shaped(case, problem):
    return [case.shaped(x) if isinstance(x, torch.Tensor) else x for x in problem]


def inner(a, b):
    return (a.conj() * b).real.sum().item()


@cases.SETTINGS
@given(problem=problems(vectors=2), zoom=st.sampled_from([1.0, 0.1, 1e-3]))
@every_convex_case
def test_what_prox_takes_off_is_a_subgradient_where_it_arrives(case, problem, zoom):
    w, z, step = shaped(case, problem)
    penalty = case.on(w)
    assert penalty.convex
    p = penalty.prox(w, step)
    g = (w - p) / step
    z = p + zoom * (z - p)
    at_z, at_p = penalty(z).item(), penalty(p).item()
    # Rounding alone: of the two values, and of p, which the division by the step enlarges.
    sizes = ((case.size(w) + p.abs()) / step * (z.abs() + p.abs() + case.size(w))).sum().item()
    slack = 16 * torch.finfo(torch.float64).eps * (at_z + at_p + sizes)
    assert at_z >= at_p + inner(g, z - p) - slack


@cases.SETTINGS
@given(problem=problems(vectors=2))
@every_convex_case
def test_prox_is_firmly_nonexpansive(case, problem):
    w, v, step = shaped(case, problem)
    penalty = case.on(w)
    moved = penalty.prox(w, step) - penalty.prox(v, step)
    slack = 32 * torch.finfo(torch.float64).eps * ((case.size(w) + case.size(v)) ** 2 / step).sum().item()
    assert inner(moved, moved / step) <= inner(moved, (w - v) / step) + slack


# ---------------------------------------------------------------------- the identity and the minimum


def no_negative_zeros(w):
    """-0.0 is kept by some and made 0.0 by others; both are zeros."""
    return w + 0.0


@every_case
def test_a_step_of_0_is_the_identity_to_the_last_bit(case):
    for dtype in cases.DTYPES:
        w = no_negative_zeros(case.weights(40, dtype))
        for step in [0, 0.0, torch.tensor(0.0), torch.zeros(w.shape)]:
            assert same_bits(case.on(w).prox(w, step), w), dtype


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.penalty.is_zero], ids=str)
def test_a_strength_of_0_is_the_identity_to_the_last_bit(case):
    for dtype in cases.DTYPES:
        w = no_negative_zeros(case.weights(40, dtype))
        for step in cases.steps(w):
            assert same_bits(case.on(w).prox(w, step), w), dtype


@every_case
def test_a_zero_in_a_tensor_step_leaves_that_weight_alone(case):
    w = no_negative_zeros(case.weights(8))
    step = case.shaped(torch.tensor([0.0, 0.5] * 4))
    p = case.on(w).prox(w, step)
    assert same_bits(p[step == 0], w[step == 0])
    if not case.penalty.is_zero:
        assert not torch.equal(p, w)


@every_case
def test_the_minimum_stays_where_it_is(case):
    for dtype in cases.DTYPES:
        w = case.shaped(torch.zeros(40, dtype=dtype))
        minimum = case.anchor(w)
        for step in [0.0, 0.7, 1e6, case.shaped(torch.linspace(0, 2, 40))]:
            assert same_bits(case.on(w).prox(minimum, step), minimum), dtype


@every_exact_case
def test_a_huge_step_lands_on_the_minimum_and_overflows_into_no_nan(case):
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        w = case.weights(40, dtype)
        for step in [3e38, torch.full(w.shape, 3e38)]:
            p = case.on(w).prox(w, step)
            goal = w if case.penalty.is_zero else case.anchor(w)
            # L2 divides by the step: what is left of weights near 100 is below 1e-30. Moved weights are rounded.
            allowed = 1e-30 + (4 * torch.finfo(dtype).eps * case.size(w) if case.anchored else 0.0)
            assert ((p - goal).abs() <= allowed).all(), dtype


# ---------------------------------------------------------------------- zeros

THRESHOLDS = [case for case in cases.CASES if case.oracle.is_kinked and not case.anchored]


@every_dtype
@pytest.mark.parametrize("case", THRESHOLDS, ids=str)
def test_zeros_are_positive_zeros(case, dtype):
    for size in (1, 3, 8, 37):  # vectorized loops and their scalar tails are different code
        w = torch.linspace(-1, 1, size).to(dtype)
        w = case.shaped(torch.cat([w, torch.zeros(size, dtype=dtype), -torch.zeros(size, dtype=dtype)]))
        for step in [0.01, 0.7, 10.0, case.shaped(torch.linspace(0.01, 2, w.numel()))]:
            p = case.penalty.prox(w, step)
            zeros = p[p == 0]
            assert len(zeros) >= 2 * size
            parts = torch.view_as_real(zeros.resolve_conj()) if dtype.is_complex else zeros
            assert not parts.signbit().any()


@every_dtype
@pytest.mark.parametrize("penalty", [L1(0.5), ElasticNet(0.5, 2.0)], ids=str)
def test_everything_up_to_the_threshold_is_zero_and_nothing_beyond_it(penalty, dtype):
    magnitude = torch.tensor([0.0, 0.25, 0.5, 0.50390625, 2.0])
    for w in (magnitude.to(dtype), -magnitude.to(dtype)):
        for step in (1.0, torch.ones(5)):
            assert (penalty.prox(w, step) == 0).tolist() == [True, True, True, False, False]


@every_dtype
@pytest.mark.parametrize("case", [case for case in cases.TOWARD if case.oracle.is_kinked], ids=str)
def test_a_weight_that_reaches_its_anchor_is_exactly_the_anchor(case, dtype):
    anchor = case.anchor(case.shaped(torch.zeros(40, dtype=dtype)))
    w = anchor + 0.29 * case.shaped(torch.arange(40.0).cos())  # w₀ + (w − w₀) would round here and there
    assert torch.equal(case.on(w).prox(w.to(dtype), 1.0), anchor)


def test_l2_makes_no_zeros():
    w = torch.tensor([1e-30, -3.0])
    assert (L2(4.0).prox(w, 100.0) != 0).all()


# ---------------------------------------------------------------------- tensors in, a tensor out


@every_case
def test_prox_keeps_shape_and_dtype_and_returns_a_new_tensor(case):
    for shape, dtype in itertools.product(case.shapes, cases.DTYPES):
        w = cases.weights(shape, dtype)
        before = w.clone()
        for step in [0.0, *cases.steps(w), torch.full(shape, 0.5, dtype=torch.float64), torch.full(shape, 0.5).half()]:
            p = case.on(w).prox(w, step)
            assert (p.shape, p.dtype) == (w.shape, dtype)
            assert p.numel() == 0 or p.data_ptr() != w.data_ptr()
            assert same_bits(w, before)


@every_case
def test_prox_does_not_depend_on_strides(case):
    for shape in case.shapes:
        w = cases.weights(shape)
        for step in cases.steps(w):
            for other in cases.layouts(w):
                assert case.agree(case.on(w).prox(other, step), case.on(w).prox(w, step), w)


@every_case
def test_prox_in_place_is_prox(case):
    for shape, dtype in itertools.product(case.shapes, cases.DTYPES):
        number, tensor = cases.steps(torch.zeros(shape))
        for step in (number, tensor, tensor.double()):
            w = cases.weights(shape, dtype)
            expected = case.on(w).prox(w, step)
            assert case.on(w).prox_(w, step) is w
            assert same_bits(w, expected), (shape, dtype)


@every_case
def test_prox_in_place_takes_half_precision_steps_as_prox_does(case):
    for step, dtype in itertools.product([torch.float16, torch.bfloat16], cases.DTYPES):
        w = case.weights(40, dtype)
        steps = case.shaped(torch.linspace(0, 2, 40)).to(step)
        expected = case.on(w).prox(w, steps)
        assert same_bits(case.on(w).prox_(w, steps), expected), (step, dtype)


@every_case
def test_prox_in_place_has_the_gradient_of_prox(case):
    for step in cases.steps(case.shaped(torch.zeros(8))):
        gradients = []
        for name in ("prox", "prox_"):
            w = case.weights(8, torch.float32).requires_grad_()
            result = getattr(case.on(w.detach()), name)(w * 2, step)
            result.square().sum().backward()
            gradients.append(w.grad)
        assert torch.equal(*gradients)


@every_case
def test_prox_in_place_writes_through_a_view_and_touches_nothing_else(case):
    base = cases.weights((6, 4))
    before, view = base.clone(), base[:, ::2]
    expected = case.on(view).prox(view, 0.7)
    case.on(view).prox_(view, 0.7)
    assert case.agree(base[:, ::2], expected, before[:, ::2])
    assert torch.equal(base[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (3, 4), (1, 1, 4), (2, 1, 1), (2, 3, 4)], ids=str)
@every_case
def test_a_tensor_step_broadcasts(case, shape):
    w = cases.weights((2, 3, 4))
    step = 0.1 + cases.weights(shape).abs()
    spread = step.expand(2, 3, 4).contiguous()
    assert case.agree(case.on(w).prox(w, step), case.on(w).prox(w, spread), w)


@every_case
def test_a_nan_stays_where_it_is_or_in_its_group(case):
    for dtype in cases.DTYPES:
        w = case.weights(20, dtype)
        hit = torch.where(case.shaped(torch.arange(20) == 5), math.nan, w)
        rest = ~case.touched(hit.isnan())
        for step in cases.steps(w):
            p = case.on(w).prox(hit, step)
            assert p[hit.isnan()].isnan()
            assert p[~rest].isnan().all() or case.penalty.is_zero
            assert same_bits(p[rest], case.on(w).prox(w, step)[rest]), dtype


class NoLook(TorchDispatchMode):
    """Refuses to read a number out of a tensor: what would make an accelerator wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was looked at"
        return func(*args, **(kwargs or {}))


@every_case
def test_prox_in_place_looks_at_no_tensor(case):
    for dtype in cases.DTYPES:
        w = case.weights(6, dtype)
        penalty, steps = case.on(w), case.shaped(torch.linspace(0, 2, 6))
        expected = penalty.prox(w, steps)
        with NoLook():
            penalty.prox_(w, steps)
        assert same_bits(w, expected), dtype
        with NoLook(), pytest.raises(AssertionError, match="a tensor was looked at"):
            penalty.prox(w, steps)


@every_case
def test_prox_takes_meta_tensors(case):
    w = case.shaped(torch.empty(6, device="meta"))
    penalty = Toward(case.penalty, w.clone()) if case.anchored else case.penalty
    assert penalty.prox_(w, w.clone()) is w
    assert penalty.prox(w, w.clone()).is_meta


# ---------------------------------------------------------------------- errors: value, reason, next move

every_prox = pytest.mark.parametrize("prox", ["prox", "prox_"])
every_penalty = pytest.mark.parametrize("penalty", [L1(0.1), L2(0.1), ElasticNet(0.1, 0.1)], ids=lambda p: p.name)


@every_prox
@every_penalty
def test_a_number_that_is_no_step_is_refused_and_nothing_is_written(penalty, prox):
    for step in (-0.1, math.inf, math.nan):
        w = torch.ones(3)
        refusal = f"^step={step} must be finite and at least 0; pass the learning rate, or a tensor of steps$"
        with pytest.raises(ValueError, match=refusal):
            getattr(penalty, prox)(w, step)
        assert torch.equal(w, torch.ones(3))


@every_prox
@pytest.mark.parametrize("step", [True, "0.1", None, [0.1]], ids=repr)
def test_a_step_that_is_no_number_is_refused(step, prox):
    refusal = rf"^step=.* is a {type(step).__name__}, not a number; pass the learning rate, or a tensor of steps$"
    with pytest.raises(TypeError, match=refusal):
        getattr(L1(0.1), prox)(torch.ones(3), step)


@pytest.mark.parametrize("entry", [-0.5, math.inf, math.nan], ids=repr)
def test_a_tensor_step_with_a_bad_entry_is_refused_and_the_entry_named(entry):
    with pytest.raises(ValueError, match=rf"^step.*[ =]{entry}[,;].*must be finite and at least 0"):
        L1(0.1).prox(torch.ones(3), torch.tensor([0.5, entry, 0.5]))


@pytest.mark.parametrize(
    ("step_shape", "shape"),
    [((4,), (3,)), ((2,), (2, 3)), ((3,), ()), ((1,), ()), ((3,), (1,)), ((2, 3), (3,)), ((1, 3), (3,)), ((2,), (0,))],
)
def test_a_step_that_does_not_broadcast_to_the_weights_is_refused(step_shape, shape):
    step, w = torch.ones(step_shape), torch.ones(shape)
    with pytest.raises(ValueError, match=r"^step of shape .* does not broadcast to weights of shape") as caught:
        L1(0.1).prox(w, step)
    assert f"step of shape {step_shape} " in str(caught.value)
    assert f"weights of shape {shape}; pass a number, or one step per weight" in str(caught.value)


def test_a_step_tensor_of_no_real_floating_type_is_refused():
    for dtype in (torch.int64, torch.bool, torch.complex64):
        refusal = rf"^step has dtype {dtype}; steps are real floating-point numbers, convert with \.float\(\)$"
        with pytest.raises(TypeError, match=refusal):
            L1(0.1).prox(torch.ones(3), torch.ones(3, dtype=dtype))


@every_prox
@every_penalty
def test_integer_weights_are_refused(penalty, prox):
    w = torch.ones(3, dtype=torch.int64)
    with pytest.raises(
        TypeError, match=r"needs floating or complex weights, got torch\.int64; convert them with \.flo"
    ):
        getattr(penalty, prox)(w, 0.1)


@every_prox
def test_weights_that_are_no_tensor_are_refused(prox):
    for w in ([1.0], 1.0, np.ones(3)):
        with pytest.raises(TypeError, match=rf"^L1 takes a tensor of weights, got {type(w).__name__}; for a model use"):
            getattr(L1(0.1), prox)(w, 0.1)
