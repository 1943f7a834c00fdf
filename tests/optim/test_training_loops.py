"""What training loops do beside a step: accumulate, clip, average, freeze, exchange modules, take sparse gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchreg as tr
from tests.backends import backend as backend
from tests.models import MLP, array, batch, mlp, same, snapshot


def with_prox(kind: Any, params: Any, reg: tr.Regularizer, **settings: Any) -> Optimizer:
    """A swap-in, or a stock optimizer with the prox attached."""
    if issubclass(kind, tr.optim.proximal.Proximal):
        return kind(params, regularizer=reg, **settings)
    optimizer = kind(params, **settings)
    tr.optim.attach(optimizer, reg)
    return optimizer


every_route = pytest.mark.parametrize("kind", [tr.optim.ProxSGD, tr.optim.ProxAdam, SGD, Adam])

# ---------------------------------------------------------------------- accumulation and clipping


@pytest.mark.parametrize("way", ["each (loss + reg()) / k", "reg() with the last", "add_gradient_"])
def test_accumulated_gradients_are_those_of_one_large_batch(way: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    x, y = batch()
    (F.mse_loss(model(x), y) + reg()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = list(zip(x.split(2), y.split(2), strict=True))
    for i, (rows, targets) in enumerate(parts):
        loss = F.mse_loss(model(rows), targets)
        if way == "each (loss + reg()) / k":
            ((loss + reg()) / len(parts)).backward()
        else:
            last = way == "reg() with the last" and i == len(parts) - 1
            (loss / len(parts) + (reg() if last else 0)).backward()
    if way == "add_gradient_":
        reg.add_gradient_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_gradient_and_not_the_prox(backend: str) -> None:
    model = nn.Linear(6, 1, bias=False).double()
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.5, regularizer=tr.Regularizer(model, tr.L1(0.2)))
    w = array(model.weight)
    x, y = (a.double() for a in batch())
    F.mse_loss(model(x), y[:, :1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    g = 2 * array(x).T @ (array(x) @ w.T - array(y)[:, :1]) / 8
    moved = w - 0.5 * 0.1 * g.T / np.linalg.norm(g)
    optimizer.step()
    np.testing.assert_allclose(array(model.weight), np.sign(moved) * np.maximum(np.abs(moved) - 0.1, 0), atol=1e-6)


# ---------------------------------------------------------------------- averages of weights


def noisy_lasso(steps: int, ema: bool) -> tuple[tr.Regularizer, AveragedModel, np.ndarray]:
    """A lasso after minibatch steps, the average of its weights, and scikit-learn's solution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    y = x[:, :3] @ torch.tensor([2.0, -1.5, 1.0]) + torch.randn(400, generator=generator)
    solution = Lasso(alpha=0.2, fit_intercept=False, tol=1e-10).fit(x.double().numpy(), y.double().numpy()).coef_
    model = nn.Linear(12, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    reg = tr.Regularizer(model, tr.L1(0.2))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.01, momentum=0.9, regularizer=reg)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98) if ema else None)
    for t in range(steps):
        rows = torch.randint(400, (100,), generator=generator)
        optimizer.zero_grad()
        (0.5 * (model(x[rows])[:, 0] - y[rows]).square().mean()).backward()
        optimizer.step()
        if t >= 10:
            average.update_parameters(model)
    return reg, average, solution


@pytest.mark.parametrize("ema", [False, True], ids=["SWA", "EMA"])
def test_an_average_with_the_model_s_zeros_has_scikit_learn_s_support_and_no_weight_is_farther(ema: bool) -> None:
    reg, average, solution = noisy_lasso(200, ema)
    before = array(average.module.weight)[0]
    assert np.count_nonzero(before) > np.count_nonzero(solution) == 3, "an average alone has no zeros"
    tr.copy_zeros_(reg, average)
    after = array(average.module.weight)[0]
    np.testing.assert_array_equal(after == 0, solution == 0)
    assert (np.abs(after - solution) <= np.abs(before - solution)).all()
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    assert np.abs(after - solution).max() < 0.05


@pytest.mark.parametrize("ema", [False, True], ids=["SWA", "EMA"])
def test_an_average_begun_when_the_zeros_are_frozen_has_them(ema: bool) -> None:
    reg, _, _ = noisy_lasso(100, ema)
    model: Any = reg.model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None)
    optimizer = Adam(model.parameters(), lr=0.01)
    zeros = model.weight == 0
    with reg.disabled(), tr.freeze_zeros(reg, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            (model(torch.ones(1, 12)) - 1).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
    assert zeros.any()
    assert torch.equal(average.module.weight == 0, zeros)


def test_toward_an_anchor_the_average_is_put_on_it_where_the_model_is() -> None:
    model = mlp()
    anchor = copy.deepcopy(model.state_dict())
    reg = tr.Regularizer(model, tr.L1(1.0), toward=anchor)
    average = copy.deepcopy(model).double()
    with torch.no_grad():
        model.fc1.weight[0] += 1
        average.fc1.weight += 0.25
    before = average.fc1.weight.detach().clone()
    tr.copy_zeros_(reg, average)
    assert torch.equal(average.fc1.weight[0], before[0])
    assert torch.equal(average.fc1.weight[1:], anchor["fc1.weight"][1:].double())


def test_copying_zeros_leaves_all_else_alone() -> None:
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0)})
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    before = snapshot(average)
    tr.copy_zeros_(reg, average)
    assert not average.fc1.weight.any()
    assert same({**snapshot(average), "fc1.weight": before["fc1.weight"]}, before)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(nn.Linear(6, 5)), r"Sequential has no fc1\.weight"),
        (nn.ModuleDict({"fc1": nn.Linear(6, 5), "fc2": nn.Linear(5, 4)}), r"fc2\.weight has shape \(4, 5\)"),
    ],
)
def test_zeros_for_another_model_are_refused_before_anything_has_changed(model: nn.Module, match: str) -> None:
    reg = tr.Regularizer(mlp(), tr.L1(1.0))
    with torch.no_grad():
        reg.model.fc1.weight.zero_()  # type: ignore[union-attr, operator]
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        tr.copy_zeros_(reg, model)
    assert same(before, snapshot(model))
    with pytest.raises(TypeError, match="expected a Regularizer"):
        tr.copy_zeros_(model, reg)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- frozen bases


class LoRA(nn.Module):
    """A frozen layer and a low-rank correction that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@every_route
def test_a_frozen_base_stays_bit_for_bit(kind: Any) -> None:
    torch.manual_seed(0)
    model = LoRA()
    reg = tr.Regularizer(model, tr.L1(0.3))
    before = snapshot(model)
    optimizer = with_prox(kind, model.parameters(), reg, lr=0.1)
    x, y = batch()
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert torch.equal(model.base.weight, before["base.weight"])
    assert (model.a.weight == 0).any()
    assert [name for name, _ in reg.named_parameters()] == ["a.weight", "b.weight"]


def test_what_was_frozen_when_the_regularizer_was_built_is_said_to_have_been() -> None:
    model = LoRA()
    reg = tr.Regularizer(model, tr.L1(0.05))

    def why() -> str:
        return next(line for line in reg.explain().splitlines() if line.startswith("base.weight")).split("  ")[-1]

    assert why().strip() == "frozen"
    model.base.requires_grad_(True)
    assert why().strip() == "was frozen when the Regularizer was built"


@every_route
def test_a_frozen_weight_that_is_named_takes_its_penalty_once_it_trains(kind: Any) -> None:
    model = LoRA()
    reg = tr.Regularizer(model, tr.L1(100.0), include=["base.weight", "a.weight"])
    optimizer = with_prox(kind, model.parameters(), reg, lr=0.1)
    for frozen in (True, False):
        model.base.requires_grad_(not frozen)
        optimizer.zero_grad()
        model(batch()[0]).sum().backward()
        optimizer.step()
        assert bool(model.base.weight.any()) is frozen


@every_route
def test_a_tied_weight_is_shrunk_once(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    nn.init.constant_(model[0].weight, 1.0)
    optimizer = with_prox(kind, model.parameters(), tr.Regularizer(model, tr.L1(0.25)), lr=0.1)
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    # A gradient of 1 moves a weight by the step s = 0.1, whatever the optimizer; the prox by s·λ.
    torch.testing.assert_close(model[0].weight.detach(), torch.full((4, 4), 1 - 0.1 - 0.025))


# ---------------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(SGD, {}), (SGD, {"momentum": 0.9}), (tr.optim.ProxSGD, {"momentum": 0.9}), (Adagrad, {})],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_give_the_weights_of_dense_ones(kind: Any, settings: dict[str, Any], backend: str) -> None:
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=sparse)
        reg = tr.Regularizer(table, tr.L1(0.2), include="weight")
        optimizer = with_prox(kind, table.parameters(), reg, lr=0.1, **settings)
        for t in range(6):
            optimizer.zero_grad()
            (table(torch.tensor([t, t + 1, t])) - 1).square().sum().backward()
            assert table.weight.grad.is_sparse == sparse
            optimizer.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert found[0].any()


@pytest.mark.parametrize("kind", [tr.optim.ProxAdam, tr.optim.ProxAdamW, Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_an_optimizer_that_takes_no_sparse_gradients_is_refused_at_construction(kind: Any, module: Any) -> None:
    model = nn.Sequential(module(10, 3, sparse=True), nn.Linear(3, 2))
    reg = tr.Regularizer(model, tr.L1(0.2), include=["0.weight", "1.weight"])
    with pytest.raises(ValueError, match=r"0\.weight has sparse gradients.*takes none; build it with sparse=False"):
        with_prox(kind, model.parameters(), reg, lr=0.1)
    assert reg().requires_grad, "nothing has changed"
    with_prox(kind, model.parameters(), tr.Regularizer(model, tr.L1(0.2)), lr=0.1)  # which leaves embeddings alone


def test_sparse_adam_is_refused_with_the_reason_and_the_optimizers_that_serve() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    reg = tr.Regularizer(table, tr.L1(0.2), include="weight")
    with pytest.raises(ValueError, match=r"moves only the rows that have a gradient.*SGD and Adagrad take sparse"):
        tr.optim.attach(SparseAdam(table.parameters()), reg)


# ---------------------------------------------------------------------- what is exchanged in mid-training


def replace_module(model: MLP) -> None:
    model.fc1 = nn.Linear(6, 5)


def replace_parameter(model: MLP) -> None:
    model.fc1.weight = nn.Parameter(torch.ones(5, 6))


def parametrize(model: MLP) -> None:
    parametrizations.weight_norm(model.fc1)


def mask(model: MLP) -> None:
    prune.l1_unstructured(model.fc1, "weight", 0.5)


@every_route
@pytest.mark.parametrize("change", [replace_module, replace_parameter, parametrize, mask])
def test_what_the_optimizer_no_longer_trains_is_an_error_before_any_weight_moves(
    change: Callable[[MLP], None], kind: Any
) -> None:
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = with_prox(kind, model.parameters(), reg, lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]

    def gradients() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(batch()[0]), batch()[1]).backward()
        for p in held:
            p.grad = torch.ones_like(p)

    gradients()
    optimizer.step()
    change(model)
    gradients()
    before = [p.detach().clone() for p in held]
    for use in (optimizer.step, reg):
        with pytest.raises(RuntimeError, match=r"fc1.*(optimizer|Build the optimizer again)"):
            use()
    assert all(map(torch.equal, before, held))


@every_route
def test_weights_whose_memory_is_exchanged_train_on(kind: Any, backend: str) -> None:
    found = []
    for exchange in (True, False):
        model = mlp()
        optimizer = with_prox(kind, model.parameters(), tr.Regularizer(model, tr.L1(0.05)), lr=0.1)
        for t in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
            if exchange and t % 2:  # as vector_to_parameters and older loaders do
                for p in model.parameters():
                    p.data = p.data.clone()
        found.append(snapshot(model))
    assert same(*found)
