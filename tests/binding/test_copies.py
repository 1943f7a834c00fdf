"""Copies: deepcopy and pickle of a model, its regularizer and its optimizer, together and apart."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

import torchreg as tr
from tests.models import MLP, Halved, Lazy, array, batch, l1, mlp, same, snapshot

L1 = 0.3


def swap_in(kind: type[Optimizer], **kwargs: Any) -> Callable[[nn.Module, tr.Regularizer], Optimizer]:
    return lambda model, reg: kind(model.parameters(), regularizer=reg, **kwargs)


def hooked(kind: type[Optimizer], **kwargs: Any) -> Callable[[nn.Module, tr.Regularizer], Optimizer]:
    def build(model: nn.Module, reg: tr.Regularizer) -> Optimizer:
        optimizer = kind(model.parameters(), **kwargs)
        tr.optim.attach(optimizer, reg)
        return optimizer

    return build


SWAP_INS = {
    "ProxSGD": swap_in(tr.optim.ProxSGD, lr=0.05, momentum=0.9),
    "ProxAdamW": swap_in(tr.optim.ProxAdamW, lr=0.01),
}
HOOKED = {
    "SGD": hooked(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": hooked(Adam, lr=0.01, amsgrad=True),
}
every_optimizer = pytest.mark.parametrize("build", [*SWAP_INS.values(), *HOOKED.values()], ids=[*SWAP_INS, *HOOKED])
every_swap_in = pytest.mark.parametrize("build", SWAP_INS.values(), ids=SWAP_INS)
every_hooked = pytest.mark.parametrize("build", HOOKED.values(), ids=HOOKED)
ORDERS = list(itertools.permutations(["model", "reg", "optimizer"]))
every_order = pytest.mark.parametrize("order", ORDERS, ids="-".join)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


every_copy = pytest.mark.parametrize("make", [copy.deepcopy, pickled])


def trainer(build: Callable[[nn.Module, tr.Regularizer], Optimizer], steps: int = 2) -> SimpleNamespace:
    """A model in mid-training: the optimizer's state is warm, some weights are zero."""
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(L1))
    result = SimpleNamespace(model=model, reg=reg, optimizer=build(model, reg))
    train(result, steps)
    return result


def copied(own: SimpleNamespace, make: Callable[[Any], Any], order: tuple[str, ...]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(order, make(tuple(getattr(own, name) for name in order)), strict=True)))


def train(own: SimpleNamespace, steps: int = 3, with_reg: bool = True) -> dict[str, torch.Tensor]:
    """`loss + reg()` as a user writes it, or the loss alone; returns the weights."""
    x, y = batch()
    for _ in range(steps):
        own.optimizer.zero_grad()
        loss = (own.model(x) - y).square().mean()
        (loss + own.reg() if with_reg else loss).backward()
        own.optimizer.step()
    return snapshot(own.model)


def zeros(model: nn.Module) -> int:
    return tr.sparsity(model).zeros


# ---------------------------------------------------------------------- model and regularizer


@every_copy
@pytest.mark.parametrize("order", [("model", "reg"), ("reg", "model")], ids="-".join)
def test_copied_with_its_model_it_follows_the_copy(make, order):
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0), "fc2.weight": tr.L2(0.0)})
    both = copied(SimpleNamespace(model=model, reg=reg), make, order)
    assert both.reg.model is both.model
    with torch.no_grad():
        both.model.fc1.weight.fill_(2.0)
    assert both.reg().item() == 60
    assert reg().item() == pytest.approx(l1(model.fc1.weight), rel=1e-6)
    both.reg().backward()
    assert model.fc1.weight.grad is None
    assert torch.equal(both.model.fc1.weight.grad, torch.ones(5, 6))
    both.reg.prox_(10.0)
    assert (both.model.fc1.weight == 0).all()
    assert (model.fc1.weight != 0).all()


@every_copy
def test_strengths_anchor_scale_and_switch_are_copied_and_then_independent(make):
    model = mlp()
    anchor = {name: w + 1 for name, w in model.state_dict().items()}
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0)}, toward=anchor, scale=scale_2)
    reg["fc1.weight"].strength, reg["fc1.weight"].factor = 0.5, 3.0
    reg.disable()
    _, other = make((model, reg))
    assert not other.enabled
    reg.enable()
    assert not other.enabled
    other.enable()
    assert other().item() == pytest.approx(0.5 * 3 * 2 * 30)
    assert other.explain() == reg.explain()
    other["fc1.weight"].factor = 0.0
    assert reg["fc1.weight"].factor == 3.0
    assert other().item() == 0
    reg["fc1.weight"].strength = 9.0
    assert other["fc1.weight"].strength == 0.5


@every_copy
def test_a_strength_changed_on_both_sides_is_read_on_each(make):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    reg["l1"].strength = 2.0
    value = reg().item()
    _, other = make((model, reg))
    other["l1"].strength = 4.0
    assert other().item() == pytest.approx(2 * value)
    assert reg().item() == value


def scale_2(name: str, parameter: torch.Tensor) -> float:
    return 2.0


@every_copy
def test_copied_alone_it_brings_its_model(make):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    other = make(reg)
    assert other.model is not model
    with torch.no_grad():
        model.fc1.weight.zero_()
    assert other().item() > reg().item() == pytest.approx(l1(model.fc2.weight), rel=1e-6)
    other["l1"].strength = 0.0
    assert reg["l1"].strength == 1.0


@every_copy
@pytest.mark.parametrize("held", ["reg", "criterion"])
def test_a_model_that_holds_its_regularizer_is_copied_with_it(make, held):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    setattr(model, held, reg if held == "reg" else tr.RegularizedLoss(nn.MSELoss(), reg))
    other = make(model)
    own = other.reg if held == "reg" else other.criterion.regularizer
    assert own.model is other
    with torch.no_grad():
        other.fc1.weight.zero_()
    assert own().item() == pytest.approx(l1(model.fc2.weight), rel=1e-6)
    assert reg().item() > own().item()


def test_an_average_of_a_model_that_holds_its_regularizer_leaves_the_model_alone():
    model = mlp()
    model.reg = tr.Regularizer(model, tr.L1(1.0))
    average = AveragedModel(model)
    with torch.no_grad():
        model.fc1.weight.zero_()
    assert model.reg().item() == pytest.approx(l1(model.fc2.weight), rel=1e-6)
    assert average.module.reg().item() == pytest.approx(l1(average.module.fc1.weight) + l1(model.fc2.weight), rel=1e-6)


@every_copy
def test_a_copy_keeps_ties(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    other, reg = make((model, tr.Regularizer(model, {"1.weight": tr.L1(1.0)})))
    assert reg().item() == pytest.approx(l1(other[0].weight), rel=1e-6)
    assert "tied to 1.weight" in reg.explain()


def test_a_copy_of_a_copy_follows_its_own_model():
    model = mlp()
    first = copy.deepcopy((model, tr.Regularizer(model, tr.L1(1.0))))
    second = copy.deepcopy(first)  # before the first has been used
    third = copy.deepcopy(second[::-1])[::-1]
    for i, (own, _) in enumerate((first, second, third), start=1):
        with torch.no_grad():
            own.fc1.weight.fill_(i)
            own.fc2.weight.zero_()
    assert [reg().item() for _, reg in (first, second, third)] == [30, 60, 90]


def test_a_copy_of_a_model_that_was_wrapped_since_is_followed():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    model.fc1 = nn.DataParallel(model.fc1)
    other, own = copy.deepcopy((model, reg))
    with torch.no_grad():
        other.fc1.module.weight.fill_(1.0)
        other.fc2.weight.zero_()
    assert own().item() == 30


def test_a_copy_of_a_model_that_was_parametrized_since_is_followed():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0)})
    parametrize.register_parametrization(model.fc1, "weight", Halved())
    other, own = copy.deepcopy((model, reg))
    with torch.no_grad():
        other.fc1.parametrizations.weight.original.fill_(4.0)
    assert own().item() == 60
    assert reg().item() == pytest.approx(l1(model.fc1.weight), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@every_copy
def test_a_copy_made_before_a_lazy_module_knows_its_shape(make):
    model = Lazy()
    reg = tr.Regularizer(
        model, tr.L1(1.0), scale=scale_2, toward={"fc1.weight": torch.zeros(5, 6), "fc2.weight": torch.zeros(3, 5)}
    )
    other, own = make((model, reg))
    other(batch()[0])
    assert own().item() == pytest.approx(2 * l1(other.fc1.weight) + 2 * l1(other.fc2.weight), rel=1e-6)
    with pytest.raises(RuntimeError, match="not materialized"):
        reg()


# ---------------------------------------------------------------------- with the optimizer


@every_optimizer
@every_order
@pytest.mark.parametrize("with_reg", [True, False], ids=["loss+reg", "loss"])
def test_a_deepcopy_of_all_three_trains_on_exactly_as_the_original(build, order, with_reg):
    own = trainer(build)
    other = copied(own, copy.deepcopy, order)
    before = snapshot(own.model)
    after = train(other, with_reg=with_reg)
    assert same(before, snapshot(own.model))
    assert same(after, train(own, with_reg=with_reg))
    assert not other.reg().requires_grad
    assert zeros(other.model) > 0


@every_optimizer
@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[-1]], ids="-".join)
@pytest.mark.parametrize("with_reg", [True, False], ids=["loss+reg", "loss"])
def test_a_pickle_of_all_three_trains_on_exactly_as_the_original(build, order, with_reg):
    own = trainer(build)
    other = copied(own, pickled, order)
    assert same(train(other, with_reg=with_reg), train(own, with_reg=with_reg))
    assert not other.reg().requires_grad


@every_optimizer
def test_a_torch_save_of_a_whole_trainer_trains_on_exactly_as_the_original(build, tmp_path):
    own = trainer(build)
    torch.save(vars(own), tmp_path / "trainer.pt")
    other = SimpleNamespace(**torch.load(tmp_path / "trainer.pt", weights_only=False))
    assert same(train(other), train(own))


@every_optimizer
@every_order
def test_a_changed_strength_acts_on_its_own_copy_alone(build, order):
    own = trainer(build)
    other = copied(own, copy.deepcopy, order)
    other.reg["l1"].strength = 100.0
    train(own, 1)
    train(other, 1)
    assert zeros(other.model) == 45
    assert zeros(own.model) < 45
    other.reg["l1"].strength = 0.0
    own.reg["l1"].strength = 100.0
    train(other, 2)
    train(own, 1)
    assert zeros(own.model) == 45
    assert zeros(other.model) < 45


@every_optimizer
def test_disabling_acts_on_its_own_copy_alone(build):
    own = trainer(build, steps=0)
    other = copied(own, copy.deepcopy, ("reg", "model", "optimizer"))
    other.reg.disable()
    train(other)
    train(own)
    assert zeros(other.model) == 0
    assert zeros(own.model) > 0


@every_optimizer
def test_a_copy_of_a_copy_of_all_three_trains_on_exactly_as_the_original(build):
    own = trainer(build)
    order = ("reg", "optimizer", "model")
    other = copied(copied(copied(own, copy.deepcopy, order), pickled, order), copy.deepcopy, order)
    assert same(train(other), train(own))


class Trainer:
    """Holds the regularizer before the model, and the handle too."""

    def __init__(self) -> None:
        model = mlp()
        self.reg = tr.Regularizer(model, tr.L1(L1))
        self.criterion = tr.RegularizedLoss(nn.MSELoss(), self.reg)
        self.optimizer = Adam(model.parameters(), lr=0.01)
        self.handle = tr.optim.attach(self.optimizer, self.reg)
        self.model = model

    def train(self) -> dict[str, torch.Tensor]:
        x, y = batch()
        for _ in range(3):
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()
        return snapshot(self.model)


@every_copy
def test_a_trainer_is_copied_whole(make):
    own = Trainer()
    own.train()
    other = make(own)
    assert other.criterion.regularizer is other.reg
    assert same(other.train(), own.train())


@every_copy
def test_the_handle_of_a_copied_trainer_takes_the_prox_off_the_copy_alone(make):
    own = Trainer()
    other = make(own)
    other.handle.remove()
    assert other.reg().requires_grad
    assert not own.reg().requires_grad
    w = snapshot(other.model)
    for p in other.model.parameters():
        p.grad = torch.zeros_like(p)
    other.optimizer.step()
    assert same(w, snapshot(other.model))


@pytest.mark.parametrize("kind", [ASGD, Adadelta, Adafactor], ids=lambda kind: kind.__name__)
@every_copy
def test_copied_after_a_step_that_broke_off_a_trainer_trains_on_exactly_as_the_original(make, kind):
    own = trainer(hooked(kind, lr=0.05))

    def broken():
        raise MemoryError

    with pytest.raises(MemoryError):
        own.optimizer.step(broken)
    other = make(own)
    assert same(train(other), train(own))


class Uncopied(tr.optim.ProxSGD):
    def __deepcopy__(self, memo):
        raise AssertionError("nobody asked for a copy of the optimizer, and of all that it holds")


@every_copy
@pytest.mark.parametrize("regularizer_first", [False, True])
def test_two_optimizers_that_share_a_regularizer_are_copied_with_it(make, regularizer_first):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(L1))
    first = tr.optim.ProxSGD(model.fc1.parameters(), lr=0.1, regularizer=reg, partial=True)
    second = SGD(model.fc2.parameters(), lr=0.1)
    tr.optim.attach(second, reg, partial=True)
    if regularizer_first:
        other, *optimizers, _ = make((reg, first, second, model))
    else:
        _, *optimizers, other = make((model, second, first, reg))
    assert not other().requires_grad
    other["l1"].strength = 1e3
    other.model(batch()[0]).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert zeros(other.model) == 45
    assert zeros(model) == 0


@every_swap_in
@every_copy
def test_copied_without_a_swap_in_the_copy_acts_through_the_loss(build, make):
    own = trainer(build)
    model, reg = make((own.model, own.reg))
    model.zero_grad()
    reg().backward()
    np.testing.assert_allclose(model.fc1.weight.grad, L1 * np.sign(array(model.fc1.weight)), rtol=1e-6)
    assert not own.reg().requires_grad


@every_hooked
@every_copy
def test_a_copied_regularizer_brings_the_stock_optimizer_that_carries_it(build, make):
    own = trainer(build)
    model, reg = make((own.model, own.reg))
    (carrier,) = {binding.carrier for binding in reg.bindings()}
    other = SimpleNamespace(model=model, reg=reg, optimizer=carrier.optimizer)
    assert other.optimizer is not own.optimizer
    assert same(train(other), train(own))
    reg.detach()
    assert reg().requires_grad
    assert not own.reg().requires_grad


def test_a_copy_without_a_swap_in_does_not_copy_it_on_the_way():
    model = mlp()
    model.reg = tr.Regularizer(model, tr.L1(L1))
    optimizer = Uncopied(model.parameters(), lr=0.1, regularizer=model.reg)
    assert copy.deepcopy(model).reg().requires_grad
    assert optimizer.attachment.active


# ---------------------------------------------------------------------- the optimizer alone


@every_swap_in
@every_copy
def test_a_copy_of_a_swap_in_alone_brings_its_regularizer_and_its_model(build, make):
    own = trainer(build)
    optimizer = make(own.optimizer)
    other = SimpleNamespace(model=optimizer.regularizer.model, reg=optimizer.regularizer, optimizer=optimizer)
    assert other.model is not own.model
    own.reg["l1"].factor = 0.0
    assert other.reg["l1"].factor == 1.0
    own.reg["l1"].factor = 1.0
    assert same(train(other), train(own))


@every_swap_in
def test_a_copy_of_a_copied_swap_in_goes_on_too(build):
    own = trainer(build)
    other = pickled(copy.deepcopy(pickled(own.optimizer)))
    for p in other.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    for _ in range(200):
        other.step()
    weights = [p for p in other.param_groups[0]["params"] if p.dim() == 2]
    assert [int((p == 0).sum()) for p in weights] == [30, 15]


@every_swap_in
def test_a_copy_of_a_swap_in_alone_leaves_the_original_attached(build):
    own = trainer(build)
    other = copy.deepcopy(own.optimizer)
    del other
    assert not own.reg().requires_grad
    twin = copied(own, copy.deepcopy, ("model", "reg", "optimizer"))
    assert same(train(own), train(twin))


@every_swap_in
@every_copy
def test_a_model_copied_with_a_swap_in_and_no_regularizer_trains_on_exactly_as_the_original(build, make):
    own = trainer(build)
    model, optimizer = make((own.model, own.optimizer))
    other = SimpleNamespace(model=model, optimizer=optimizer, reg=None)
    assert same(train(other, with_reg=False), train(own, with_reg=False))


@every_copy
def test_a_copied_swap_in_that_is_attached_anew_has_one_prox_and_the_new_strength(make):
    model = mlp()
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=tr.Regularizer(model, tr.L1(1.0)))
    model, optimizer = make((model, optimizer))
    reg = tr.Regularizer(model, tr.L1(2.0))
    tr.optim.attach(optimizer, reg)
    assert not reg().requires_grad
    w = array(model.fc1.weight)
    model.fc1.weight.grad = torch.zeros(5, 6)
    optimizer.step()
    np.testing.assert_allclose(array(model.fc1.weight), np.sign(w) * np.maximum(np.abs(w) - 0.2, 0), atol=1e-7)
    reg.disable()
    before = snapshot(model)
    optimizer.step()
    assert same(before, snapshot(model))


@every_hooked
@every_copy
def test_a_copy_of_a_stock_optimizer_alone_has_no_prox(build, make):
    own = trainer(build)
    other = make(own.optimizer)
    assert type(other) is type(own.optimizer)
    plain = type(other)([w.clone() for w in snapshot(own.model).values()], lr=9.0)
    plain.load_state_dict(copy.deepcopy(own.optimizer.state_dict()))
    held = [optimizer.param_groups[0]["params"] for optimizer in (other, plain)]
    for _ in range(2):
        for optimizer, parameters in zip((other, plain), held, strict=True):
            for p in parameters:
                p.grad = torch.full_like(p, 1e-3)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*held, strict=True))
    assert not own.reg().requires_grad, "the original is attached as before"


@every_swap_in
def test_a_copy_loads_its_own_checkpoint_and_keeps_its_prox(build):
    own = trainer(build)
    other = copied(own, copy.deepcopy, ("optimizer", "reg", "model"))
    train(other, 2)
    other.optimizer.load_state_dict(copy.deepcopy(own.optimizer.state_dict()))
    other.model.load_state_dict(own.model.state_dict())
    assert same(train(other), train(own))


# ---------------------------------------------------------------------- the loss


def test_a_loss_copied_with_its_model_follows_the_copy_in_either_order():
    model = mlp()
    criterion = tr.RegularizedLoss(nn.MSELoss(), tr.Regularizer(model, tr.L1(1.0)))
    x, y = batch()
    value = criterion(model(x), y).item()
    for other, loss in (copy.deepcopy((model, criterion)), copy.deepcopy((criterion, model))[::-1]):
        assert loss.last.data == criterion.last.data
        with torch.no_grad():
            other.fc1.weight.zero_()
        loss(other(x), y).backward()
        assert loss.last.penalty == pytest.approx(l1(model.fc2.weight), rel=1e-6)
        assert torch.equal(other.fc1.weight.grad * 0, torch.zeros(5, 6))
    assert model.fc1.weight.grad is None
    assert criterion(model(x), y).item() == value


def test_a_loss_copied_alone_brings_its_model():
    model = mlp()
    criterion = tr.RegularizedLoss(nn.MSELoss(), tr.Regularizer(model, tr.L1(1.0)))
    other = copy.deepcopy(criterion)
    assert other.regularizer.model is not model
    x, y = batch()
    assert other(model(x), y).item() == criterion(model(x), y).item()


def test_the_copy_of_a_loss_looks_at_the_mode_of_its_own_model():
    model = mlp()
    own, criterion = copy.deepcopy((model, tr.RegularizedLoss(nn.MSELoss(), tr.Regularizer(model, tr.L1(1.0)))))
    model.eval()
    x, y = batch()
    criterion(own(x), y)  # a warning would be an error
    model, criterion = copy.deepcopy((own, criterion))
    model.eval()
    with pytest.warns(UserWarning, match="evaluation mode"):
        criterion(model(x), y)


def test_a_pickled_class_of_ones_own_follows_too():
    own = trainer(SWAP_INS["ProxSGD"])
    other = pickled(own)
    assert isinstance(other.model, MLP)
    assert same(train(other), train(own))
