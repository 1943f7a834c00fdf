"""The native value and gradient of λ₁Σ|w − w₀| + λ₂Σ(w − w₀)²: exact sums, true gradients, and where torch serves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.backends import needs_native
from tests.cases import same_bits, weights
from torchreg import L1, L2, ElasticNet, Penalty, Regularizer
from torchreg.kernels import l1l2
from torchreg.penalties.coefficients import L1L2

pytestmark = needs_native

SIZES = [0, 1, 7, 511, 513, 16384, 16385, 50_001]  # about a strip and a block of the kernel
STRENGTHS = [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_strength = pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
both_ways = pytest.mark.parametrize("anchored", [False, True], ids=["from 0", "from an anchor"])


def some(dtype: torch.dtype, anchored: bool, strengths: tuple[float, float]) -> tuple[list[Tensor], list[L1L2]]:
    """Weights of many sizes with a penalty each, some of them exactly at its minimum."""
    every = [weights((size,), dtype, seed=size) for size in SIZES]
    anchors = [
        weights((size,), dtype, seed=1).where(torch.arange(size) % 3 > 0, w)
        for size, w in zip(SIZES, every, strict=True)
    ]
    return every, [L1L2(*strengths, anchor if anchored else None) for anchor in anchors]


def exactly(w: Tensor, penalty: L1L2) -> float:
    """The penalty of one weight, every difference rounded to its dtype and then nothing more."""
    away = (w.detach() if penalty.anchor is None else w.detach() - penalty.anchor).double().flatten().tolist()
    return penalty.l1 * math.fsum(map(abs, away)) + penalty.l2 * math.fsum(x * x for x in away)


# ---------------------------------------------------------------------- values


@every_dtype
@every_strength
@both_ways
def test_the_value_is_the_exact_sum(dtype: torch.dtype, strengths: tuple[float, float], anchored: bool) -> None:
    every, penalties = some(dtype, anchored, strengths)
    value = l1l2.value(every, penalties)
    assert (value.dtype, value.shape) == (dtype, ())
    expected = math.fsum(map(exactly, every, penalties))
    assert value.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-14)


def test_a_sum_of_many_float32_weights_is_not_rounded_away() -> None:
    w = torch.full((9_000_001,), 0.1)
    assert l1l2.value([w], [L1L2(1.0, 0.0)]).item() == pytest.approx(9_000_001 * w[0].double().item(), rel=1e-6)


def test_infinite_and_nan_weights_give_infinite_and_nan_values() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        w = torch.tensor([1.0, bad, -2.0])
        for l1, l2 in STRENGTHS:
            assert l1l2.value([w], [L1L2(l1, l2)]).isnan().item() == math.isnan(bad)
            assert not l1l2.value([w], [L1L2(l1, l2)]).isfinite()


# ---------------------------------------------------------------------- gradients


@every_strength
@both_ways
def test_first_and_second_derivatives_are_those_of_the_value(strengths: tuple[float, float], anchored: bool) -> None:
    every = [torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3) + 0.1, torch.ones(4, dtype=torch.float64)]
    penalties = [L1L2(*strengths, torch.full_like(w, 0.3) if anchored else None) for w in every]
    inputs = [w.requires_grad_() for w in every]

    def value(*inputs: Tensor) -> Tensor:
        return l1l2.value(inputs, penalties).exp()  # so that the incoming slope is no constant

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@every_dtype
@every_strength
@both_ways
def test_gradients_are_those_of_torch_to_the_bit(
    dtype: torch.dtype, strengths: tuple[float, float], anchored: bool
) -> None:
    l1, l2 = strengths
    every, penalties = some(dtype, anchored, strengths)
    ours = [w.clone().requires_grad_() for w in every]
    (1.7 * l1l2.value(ours, penalties)).backward()
    for w, own, penalty in zip(every, ours, penalties, strict=True):
        theirs = w.clone().requires_grad_()
        away = theirs if penalty.anchor is None else theirs - penalty.anchor
        (1.7 * (l1 * away.abs().sum() + l2 * away.square().sum())).backward()
        assert torch.equal(own.grad, theirs.grad)
        assert bool((own.grad[away == 0] == 0).all())


def test_weights_that_need_no_gradient_get_none() -> None:
    a, b = torch.ones(3, requires_grad=True), torch.ones(3)
    l1l2.value([a, b], [L1L2(0.5, 0.0)] * 2).backward()
    assert a.grad.tolist() == [0.5] * 3
    assert b.grad is None


def test_the_gradient_is_kept_without_a_copy_and_in_the_weights_layout() -> None:
    w = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    pointers = []
    w.register_hook(lambda gradient: pointers.append(gradient.data_ptr()))
    l1l2.value([w], [L1L2(0.5, 0.0)]).backward()
    assert [w.grad.data_ptr()] == pointers
    assert w.grad.stride() == w.stride()
    assert torch.equal(w.grad, 0.5 * w.detach().sign())


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    value = l1l2.value([w], [L1L2(0.5, 0.25)])
    first, second = (torch.autograd.grad(value, w, retain_graph=True)[0] for _ in range(2))
    assert first.tolist() == second.tolist() == [1.0, -1.5]


def test_a_weight_that_changes_before_backward_is_an_error() -> None:
    w = torch.ones(3, requires_grad=True)
    value = l1l2.value([w], [L1L2(0.5, 0.0)])
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_values_and_gradients_are_the_same_to_the_bit_in_any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            every, penalties = some(torch.float32, False, (0.3, 0.2))
            every = [w.requires_grad_() for w in every]
            value = l1l2.value(every, penalties)
            value.backward()
            found.append([value.detach(), *(w.grad for w in every)])
    finally:
        torch.set_num_threads(before)
    for first, *others in zip(*found, strict=True):
        assert all(same_bits(first, other) for other in others)


@every_dtype
@every_strength
def test_both_at_once_are_the_value_and_the_gradient_added(dtype: torch.dtype, strengths: tuple[float, float]) -> None:
    every, penalties = some(dtype, True, strengths)
    ours, theirs = ([w.clone().requires_grad_() for w in every] for _ in range(2))
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):  # the last has none yet
        a.grad, b.grad = torch.full_like(a, 0.7), torch.full_like(b, 0.7)
    versions = [w.grad._version for w in ours[:-1]]
    value = l1l2.add_gradients_(ours, penalties)
    expected = l1l2.value(theirs, penalties)
    expected.backward()
    assert same_bits(value, expected.detach())
    assert not value.requires_grad
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert all(w.grad._version > version for w, version in zip(ours[:-1], versions, strict=True))


# ---------------------------------------------------------------------- where torch serves


class Renamed(torch.Tensor):
    """A subclass, which may compute something else than its memory says."""


def test_what_c_cannot_read_is_not_served() -> None:
    w = torch.randn(4, 4)
    assert all(l1l2.serves(x, None) for x in (w, w.t(), w.double(), nn.Parameter(w), w[1:3]))
    others = [
        w.bfloat16(),
        w.to(torch.complex64),
        w.to_sparse(),
        w.to("meta"),
        w.as_subclass(Renamed),
        w[:, ::2],
        w[0].expand(4, 4),
        torch._neg_view(w),
    ]
    assert not any(l1l2.serves(x, None) for x in others)
    assert l1l2.serves(w, torch.ones(4, 4))
    misfits = [w.double(), w.t(), w[:2], torch.ones(4, 4, requires_grad=True), w.to("meta"), w.as_subclass(Renamed)]
    assert not any(l1l2.serves(w, anchor) for anchor in misfits)


class Own(L1):
    """Another value under the same prox."""

    def value(self, w: Tensor) -> Tensor:
        return 7 * w.sum()


def test_a_value_of_one_s_own_is_not_taken_for_the_one_it_inherits() -> None:
    model = nn.Linear(2, 2)
    assert Own(1.0).coefficients() is None
    assert Regularizer(model, Own(1.0))().item() == pytest.approx(7 * model.weight.sum().item())


CASES: list[tuple[Penalty, Callable[[Tensor], Tensor]]] = [
    (L1(0.5), lambda w: 0.5 * w.abs().sum()),
    (L2(0.5), lambda w: 0.5 * w.square().sum()),
    (ElasticNet(0.5, 0.25), lambda w: 0.5 * w.abs().sum() + 0.25 * w.square().sum()),
]
every_formula = pytest.mark.parametrize(("penalty", "formula"), CASES, ids=["l1", "l2", "elastic net"])
# Torch's forward mode compiles some formulas by what torch itself calls deprecated.
uses_jit = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
Formula = Callable[[Tensor], Tensor]


def called(model: nn.Module, reg: Regularizer) -> Formula:
    """The regularizer as a function of the weight."""

    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return reg()

    module = Value()
    return lambda w: torch.func.functional_call(module, {"model.weight": w}, ())


@every_formula
@uses_jit
def test_transforms_of_torch_func_go_through(penalty: Penalty, formula: Formula) -> None:
    model = nn.Linear(3, 2, bias=False)
    reg = Regularizer(model, penalty)
    value = called(model, reg)
    w, tangent, many = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 2, 3)
    close = torch.testing.assert_close
    close(torch.func.grad(value)(w), torch.func.grad(formula)(w))
    close(torch.func.vmap(value)(many), torch.stack([formula(x) for x in many]))
    close(torch.func.vmap(torch.func.grad(value))(many), torch.func.vmap(torch.func.grad(formula))(many))
    close(torch.func.jvp(value, (w,), (tangent,)), torch.func.jvp(formula, (w,), (tangent,)))
    close(torch.func.hessian(value)(w), torch.func.hessian(formula)(w))
    # The weight is no part of this transform, and still within it.
    close(torch.func.vmap(lambda x: x.sum() + reg())(many), many.sum((1, 2)) + formula(model.weight))


@every_formula
@uses_jit
def test_forward_mode_and_batched_gradients_go_through(penalty: Penalty, formula: Formula) -> None:
    model = nn.Linear(3, 2, bias=False)
    reg = Regularizer(model, penalty)
    w, slopes = model.weight, torch.tensor([1.0, -2.0])
    batched = [torch.autograd.grad(f, w, slopes, is_grads_batched=True)[0] for f in (reg(), formula(w))]
    torch.testing.assert_close(*batched)
    value = called(model, reg)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w.detach(), torch.ones(2, 3))
        tangents = [forward_ad.unpack_dual(f(dual)).tangent for f in (value, formula)]
    torch.testing.assert_close(*tangents)


def test_a_mode_that_records_operations_sees_them() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Linear(3, 2, bias=False)
    value = called(model, Regularizer(model, L1(0.5)))
    graph = make_fx(value)(torch.ones(2, 3))
    assert graph(torch.full((2, 3), -2.0)).item() == 6.0


def test_a_default_device_elsewhere_changes_nothing() -> None:
    w = torch.ones(3, requires_grad=True)
    with torch.device("meta"):
        value = l1l2.value([w], [L1L2(0.5, 0.0)])
        value.backward()
    assert value.item() == 1.5
    assert w.grad.tolist() == [0.5] * 3


def test_every_combination_of_groups_of_weights_adds_up() -> None:
    """Terms, dtypes, frozen and held parameters each take a sum of their own: none is lost or counted twice."""
    for dtypes in itertools.product([torch.float32, torch.float64, torch.bfloat16], repeat=2):
        model = nn.Sequential(*(nn.Linear(3, 2, bias=False, dtype=dtype) for dtype in dtypes), nn.Linear(3, 2))
        model[2].weight.requires_grad_(False)
        reg = Regularizer(model, {"0.*": L1(0.5), "*.weight": L2(0.25), "2.weight": L2(0.125)})
        expected = [0.5 * w.abs().sum() for w in [model[0].weight.double()]]
        expected += [0.25 * model[1].weight.double().square().sum(), 0.125 * model[2].weight.double().square().sum()]
        values = reg.components()
        assert [v.item() for v in values.values()] == pytest.approx([v.item() for v in expected], rel=1e-6)
        assert [v.requires_grad for v in values.values()] == [True, True, False]
        assert reg().item() == pytest.approx(sum(v.item() for v in expected), rel=1e-6)
        assert reg().dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
