"""RegularizedLoss: adds the penalty in training, once, and nowhere else."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchreg as tr
from tests.models import Reads, array, batch, l1, l2, mlp


def build(penalty: object = None) -> tuple[nn.Module, tr.RegularizedLoss]:
    model = mlp()
    return model, tr.RegularizedLoss(nn.MSELoss(), tr.Regularizer(model, penalty or tr.L1(0.1)))


def mse(model: nn.Module) -> float:
    x, y = batch()
    with torch.no_grad():
        return float(((array(model(x)) - array(y)) ** 2).mean())


class Contrastive(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, *, margin: float = 1.0) -> torch.Tensor:
        return (margin - (a - b).norm(dim=1)).clamp(min=0).mean()


# ---------------------------------------------------------------------- what it adds, and when


def test_in_training_it_is_the_loss_plus_the_penalty():
    model, criterion = build({"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L2(0.2)})
    x, y = batch()
    penalty = 0.1 * l1(model.fc1.weight) + 0.2 * l2(model.fc2.weight)
    assert criterion(model(x), y).item() == pytest.approx(mse(model) + penalty, rel=1e-6)


def test_the_gradient_is_that_of_the_data_plus_that_of_the_penalty():
    model, criterion = build({"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L2(0.2)})
    x, y = batch()
    criterion(model(x), y).backward()
    total = {name: array(p.grad) for name, p in model.named_parameters()}
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    penalty = {"fc1.weight": 0.1 * np.sign(array(model.fc1.weight)), "fc2.weight": 0.4 * array(model.fc2.weight)}
    for name, p in model.named_parameters():
        np.testing.assert_allclose(total[name], array(p.grad) + penalty.get(name, 0), rtol=1e-5, atol=1e-7)


def test_a_validation_loss_is_bare():
    model, criterion = build()
    x, y = batch()
    with torch.no_grad():
        assert criterion(model(x), y).item() == pytest.approx(mse(model), rel=1e-6)
    with torch.inference_mode():
        assert criterion(model(x), y).item() == pytest.approx(mse(model), rel=1e-6)
    assert criterion.eval()(model(x), y).item() == pytest.approx(mse(model), rel=1e-6)
    assert (criterion.last.penalty, criterion.last.by_term) == (0, {})
    assert criterion.train()(model(x), y).item() > mse(model)


def test_it_follows_the_mode_of_the_module_that_holds_it():
    model = mlp()
    model.criterion = tr.RegularizedLoss(nn.MSELoss(), tr.Regularizer(model, tr.L1(0.1)))
    x, y = batch()
    assert model.eval().criterion(model(x), y).item() == pytest.approx(mse(model), rel=1e-6)
    assert model.train().criterion(model(x), y).item() > mse(model)


def test_disabled_it_is_the_bare_loss_with_its_gradient():
    model, criterion = build()
    x, y = batch()
    with criterion.regularizer.disabled():
        loss = criterion(model(x), y)
    loss.backward()
    assert loss.item() == pytest.approx(mse(model), rel=1e-6)
    assert criterion.last.penalty == 0
    assert model.fc1.weight.grad is not None


@pytest.mark.parametrize("hooked", [False, True])
def test_with_a_proximal_optimizer_it_is_the_true_objective_and_its_gradient_is_not_doubled(hooked):
    model, criterion = build()
    if hooked:
        optimizer = torch.optim.Adam(model.parameters())
        tr.optim.attach(optimizer, criterion.regularizer)
    else:
        optimizer = tr.optim.ProxAdam(model.parameters(), regularizer=criterion.regularizer)
    x, y = batch()
    loss = criterion(model(x), y)
    loss.backward()
    penalty = 0.1 * (l1(model.fc1.weight) + l1(model.fc2.weight))
    assert loss.item() == pytest.approx(mse(model) + penalty, rel=1e-6)
    assert criterion.last.penalty == pytest.approx(penalty, rel=1e-6)
    gradient = model.fc1.weight.grad.clone()
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    assert torch.equal(gradient, model.fc1.weight.grad)


def test_a_loss_in_half_precision_gets_a_penalty_in_single():
    # The penalty alone is 9e4, which float16 cannot hold.
    model = nn.Linear(300, 300, bias=False).half()
    nn.init.ones_(model.weight)
    criterion = tr.RegularizedLoss(lambda x: x.sum(), tr.Regularizer(model, tr.L1(1.0)))
    loss = criterion(torch.ones(2, dtype=torch.float16))
    assert loss.item() == 90002


# ---------------------------------------------------------------------- any loss


@pytest.mark.parametrize(
    ("loss", "args", "kwargs"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), (torch.zeros(2, 3), torch.tensor([0, 1])), {}),
        (F.cross_entropy, (torch.zeros(2, 3),), {"target": torch.tensor([0, 1]), "label_smoothing": 0.1}),
        (functools.partial(F.mse_loss, reduction="sum"), (torch.ones(2), torch.zeros(2)), {}),
        (lambda a, *rest, scale: scale * (a.sum() + sum(rest)), (torch.ones(2), 1, 2), {"scale": 3}),
        (Contrastive(), (torch.zeros(2, 3), torch.zeros(2, 3)), {"margin": 0.5}),
        (Contrastive().forward, (torch.zeros(2, 3), torch.zeros(2, 3)), {}),
        (lambda: torch.tensor(2.0), (), {}),
        (lambda outputs: outputs["loss"], ({"loss": torch.tensor(1.5)},), {}),
    ],
    ids=["module", "function", "partial", "lambda", "own module", "method", "no argument", "dict"],
)
def test_any_loss_with_any_arguments(loss, args, kwargs):
    model = mlp()
    criterion = tr.RegularizedLoss(loss, tr.Regularizer(model, tr.L1(0.1)))
    penalty = 0.1 * (l1(model.fc1.weight) + l1(model.fc2.weight))
    assert criterion(*args, **kwargs).item() == pytest.approx(loss(*args, **kwargs).item() + penalty, rel=1e-6)


def test_a_loss_with_parameters_of_its_own_keeps_them_and_gets_no_others():
    model = mlp()
    criterion = tr.RegularizedLoss(nn.PReLU(), tr.Regularizer(model, tr.L1(0.1)))
    assert [name for name, _ in criterion.named_parameters()] == ["loss.weight"]
    assert list(criterion.state_dict()) == ["loss.weight"]
    assert criterion.double().loss.weight.dtype == torch.float64
    assert model.fc1.weight.dtype == torch.float32


# ---------------------------------------------------------------------- the parts


def test_last_holds_the_parts_of_the_last_loss():
    model, criterion = build({"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L2(0.2)})
    assert criterion.last is None
    x, y = batch()
    loss = criterion(model(x), y)
    last = criterion.last
    assert last.data == pytest.approx(mse(model), rel=1e-6)
    assert list(last.by_term) == ["fc1.weight", "fc2.weight"]
    assert last.by_term["fc1.weight"] == pytest.approx(0.1 * l1(model.fc1.weight), rel=1e-6)
    assert last.by_term["fc2.weight"] == pytest.approx(0.2 * l2(model.fc2.weight), rel=1e-6)
    assert last.penalty == pytest.approx(sum(last.by_term.values()))
    assert last.data + last.penalty == pytest.approx(loss.item(), rel=1e-6)
    assert {type(value) for value in (last.data, last.penalty, *last.by_term.values())} == {float}
    assert f"data={last.data:.6g}, penalty={last.penalty:.6g}" in repr(last)


def test_last_stays_what_it_was_when_the_weights_and_the_loss_change():
    model, criterion = build()
    x, y = batch()
    for mode in (True, False):
        criterion.train(mode)
        loss = criterion(model(x), y)
        last, expected = criterion.last, mse(model)
        penalty = last.penalty
        with torch.no_grad():
            loss.mul_(0.25)  # as for gradient accumulation
            model.fc1.weight.zero_()
        assert last.data == pytest.approx(expected, rel=1e-6)
        assert last.penalty == penalty


def test_last_holds_no_graph():
    model, criterion = build()
    x, y = batch()
    criterion(model(x), y)
    assert not criterion.last.on_device.requires_grad
    assert not any(value.requires_grad for value in criterion.last._by_term.values())


def test_nothing_waits_for_the_device_until_a_part_is_read():
    model, criterion = build({"fc1.weight": tr.L1(0.1), "fc2.weight": tr.ElasticNet(0.1, 0.2)})
    optimizer = torch.optim.SGD([model.fc1.weight], lr=0.1)
    tr.optim.attach(optimizer, criterion.regularizer, partial=True)
    x, y = batch()
    with Reads() as reads:
        criterion(model(x), y).backward()
        with torch.no_grad():
            criterion(model(x), y)
        criterion(model(x), y)
    assert reads.count == 0
    with Reads() as reads:
        _ = criterion.last.penalty
    assert reads.count > 0


# ---------------------------------------------------------------------- refusals and warnings


@pytest.mark.parametrize("reduction", ["none", "unsqueezed"])
def test_a_loss_that_is_not_a_scalar_is_an_error(reduction):
    model, _ = build()
    loss = nn.MSELoss(reduction="none") if reduction == "none" else lambda a, b: F.mse_loss(a, b)[None]
    criterion = tr.RegularizedLoss(loss, tr.Regularizer(model, tr.L1(0.1)))
    x, y = batch()
    with pytest.raises(ValueError, match=r"not a scalar; reduce it first, as with reduction='mean'") as error:
        criterion(model(x), y)
    assert str((8, 3) if reduction == "none" else (1,)) in str(error.value)
    with pytest.raises(ValueError, match="not a scalar"):
        criterion.eval()(model(x), y)


@pytest.mark.parametrize("result", [1.5, None, (torch.tensor(1.0),), {"loss": torch.tensor(1.0)}])
def test_a_loss_that_returns_no_tensor_is_an_error(result):
    model, _ = build()
    criterion = tr.RegularizedLoss(lambda: result, tr.Regularizer(model, tr.L1(0.1)))
    with pytest.raises(TypeError, match=rf"returned a {type(result).__name__}"):
        criterion()


@pytest.mark.parametrize("loss", [nn.MSELoss, torch.tensor(1.0), 0.5, None, "mse"])
def test_what_is_no_loss_to_call_is_refused_at_construction(loss):
    with pytest.raises(TypeError, match=r"pass an instance or a function: nn\.CrossEntropyLoss\(\)"):
        tr.RegularizedLoss(loss, tr.Regularizer(mlp(), tr.L1(0.1)))


@pytest.mark.parametrize("regularizer", [tr.L1(0.1), tr.Regularizer, None, 0.1])
def test_what_is_no_regularizer_is_refused_at_construction(regularizer):
    with pytest.raises(TypeError, match=r"build one first: Regularizer\(model, L1\(1e-4\)\)"):
        tr.RegularizedLoss(nn.MSELoss(), regularizer)


def test_a_model_in_evaluation_mode_with_gradients_warns_once_and_still_adds():
    model, criterion = build()
    model.eval()
    x, y = batch()
    with pytest.warns(UserWarning, match=r"criterion\.eval\(\) or use torch\.no_grad\(\)"):
        loss = criterion(model(x), y)
    assert loss.item() > mse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(model(x), y)


def test_frozen_norms_or_a_bare_validation_do_not_warn():
    model, criterion = build()
    x, y = batch()
    model.norm.eval()  # a fine-tune with frozen statistics
    criterion(model(x), y)
    model.eval()
    with torch.no_grad():
        criterion(model(x), y)
    criterion.eval()(model(x), y)


def test_repr_shows_the_loss_and_the_terms():
    _, criterion = build({"fc1.weight": tr.L1(0.1), "*.weight": tr.L2(0.2)})
    assert "MSELoss()" in repr(criterion)
    assert "terms=['fc1.weight', '*.weight']" in repr(criterion)
