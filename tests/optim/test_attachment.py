"""attach(): the prox on an optimizer that exists, what it refuses, and the way back."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

import torchreg as tr
from tests.models import Counted

STOCK: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (Adam, {}),
    (AdamW, {}),
]
EVERY = [
    *STOCK,
    *((kind, {}) for kind in (Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adafactor, ASGD)),
    (RMSprop, {"momentum": 0.9}),
]
FUSED = (SGD, Adam, AdamW, Adagrad)
KERNELS = [
    pytest.param(kind, {**settings, **fused}, id=f"{kind.__name__}-{settings}{'-fused' if fused else ''}")
    for kind, settings in EVERY
    for fused in ({}, {"fused": True})
    if not fused or kind in FUSED
]
SWAP_INS: dict[Any, Any] = {SGD: tr.optim.ProxSGD, Adam: tr.optim.ProxAdam, AdamW: tr.optim.ProxAdamW}


def one_weight(*values: float) -> nn.Linear:
    model = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def two_layers() -> nn.ModuleList:
    return nn.ModuleList([one_weight(1.0), one_weight(1.0)])


def step_on(optimizer: Optimizer, model: nn.Module, gradient: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


# ---------------------------------------------------------------------- the prox


@pytest.mark.parametrize(("stock", "settings"), STOCK, ids=str)
@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_attached_optimizer_steps_as_the_swap_in_bit_for_bit(
    stock: Any, settings: dict[str, Any], kernel: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")  # the native step of a swap-in rounds in another order
    weights = []
    for swap_in in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        reg = tr.Regularizer(model, tr.ElasticNet(l1=0.2, l2=0.1))
        if swap_in:
            optimizer = SWAP_INS[stock](model.parameters(), lr=0.05, regularizer=reg, **settings, **kernel)
        else:
            optimizer = stock(model.parameters(), lr=0.05, **settings, **kernel)
            tr.optim.attach(optimizer, reg)
        for _ in range(20):
            optimizer.zero_grad()
            (model(torch.randn(8, 5)) - 1).square().mean().backward()
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)
    assert (weights[0] == 0).any()


@pytest.mark.parametrize(("stock", "settings"), KERNELS)
def test_a_real_step_has_exactly_one_prox(stock: Any, settings: dict[str, Any]) -> None:
    model = two_layers()
    steps: list[Any] = []
    optimizer = stock(model.parameters(), lr=0.1, **settings)
    tr.optim.attach(optimizer, tr.Regularizer(model, Counted(0.01, steps)))
    for t in range(1, 4):
        step_on(optimizer, model)
        assert len(steps) == 2 * t
    model[0].weight.grad = None
    optimizer.step()
    assert len(steps) == 2 * 3 + 1, "a parameter without a gradient has taken no step"


INF, NAN = float("inf"), float("nan")


def scaled(stock: Any, settings: dict[str, Any], factors: list[float]) -> list[Tensor]:
    """The weights after each step under a GradScaler, with gradients multiplied by `factors`."""
    model = one_weight(1.0, -2.0).float()
    optimizer = stock(model.parameters(), lr=0.01, **settings)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = [model.weight.detach().clone()]
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(model.weight.detach().clone())
    return found


@pytest.mark.parametrize(("stock", "settings"), KERNELS)
def test_a_step_that_the_scaler_skips_leaves_the_weights_bit_for_bit(stock: Any, settings: dict[str, Any]) -> None:
    factors = [1.0, NAN, INF, 1.0, INF, 1.0]
    if not (settings.get("fused") and settings.get("momentum")):
        # After a skipped first step, torch's fused SGD goes on from a momentum buffer that nothing has written.
        factors = [INF, *factors]
    found = scaled(stock, settings, factors)
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(found)]
    assert moved == [factor == 1 for factor in factors]
    plain = scaled(stock, settings, [1.0, 1.0, 1.0])
    torch.testing.assert_close(found[-1], plain[-1], rtol=1e-6, atol=0, msg="skipped steps left a trace")


@pytest.mark.parametrize(("stock", "settings"), KERNELS)
def test_accumulated_gradients_have_one_prox_at_the_step(stock: Any, settings: dict[str, Any]) -> None:
    found = []
    for parts in (1, 4):
        model = one_weight(1.0, -2.0)
        steps: list[Any] = []
        reg = tr.Regularizer(model, Counted(0.3, steps))
        optimizer = stock(model.parameters(), lr=0.01, **settings)
        tr.optim.attach(optimizer, reg)
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            for chunk in x.chunk(parts):
                ((model(chunk) - 1).square().mean() / parts + reg() / parts).backward()
            optimizer.step()
        assert len(steps) == 3
        found.append(model.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("stock", "settings"), KERNELS)
def test_a_parameter_frozen_midway_stays_as_it_is(stock: Any, settings: dict[str, Any]) -> None:
    model = two_layers()
    optimizer = stock(model.parameters(), lr=0.01, **settings)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)))
    step_on(optimizer, model)
    frozen, other = (part.weight.item() for part in model)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    for _ in range(3):
        model[1].weight.grad = torch.ones_like(model[1].weight)
        optimizer.step()
    assert model[0].weight.item() == frozen
    assert model[1].weight.item() != other
    # Thawed, it goes on: one prox for each step of its own.
    model[0].requires_grad_(True)
    step_on(optimizer, model)
    assert model[0].weight.item() != frozen


@pytest.mark.parametrize(("stock", "settings"), KERNELS)
def test_a_closure_gives_the_same_step(stock: Any, settings: dict[str, Any]) -> None:
    found = []
    for with_closure in (False, True):
        model = one_weight(1.0, -2.0)
        optimizer = stock(model.parameters(), lr=0.01, **settings)
        tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)))

        def closure(optimizer: Any = optimizer, model: Any = model) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(1, 2, dtype=torch.float64)).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            if with_closure:
                assert isinstance(optimizer.step(closure), Tensor)
            else:
                closure()
                optimizer.step()
        found.append(model.weight.detach())
    assert torch.equal(*found)


def test_a_change_of_the_strength_takes_effect_at_the_next_step() -> None:
    model = one_weight(1.0)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = SGD(model.parameters(), lr=0.5)
    tr.optim.attach(optimizer, reg)
    expected = 1.0
    for strength, factor in ((0.1, 1.0), (0.4, 1.0), (0.4, 0.25), (0.0, 1.0), (0.2, 1.0)):
        reg["l1"].strength = strength
        reg["l1"].factor = factor
        step_on(optimizer, model, 0.0)
        expected -= 0.5 * strength * factor
        assert model.weight.item() == pytest.approx(expected, rel=1e-12)
    with reg.disabled():
        step_on(optimizer, model, 0.0)
    assert model.weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("stock", "settings"), STOCK, ids=str)
def test_toward_ends_exactly_at_the_anchor(stock: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 3)
    anchor = {"weight": torch.randn(3, 20)}
    reg = tr.Regularizer(model, tr.L1(10.0), toward=anchor)
    optimizer = stock(model.parameters(), lr=0.05, **settings)
    tr.optim.attach(optimizer, reg)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, anchor["weight"])
    assert reg().item() == 0


def test_the_prox_runs_before_hooks_that_were_there_earlier_and_later() -> None:
    """A mask or an average must see the weights after the prox."""
    model = one_weight(1.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(("earlier", model.weight.item())))
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(100.0)))
    optimizer.register_step_post_hook(lambda *_: seen.append(("later", model.weight.item())))
    step_on(optimizer, model)
    assert seen == [("earlier", 0.0), ("later", 0.0)]


def test_a_mask_outlives_the_prox_toward_an_anchor() -> None:
    model = one_weight(1.0, 1.0)
    optimizer = SGD(model.parameters(), lr=0.1)

    def mask(*_: Any) -> None:
        with torch.no_grad():
            model.weight[0, 0] = 0.0

    optimizer.register_step_post_hook(mask)
    reg = tr.Regularizer(model, tr.L1(100.0), toward={"weight": torch.tensor([[0.5, 0.5]])})
    tr.optim.attach(optimizer, reg)
    step_on(optimizer, model)
    assert model.weight.tolist() == [[0.0, 0.5]]


def test_closures_work_as_without_the_prox() -> None:
    model = one_weight(1.0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)))
    calls: list[None] = []

    def closure() -> str:
        calls.append(None)
        model.weight.grad = torch.ones_like(model.weight)
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert len(calls) == 1
    assert model.weight.item() == pytest.approx(1 - 0.1 * 1.5, rel=1e-12)


# ---------------------------------------------------------------------- one route for each parameter


def test_while_attached_the_value_stands_and_its_gradient_does_not() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, {"0.weight": tr.L1(0.25), "1.weight": tr.L2(0.5)})
    optimizer = Adam(model.parameters())
    handle = tr.optim.attach(optimizer, reg)
    assert handle.active
    assert reg().item() == pytest.approx(0.75)
    assert not reg().requires_grad
    assert {key: part.item() for key, part in reg.components().items()} == {"0.weight": 0.25, "1.weight": 0.5}
    assert reg.explain().count("prox (Adam)") == 2

    handle.remove()
    assert not handle.active
    assert torch.autograd.grad(reg(), model[0].weight)[0].item() == 0.25
    before = [part.weight.item() for part in model]
    step_on(optimizer, model, 0.0)
    assert [part.weight.item() for part in model] == before, "no prox after remove()"
    handle.remove()  # once more does no harm


def test_partial_leaves_the_rest_to_the_loss() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.25))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold the selected 1\.weight; .*partial=True"):
        tr.optim.attach(optimizer, reg)
    assert torch.autograd.grad(reg(), model[0].weight)[0].item() == 0.25, "the refused attachment took no route"

    tr.optim.attach(optimizer, reg, partial=True)
    held, free = torch.autograd.grad(reg(), [part.weight for part in model], allow_unused=True)
    assert held is None
    assert free.item() == 0.25
    assert reg().item() == 0.5
    other = SGD(model[1].parameters(), lr=0.1)
    tr.optim.attach(other, reg, partial=True)
    assert not reg().requires_grad


def test_partial_still_needs_one_of_the_selected() -> None:
    model = two_layers()
    optimizer = SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of the selected parameters \(0\.weight, 1\.weight\)"):
        tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.25)), partial=True)


def test_add_param_group_brings_selected_parameters_to_the_prox() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg, partial=True)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.2})
    assert not reg().requires_grad
    step_on(optimizer, model, 0.0)
    assert [part.weight.item() for part in model] == pytest.approx([0.95, 0.9], rel=1e-12)


def test_own_prox_is_refused_while_an_optimizer_has_it() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    with pytest.raises(RuntimeError, match=r"prox \(SGD\) already applies the prox"):
        reg.prox_(0.1)
    assert [part.weight.item() for part in model] == [1.0, 1.0]


# ---------------------------------------------------------------------- what is refused


class MyAdam(Adam):
    """A subclass may step otherwise."""


class MySGD(SGD):
    """A subclass may step otherwise."""


REFUSED = {
    LBFGS: "mixes the gradients of all weights",
    Rprop: "the sign of the gradient and not its size",
    SparseAdam: "only the rows that have a gradient",
    MyAdam: "no class of torch.optim",
    MySGD: "no class of torch.optim",
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    REFUSED[torch.optim.Muon] = "orthogonal, as a whole"


@pytest.mark.parametrize("kind", REFUSED)
def test_an_optimizer_without_a_known_response_is_refused_with_the_reason_and_the_way_out(kind: Any) -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = kind([layer.weight for layer in model], lr=0.1)
    expected = rf"{kind.__name__} has no known unit response \(.*{REFUSED[kind]}.*SGD, Adam, AdamW.*step_size="
    with pytest.raises(ValueError, match=expected):
        tr.optim.attach(optimizer, reg)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert reg().requires_grad


def test_a_step_size_of_one_s_own_serves_any_optimizer() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, {"0.weight": tr.L1(0.5), "1.weight": tr.L2(0.5)})
    optimizer = RMSprop([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.3}], lr=0.1)
    asked: list[tuple[Any, Any, Any]] = []

    def step_size(*asked_for: Any) -> Any:
        asked.append(asked_for)
        return 0.25 if asked_for[2] is model[0].weight else torch.tensor([[1.0]], dtype=torch.float64)

    tr.optim.attach(optimizer, reg, step_size=step_size)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model[0].weight.item() == pytest.approx(1 - 0.25 * 0.5)
    assert model[1].weight.item() == pytest.approx(1 / (1 + 2 * 1.0 * 0.5))
    assert len(asked) == 2
    for got, group, part in zip(asked, optimizer.param_groups, model, strict=True):
        assert got[0] is group
        assert got[1] is optimizer.state[part.weight]
        assert got[2] is part.weight


def test_a_step_size_object_is_told_of_each_parameter_before_the_step() -> None:
    model = one_weight(1.0)
    told: list[float] = []

    class Half(tr.optim.StepSize):
        def before_update(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> None:
            told.append(parameter.item())

        def after_update(self, group: Any, state: dict[str, Any], parameter: Tensor, skipped: Any = None) -> None:
            state["updates"] = state.get("updates", 0) + 1

        def __call__(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> float:
            told.append(parameter.item())
            return 0.5

    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.2)), step_size=Half())
    step_on(optimizer, model)
    assert [*told, model.weight.item()] == pytest.approx([1.0, 0.9, 0.8])
    assert optimizer.state[model.weight] == {"updates": 1}, "what it writes goes into checkpoints"


@pytest.mark.parametrize("step_size", [0.1, "lr", torch.tensor(0.1)], ids=repr)
def test_a_step_size_that_cannot_be_called_is_a_type_error(step_size: Any) -> None:
    model = two_layers()
    with pytest.raises(TypeError, match=re.escape(f"step_size={step_size!r} cannot be called; pass fn(group")):
        tr.optim.attach(SGD(model.parameters(), lr=0.1), tr.Regularizer(model, tr.L1(0.5)), step_size=step_size)


def test_what_is_no_optimizer_is_a_type_error() -> None:
    model = two_layers()
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got ModuleList"):
        tr.optim.attach(model, tr.Regularizer(model, tr.L1(0.5)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [tr.L1(0.5), None, 0.1], ids=repr)
def test_what_is_no_regularizer_is_a_type_error(wrong: Any) -> None:
    optimizer = SGD(two_layers().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=rf"regularizer is a {type(wrong).__name__}; build one first"):
        tr.optim.attach(optimizer, wrong)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("stock", [Adam, AdamW, RMSprop, Adagrad])
def test_complex_weights_are_refused_under_a_metric_of_each_weight(stock: Any) -> None:
    model = nn.Linear(2, 1, bias=False, dtype=torch.complex64)
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(ValueError, match="weight is complex"):
        tr.optim.attach(stock(model.parameters()), reg)
    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)


def test_two_regularizers_share_an_optimizer_where_they_select_apart() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = tr.Regularizer(model, tr.L1(0.5), include="0.weight")
    second = tr.Regularizer(model, tr.L1(0.25), include="1.weight")
    handle = tr.optim.attach(optimizer, first)
    tr.optim.attach(optimizer, second)
    step_on(optimizer, model, 0.0)
    assert [part.weight.item() for part in model] == pytest.approx([0.95, 0.975], rel=1e-12)
    handle.remove()
    step_on(optimizer, model, 0.0)
    assert [part.weight.item() for part in model] == pytest.approx([0.95, 0.95], rel=1e-12)


# ---------------------------------------------------------------------- replaced tensors, second starts, copies


@pytest.mark.parametrize("kind", ["attached", "swap-in"])
def test_replaced_parameters_are_an_error_that_says_to_build_the_optimizer_again(kind: str) -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    if kind == "attached":
        optimizer: Any = SGD(model.parameters(), lr=0.1)
        handle = tr.optim.attach(optimizer, reg)
    else:
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
        handle = optimizer.attachment
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"former tensor of 0\.weight, 1\.weight.*Build the optimizer again"):
        step_on(optimizer, model, 0.0)

    handle.remove()
    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    step_on(optimizer, model, 0.0)
    assert [part.weight.item() for part in model] == pytest.approx([0.95, 0.95], rel=1e-12)


def test_an_attachment_whose_parameters_were_replaced_hinders_no_other_model() -> None:
    stale, model = two_layers(), two_layers()
    optimizer = SGD(stale.parameters(), lr=0.1)
    tr.optim.attach(optimizer, tr.Regularizer(stale, tr.L1(0.5)))
    stale.load_state_dict({name: w.clone() for name, w in stale.state_dict().items()}, assign=True)
    reg = tr.Regularizer(model, tr.L1(0.5))
    tr.optim.attach(SGD(model.parameters(), lr=0.1), reg).remove()
    tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)


def test_attached_again_momentum_counts_as_built_up() -> None:
    """While it was off nobody followed the momentum: what it was then says nothing of what it is now."""
    model = one_weight(1000.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = tr.optim.attach(optimizer, reg)
    step_on(optimizer, model, -0.5)
    handle.remove()
    for _ in range(200):
        step_on(optimizer, model, -0.5)
    before = model.weight.item()
    tr.optim.attach(optimizer, reg)
    step_on(optimizer, model, -0.5)
    assert model.weight.item() == pytest.approx(before, rel=1e-9), "gradient and penalty cancel"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize(("stock", "settings"), STOCK, ids=str)
def test_a_copy_with_model_and_regularizer_has_a_prox_of_its_own(
    stock: Any, settings: dict[str, Any], order: tuple[int, ...], how: str
) -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = stock(model.parameters(), lr=0.01, **settings)
    tr.optim.attach(optimizer, reg)
    step_on(optimizer, model)
    original = (model, reg, optimizer)
    parts = [original[i] for i in order]
    copies = copy.deepcopy(parts) if how == "deepcopy" else pickle.loads(pickle.dumps(parts))
    model2, reg2, optimizer2 = (copies[order.index(i)] for i in range(3))
    # Nothing has asked the copied regularizer for anything yet: the prox is there all the same.
    step_on(optimizer, model)
    step_on(optimizer2, model2)
    for part, part2 in zip(model, model2, strict=True):
        assert torch.equal(part.weight, part2.weight)
    reg2["l1"].strength = 1e4
    step_on(optimizer, model)
    step_on(optimizer2, model2)
    assert not reg2().requires_grad
    assert not reg().requires_grad
    assert [part.weight.item() for part in model2] == [0.0, 0.0]
    assert all(part.weight.item() != 0 for part in model)


def test_a_copy_of_the_optimizer_alone_is_a_stock_optimizer() -> None:
    model = one_weight(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    twin = copy.deepcopy(optimizer)
    (weight,) = twin.param_groups[0]["params"]
    weight.grad = torch.ones_like(weight)
    twin.step()
    assert weight.item() == pytest.approx(0.9, rel=1e-12)
    assert not reg().requires_grad, "the original keeps its prox"


def test_the_optimizer_s_state_dict_has_the_stock_keys_and_the_build_up() -> None:
    model = two_layers()
    optimizer = Adam(model.parameters())
    expected = optimizer.state_dict().keys()
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)))
    step_on(optimizer, model)
    state = optimizer.state_dict()
    assert state.keys() == expected
    assert all(set(own) == {"step", "exp_avg", "exp_avg_sq", "unit_momentum"} for own in state["state"].values())


def test_hooks_of_removed_attachments_are_gone() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5))).remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_group_whose_parameters_were_exchanged_is_seen() -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.1, regularizer=reg)
    optimizer.param_groups[0]["params"] = [model[0].weight, model[0].weight.detach().clone().requires_grad_()]
    before = [part.weight.item() for part in model]
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        step_on(optimizer, model, 1.0)
    assert [part.weight.item() for part in model] == before, "refused before anything moved"


@pytest.mark.parametrize(("weight_decay", "said"), [(0.0, False), (1e-2, True)])
def test_explain_names_a_decay_that_is_no_penalty(weight_decay: float, said: bool) -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = tr.optim.ProxAdamW(model.parameters(), weight_decay=weight_decay, regularizer=reg)
    assert ("beside decoupled decay" in reg.explain()) is said
    optimizer.attachment.remove()
    coupled = torch.optim.Adam(model.parameters(), weight_decay=weight_decay)
    tr.optim.attach(coupled, reg)
    assert "decoupled" not in reg.explain(), "coupled decay is L2 in the gradient"


@pytest.mark.parametrize(
    ("stock", "settings", "said"),
    [
        (Adafactor, {"weight_decay": 0.1}, ", beside decoupled decay"),
        (Adafactor, {"weight_decay": 0.0}, ""),
        (NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, ", beside decoupled decay"),
        (RAdam, {"weight_decay": 0.1}, ""),
        (ASGD, {}, ", beside its own lambd"),
        (ASGD, {"lambd": 0.0}, ""),
    ],
)
def test_explain_names_the_decay_of_every_optimizer(stock: Any, settings: dict[str, Any], said: str) -> None:
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = stock(model.parameters(), lr=0.1, **settings)
    tr.optim.attach(optimizer, reg)
    assert f"prox ({stock.__name__}{said})" in reg.explain()


def test_the_lambd_of_asgd_is_an_l2_penalty() -> None:
    """Under the gradient −1 the weight rests where lambd·w + λ = 1, as with L2(lambd/2) beside L1."""
    model = two_layers()
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = ASGD(model.parameters(), lr=0.5, lambd=0.25, alpha=0.0)
    tr.optim.attach(optimizer, reg)
    for _ in range(300):
        step_on(optimizer, model, -1.0)
    assert model[0].weight.item() == pytest.approx((1 - 0.5) / 0.25, rel=1e-6)


@pytest.mark.parametrize("penalty", [tr.L1(0.05), tr.L2(0.3), tr.ElasticNet(l1=0.05, l2=0.3)], ids=str)
@pytest.mark.parametrize(
    ("stock", "settings"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.AdamW, {})],
    ids=str,
)
def test_a_large_weight_which_is_shrunk_in_pieces_has_the_bits_of_a_small_one(
    stock: Any, settings: dict[str, Any], penalty: tr.Penalty
) -> None:
    """Each row by itself is small; both are compared after the same steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 40_000, generator=generator)
    large = nn.ParameterList([start.clone()])
    small = nn.ParameterList([row.clone() for row in start])
    optimizers = []
    for model in (large, small):
        optimizers.append(stock(model.parameters(), lr=0.05, **settings))
        tr.optim.attach(optimizers[-1], tr.Regularizer(model, penalty, include="*"))
    for _ in range(3):
        large[0].grad = torch.randn(3, 40_000, generator=generator)
        for w, gradient in zip(small, large[0].grad, strict=True):
            w.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(large[0], torch.stack(list(small)))
    assert (large[0] == 0).any() == (not penalty.smooth)
