"""ProxSGD, ProxAdam and ProxAdamW are the stock classes in all that is not the prox, and the prox acts once a step."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import pydoc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import torchreg as tr
from tests.backends import backend as backend
from tests.models import TORCH, Counted

pytestmark = pytest.mark.usefixtures("backend")

PAIRS: list[tuple[type[Optimizer], Any]] = [
    (SGD, tr.optim.ProxSGD),
    (Adam, tr.optim.ProxAdam),
    (AdamW, tr.optim.ProxAdamW),
]
SWAP_INS = [swap_in for _, swap_in in PAIRS]

SGD_SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"lr": 1e-3, "momentum": 0.9, "maximize": True},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "foreach": False},
    {"momentum": 0.9, "fused": True},
    {"lr": torch.tensor(0.1), "momentum": 0.9},
]
ADAM_SETTINGS: list[dict[str, Any]] = [
    {},
    {"betas": (0.5, 0.7), "eps": 1e-3},
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": True, "amsgrad": True, "weight_decay": 0.1},
    {"lr": torch.tensor(0.1)},
    {"lr": torch.tensor(0.1), "fused": True},
]
ALL_SETTINGS = [(*PAIRS[0], settings) for settings in SGD_SETTINGS]
ALL_SETTINGS += [(*pair, settings) for pair in PAIRS[1:] for settings in ADAM_SETTINGS]
SETTING_IDS = [f"{stock.__name__}({settings})" for stock, _, settings in ALL_SETTINGS]
MOMENTUM = [(*PAIRS[0], {"momentum": 0.9}), (*PAIRS[1], {}), (*PAIRS[2], {})]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


def one_weight(*values: float, dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(len(values), 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def build(swap_in: Any, model: nn.Module, reg: tr.Regularizer, lr: float = 0.1, **settings: Any) -> Any:
    return swap_in(model.parameters(), **{"lr": lr, **settings}, regularizer=reg)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps of which each has data of its own."""
    dtype = next(model.parameters()).dtype
    for t in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def step_on(optimizer: Optimizer, weight: Tensor, *gradient: float) -> None:
    weight.grad = torch.tensor([gradient], dtype=weight.dtype)
    optimizer.step()


def same_bits(model: nn.Module, optimizer: Optimizer, other: nn.Module, other_optimizer: Optimizer) -> None:
    """Every weight and every entry of the state; SGD's build-up is the one entry that only the swap-in has."""
    for w, v in zip(model.parameters(), other.parameters(), strict=True):
        assert w.isfinite().all()
        assert torch.equal(w, v)
        state, other_state = (
            {key: value for key, value in o.state.get(p, {}).items() if key != "unit_momentum"}
            for o, p in ((optimizer, w), (other_optimizer, v))
        )
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert torch.equal(value, other_state[key]), key


# ---------------------------------------------------------------------- the stock class, but for the prox


def strength_zero(reg: tr.Regularizer) -> None:
    reg["l1"].strength = 0.0


def factor_zero(reg: tr.Regularizer) -> None:
    reg["l1"].factor = 0.0


@pytest.mark.parametrize("switch_off", [strength_zero, factor_zero, tr.Regularizer.disable])
@pytest.mark.parametrize(("stock", "swap_in", "settings"), ALL_SETTINGS, ids=SETTING_IDS)
def test_without_a_penalty_every_step_is_the_stock_step_bit_for_bit(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], switch_off: Callable[[tr.Regularizer], None]
) -> None:
    plain, regularized = net(), net()
    reg = tr.Regularizer(regularized, tr.L1(1.0))
    switch_off(reg)
    expected = stock(plain.parameters(), **{"lr": 0.1, **settings})
    optimizer = build(swap_in, regularized, reg, **settings)
    train(plain, expected, range(20))
    train(regularized, optimizer, range(20))
    same_bits(regularized, optimizer, plain, expected)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_with_a_penalty_the_same_run_ends_elsewhere_and_in_zeros(swap_in: Any) -> None:
    """The control of the test above: there the penalty is off, not absent."""
    model = net()
    train(model, build(swap_in, model, tr.Regularizer(model, tr.L1(1.0))), range(20))
    assert int((model[0].weight == 0).sum()) > 10


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_the_with_block_of_disabled_holds_for_its_steps_alone(swap_in: Any) -> None:
    model = one_weight(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = build(swap_in, model, reg)
    with reg.disabled():
        step_on(optimizer, model.weight, 1e-12)
    assert model.weight.item() > 0.5
    step_on(optimizer, model.weight, 1e-12)
    assert model.weight.item() < 1.0 - 0.04


@pytest.mark.parametrize(("stock", "swap_in"), PAIRS)
def test_every_argument_of_the_stock_class_is_accepted_and_shown(stock: type[Optimizer], swap_in: Any) -> None:
    theirs = inspect.signature(stock).parameters
    ours = inspect.signature(swap_in).parameters
    assert list(ours) == [*theirs, "regularizer", "partial", "rounding"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    shown = pydoc.plain(pydoc.render_doc(swap_in)).split("\n |  \n")[0]
    assert all(name in shown for name in ours)

    model = net()
    reg = tr.Regularizer(model, tr.L1(0.1))
    arguments = {name: p.default for name, p in theirs.items() if p.default is not inspect.Parameter.empty}
    optimizer = swap_in(model.parameters(), **arguments, regularizer=reg)
    stock_group = {**stock(net().parameters()).param_groups[0], "params": None}
    assert {**optimizer.param_groups[0], "params": None} == stock_group


def test_arguments_are_accepted_by_position_too() -> None:
    model = net()
    optimizer = tr.optim.ProxSGD(model.parameters(), 0.25, 0.5, regularizer=tr.Regularizer(model, tr.L1(0.1)))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.5)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_the_regularizer_is_required_and_checked(swap_in: Any) -> None:
    model = net()
    with pytest.raises(TypeError, match="regularizer"):
        swap_in(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"regularizer is a L1; build one first"):
        swap_in(model.parameters(), lr=0.1, regularizer=tr.L1(0.1))


@pytest.mark.parametrize(("stock", "swap_in"), PAIRS)
def test_an_invalid_setting_is_the_stock_class_s_error_and_takes_no_route(stock: type[Optimizer], swap_in: Any) -> None:
    model = net()
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        build(swap_in, model, reg, lr=-1.0)
    assert reg().requires_grad
    build(swap_in, model, reg)


@pytest.mark.parametrize(("stock", "swap_in"), PAIRS)
def test_it_is_an_instance_of_its_stock_class(stock: type[Optimizer], swap_in: Any) -> None:
    model = net()
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = build(swap_in, model, reg)
    assert isinstance(optimizer, stock)
    assert optimizer.regularizer is reg


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_subclass_keeps_the_prox_as_those_that_frameworks_make_on_the_fly(swap_in: Any) -> None:
    kind = type("Wrapped", (swap_in,), {})
    model = one_weight(1.0)
    fired: list[str] = []
    optimizer = build(kind, model, tr.Regularizer(model, tr.L1(100.0)))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    step_on(optimizer, model.weight, 1.0)
    assert model.weight.item() == 0
    assert fired == ["post"]


# ---------------------------------------------------------------------- hooks, closures, schedulers


@pytest.mark.parametrize(("stock", "swap_in"), PAIRS)
def test_step_hooks_fire_once_a_step_whether_or_not_a_stock_instance_exists(
    stock: type[Optimizer], swap_in: Any
) -> None:
    model = net()
    stock(net().parameters(), lr=0.1)
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)))
    stock(net().parameters(), lr=0.1)
    fired: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    try:
        train(model, optimizer, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert fired == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_hooks_of_the_instance_see_the_weights_after_the_prox(swap_in: Any) -> None:
    model = one_weight(1.0)
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(100.0)))
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(model.weight.item()))
    step_on(optimizer, model.weight, 1.0)
    assert seen == [0.0]


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_closure_is_called_once_and_its_loss_returned(swap_in: Any) -> None:
    weights = []
    for with_closure in (False, True):
        model = net()
        optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)))
        calls: list[Tensor] = []

        def closure(model: Any = model, optimizer: Any = optimizer, calls: list[Tensor] = calls) -> Tensor:
            optimizer.zero_grad()
            loss = (model(torch.ones(3, 5)) - 1).square().mean()
            loss.backward()
            calls.append(loss)
            return loss

        for t in range(1, 4):
            if with_closure:
                assert optimizer.step(closure) is calls[-1]
            else:
                closure()
                assert optimizer.step() is None
            assert len(calls) == t
        weights.append(model[0].weight)
    assert torch.equal(*weights)


def step_lr(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=3, gamma=0.3)


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.2, total_steps=20, cycle_momentum=True)


@pytest.mark.parametrize("scheduler", [step_lr, one_cycle])
@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_a_scheduler_drives_the_swap_in_as_the_stock_class(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], scheduler: Callable[[Optimizer], LRScheduler]
) -> None:
    """A scheduler warns, and so fails this test, if it does not see the optimizer's steps."""
    plain, regularized = net(), net()
    reg = tr.Regularizer(regularized, tr.L1(0.0))
    expected = stock(plain.parameters(), lr=0.1, **settings)
    optimizer = build(swap_in, regularized, reg, **settings)
    for model, o in ((plain, expected), (regularized, optimizer)):
        schedule = scheduler(o)
        for t in range(15):
            train(model, o, range(t, t + 1))
            schedule.step()
    same_bits(regularized, optimizer, plain, expected)


@pytest.mark.parametrize("scheduler", [step_lr, one_cycle])
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_a_stationary_weight_rests_under_a_scheduler(
    settings: dict[str, Any], scheduler: Callable[[Optimizer], LRScheduler]
) -> None:
    model = one_weight(2.0, -0.5)
    optimizer = build(tr.optim.ProxSGD, model, tr.Regularizer(model, tr.L1(0.3)), **settings)
    schedule = scheduler(optimizer)
    for _ in range(19):
        step_on(optimizer, model.weight, -0.3, 0.3)
        schedule.step()
        torch.testing.assert_close(
            model.weight.detach(), torch.tensor([[2.0, -0.5]], dtype=torch.float64), rtol=1e-12, atol=0
        )


# ---------------------------------------------------------------------- which parameters


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_each_group_shrinks_with_its_own_learning_rate(swap_in: Any) -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0)])
    reg = tr.Regularizer(model, tr.L1(0.1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.02}]
    optimizer = swap_in(groups, lr=0.5, weight_decay=0, regularizer=reg)
    for part in model:
        part.weight.grad = torch.ones_like(part.weight)
    optimizer.step()
    # A gradient of 1: the step moves by lr, the prox by lr·λ.
    assert model[0].weight.item() == pytest.approx(1 - 0.5 * 1.1, rel=1e-7)
    assert model[1].weight.item() == pytest.approx(1 - 0.02 * 1.1, rel=1e-7)


def test_two_optimizers_share_a_regularizer_and_each_shrinks_its_own() -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0), one_weight(1.0)])
    steps: list[Any] = []
    reg = tr.Regularizer(model, Counted(0.1, steps))
    first = tr.optim.ProxSGD(model[0].parameters(), lr=0.5, regularizer=reg, partial=True)
    second = tr.optim.ProxAdamW(model[1].parameters(), lr=0.02, weight_decay=0, regularizer=reg, partial=True)
    gradients = torch.autograd.grad(reg(), [part.weight for part in model], allow_unused=True)
    assert gradients[:2] == (None, None), "those on the prox route have no gradient"
    assert gradients[2].item() == pytest.approx(0.1)
    assert reg().item() == pytest.approx(0.3)

    for optimizer in (first, second):
        for part in model:
            part.weight.grad = torch.ones_like(part.weight)
        optimizer.step()
    assert [part.weight.item() for part in model] == pytest.approx([1 - 0.5 * 1.1, 1 - 0.02 * 1.1, 1.0], rel=1e-7)
    assert len(steps) == 2


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_selected_parameter_that_the_optimizer_lacks_is_an_error_naming_it(swap_in: Any) -> None:
    model = net()
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(ValueError, match=r"does not hold the selected 2\.weight; .*partial=True"):
        swap_in(model[0].parameters(), lr=0.1, regularizer=reg)
    with pytest.raises(ValueError, match=r"holds none of the selected parameters"):
        swap_in([nn.Parameter(torch.ones(2, 2))], lr=0.1, regularizer=reg, partial=True)
    assert reg().requires_grad, "no route was taken"


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_gradient_of_zeros_is_a_step_and_none_is_not(swap_in: Any) -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0)])
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)), weight_decay=0)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert model[0].weight.item() < 1
    assert model[1].weight.item() == 1


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_parameter_frozen_midway_stays_as_it_is(swap_in: Any) -> None:
    model = net()
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)))
    train(model, optimizer, range(2))
    model[0].requires_grad_(False)
    frozen, other = model[0].weight.clone(), model[2].weight.clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, other)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_add_param_group_adopts_what_is_selected(swap_in: Any) -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0)])
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = swap_in(model[0].parameters(), lr=0.5, weight_decay=0, regularizer=reg, partial=True)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.02})
    assert not reg().requires_grad
    for part in model:
        part.weight.grad = torch.ones_like(part.weight)
    optimizer.step()
    assert [part.weight.item() for part in model] == pytest.approx([1 - 0.5 * 1.1, 1 - 0.02 * 1.1], rel=1e-7)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_add_param_group_takes_a_parameter_over(swap_in: Any) -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0)])
    reg = tr.Regularizer(model, tr.L1(0.1))
    settings = {"lr": 0.5, "weight_decay": 0, "regularizer": reg, "partial": True}
    first = swap_in(model[0].parameters(), **settings)
    second = swap_in(model[1].parameters(), **settings)
    second.add_param_group({"params": model[0].parameters()})
    assert [binding.carrier for binding in reg.bindings()] == [second.attachment, second.attachment]
    for part in model:
        part.weight.grad = torch.ones_like(part.weight)
    with pytest.raises(RuntimeError, match=r"no longer carries the penalty of 0\.weight: a newer"):
        first.step()
    second.step()
    assert [part.weight.item() for part in model] == pytest.approx([0.45, 0.45], rel=1e-7)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_removing_the_attachment_leaves_a_stock_optimizer(swap_in: Any) -> None:
    model = net()
    reg = tr.Regularizer(model, tr.L1(1.0))
    optimizer = build(swap_in, model, reg)
    optimizer.attachment.remove()
    stock = next(stock for stock, kind in PAIRS if kind is swap_in)
    plain = net()
    expected = stock(plain.parameters(), lr=0.1)
    train(plain, expected, range(3))
    train(model, optimizer, range(3))
    same_bits(model, optimizer, plain, expected)
    assert reg().requires_grad
    build(swap_in, model, reg)  # its place is free again


# ---------------------------------------------------------------------- copies and checkpoints


def clone(optimizer: Any, how: str) -> Any:
    return copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_a_copy_of_the_optimizer_alone_brings_regularizer_and_model(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], how: str
) -> None:
    model = one_weight(1.0, -1.0)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = build(swap_in, model, reg, **settings)
    for _ in range(3):
        step_on(optimizer, model.weight, 0.3, 0.2)
    twin = clone(clone(optimizer, how), how)
    (weight,) = twin.param_groups[0]["params"]
    assert weight is twin.regularizer.model.weight
    assert weight is not model.weight
    for _ in range(3):
        step_on(optimizer, model.weight, 0.3, 0.2)
        step_on(twin, weight, 0.3, 0.2)
    assert torch.equal(weight, model.weight)
    reg["l1"].strength = 1e3
    step_on(optimizer, model.weight, 0.3, 0.2)
    step_on(twin, weight, 0.3, 0.2)
    assert model.weight.tolist() == [[0.0, 0.0]]
    assert (weight != 0).all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_a_copy_with_model_and_regularizer_is_bound_to_the_copies(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], order: tuple[int, ...], how: str
) -> None:
    model = one_weight(1.0, -1.0)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = build(swap_in, model, reg, **settings)
    for _ in range(3):
        step_on(optimizer, model.weight, 0.3, 0.2)
    parts = (model, reg, optimizer)
    copies = clone([parts[i] for i in order], how)
    model2, reg2, optimizer2 = (copies[order.index(i)] for i in range(3))
    for _ in range(2):
        step_on(optimizer, model.weight, 0.3, 0.2)
        step_on(optimizer2, model2.weight, 0.3, 0.2)
    assert torch.equal(model2.weight, model.weight)
    assert not reg2().requires_grad
    reg2["l1"].strength = 1e3
    step_on(optimizer, model.weight, 0.3, 0.2)
    step_on(optimizer2, model2.weight, 0.3, 0.2)
    assert optimizer2.regularizer is reg2
    assert model2.weight.tolist() == [[0.0, 0.0]]
    assert (model.weight != 0).any()
    assert not reg().requires_grad


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("stock", "swap_in", "settings"), ALL_SETTINGS, ids=SETTING_IDS)
def test_a_run_resumes_from_its_checkpoint_bit_for_bit(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any]
) -> None:
    model = net()
    reg = tr.Regularizer(model, tr.ElasticNet(l1=0.02, l2=0.01))
    optimizer = build(swap_in, model, reg, **settings)
    train(model, optimizer, range(5))
    reg["elastic_net"].l1 = 0.05
    state = saved_and_loaded([model.state_dict(), reg.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(5, 10))

    resumed = net()
    reg2 = tr.Regularizer(resumed, tr.ElasticNet(l1=0.0, l2=0.0))
    optimizer2 = build(swap_in, resumed, reg2, **settings)
    for part, own in zip((resumed, reg2, optimizer2), state, strict=True):
        part.load_state_dict(own)
    train(resumed, optimizer2, range(5, 10))
    same_bits(resumed, optimizer2, model, optimizer)


@pytest.mark.parametrize("direction", ["stock to swap-in", "swap-in to stock"])
@pytest.mark.parametrize(("stock", "swap_in", "settings"), ALL_SETTINGS, ids=SETTING_IDS)
def test_checkpoints_load_both_ways(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], direction: str
) -> None:
    settings = {"lr": 0.1, **settings}

    def make(model: nn.Module, kind: str) -> Optimizer:
        if kind == "stock":
            return stock(model.parameters(), **settings)
        return swap_in(model.parameters(), regularizer=tr.Regularizer(model, tr.L1(0.0)), **settings)

    start, end = direction.split(" to ")
    model = net()
    optimizer = make(model, start)
    train(model, optimizer, range(5))
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    optimizer2 = make(resumed, end)
    optimizer2.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    train(resumed, optimizer2, range(5, 10))
    same_bits(resumed, optimizer2, model, optimizer)


@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_param_groups_and_state_hold_the_stock_entries_and_plain_values(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any]
) -> None:
    model, plain = net(), net()
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)), **settings)
    expected = stock(plain.parameters(), lr=0.1, **settings)
    train(model, optimizer, range(2))
    train(plain, expected, range(2))
    ours, theirs = optimizer.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in ours["state"].items():
        assert set(state) - set(theirs["state"][i]) <= {"unit_momentum"}
        assert set(theirs["state"][i]) <= set(state)
        assert all(isinstance(value, Tensor | float) for value in state.values())


@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_a_parameter_that_never_had_a_gradient_has_no_state_as_in_the_stock_class(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any]
) -> None:
    model = nn.ModuleList([one_weight(1.0), one_weight(1.0)])
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)), **settings)
    for _ in range(2):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0]


# ---------------------------------------------------------------------- mixed precision and accumulation


def scaled_steps(model: nn.Linear, optimizer: Optimizer, infinite: set[int], steps: int = 6) -> list[bool]:
    """Steps under a GradScaler, with infinite gradients at some; returns which of them moved the weights."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    moved = []
    for t in range(steps):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss = model(torch.ones(1, model.in_features, dtype=model.weight.dtype)).sum()
        if t in infinite:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(model.weight, before))
    return moved


SCALED: list[tuple[Any, dict[str, Any]]] = [
    (tr.optim.ProxSGD, {"lr": 0.01}),
    (tr.optim.ProxSGD, {"lr": 0.01, "momentum": 0.9}),
    (tr.optim.ProxSGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    (tr.optim.ProxAdam, {"lr": 0.01}),
    (tr.optim.ProxAdam, {"lr": 0.01, "amsgrad": True}),
    (tr.optim.ProxAdamW, {"lr": 0.01}),
]


@pytest.mark.parametrize("toward", [False, True], ids=["to zero", "toward"])
@pytest.mark.parametrize("fused", [False, True], ids=["not fused", "fused"])
@pytest.mark.parametrize(("swap_in", "settings"), SCALED, ids=str)
@pytest.mark.parametrize(
    # After a skipped first step, torch's fused SGD goes on from a momentum buffer that nothing has written.
    ("infinite", "moved"),
    [({0}, [False]), ({1, 4}, [True, False, True, True, False, True])],
    ids=["the first step", "later steps"],
)
def test_a_step_that_the_scaler_skips_leaves_the_weights_bit_for_bit(
    swap_in: Any, settings: dict[str, Any], fused: bool, toward: bool, infinite: set[int], moved: list[bool]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    anchors = {"weight": torch.randn(1, 50)} if toward else None
    reg = tr.Regularizer(model, tr.L1(0.5), toward=anchors)
    optimizer = build(swap_in, model, reg, fused=fused, **settings)
    assert scaled_steps(model, optimizer, infinite, len(moved)) == moved


@pytest.mark.parametrize("fused", [False, True], ids=["not fused", "fused"])
@pytest.mark.parametrize(("swap_in", "settings"), SCALED, ids=str)
def test_skipped_steps_leave_no_trace_in_the_steps_after_them(
    swap_in: Any, settings: dict[str, Any], fused: bool
) -> None:
    """Momentum's build-up and Adam's count of steps stand still: the real steps are those of a run without skips."""
    found = []
    for infinite, steps in ((set(), 4), ({1, 3}, 6)):
        model = one_weight(1.0, -2.0, dtype=torch.float32)
        optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.5)), fused=fused, **settings)
        scaled_steps(model, optimizer, infinite, steps)
        found.append(model.weight)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["not fused", "fused"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_not_built_up_when_the_very_first_step_was_skipped(nesterov: bool, fused: bool) -> None:
    model = one_weight(1.0)
    steps: list[Any] = []
    reg = tr.Regularizer(model, Counted(0.5, steps))
    optimizer = build(tr.optim.ProxSGD, model, reg, momentum=0.9, nesterov=nesterov, fused=fused)
    scaled_steps(model, optimizer, {0}, 4)
    expected = [0.1, 0.19, 0.271]
    if nesterov:
        expected = [0.1 + 0.9 * step for step in expected]
    assert [float(step) for step in steps[-3:]] == pytest.approx(expected, rel=1e-6)
    assert all(float(step) == 0 for step in steps[:-3])


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize(
    ("swap_in", "settings"),
    [(kind, {"fused": fused}) for kind in SWAP_INS for fused in (False, True)],
    ids=str,
)
def test_a_real_step_has_exactly_one_prox(swap_in: Any, settings: dict[str, Any], scaled: bool) -> None:
    model = one_weight(1.0, 2.0)
    steps: list[Any] = []
    optimizer = build(swap_in, model, tr.Regularizer(model, Counted(0.01, steps)), **settings)
    if scaled:
        scaled_steps(model, optimizer, set(), 5)
    else:
        for _ in range(5):
            step_on(optimizer, model.weight, 1.0, 1.0)
    assert len(steps) == 5


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_accumulated_gradients_have_one_prox_at_the_step(swap_in: Any) -> None:
    found = []
    for parts in (1, 4):
        model = net(torch.float64)
        steps: list[Any] = []
        reg = tr.Regularizer(model, Counted(0.05, steps))
        optimizer = build(swap_in, model, reg)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            for chunk in x.chunk(parts):
                ((model(chunk) - 1).square().mean() / parts + reg() / parts).backward()
            optimizer.step()
        assert len(steps) == 3 * 2
        found.append(model[0].weight)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------- kernels and dtypes


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
@pytest.mark.parametrize(("stock", "swap_in", "settings"), MOMENTUM)
def test_foreach_and_fused_agree_with_the_loop(
    stock: type[Optimizer], swap_in: Any, settings: dict[str, Any], kernel: str
) -> None:
    found = []
    for kernels in ({"foreach": False}, {kernel: True}):
        model = net(torch.float64)
        reg = tr.Regularizer(model, tr.L1(0.1))
        train(model, build(swap_in, model, reg, **settings, **kernels), range(20))
        found.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert (found[0] == 0).any()


@pytest.mark.parametrize("swap_in", [tr.optim.ProxAdam, tr.optim.ProxAdamW])
def test_without_the_native_kernel_adam_takes_its_fused_step(swap_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    model = net(torch.float32)
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.1)))
    seen: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Operations():
        train(model, optimizer, range(1))
    assert any("_fused_adam" in name for name in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_the_first_step_is_that_of_float64_up_to_the_dtype_s_rounding(swap_in: Any, dtype: torch.dtype) -> None:
    """From w with gradient 1 and λ = 0.3 every optimizer steps to w − lr and its prox to soft(w − lr, 0.3·lr)."""
    w = np.array([1.0, -1.0, 0.13, 0.1, 0.125, 0.0])
    model = one_weight(*w, dtype=dtype)
    w = model.weight.detach().double().numpy()[0].copy()
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.L1(0.3)), lr=0.125, weight_decay=0)
    step_on(optimizer, model.weight, *[1.0] * w.size)
    moved = w - 0.125
    expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.3 * 0.125, 0)
    assert model.weight.dtype == dtype
    # Adam's ε of 1e-8 is a rounding of its own.
    tolerance = 3 * torch.finfo(dtype).eps + 1e-7
    np.testing.assert_allclose(model.weight.detach().double().numpy()[0], expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal((model.weight == 0).numpy()[0], expected == 0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_complex_weights_lose_modulus_and_keep_phase_under_sgd(dtype: torch.dtype, nesterov: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=6) + 1j * rng.normal(size=6)
    model = nn.Linear(6, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w)[None])
    reg = tr.Regularizer(model, tr.L1(0.2))
    optimizer = build(tr.optim.ProxSGD, model, reg, momentum=0.8, nesterov=nesterov)
    buffer, unit = None, None
    for _ in range(12):
        gradient = 0.1 * (rng.normal(size=6) + 1j * rng.normal(size=6))
        model.weight.grad = torch.from_numpy(gradient)[None].to(dtype)
        optimizer.step()
        buffer = gradient if buffer is None else 0.8 * buffer + gradient
        unit = 1.0 if unit is None else 0.8 * unit + 1.0
        w = w - 0.1 * (gradient + 0.8 * buffer if nesterov else buffer)
        threshold = 0.1 * (1 + 0.8 * unit if nesterov else unit) * 0.2
        modulus = np.abs(w)
        w = np.where(modulus > threshold, (1 - threshold / np.maximum(modulus, 1e-300)) * w, 0)
        np.testing.assert_allclose(
            model.weight.detach().numpy()[0], w, rtol=0, atol=1e-5 if dtype == torch.complex64 else 1e-13
        )
    assert 0 < np.count_nonzero(w) < 6, "zeros and others: both are tried"


@pytest.mark.parametrize("swap_in", [tr.optim.ProxAdam, tr.optim.ProxAdamW])
def test_complex_weights_are_refused_by_adam_at_construction(swap_in: Any) -> None:
    model = nn.Linear(2, 1, bias=False, dtype=torch.complex64)
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(ValueError, match=r"weight is complex: Prox\w+ .*ProxSGD"):
        build(swap_in, model, reg)
    assert reg().requires_grad, "no route was taken"


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_without_eps_the_step_of_a_weight_that_never_had_a_gradient_is_finite(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """The stock step itself is 0/0 there; the prox adds no NaN of its own."""
    model = one_weight(1.0, 2.0, dtype=dtype)
    steps: list[Tensor] = []
    optimizer = build(tr.optim.ProxAdam, model, tr.Regularizer(model, Counted(0.1, steps)), eps=0.0, **settings)
    step_on(optimizer, model.weight, 1.0, 0.0)
    (step,) = steps
    assert step.isfinite().all()
    w = torch.tensor([[1.0, 2.0]], dtype=dtype)
    assert tr.L1(1e-3).prox(w, step)[0, 1] == 0
    assert tr.L1(1e3).prox(w, step)[0, 1] == 0
    for l1, l2 in ((0.0, 0.1), (0.1, 0.0), (0.1, 0.1), (0.0, 1e3)):
        assert tr.ElasticNet(l1=l1, l2=l2).prox(w, step).isfinite().all()


@pytest.mark.parametrize("toward", [False, True], ids=["to zero", "toward"])
@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_a_step_with_lr_0_leaves_the_weights_bit_for_bit(swap_in: Any, toward: bool) -> None:
    """Distributed checkpoints make an optimizer's state so."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    before = model.weight.detach().clone()
    anchors = {"weight": torch.randn(1, 50)} if toward else None
    reg = tr.Regularizer(model, tr.ElasticNet(l1=0.5, l2=0.5), toward=anchors)
    step_on(build(swap_in, model, reg, lr=0.0), model.weight, *[0.0] * 50)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("swap_in", SWAP_INS)
def test_zero_weights_zero_gradients_and_zero_lr_are_ordinary(swap_in: Any) -> None:
    model = one_weight(0.0, 1.0)
    optimizer = build(swap_in, model, tr.Regularizer(model, tr.ElasticNet(l1=0.1, l2=0.1)))
    for lr in (0.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        step_on(optimizer, model.weight, 0.0, 0.0)
        assert model.weight[0, 0] == 0
        assert model.weight[0, 1] == 1 if lr == 0 else model.weight[0, 1] < 1


@pytest.mark.parametrize(
    ("swap_in", "settings"),
    [
        (tr.optim.ProxSGD, {}),
        (tr.optim.ProxSGD, {"momentum": 0.9, "nesterov": True}),
        (tr.optim.ProxAdam, {}),
        (tr.optim.ProxAdam, {"amsgrad": True}),
        (tr.optim.ProxAdamW, {}),
    ],
    ids=str,
)
def test_gradients_flow_through_a_differentiable_step(swap_in: Any, settings: dict[str, Any]) -> None:
    if swap_in is tr.optim.ProxSGD and TORCH < (2, 7):
        pytest.skip("torch's SGD takes no learning rate with a gradient before 2.7")

    def after_a_step(lr: Tensor, start: Tensor, gradient: Tensor) -> Tensor:
        model = one_weight(1.0, -2.0, 0.01)
        reg = tr.Regularizer(model, tr.ElasticNet(l1=0.5, l2=0.2))
        del model.weight
        model.weight = start.clone()  # a tensor with a history, as meta-learning has
        model.weight.retain_grad()
        optimizer = swap_in([model.weight], lr=lr, differentiable=True, regularizer=reg, **settings)
        model.weight.grad = gradient.clone()
        optimizer.step()
        return model.weight

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[1.0, -2.0, 0.01]], dtype=torch.float64, requires_grad=True)
    # A momentum buffer starts from a detached gradient, so that no history leads through it.
    gradient = torch.tensor([[0.5, 0.25, 0.02]], dtype=torch.float64, requires_grad="momentum" not in settings)
    assert (after_a_step(lr, start, gradient) == 0).tolist() == [[False, False, True]]
    assert torch.autograd.gradcheck(after_a_step, (lr, start, gradient))
