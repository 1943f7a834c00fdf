"""The prox step is the unit response: what the stock optimizer moves under a constant gradient, over that gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

import torchreg as tr
from tests.models import Reads
from torchreg.optim import StepSize, step_sizes

SWAP_INS: dict[type[Optimizer], Callable[..., Optimizer]] = {
    SGD: tr.optim.ProxSGD,
    Adam: tr.optim.ProxAdam,
    AdamW: tr.optim.ProxAdamW,
}
ROUTES = ["swap-in", "attached"]


def routes(cases: dict[str, Case]) -> Any:
    """Every case on the stock class with `attach`, and on the swap-in where there is one."""
    rows = [
        pytest.param(case, route, id=f"{name}, {route}")
        for name, case in cases.items()
        for route in ROUTES
        if route == "attached" or case.stock in SWAP_INS
    ]
    return pytest.mark.parametrize(("case", "route"), rows)


# Constant gradients of very different sizes, side by side in one weight.
GRADIENT = torch.tensor([[1e-6, -1e-4, 1e-2, 1.0, -30.0, 1e3]], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A stock class, its settings, and the settings that change from step to step."""

    stock: type[Optimizer]
    settings: dict[str, Any]
    cycle: dict[str, Sequence[Any]] = field(default_factory=dict)

    def set(self, optimizer: Optimizer, t: int) -> None:
        for key, values in self.cycle.items():
            optimizer.param_groups[0][key] = values[t % len(values)]


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


CASES = {
    "sgd": Case(SGD, {"lr": 0.1}),
    "sgd, momentum": Case(SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd, dampening": Case(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "sgd, nesterov": Case(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd, maximize": Case(SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "sgd, weight_decay": Case(SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd, foreach": Case(SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd, fused": Case(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "fused": True}),
    "sgd, tensor lr": Case(SGD, {"lr": f64(0.1), "momentum": 0.9}),
    "sgd, cycled lr": Case(SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": [0.1, 0.3, 0.0, 0.2]}),
    "sgd, cycled momentum": Case(SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum": [0.95, 0.9, 0.85, 0.9]}),
    "sgd, momentum off, on, off, on": Case(
        SGD, {"lr": 0.1, "dampening": 0.4}, {"momentum": [0, 0, 0.9, 0.9, 0.9, 0, 0]}
    ),
    "sgd, nesterov, cycled": Case(
        SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": [0.1, 0.2, 0.3], "momentum": [0.95, 0.85]},
    ),
    "adam": Case(Adam, {"lr": 0.1}),
    "adam, betas": Case(Adam, {"lr": 0.1, "betas": (0.5, 0.7)}),
    "adam, amsgrad": Case(Adam, {"lr": 0.1, "amsgrad": True}),
    "adam, large eps": Case(Adam, {"lr": 0.1, "eps": 1e-2}),
    "adam, eps=0": Case(Adam, {"lr": 0.1, "eps": 0.0}),
    "adam, weight_decay": Case(Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adam, maximize": Case(Adam, {"lr": 0.1, "maximize": True}),
    "adam, foreach": Case(Adam, {"lr": 0.1, "foreach": True}),
    "adam, fused": Case(Adam, {"lr": 0.1, "fused": True}),
    "adam, fused amsgrad": Case(Adam, {"lr": 0.1, "fused": True, "amsgrad": True}),
    "adam, tensor lr": Case(Adam, {"lr": f64(0.1)}),
    "adam, fused tensor lr": Case(Adam, {"lr": f64(0.1), "fused": True}),
    "adam, changed lr": Case(Adam, {"lr": 0.1}, {"lr": [0.1, 0.3, 0.0, 0.2]}),
    "adam, changed tensor lr": Case(Adam, {"lr": f64(0.1)}, {"lr": [f64(0.1), f64(0.3)]}),
    "adamw, weight_decay=0": Case(AdamW, {"lr": 0.1, "weight_decay": 0}),
    "adamw": Case(AdamW, {"lr": 0.1}),
    "adamw, amsgrad foreach": Case(AdamW, {"lr": 0.1, "weight_decay": 0, "amsgrad": True, "foreach": True}),
    "adamw, fused": Case(AdamW, {"lr": 0.1, "weight_decay": 0, "fused": True}),
    "adam, cycled betas": Case(Adam, {"lr": 0.1}, {"betas": [(0.95, 0.99), (0.85, 0.9), (0.0, 0.9)], "lr": [0.1, 0.2]}),
    "adamw, cycled betas, fused": Case(
        AdamW, {"lr": 0.1, "weight_decay": 0, "fused": True}, {"betas": [(0.95, 0.99), (0.85, 0.99)]}
    ),
    "adamax": Case(Adamax, {"lr": 0.1}),
    "adamax, cycled": Case(Adamax, {"lr": 0.1}, {"lr": [0.1, 0.2], "betas": [(0.95, 0.99), (0.85, 0.9)]}),
    "adamax, foreach": Case(Adamax, {"lr": 0.1, "foreach": True, "maximize": True}),
    "nadam": Case(NAdam, {"lr": 0.1}),
    "nadam, cycled": Case(NAdam, {"lr": 0.1}, {"lr": [0.1, 0.2], "betas": [(0.95, 0.99), (0.85, 0.9)]}),
    "nadam, foreach": Case(NAdam, {"lr": 0.1, "foreach": True, "momentum_decay": 0.1}),
    "nadam, decoupled": Case(NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    # Its variance has an estimate from step 6 on, or from step 1 with a short memory, or never with a shorter one.
    "radam": Case(RAdam, {"lr": 0.1}),
    "radam, first regime alone": Case(RAdam, {"lr": 0.1, "betas": (0.9, 0.6)}),
    "radam, cycled": Case(RAdam, {"lr": 0.1}, {"lr": [0.1, 0.2], "betas": [(0.95, 0.999), (0.85, 0.999)]}),
    "radam, foreach": Case(RAdam, {"lr": f64(0.1), "foreach": False, "maximize": True}),
    "rmsprop": Case(RMSprop, {"lr": 0.1}),
    "rmsprop, cycled": Case(RMSprop, {"lr": 0.1, "eps": 1e-3}, {"lr": [0.1, 0.2], "alpha": [0.9, 0.5]}),
    "rmsprop, foreach": Case(RMSprop, {"lr": 0.1, "foreach": True, "maximize": True}),
    # Its variance cancels under a constant gradient, later: at step t it is the difference of 1 and 1 − αᵗ.
    "rmsprop, centered": Case(RMSprop, {"lr": 0.1, "centered": True}),
    "adagrad": Case(Adagrad, {"lr": 0.1}),
    "adagrad, decay and start": Case(Adagrad, {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.5}),
    "adagrad, cycled": Case(Adagrad, {"lr": 0.1, "lr_decay": 0.3}, {"lr": [0.1, 0.2, 0.0]}),
    "adagrad, foreach": Case(Adagrad, {"lr": 0.1, "lr_decay": 0.3, "foreach": True, "maximize": True}),
    "adagrad, fused": Case(Adagrad, {"lr": 0.1, "lr_decay": 0.3, "fused": True}),
    "adadelta": Case(Adadelta, {"lr": 1.0}),
    "adadelta, cycled": Case(Adadelta, {"lr": 1.0, "eps": 1e-3}, {"lr": [1.0, 3.0], "rho": [0.9, 0.5]}),
    "adadelta, foreach": Case(Adadelta, {"lr": f64(1.0), "maximize": True}),
    "adadelta, weight_decay": Case(Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    "asgd": Case(ASGD, {"lr": 0.1, "lambd": 0.0}),
    "asgd, falling": Case(ASGD, {"lr": 0.1, "lambd": 0.3, "t0": 2.0}),
    "asgd, cycled": Case(ASGD, {"lr": 0.1, "lambd": 0.0}, {"lr": [0.1, 0.3, 0.2]}),
    "asgd, foreach": Case(ASGD, {"lr": 0.1, "lambd": 0.0, "foreach": True, "maximize": True}),
    "adafactor": Case(Adafactor, {"lr": 0.1, "weight_decay": 0}),
    "adafactor, cycled": Case(Adafactor, {"lr": 0.1, "weight_decay": 0, "d": 1.5}, {"lr": [0.1, 0.2, 1.0]}),
    "adafactor, foreach": Case(Adafactor, {"lr": 0.1, "weight_decay": 0, "foreach": True, "maximize": True}),
}
STEPS = 15


class Probe(tr.testing.Probe):
    """Writes down every step as a float64 tensor of the weight's shape."""

    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        self.steps.append(torch.as_tensor(step, dtype=torch.float64).expand(w.shape).clone())
        return w


def layer(width: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(width, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def proximal(route: str, stock: type[Optimizer], model: nn.Module, reg: tr.Regularizer, **settings: Any) -> Optimizer:
    if route == "swap-in":
        return SWAP_INS[stock](model.parameters(), regularizer=reg, **settings)
    optimizer = stock(model.parameters(), **settings)
    tr.optim.attach(optimizer, reg)
    return optimizer


def displacements(case: Case, optimizer: Optimizer, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    """How far each step moves a weight. From 0 every time: there the difference is exact, and no decay acts."""
    found = []
    for t in range(STEPS):
        case.set(optimizer, t)
        weight.detach().zero_()
        weight.grad = gradient.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return found


def probed(case: Case, route: str, gradient: Tensor) -> list[Tensor]:
    """The steps that a penalty's prox is given."""
    model = layer(gradient.numel(), gradient.dtype)
    steps: list[Tensor] = []
    optimizer = proximal(route, case.stock, model, tr.Regularizer(model, Probe(1.0, steps)), **case.settings)
    found = []
    for t in range(STEPS):
        case.set(optimizer, t)
        model.weight.detach().zero_()
        model.weight.grad = gradient.clone()
        optimizer.step()
        # A step of 0 may be left out: it is the identity.
        found.append(steps.pop() if steps else torch.zeros_like(gradient))
        assert not steps
    return found


@routes(CASES)
def test_the_step_is_displacement_over_gradient_from_step_one_on(case: Case, route: str) -> None:
    model = layer(GRADIENT.numel())
    stock = case.stock(model.parameters(), **case.settings)
    sign = 1 if case.settings.get("maximize") else -1
    moved = displacements(case, stock, model.weight, GRADIENT)

    steps = probed(case, route, GRADIENT)

    for displacement, step in zip(moved, steps, strict=True):
        torch.testing.assert_close(step, sign * displacement / GRADIENT, rtol=1e-12, atol=0)


LOW = ["sgd, nesterov, cycled", "adam", "adam, amsgrad", "adam, foreach", "adamw, fused", "adamax", "nadam", "rmsprop"]
LOW += ["adagrad", "asgd, cycled"]


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str
)
@routes({name: CASES[name] for name in LOW})
def test_the_step_is_displacement_over_gradient_in_low_precision(
    case: Case, dtype: torch.dtype, rtol: float, route: str
) -> None:
    gradient = torch.tensor([[0.25, -1.0, 30.0]], dtype=dtype)
    model = layer(3, dtype)
    moved = displacements(case, case.stock(model.parameters(), **case.settings), model.weight, gradient)

    for displacement, step in zip(moved, probed(case, route, gradient), strict=True):
        torch.testing.assert_close(step, -displacement.double() / gradient.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_after_a_larger_gradient_the_step_is_displacement_over_gradient_again(
    amsgrad: bool, kernel: dict[str, bool], route: str
) -> None:
    """amsgrad remembers the largest square for ever; the others forget, each at its own rate."""
    settings = {"lr": 0.1, "betas": (0.5, 0.9), "amsgrad": amsgrad, **kernel}
    model = layer(GRADIENT.numel())
    steps: list[Tensor] = []
    optimizer = proximal(route, Adam, model, tr.Regularizer(model, Probe(1.0, steps)), **settings)
    for t in range(80):
        model.weight.detach().zero_()
        # After 60 steps the mean is the gradient to rounding, and the squares are not.
        model.weight.grad = GRADIENT * (1e5 if t == 0 else 1)
        optimizer.step()
        if t > 60:
            torch.testing.assert_close(steps[-1], -model.weight.detach() / GRADIENT, rtol=1e-12, atol=0)


def test_with_momentum_the_step_of_rmsprop_is_displacement_over_gradient_in_the_limit() -> None:
    """Its buffer adds up gradients over the sizes of their own steps, which settle in 1/(1 − alpha) steps."""
    model = layer(GRADIENT.numel())
    steps: list[Tensor] = []
    optimizer = RMSprop(model.parameters(), lr=0.1, momentum=0.9, alpha=0.5)
    tr.optim.attach(optimizer, tr.Regularizer(model, Probe(1.0, steps)))
    off = []
    for _ in range(300):
        model.weight.detach().zero_()
        model.weight.grad = GRADIENT.clone()
        optimizer.step()
        off.append((steps[-1] * GRADIENT / -model.weight.detach() - 1).abs().max().item())
    assert off[0] < 1e-12, "one step has no past"
    assert off[1] > 1e-2, "what the docstring owns up to"
    assert off[-1] < 1e-10


def test_the_step_of_a_whole_matrix_under_adafactor_is_displacement_over_gradient() -> None:
    gradient = torch.tensor([[1.0, -2.0, 0.5], [10.0, 1e-3, -4.0]], dtype=torch.float64)
    weight = nn.Parameter(torch.full_like(gradient, 0.5))
    steps: list[Tensor] = []
    model = nn.ParameterDict({"weight": weight})
    optimizer = Adafactor(model.parameters(), lr=0.3, d=1.0, weight_decay=0)
    tr.optim.attach(optimizer, tr.Regularizer(model, Probe(1.0, steps)))
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(steps[-1], (before - weight.detach()) / gradient, rtol=1e-9, atol=0)


@pytest.mark.parametrize("stock", [Adam, NAdam, RAdam, Adamax], ids=lambda kind: kind.__name__)
def test_a_stock_checkpoint_counts_as_one_of_a_constant_beta(stock: type[Optimizer]) -> None:
    model = layer(2)
    first = stock(model.parameters(), lr=0.1)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        first.step()
    steps: list[Tensor] = []
    tr.optim.attach(first, tr.Regularizer(model, Probe(1.0, steps)))
    for _ in range(3):
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones_like(model.weight)
        first.step()
        torch.testing.assert_close(steps[-1], before - model.weight.detach(), rtol=1e-12, atol=0)


def test_a_skipped_step_right_after_a_stock_checkpoint_leaves_no_trace() -> None:
    found = []
    for skips in (False, True):
        model = layer(2)
        optimizer = Adam(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        steps: list[Tensor] = []
        tr.optim.attach(optimizer, tr.Regularizer(model, Probe(1.0, steps)))
        if skips:
            skip(optimizer)
        optimizer.step()
        found.append(steps[-1])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_adagrad_may_begin_with_a_skipped_step_whatever_its_decay() -> None:
    model = layer(2)
    steps: list[Tensor] = []
    optimizer = Adagrad(model.parameters(), lr=0.1, lr_decay=1.0, fused=True)
    tr.optim.attach(optimizer, tr.Regularizer(model, Probe(1.0, steps)))
    model.weight.grad = torch.ones_like(model.weight)
    skip(optimizer)
    optimizer.step()
    assert steps[0].tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(steps[1], -model.weight.detach(), rtol=1e-12, atol=0)


def skip(optimizer: Any) -> None:
    """A step as the GradScaler calls a fused optimizer after an infinite gradient."""
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def test_the_step_of_a_float16_weight_does_not_overflow() -> None:
    model = layer(1, torch.float16)
    steps: list[Tensor] = []
    optimizer = proximal("swap-in", Adam, model, tr.Regularizer(model, Probe(1.0, steps)), lr=1000.0)
    model.weight.grad = torch.full_like(model.weight, 1e-2)
    optimizer.step()
    assert steps[0].item() == pytest.approx(1000 / 1e-2, rel=0.2), "beyond 65504, the largest float16"


RESTING = torch.tensor([[0.5, -2.0, 3.0]], dtype=torch.float64)
# Penalty, and the l1 and l2 in it: one layer of a model each.
PENALTIES = [
    (tr.L1(1e-3), 1e-3, 0.0),
    (tr.L1(1.0), 1.0, 0.0),
    (tr.L1(30.0), 30.0, 0.0),
    (tr.L2(0.3), 0.0, 0.3),
    (tr.ElasticNet(l1=0.5, l2=0.2), 0.5, 0.2),
]
# Decay, the default of AdamW, is another pull on the weight; and so is ASGD's `lambd`.
PURE = {
    name: case
    for name, case in CASES.items()
    if not case.settings.get("weight_decay", 1e-2 if case.stock is AdamW else 0) and not case.settings.get("lambd")
}


@routes(PURE)
def test_a_weight_rests_where_gradient_and_penalty_cancel(case: Case, route: str) -> None:
    model = nn.ModuleList([layer(3) for _ in PENALTIES])
    reg = tr.Regularizer(model, {f"{i}.weight": penalty for i, (penalty, _, _) in enumerate(PENALTIES)})
    optimizer = proximal(route, case.stock, model, reg, **case.settings)
    sign = 1 if case.settings.get("maximize") else -1
    for part in model:
        part.weight.detach().copy_(RESTING)
    for t in range(STEPS):
        case.set(optimizer, t)
        for part, (_, l1, l2) in zip(model, PENALTIES, strict=True):
            part.weight.grad = sign * (l1 * RESTING.sign() + 2 * l2 * RESTING)
        optimizer.step()
        for part, (penalty, _, _) in zip(model, PENALTIES, strict=True):
            torch.testing.assert_close(
                part.weight.detach(), RESTING, rtol=1e-12, atol=0, msg=lambda m, p=penalty: f"{p}: {m}"
            )


@routes(PURE)
def test_a_zero_stays_below_lambda_and_leaves_above_it(case: Case, route: str) -> None:
    model = layer(4)
    optimizer = proximal(route, case.stock, model, tr.Regularizer(model, tr.L1(0.7)), **case.settings)
    for t in range(STEPS):
        case.set(optimizer, t)
        model.weight.grad = 0.7 * torch.tensor([[0.99, -0.99, 1.01, -1.01]], dtype=torch.float64)
        optimizer.step()
    assert (model.weight == 0).tolist() == [[True, True, False, False]]


LIMITS = {
    "momentum": ({"momentum": 0.9}, 10.0),
    "dampening": ({"momentum": 0.9, "dampening": 0.4}, 6.0),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, 1 + 0.9 * 10.0),
}


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("start", ["checkpoint", "attached midway"])
@pytest.mark.parametrize(("settings", "limit"), LIMITS.values(), ids=LIMITS)
def test_stock_sgd_state_without_build_up_starts_at_the_limit(
    settings: dict[str, Any], limit: float, start: str, with_closure: bool
) -> None:
    model = layer(2)
    stock = SGD(model.parameters(), lr=0.1, **settings)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        stock.step()
    stock.zero_grad()
    steps: list[Tensor] = []
    reg = tr.Regularizer(model, Probe(1.0, steps))
    optimizer: Optimizer = stock
    if start == "checkpoint":
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, **settings, regularizer=reg)
        optimizer.load_state_dict(stock.state_dict())
    else:
        tr.optim.attach(optimizer, reg)

    def closure() -> float:
        model.weight.grad = torch.ones_like(model.weight)
        return 0.0

    for _ in range(3):
        optimizer.zero_grad()
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    expected = torch.full((3, 1, 2), 0.1 * limit, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_the_momentum_of_each_parameter_builds_up_on_its_own(route: str) -> None:
    """A parameter without a gradient has taken no step, and its momentum stands still."""
    model = nn.ModuleList([layer(2), layer(2)])
    early: list[Tensor] = []
    late: list[Tensor] = []
    reg = tr.Regularizer(model, {"0.weight": Probe(1.0, early), "1.weight": Probe(1.0, late)})
    optimizer = proximal(route, SGD, model, reg, lr=0.1, momentum=0.5)
    for t in range(4):
        optimizer.zero_grad()
        for part in [model[0]] if t < 2 else model:
            part.weight.grad = torch.ones_like(part.weight)
        optimizer.step()

    assert [step[0, 0].item() for step in early] == pytest.approx([0.1, 0.15, 0.175, 0.1875], rel=1e-12)
    assert [step[0, 0].item() for step in late] == pytest.approx([0.1, 0.15], rel=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("how", ["strength 0", "disabled"])
def test_momentum_builds_up_while_the_penalty_waits(how: str, route: str) -> None:
    model = layer(2)
    steps: list[Tensor] = []
    reg = tr.Regularizer(model, Probe(1.0, steps))
    optimizer = proximal(route, SGD, model, reg, lr=0.1, momentum=0.5)
    if how == "disabled":
        reg.disable()
    else:
        reg["probe"].factor = 0.0
    for t in range(4):
        if t == 3:
            reg.enable()
            reg["probe"].factor = 1.0
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()

    assert [step[0, 0].item() for step in steps] == pytest.approx([0.1875], rel=1e-12)


# Cycled betas are followed on the host alone, and Adafactor's own step reads its counter.
ON_DEVICE = {name: case for name, case in CASES.items() if "betas" not in case.cycle and case.stock is not Adafactor}


@pytest.mark.parametrize("case", ON_DEVICE.values(), ids=ON_DEVICE)
def test_with_counters_on_the_device_the_step_is_the_same_and_nobody_reads_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probed(case, "attached", GRADIENT)
    monkeypatch.setattr(step_sizes, "as_number", lambda value: value)  # a number would be read off the device
    model = layer(GRADIENT.numel())
    stock = case.stock(model.parameters(), **case.settings)
    step_size = step_sizes.STOCK[case.stock]
    (group,) = stock.param_groups
    for t in range(STEPS):
        case.set(stock, t)
        model.weight.detach().zero_()
        model.weight.grad = GRADIENT.clone()
        with Reads() as reads:
            deferred = step_size.before_update(group, stock.state.get(model.weight, {}), model.weight)
        stock.step()
        with reads:
            state = stock.state.get(model.weight, {})
            step_size.after_update(group, state, model.weight)
            step = step_size(group, state, model.weight) if deferred is None else deferred(state)
        assert reads.count == 0
        found = torch.as_tensor(step, dtype=torch.float64).expand(GRADIENT.shape)
        # In float32, which the counters are kept in.
        torch.testing.assert_close(found, expected[t], rtol=1e-4, atol=0)


class Counting(StepSize):
    """Another step size, and how often it was asked for a step."""

    def __init__(self, other: StepSize) -> None:
        self.other, self.asked = other, 0

    def __call__(self, *args: Any) -> Any:
        self.asked += 1
        return self.other(*args)

    def before_update(self, *args: Any) -> Any:
        return self.other.before_update(*args)

    def after_update(self, *args: Any) -> None:
        self.other.after_update(*args)


@pytest.mark.parametrize("name", ["sgd, cycled momentum", "adam, cycled betas", "radam, cycled", "adadelta"])
def test_at_strength_0_a_step_builds_up_the_momentum_and_computes_nothing_else(name: str) -> None:
    case, found = CASES[name], []
    for idle in (0, 5):
        model, steps = layer(2), []
        reg = tr.Regularizer(model, Probe(1.0, steps))
        optimizer = case.stock(model.parameters(), **case.settings)
        step_size = Counting(step_sizes.STOCK[case.stock])
        tr.optim.attach(optimizer, reg, step_size=step_size)
        for t in range(7):
            case.set(optimizer, t)
            reg["probe"].factor = float(t >= idle)
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        found.append(steps[-1])
    assert len(steps) == 2
    assert step_size.asked <= 2, "or fewer: a function that `before_update` returned was asked instead"
    assert torch.equal(*found)


def test_learning_rate_is_the_group_s_own() -> None:
    model = nn.ModuleList([layer(2), layer(2)])
    optimizer = Adam([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": f64(0.3)}], lr=0.1)
    groups = optimizer.param_groups
    found = [tr.optim.learning_rate(group, {}, group["params"][0]) for group in groups]
    assert found == pytest.approx([0.1, 0.3])


def test_the_first_step_of_asgd_is_a_number_whatever_the_default_device_is() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = ASGD([parameter], lr=0.5)
    with torch.device("meta"):
        assert step_sizes.STOCK[ASGD](optimizer.param_groups[0], {}, parameter) == 0.5
