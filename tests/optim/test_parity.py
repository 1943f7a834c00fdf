"""One λ, one answer: on the diabetes data every optimizer reaches the solution that scikit-learn finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import torchreg as tr

Array = NDArray[np.float64]
ALPHA = 0.1
L1_RATIOS = {"lasso": 1.0, "elastic net": 0.5}

SGD_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.2},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "dampening": {"lr": 0.2, "momentum": 0.9, "dampening": 0.5},
    "fused": {"lr": 0.1, "momentum": 0.9, "fused": True},
}
ADAM_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.01},
    "amsgrad": {"lr": 0.01, "amsgrad": True},
    "foreach": {"lr": 0.01, "foreach": True},
    "fused": {"lr": 0.01, "fused": True},
    "eps": {"lr": 0.01, "eps": 1e-2},
}
SETTINGS = [(SGD, name, settings) for name, settings in SGD_SETTINGS.items()]
SETTINGS += [(Adam, name, settings) for name, settings in ADAM_SETTINGS.items()]
SETTINGS += [(AdamW, name, {**settings, "weight_decay": 0}) for name, settings in ADAM_SETTINGS.items()]
SWAP_INS: dict[type[Optimizer], Any] = {SGD: tr.optim.ProxSGD, Adam: tr.optim.ProxAdam, AdamW: tr.optim.ProxAdamW}


@dataclass
class Problem:
    """½·MSE + ALPHA·(ratio·Σ|w| + ½(1 − ratio)·Σw²) for every ratio, in numpy."""

    x: Array
    y: Array
    solutions: dict[str, Array]

    def objective(self, w: Array, ratio: float) -> float:
        error = self.x @ w - self.y
        penalty = ratio * np.abs(w).sum() + 0.5 * (1 - ratio) * np.square(w).sum()
        return float(0.5 * np.square(error).mean() + ALPHA * penalty)

    def gap(self, name: str, w: Array) -> float:
        """By how much the objective exceeds that of scikit-learn, relative to it."""
        ratio = L1_RATIOS[name]
        best = self.objective(self.solutions[name], ratio)
        return (self.objective(w, ratio) - best) / best

    def violation(self, name: str, w: Array) -> float:
        """The distance of 0 from the subdifferential, at its worst weight."""
        ratio = L1_RATIOS[name]
        gradient = self.x.T @ (self.x @ w - self.y) / len(self.y) + ALPHA * (1 - ratio) * w
        strength = ALPHA * ratio
        active = np.abs(gradient + strength * np.sign(w))
        return float(np.where(w != 0, active, np.maximum(np.abs(gradient) - strength, 0)).max())


@pytest.fixture(scope="module")
def problem() -> Problem:
    x, y = load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std()
    solutions = {
        name: ElasticNet(ALPHA, l1_ratio=ratio, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y).coef_
        for name, ratio in L1_RATIOS.items()
    }
    return Problem(x, y, solutions)


class Models(nn.Module):
    """One linear model for each problem, trained side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(10, 1, bias=False, dtype=torch.float64) for name in L1_RATIOS})
        for part in self.parts.values():
            nn.init.constant_(part.weight, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts.values()], 1)

    def weights(self) -> dict[str, Array]:
        return {name: part.weight.detach().numpy()[0] for name, part in self.parts.items()}


def penalties(model: Models) -> tr.Regularizer:
    rules = {f"parts.{name}.weight": tr.ElasticNet.from_sklearn(ALPHA, ratio) for name, ratio in L1_RATIOS.items()}
    return tr.Regularizer(model, rules)


def train(problem: Problem, model: Models, optimizer: Optimizer, sign: float = 1.0) -> None:
    """Full-batch steps with the gradient of ½·MSE for each model."""
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    gram, target = x.T @ x / len(y), x.T @ y / len(y)
    for _ in range(600):
        for w in model.parameters():
            w.grad = sign * (w.detach() @ gram - target)
        optimizer.step()


def assert_solved(problem: Problem, model: Models) -> None:
    for name, w in model.weights().items():
        assert abs(problem.gap(name, w)) <= 1e-10, name
        assert problem.violation(name, w) <= 1e-7, name
        np.testing.assert_array_equal(w == 0, problem.solutions[name] == 0, err_msg=name)


def test_scikit_learn_s_solutions_are_sparse_and_optimal(problem: Problem) -> None:
    for name, w in problem.solutions.items():
        assert problem.violation(name, w) < 1e-7
    assert np.count_nonzero(problem.solutions["lasso"]) == 4
    assert 0 < np.count_nonzero(problem.solutions["elastic net"]) < 10


@pytest.mark.parametrize("route", ["swap-in", "attached"])
@pytest.mark.parametrize(
    ("stock", "settings"), [case[::2] for case in SETTINGS], ids=[f"{case[0].__name__}, {case[1]}" for case in SETTINGS]
)
def test_every_optimizer_reaches_scikit_learn_s_solution(
    problem: Problem, stock: type[Optimizer], settings: dict[str, Any], route: str
) -> None:
    model = Models()
    reg = penalties(model)
    if route == "swap-in":
        optimizer = SWAP_INS[stock](model.parameters(), regularizer=reg, **settings)
    else:
        optimizer = stock(model.parameters(), **settings)
        tr.optim.attach(optimizer, reg)
    train(problem, model, optimizer)
    assert_solved(problem, model)


@pytest.mark.parametrize(("swap_in", "lr"), [(tr.optim.ProxSGD, 0.2), (tr.optim.ProxAdam, 0.01)])
def test_l1_with_coupled_decay_is_the_elastic_net(problem: Problem, swap_in: Any, lr: float) -> None:
    model = Models()
    ratio = L1_RATIOS["elastic net"]
    reg = tr.Regularizer(model, tr.L1(ALPHA * ratio))
    optimizer = swap_in(model.parameters(), lr=lr, weight_decay=ALPHA * (1 - ratio), regularizer=reg)
    train(problem, model, optimizer)
    w = model.weights()["elastic net"]
    assert abs(problem.gap("elastic net", w)) <= 1e-10
    np.testing.assert_array_equal(w == 0, problem.solutions["elastic net"] == 0)


@pytest.mark.parametrize(
    ("stock", "settings"),
    [(Adam, ADAM_SETTINGS["plain"]), (SGD, SGD_SETTINGS["momentum"])],
    ids=["Adam", "SGD momentum"],
)
def test_the_learning_rate_as_prox_step_solves_another_problem(
    problem: Problem, stock: type[Optimizer], settings: dict[str, Any]
) -> None:
    model = Models()
    optimizer = stock(model.parameters(), **settings)
    tr.optim.attach(optimizer, penalties(model), step_size=tr.optim.learning_rate)
    train(problem, model, optimizer)
    for name, w in model.weights().items():
        assert problem.gap(name, w) > 1e-3, name


def test_the_learning_rate_is_right_for_plain_sgd(problem: Problem) -> None:
    model = Models()
    optimizer = SGD(model.parameters(), **SGD_SETTINGS["plain"])
    tr.optim.attach(optimizer, penalties(model), step_size=tr.optim.learning_rate)
    train(problem, model, optimizer)
    assert_solved(problem, model)


def test_l1_in_the_loss_with_adam_gives_no_exact_zero(problem: Problem) -> None:
    model = Models()
    reg = penalties(model)
    optimizer = Adam(model.parameters(), lr=0.01)
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)[:, None]
    for _ in range(600):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().mean(0).sum() + reg()
        loss.backward()
        optimizer.step()
    for name, w in model.weights().items():
        assert np.count_nonzero(w) == w.size, name
        assert 0 < problem.gap(name, w) < 1e-2, name


def test_maximize_maximizes_the_negative_loss_less_the_penalty(problem: Problem) -> None:
    model = Models()
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.01, maximize=True, regularizer=penalties(model))
    train(problem, model, optimizer, sign=-1.0)
    assert_solved(problem, model)
