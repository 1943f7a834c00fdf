"""`torch.compile` of a regularized loss and of a proximal step: one graph, no recompilation, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchreg as tr
from tests.backends import backend as backend
from tests.models import MLP, TORCH, batch, mlp

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9), reason="torch 2.8 and older make several graphs of it; test_versions.py holds what they do"
)

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


@pytest.mark.parametrize("route", ["loss + reg()", "RegularizedLoss"])
def test_batches_of_any_size_share_a_dynamic_graph_while_a_schedule_moves_the_strength(route: str) -> None:
    model = model_of_all()
    reg = tr.Regularizer(model, RULES)
    schedule = tr.Schedule(reg, tr.schedules.Linear(0, 1, steps=8))
    step = steps(model, reg)[route]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for n in (8, 12):  # at the second size torch makes it dynamic
        compiled(*batch(n=n))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (5, 7, 20):
            schedule.step()
            torch.testing.assert_close(compiled(*batch(n=n)), step(*batch(n=n)))


def test_a_schedule_that_starts_at_zero_is_one_compiled_step() -> None:
    found = []
    for compiling in (True, False):
        model = model_of_all()
        reg = tr.Regularizer(model, tr.L1(0.5))
        schedule = tr.Schedule(reg, tr.schedules.Linear(0, 1, steps=3))
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=torch.tensor(0.05), regularizer=reg)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiling else optimizer.step
        stepped(model, optimizer, step, 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                schedule.step()
                stepped(model, optimizer, step, 1)
        found.append([w.detach() for w in model.parameters()])
    assert any((w == 0).any() for w in found[0])
    for w, expected in zip(*found, strict=True):
        torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-6)


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


SETTINGS: list[tuple[Any, dict[str, Any], bool]] = [
    (tr.optim.ProxSGD, {"momentum": 0.9, "nesterov": True}, False),
    (tr.optim.ProxAdam, {"amsgrad": True}, False),
    (tr.optim.ProxAdamW, {"weight_decay": 0.0}, True),
]


def stepped(model: MLP, optimizer: torch.optim.Optimizer, step: Callable[[], object], times: int) -> None:
    x, y = batch()
    for _ in range(times):
        optimizer.zero_grad()
        F.mse_loss(model.fc4(model.fc3(model(x))), y).backward()
        step()


@pytest.mark.parametrize(("swap_in", "settings", "toward"), SETTINGS)
def test_a_proximal_step_is_one_graph_and_does_not_recompile_when_strengths_or_lr_change(
    swap_in: Any, settings: dict[str, Any], toward: bool
) -> None:
    found = []
    for compiling in (True, False):
        model = model_of_all()
        anchor = {name: w.clone() for name, w in model.state_dict().items()} if toward else None
        reg = tr.Regularizer(model, RULES, toward=anchor, scale=lambda name, w: 0.5)
        lr = torch.tensor(0.05)
        optimizer = swap_in(model.parameters(), lr=lr, regularizer=reg, **settings)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiling else optimizer.step
        stepped(model, optimizer, step, 2)  # the first builds the optimizer's state: SGD's has a graph of its own
        with torch._dynamo.config.patch(error_on_recompile=True):
            for strength in (0.7, 0.0, 1e-3):
                reg["fc1.weight"].strength = strength
                reg["fc2.weight"].l2 = strength
                reg["norm.weight"].factor = strength
                reg["fc3.weight"].strength = strength
                reg["fc4.weight"].group = strength
                lr.mul_(0.9)
                stepped(model, optimizer, step, 2)
        found.append([w.detach() for w in model.parameters()])
        assert any((w == (0 if anchor is None else anchor[name])).any() for name, w in model.named_parameters())
    for w, expected in zip(*found, strict=True):
        torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(w == 0, expected == 0)


def test_after_compiled_steps_the_optimizer_goes_on_uncompiled(backend: str) -> None:
    found = []
    for compiled in (True, False):
        model = model_of_all()
        reg = tr.Regularizer(model, tr.L1(0.01))
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.05, momentum=0.9, regularizer=reg)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        stepped(model, optimizer, step, 3)
        stepped(model, optimizer, optimizer.step, 3)
        assert isinstance(optimizer.state[model.fc1.weight]["unit_momentum"], float)
        found.append([w.detach() for w in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [tr.optim.ProxSGD, tr.optim.ProxAdam])
def test_a_compiled_step_of_bfloat16_weights_rounds_as_one_that_is_not(kind: Any) -> None:
    found = []
    for compiled in (True, False):
        model = nn.Linear(30, 20).bfloat16()
        nn.init.normal_(model.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        optimizer = kind(model.parameters(), lr=0.01, regularizer=tr.Regularizer(model, tr.L1(0.5)))
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            model.weight.grad, model.bias.grad = 0.1 * model.weight.detach(), torch.zeros_like(model.bias)
            step()
        found.append(model.weight.detach())
    assert torch.equal(*found)
    assert (found[0] == 0).any()


def test_a_disabled_regularizer_is_seen_by_a_compiled_step() -> None:
    model = model_of_all()
    reg = tr.Regularizer(model, tr.L1(1e3))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=torch.tensor(0.01), regularizer=reg)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    with reg.disabled():
        stepped(model, optimizer, step, 1)
    assert (model.fc1.weight != 0).all()
    stepped(model, optimizer, step, 1)
    assert (model.fc1.weight == 0).all()
