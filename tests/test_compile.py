"""`torch.compile` of a regularized loss: one graph, the same numbers, and no recompilation when λ changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchreg as tr
from tests.backends import backend as backend
from tests.models import MLP, batch, mlp

Step = Callable[[Tensor, Tensor], Tensor]
RULES = {
    "fc1.weight": tr.L1(0.1),
    "fc2.weight": tr.ElasticNet(0.1, 0.2),
    "norm.weight": tr.L2(0.3),
    "fc3.weight": tr.GroupLasso(0.1),
    "fc4.weight": tr.SparseGroupLasso(0.1, 0.2),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_of_all() -> MLP:
    model = mlp()
    model.fc3, model.fc4 = nn.Linear(3, 4), nn.Linear(4, 3)
    return model


def steps(model: MLP, reg: tr.Regularizer) -> dict[str, Step]:
    criterion = tr.RegularizedLoss(nn.MSELoss(), reg)
    return {
        "loss + reg()": lambda x, y: F.mse_loss(model.fc4(model.fc3(model(x))), y) + reg(),
        "RegularizedLoss": lambda x, y: criterion(model.fc4(model.fc3(model(x))), y),
    }


def gradients(model: nn.Module, step: Step) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = step(*batch())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("toward", [False, True], ids=["plain", "toward"])
@pytest.mark.parametrize("route", ["loss + reg()", "RegularizedLoss"])
def test_it_is_one_graph_and_does_not_recompile_when_strengths_change(route: str, toward: bool, backend: str) -> None:
    model = model_of_all()
    anchor = {name: w + 1 for name, w in model.state_dict().items()} if toward else None
    reg = tr.Regularizer(model, RULES, toward=anchor, scale=lambda name, w: 0.5)
    step = steps(model, reg)[route]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, step))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.7, 0.0, 1e-3):
            reg["fc1.weight"].strength = strength
            reg["fc2.weight"].l2 = strength
            reg["norm.weight"].factor = strength
            reg["fc3.weight"].strength = strength
            reg["fc4.weight"].group = strength
            torch.testing.assert_close(gradients(model, compiled), gradients(model, step))
        reg.load_state_dict({key: {**values, "factor": 2.0} for key, values in reg.state_dict().items()})
        torch.testing.assert_close(gradients(model, compiled), gradients(model, step))


def test_the_parts_of_a_compiled_loss_are_read_as_ever() -> None:
    model = model_of_all()
    reg = tr.Regularizer(model, RULES)
    criterion = tr.RegularizedLoss(nn.MSELoss(), reg)
    x, y = batch()
    loss = torch.compile(lambda: criterion(model(x), y), backend="aot_eager", fullgraph=True)()
    assert criterion.last is not None
    assert criterion.last.by_term == pytest.approx({key: v.item() for key, v in reg.components().items()})
    assert criterion.last.data + criterion.last.penalty == pytest.approx(loss.item())


def test_a_regularizer_that_is_switched_off_or_held_is_seen() -> None:
    model = model_of_all()
    reg = tr.Regularizer(model, RULES)
    step = steps(model, reg)["loss + reg()"]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, step))
    with reg.disabled():
        torch.testing.assert_close(gradients(model, compiled), gradients(model, step))
    held = torch.optim.SGD([model.fc1.weight], lr=0.1)
    handle = tr.optim.attach(held, reg, partial=True)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, step))
    handle.remove()
    torch.testing.assert_close(gradients(model, compiled), gradients(model, step))


def test_a_strength_of_a_copy_is_its_own() -> None:
    import copy

    model = model_of_all()
    reg = tr.Regularizer(model, RULES)
    other = copy.copy(reg)
    reg["fc1.weight"].strength = 5.0
    compiled = {r: torch.compile(lambda x, y, r=r: r(), backend="aot_eager", fullgraph=True) for r in (reg, other)}
    for r, f in compiled.items():
        torch.testing.assert_close(f(*batch()), r())
