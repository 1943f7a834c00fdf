"""One carrier for each parameter: who has it, who takes over, and what is said where nobody steps it."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

import torchreg as tr

TOOK_OVER = r"no longer carries the penalty of .*weight: a newer {} has taken it over"
NOBODY_STEPS = r"the weights train, but not by the {} that carries their penalty"


def model_of(*weights: float) -> nn.Module:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in weights])
    for part, w in zip(model, weights, strict=True):
        nn.init.constant_(part.weight, w)
    return model


def step(optimizer: Optimizer, model: nn.Module, gradient: float = 0.0) -> None:
    """A step under a constant gradient."""
    optimizer.zero_grad()
    sum(gradient * w.sum() for w in model.parameters()).backward()
    optimizer.step()


def attached(model: nn.Module, reg: tr.Regularizer) -> SGD:
    optimizer = SGD(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    return optimizer


def swapped_in(model: nn.Module, reg: tr.Regularizer) -> tr.optim.ProxSGD:
    return tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)


BUILDS = [attached, swapped_in]
every_build = pytest.mark.parametrize("build", BUILDS)
every_pair = pytest.mark.parametrize(("first", "second"), list(itertools.product(BUILDS, BUILDS)))


def handles(reg: tr.Regularizer) -> list[Any]:
    return [binding.carrier for binding in reg.bindings()]


def weights(model: nn.Module) -> list[float]:
    return [w.item() for w in model.parameters()]


# ---------------------------------------------------------------------- a value that can be read


@every_build
def test_the_carrier_is_a_value(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    assert handles(reg) == [None, None]
    optimizer = build(model, reg)
    first, second = handles(reg)
    assert first is second
    assert first.optimizer is optimizer
    assert first.regularizer is reg
    assert first.active
    assert reg.explain().count(f"prox ({type(optimizer).__name__}") == 2


def test_an_added_group_has_the_carrier_at_once() -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    handle = tr.optim.attach(optimizer, reg, partial=True)
    assert handles(reg) == [handle, None]
    optimizer.add_param_group({"params": model[1].parameters()})
    assert handles(reg) == [handle, handle]
    assert not reg().requires_grad


@pytest.mark.parametrize("holder", ["freed", "a scheduler", "a cycle", "a variable"])
@pytest.mark.parametrize("collect", [False, True])
def test_the_objective_depends_on_no_object_s_lifetime(holder: str, collect: bool) -> None:
    gc.disable()
    try:
        model = model_of(1.0)
        reg = tr.Regularizer(model, tr.L1(0.5))
        optimizer = swapped_in(model, reg)
        kept: Any = None
        if holder == "a scheduler":
            kept = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        elif holder == "a cycle":
            optimizer.trainer = [optimizer]
        elif holder == "a variable":
            kept = optimizer
        del optimizer
        if collect:
            gc.collect()
        assert not reg().requires_grad, "the optimizer carries the penalty until somebody takes it off"
        reg.detach()
        plain = SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            plain.zero_grad()
            (0 * model[0].weight.sum() + reg()).backward()
            plain.step()
        assert weights(model) == pytest.approx([0.85])
        del kept
    finally:
        gc.enable()


# ---------------------------------------------------------------------- the newest takes over


@every_pair
@pytest.mark.parametrize("another", [False, True], ids=["the same regularizer", "another regularizer"])
def test_the_newest_optimizer_takes_over(
    first: Callable[..., Optimizer], second: Callable[..., Optimizer], another: bool
) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old = first(model, reg)
    newest = tr.Regularizer(model, tr.L1(0.2)) if another else reg
    new = second(model, newest)
    assert all(handle.optimizer is new for handle in handles(newest))
    assert reg().requires_grad == another, "of a regularizer that lost its carrier the loss is the route again"
    before = weights(model)
    with pytest.raises(RuntimeError, match=TOOK_OVER.format(type(new).__name__)):
        step(old, model)
    assert weights(model) == before
    step(new, model)
    assert weights(model) == pytest.approx([1 - 0.1 * (0.2 if another else 0.5)] * 2)


@every_pair
def test_the_old_optimizer_may_take_its_parameters_back(
    first: Callable[..., Optimizer], second: Callable[..., Optimizer]
) -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old, new = first(model, reg), second(model, reg)
    handle = tr.optim.attach(old, reg)
    assert handles(reg) == [handle]
    step(old, model)
    assert weights(model) == pytest.approx([0.95])
    with pytest.raises(RuntimeError, match=TOOK_OVER.format(type(old).__name__)):
        step(new, model)


@every_pair
def test_once_the_newer_is_removed_the_old_optimizer_is_a_stock_one(
    first: Callable[..., Optimizer], second: Callable[..., Optimizer]
) -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old = first(model, reg)
    second(model, reg)
    handles(reg)[0].remove()
    assert reg().requires_grad
    step(old, model, 1.0)
    assert weights(model) == pytest.approx([0.9])


def test_what_a_newer_optimizer_does_not_hold_stays_with_the_old_one() -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old = attached(model, reg)
    new = SGD(model[1].parameters(), lr=0.1)
    tr.optim.attach(new, reg, partial=True)
    assert [handle.optimizer for handle in handles(reg)] == [old, new]
    with pytest.raises(RuntimeError, match=r"the penalty of 1\.weight"):
        step(old, model)


@every_build
def test_a_second_regularizer_on_one_optimizer_takes_what_it_selects(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = build(model, reg)
    if build is swapped_in:
        return  # the attachment of a swap-in is one
    other = tr.Regularizer(model, tr.L1(0.2), include="1.weight")
    tr.optim.attach(optimizer, other)
    assert [handles(reg)[1], handles(other)[0].optimizer] == [None, optimizer]
    for _ in range(2):
        step(optimizer, model)
    assert weights(model) == pytest.approx([0.9, 0.96])


def test_a_refused_optimizer_leaves_the_carrier_of_before() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = swapped_in(model, reg)
    with pytest.raises(ValueError, match="no known unit response"):
        tr.optim.attach(torch.optim.LBFGS(model.parameters()), reg)
    with pytest.raises(ValueError, match="holds none of the selected"):
        tr.optim.attach(SGD(model_of(1.0).parameters(), lr=0.1), reg, partial=True)
    assert handles(reg) == [optimizer.attachment]
    step(optimizer, model)
    assert weights(model) == pytest.approx([0.95])


@every_build
def test_detach_gives_every_parameter_back_to_the_loss(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = build(model, reg)
    reg.detach()
    assert handles(reg) == [None, None]
    assert reg().requires_grad
    assert not optimizer._optimizer_step_post_hooks
    step(optimizer, model, 1.0)
    assert weights(model) == pytest.approx([0.9, 0.9])
    reg.detach()  # once more changes nothing


def test_a_removed_handle_may_be_removed_again() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    handle = tr.optim.attach(SGD(model.parameters(), lr=0.1), reg)
    handle.remove()
    optimizer = swapped_in(model, reg)
    handle.remove()
    assert handles(reg) == [optimizer.attachment]
    assert not handle.active


# ---------------------------------------------------------------------- weights that train without their carrier


@every_build
@pytest.mark.parametrize("says", ["RegularizedLoss", "loss alone"])
def test_weights_that_train_while_their_carrier_does_not_step_are_noticed(
    build: Callable[..., Optimizer], says: str
) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    carrier = build(model, reg)
    criterion = tr.RegularizedLoss(F.mse_loss, reg) if says == "RegularizedLoss" else F.mse_loss
    second = SGD(model.parameters(), lr=0.1)

    def train() -> None:
        second.zero_grad()
        out = torch.stack([w.sum() for w in model.parameters()])
        criterion(out, torch.zeros_like(out)).backward()
        second.step()

    train()
    train()
    with pytest.warns(UserWarning, match=NOBODY_STEPS.format(type(carrier).__name__)) as caught:
        train()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "handle.remove()" in text
    assert "regularizer.detach()" in text
    train()  # it is said once: a second warning would be an error


def test_a_value_that_is_read_after_the_second_step_is_enough() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    swapped_in(model, reg)
    plain = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(plain, model, 1.0)
    with pytest.warns(UserWarning, match=NOBODY_STEPS.format("ProxSGD")):
        reg()


def test_every_other_step_of_another_optimizer_is_noticed() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    carrier, other = swapped_in(model, reg), SGD(model.parameters(), lr=0.1)
    for optimizer in (carrier, other, carrier, other):
        step(optimizer, model, 1.0)
    with pytest.warns(UserWarning, match=NOBODY_STEPS.format("ProxSGD")):
        step(carrier, model, 1.0)


def quiet_training(model: nn.Module, reg: tr.Regularizer, optimizer: Optimizer) -> Iterator[None]:
    """Loops in which weights move beside the carrier's steps, and rightly so."""
    state = copy.deepcopy(model.state_dict())
    for _ in range(4):
        yield step(optimizer, model, 1.0)
        model.load_state_dict(state)
    for _ in range(4):  # checkpoints are compared
        model.load_state_dict(state)
        yield reg()
    for _ in range(4):  # weights are clamped after each step
        step(optimizer, model, 1.0)
        with torch.no_grad():
            yield [w.clamp_(-1, 1) for w in model.parameters()]
    for _ in range(4):  # gradients add up
        for _ in range(3):
            sum(w.sum() for w in model.parameters()).backward()
            reg()
        yield optimizer.step()
    with reg.disabled():  # a refit with an optimizer of its own
        plain = SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            yield step(plain, model, 1.0)


@every_build
def test_what_is_right_is_not_warned_of(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    for _ in quiet_training(model, reg, build(model, reg)):
        pass  # a warning would be an error


def test_after_a_takeover_or_a_detach_nobody_watches() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old = attached(model, reg)
    new = swapped_in(model, reg)
    for _ in range(4):
        step(new, model, 1.0)
    reg.detach()
    plain = SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        step(plain, model, 1.0)
    assert old is not new


def test_the_watch_keeps_nothing_alive() -> None:
    import weakref

    model = model_of(1.0)
    optimizer = swapped_in(model, tr.Regularizer(model, tr.L1(0.5)))
    step(optimizer, model, 1.0)
    gone = weakref.ref(optimizer), weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# ---------------------------------------------------------------------- one prox a real step


class Ends(SGD):
    """A user's class that ends in `super().step()`."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Ends):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(Optimizer):
    """An optimizer that calls an inner one."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__([w for group in inner.param_groups for w in group["params"]], {})
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [Ends, Twice])
@pytest.mark.parametrize("plain_before", [False, True])
def test_a_class_that_ends_in_super_step_has_one_prox(kind: type[SGD], plain_before: bool) -> None:
    if plain_before:  # torch hooks a class's step once it has an instance
        SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = kind(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg, step_size=tr.optim.learning_rate)
    for _ in range(2):
        step(optimizer, model)
    assert weights(model) == pytest.approx([0.9])


def test_a_subclass_of_a_swap_in_that_ends_in_super_step_has_one_prox() -> None:
    class Mine(tr.optim.ProxSGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = model_of(1.0)
    optimizer = Mine(model.parameters(), lr=0.1, regularizer=tr.Regularizer(model, tr.L1(0.5)))
    step(optimizer, model)
    assert weights(model) == pytest.approx([0.95])


@every_build
def test_a_wrapper_around_the_carrier_has_one_prox(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0)
    optimizer = Wrapper(build(model, tr.Regularizer(model, tr.L1(0.5))))
    step(optimizer, model)
    assert weights(model) == pytest.approx([0.95])


def test_after_a_step_that_broke_off_there_is_one_prox_again() -> None:
    SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = model_of(1.0)
    optimizer = Ends(model.parameters(), lr=0.1)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(0.5)), step_size=tr.optim.learning_rate)

    def broken() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    step(optimizer, model)
    assert weights(model) == pytest.approx([0.95])


@pytest.mark.parametrize("kind", [SGD, Ends])
def test_a_stage_counts_real_steps(kind: type[SGD]) -> None:
    SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    stage = tr.Regularize(8, tr.schedules.Linear(0, 1, steps=8))
    optimizer = kind(model.parameters(), lr=0.1)
    with stage.on(reg, optimizer) as schedule:
        for number in range(1, 9):
            step(optimizer, model)
            assert schedule.last_step == number


class Shell:
    """What Lightning hands to hooks: it is no optimizer, and has one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_wrappers_that_are_no_optimizers_are_seen_through() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = SGD(model.parameters(), lr=0.1)
    assert tr.optim.attach(Shell(Shell(optimizer)), reg).optimizer is optimizer
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got Shell"):
        tr.optim.attach(Shell(3), reg)


# ---------------------------------------------------------------------- trainers, notebooks, processes


def test_a_cell_that_builds_all_of_it_runs_again() -> None:
    model = model_of(1.0)
    for lr in (0.1, 0.2):
        reg = tr.Regularizer(model, tr.L1(0.5))
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=lr, regularizer=reg)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        step(optimizer, model)
        scheduler.step()
    assert handles(reg) == [optimizer.attachment]


def test_a_trainer_fits_twice() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model_of(1.0)
            self.reg = tr.Regularizer(self.net, tr.L1(0.5))

        def configure_optimizers(self) -> Optimizer:
            return swapped_in(self.net, self.reg)

    module, optimizers = Module(), []
    for _ in range(2):
        optimizers = [*optimizers, module.configure_optimizers()]  # the old one lives on
        step(optimizers[-1], module.net)
    assert weights(module.net) == pytest.approx([0.9])


def test_wrappers_that_keep_keyword_arguments_leave_no_regularizer_in_a_checkpoint() -> None:
    class SAM(Optimizer):
        def __init__(self, params: Any, base: type[Optimizer], **kwargs: Any) -> None:
            super().__init__(params, {"rho": 0.05, **kwargs})
            self.base = base(self.param_groups, **kwargs)
            self.param_groups = self.base.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    rounding = tr.optim.NearestRounding()
    optimizer = SAM(model.parameters(), tr.optim.ProxSGD, lr=0.1, regularizer=reg, partial=False, rounding=rounding)
    assert not {"regularizer", "partial", "rounding"} & set(optimizer.param_groups[0])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)
    step(optimizer, model)
    assert weights(model) == pytest.approx([0.95])


def evaluate(model: nn.Module, reg: tr.Regularizer, values: Any) -> None:
    reg["l1"].strength = 2.0
    values.put((reg().item(), reg.model is model))


def test_a_regularizer_goes_to_a_spawned_process_with_its_model() -> None:
    model = model_of(3.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    context = multiprocessing.get_context("spawn")
    values = context.Queue()
    process = context.Process(target=evaluate, args=(model, reg, values))
    process.start()
    assert values.get(timeout=120) == (6.0, True)
    process.join()
    assert reg().item() == 1.5


def test_a_fit_s_own_optimizer_carries_nothing_after_it() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    made = []

    def fit(model: nn.Module, reg: tr.Regularizer) -> None:
        made.append(swapped_in(model, reg))
        step(made[-1], model)

    tr.path(reg, fit, lambdas=[0.5, 0.1])
    assert handles(reg) == [None]
    assert reg().requires_grad
    assert len(made) == 2


@every_build
def test_at_strength_zero_and_frozen_weights_the_prox_moves_nothing(build: Callable[..., Optimizer]) -> None:
    model = model_of(1.0, 1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    optimizer = build(model, reg)
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    model[0].weight.requires_grad_(False)
    for _ in range(2):
        optimizer.step()
    assert weights(model) == pytest.approx([1.0, 0.9])


def test_the_error_names_the_adam_that_has_taken_over() -> None:
    model = model_of(1.0)
    reg = tr.Regularizer(model, tr.L1(0.5))
    old = attached(model, reg)
    tr.optim.attach(Adam(model.parameters()), reg)
    expected = (
        "this SGD no longer carries the penalty of 0.weight: a newer Adam has taken it over. Step the Adam, or let "
        "this one take it back: tr.optim.attach(optimizer, regularizer)"
    )
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=re.escape(expected)):
        step(old, model)
