"""`reg.add_gradient_()`: what `loss + reg()` would have left in `.grad`, for every penalty and every parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchreg as tr
from tests.backends import backend as backend
from tests.cases import Case, every_case, same_bits, weights
from tests.models import Halved, array, l1, mlp
from torchreg.penalties.toward import Toward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Weight(nn.Module):
    """A single parameter."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w)
        self.slope = torch.ones_like(w).cumsum(0) / 3 if w.dim() else torch.ones_like(w)

    def loss(self) -> Tensor:
        """Its gradient is `slope`, in one piece: a sum of three pieces would depend on their order."""
        return (self.weight * self.slope.conj()).real.sum()


def built(case: Case, w: Tensor) -> tuple[Weight, tr.Regularizer]:
    model = Weight(w.clone())
    toward = {"weight": case.anchor(w)} if case.anchored else None
    return model, tr.Regularizer(model, case.penalty, include="weight", scale=lambda name, p: 0.7, toward=toward)


def both(case: Case, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient and the value by `loss + reg()`, and by `add_gradient_()`."""
    (a, reg_a), (b, reg_b) = built(case, w), built(case, w)
    (a.loss() + (value := reg_a())).backward()
    b.loss().backward()
    added = reg_b.add_gradient_()
    assert not added.requires_grad
    return a.weight.grad, b.weight.grad, value.detach(), added


# ---------------------------------------------------------------------- the same as in the loss


@every_case
@every_dtype
def test_it_leaves_what_the_loss_would_have(case: Case, dtype: torch.dtype, backend: str) -> None:
    for w in (case.weights(35, dtype), weights((2, 3, 4, 2), dtype).to(memory_format=torch.channels_last)):
        in_loss, added, value, returned = both(case, w)
        assert same_bits(value, returned)
        assert same_bits(in_loss, added)
        # And so says autograd of the penalty alone, as the tests of the penalties judge it.
        leaf = w.clone().requires_grad_()
        penalty = case.penalty.scaled(0.7)
        (own,) = torch.autograd.grad(Toward(penalty, case.anchor(w))(leaf), leaf)
        close = 0.02 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(added, built(case, w)[0].slope + own, rtol=close, atol=close)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("penalty", [tr.L1(0.5), tr.GroupLasso(0.5)], ids=str)
def test_it_does_so_wherever_it_is_called(context: Callable[[], Any], penalty: tr.Penalty, backend: str) -> None:
    a, b = mlp(), mlp()
    tr.Regularizer(a, penalty)().backward()
    reg = tr.Regularizer(b, penalty)
    with context():
        reg.add_gradient_()
    assert all(torch.equal(p.grad, q.grad) for p, q in [(a.fc1.weight, b.fc1.weight), (a.fc2.weight, b.fc2.weight)])
    assert b.fc1.bias.grad is None


def test_rules_factors_and_ties_count_as_in_the_loss(backend: str) -> None:
    def tied() -> tuple[nn.Module, tr.Regularizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        model[1].weight = model[0].weight
        reg = tr.Regularizer(model, {"0.weight": tr.L1(0.5), "2.*": tr.ElasticNet(0.25, 0.5)})
        reg["0.weight"].factor = 0.5
        reg["2.*"].l1 = 2.0
        return model, reg

    (a, reg_a), (b, reg_b) = tied(), tied()
    value = reg_a()
    value.backward()
    assert same_bits(reg_b.add_gradient_(), value.detach())
    assert value.item() == pytest.approx(
        0.25 * l1(a[0].weight) + 2 * l1(a[2].weight) + 0.5 * (array(a[2].weight) ** 2).sum(), rel=1e-6
    )
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True) if p.grad is not None
    )
    assert torch.equal(b[0].weight.grad, 0.25 * b[0].weight.detach().sign())


# ---------------------------------------------------------------------- who is left alone


def test_frozen_and_held_parameters_are_left_alone_and_still_count(backend: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, {"fc*.weight": tr.L1(0.5), "norm.weight": tr.L2(1.0)})
    model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model.fc1.weight], lr=0.1)
    handle = tr.optim.attach(optimizer, reg, partial=True)
    value = reg.add_gradient_()
    assert model.fc1.weight.grad is None
    assert model.norm.weight.grad is None
    assert torch.equal(model.fc2.weight.grad, 0.5 * model.fc2.weight.detach().sign())
    assert value.item() == pytest.approx(0.5 * (l1(model.fc1.weight) + l1(model.fc2.weight)) + 5, rel=1e-6)
    handle.remove()


@pytest.mark.parametrize("how", ["disabled", "no strength"])
def test_disabled_or_without_strength_it_does_nothing(how: str, backend: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.5 if how == "disabled" else 0.0))
    with reg.disabled() if how == "disabled" else contextlib.nullcontext():
        assert reg.add_gradient_().item() == 0
    assert all(p.grad is None for p in model.parameters())


def test_zeros_that_are_kept_stay_without_a_gradient(backend: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0, -1.0]]))
    reg = tr.Regularizer(model, tr.L2(0.5), toward={"weight": torch.full((1, 3), 2.0)})
    zeros = tr.Regularizer(model, tr.L1(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tr.freeze_zeros(zeros, optimizer):
        reg.add_gradient_()
        assert model.weight.grad.tolist() == [[0.0, -1.0, -3.0]]


# ---------------------------------------------------------------------- gradients of other kinds


# Torch says so of a gradient that lies in memory otherwise than its weight.
@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("kind", ["sparse", "transposed", "with a graph", "a parametrization", "a hook"])
def test_gradients_of_other_kinds_are_added_to_as_backward_would(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    reg = tr.Regularizer(model, tr.ElasticNet(0.5, 0.25))
    leaf, expected = model.weight, 1.0
    if kind == "a parametrization":
        parametrize.register_parametrization(model, "weight", Halved())
        leaf, expected = model.parametrizations.weight.original, 0.5
    w = model.weight.detach().clone()
    before = torch.randn(3, 3)
    if kind == "with a graph":
        before.requires_grad_()
    if kind == "a hook":
        leaf.register_hook(lambda gradient: 2 * gradient)
        expected = 2.0
    leaf.grad = {"sparse": before.to_sparse(), "transposed": before.t()}.get(kind, before * 1.0)
    start = leaf.grad.detach().to_dense().clone()
    reg.add_gradient_()
    slope = 0.5 * w.sign() + 2 * 0.25 * w
    torch.testing.assert_close(leaf.grad.detach().to_dense(), start + expected * slope)
