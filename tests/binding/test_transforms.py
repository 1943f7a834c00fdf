"""`torch.func`: penalties, their proxes and a whole regularizer under grad, vmap and jvp."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import torchreg as tr
from tests.backends import backend as backend
from tests.cases import Case, every_plain_case, weights
from tests.models import TORCH, batch, mlp

Parameters = Mapping[str, Tensor]
RULES = {"fc1.weight": tr.ElasticNet(0.1, 0.2), "fc2.weight": tr.GroupLasso(0.3)}

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # by torch's own decompositions for jvp


def objective(model: nn.Module, reg: tr.Regularizer) -> Callable[[Parameters], Tensor]:
    x, y = batch()
    x, y = x.to(next(model.parameters())), y.to(next(model.parameters()))
    # Not mse_loss: at its second derivative in forward mode torch fails.
    return lambda parameters: (functional_call(model, dict(parameters), (x,)) - y).square().mean() + reg(parameters)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------- penalties


@every_plain_case
def test_under_vmap_value_gradient_and_prox_are_those_of_each_member(case: Case) -> None:
    penalty, stack, steps = case.penalty, weights((3, 5, 4)), weights((3, 5, 4), seed=1).abs()
    ones = range(len(stack))
    torch.testing.assert_close(vmap(penalty)(stack), torch.stack([penalty(stack[i]) for i in ones]))
    gradients = vmap(grad(penalty))(stack)
    for i in ones:
        w = stack[i].clone().requires_grad_()
        torch.testing.assert_close(gradients[i], torch.autograd.grad(penalty(w), w)[0])
    one_step = vmap(lambda w: penalty.prox(w, 0.3))(stack)
    torch.testing.assert_close(one_step, torch.stack([penalty.prox(stack[i], 0.3) for i in ones]))
    expected = torch.stack([penalty.prox(stack[i], steps[i]) for i in ones])
    torch.testing.assert_close(vmap(penalty.prox)(stack, steps), expected)
    with torch.no_grad():
        vmap(penalty.prox_)(stack, steps)
    torch.testing.assert_close(stack, expected)
    assert torch.equal(stack == 0, expected == 0)


def test_a_prox_under_vmap_has_the_gradient_of_gradcheck() -> None:
    penalty = tr.GroupLasso(0.3)
    stack = weights((2, 3, 4)).abs() + 1
    steps = torch.linspace(0.1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
    f = vmap(lambda w: penalty.prox(w, steps[0]))
    assert torch.autograd.gradcheck(f, stack.requires_grad_())


# ---------------------------------------------------------------------- a regularizer


def test_with_given_parameters_the_gradient_is_that_of_the_loss_plus_the_penalty(backend: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    found = grad(objective(model, reg))(detached(model))
    x, y = batch()
    (F.mse_loss(model(x), y) + reg()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_given_parameters_may_have_a_graph_of_their_own(backend: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    lr = torch.tensor(0.1, requires_grad=True)
    own = detached(model)
    moved = {name: w - lr * w for name, w in own.items()}  # one inner step of a meta-learner
    (slope,) = torch.autograd.grad(reg(moved), lr)
    at = [reg({name: (1 - t) * w.double() for name, w in own.items()}).item() for t in (0.1 + 1e-6, 0.1 - 1e-6)]
    assert slope.item() == pytest.approx((at[0] - at[1]) / 2e-6, rel=1e-5)


def test_an_ensemble_has_the_losses_and_gradients_of_its_members(backend: str) -> None:
    models = [mlp(seed) for seed in range(3)]
    stacked, _ = stack_module_state(models)
    stacked = {name: w.detach() for name, w in stacked.items()}
    f = objective(models[0], tr.Regularizer(models[0], RULES))
    losses, gradients = vmap(f)(stacked), vmap(grad(f))(stacked)
    x, y = batch()
    for i, model in enumerate(models):
        loss = F.mse_loss(model(x), y) + tr.Regularizer(model, RULES)()
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach())
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad)


def test_a_hessian_times_a_vector_is_the_difference_of_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    f = objective(model, tr.Regularizer(model, {"0.weight": tr.ElasticNet(0.1, 0.2), "2.weight": tr.GroupLasso(0.3)}))
    w = detached(model)
    v = {name: p.cos() for name, p in w.items()}
    found = jvp(grad(f), (w,), (v,))[1]
    ahead, behind = (grad(f)({name: p + t * v[name] for name, p in w.items()}) for t in (1e-6, -1e-6))
    for name in w:
        torch.testing.assert_close(found[name], (ahead[name] - behind[name]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(TORCH < (2, 9), reason="torch 2.8 and older make several graphs of it")
def test_a_compiled_ensemble_is_one_graph_and_follows_the_strength() -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    f = vmap(grad(objective(model, reg)))
    stacked = {name: torch.stack([w, w + 1]) for name, w in detached(model).items()}
    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(stacked), f(stacked))
    with torch._dynamo.config.patch(error_on_recompile=True):
        reg["fc1.weight"].l1 = 0.7
        torch.testing.assert_close(compiled(stacked), f(stacked))
    torch.compiler.reset()


def test_a_tied_weight_is_given_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    reg = tr.Regularizer(model, tr.L1(1.0))
    w = torch.full((3, 3), 2.0)
    assert reg({"1.weight": w}).item() == reg({"module._orig_mod.0.weight": w}).item() == 18


def test_what_an_optimizer_regularizes_by_prox_has_no_gradient_here_either() -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    optimizer = torch.optim.SGD(model.fc1.parameters(), lr=0.1)
    handle = tr.optim.attach(optimizer, reg, partial=True)
    found = grad(reg)(detached(model))
    assert not found["fc1.weight"].any()
    assert found["fc2.weight"].all()
    assert reg(detached(model)).item() == pytest.approx(reg().item())
    handle.remove()
    assert grad(reg)(detached(model))["fc1.weight"].all()


@pytest.mark.parametrize(
    ("give", "error", "match"),
    [
        (lambda own: {"fc1.weight": own["fc1.weight"]}, ValueError, r"parameters has no fc2\.weight"),
        (lambda own: {**own, "fc2.weight": torch.ones(2, 3, 5)}, ValueError, r"in shape \(2, 3, 5\).*torch\.vmap"),
        (lambda own: list(own.values()), TypeError, r"parameters is a list; pass tensors by name"),
    ],
)
def test_parameters_that_cannot_serve_are_refused(
    give: Callable[[Parameters], object], error: type[Exception], match: str
) -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    with pytest.raises(error, match=match):
        reg(give(detached(model)))  # type: ignore[arg-type]


def test_a_penalty_that_torch_func_would_take_for_a_constant_warns() -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    with pytest.warns(UserWarning, match=r"reg\(parameters\)"):
        assert not grad(lambda w: w["fc1.weight"].sum() * 0 + reg())(detached(model))["fc1.weight"].any()
    with reg.disabled():
        grad(lambda w: w["fc1.weight"].sum() + reg())(detached(model))
    torch.vmap(lambda x: x + reg())(torch.ones(2)).sum().backward()
    assert model.fc1.weight.grad.any()  # autograd sees through vmap
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    grad(lambda w: w["fc1.weight"].sum() + reg())(detached(model))  # no gradient is meant
    del optimizer


class Objective(nn.Module):
    """A model that holds its loss: what is read inside of functional_call is what that was given."""

    def __init__(self, model: nn.Module, reg: tr.Regularizer) -> None:
        super().__init__()
        self.model, self.reg = model, reg

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.model(x), y) + self.reg()


def test_inside_of_functional_call_it_reads_what_that_was_given() -> None:
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    whole, f, own = Objective(model, reg), objective(model, reg), detached(model)
    x, y = batch()
    found = grad(lambda w: functional_call(whole, {f"model.{name}": p for name, p in w.items()}, (x, y)))(own)
    expected = grad(f)(own)
    for name in own:
        torch.testing.assert_close(found[name], expected[name])
