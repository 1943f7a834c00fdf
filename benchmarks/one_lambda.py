"""One λ, one answer: every optimizer against scikit-learn, on scikit-learn's data, in float64.

    python benchmarks/one_lambda.py --short
    python benchmarks/one_lambda.py --json one_lambda.json

Lasso, elastic net, multi-task lasso, L1 logistic and L1 multinomial regression, with standardized columns and with
columns whose scales are spread 100:1, at λ/λ_max = 0.5, 0.1 and 0.01. A problem counts as solved at the step where the
relative objective gap to scikit-learn (tol 1e-12) is at most 1e-8 and the support is the same. Beside it, what the same
optimizer gives when the threshold is lr·λ, when the penalty is in the loss, and in torchao's PruneOptimizer, after
2,000 steps: the median gap, and how many supports are right. In the column of lr, λ is the strength and L the Lipschitz
constant of the gradient.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn import datasets
from sklearn.linear_model import ElasticNet, LogisticRegression, MultiTaskLasso
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

import torchreg as tr

FRACTIONS = [0.5, 0.1, 0.01]  # of λ_max
GAP = 1e-8
RIVAL_STEPS = 2_000  # where they go shows early
Array = np.ndarray

# ---------------------------------------------------------------------- losses: means over the rows


@dataclass
class Loss:
    """A data loss on x (rows, features) and y (rows, tasks), for weights of shape (tasks, features)."""

    x: Array
    y: Array

    def __post_init__(self) -> None:
        self.tx, self.ty = torch.from_numpy(self.x), torch.from_numpy(self.y)

    @property
    def largest_eigenvalue(self) -> float:
        return float(np.linalg.eigvalsh(self.x.T @ self.x / len(self.x))[-1])


class Squared(Loss):
    """½·mean of the squared error, summed over the tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gram, self.moment = self.tx.T @ self.tx / len(self.x), self.ty.T @ self.tx / len(self.x)

    @property
    def lipschitz(self) -> float:
        return self.largest_eigenvalue

    def value(self, w: Array) -> float:
        return float(0.5 * np.square(self.x @ w.T - self.y).sum() / len(self.x))

    def gradients(self, ws: Tensor) -> Tensor:
        return ws @ self.gram - self.moment


class Logistic(Loss):
    """The mean log loss of one logit."""

    @property
    def lipschitz(self) -> float:
        return self.largest_eigenvalue / 4

    def value(self, w: Array) -> float:
        z = self.x @ w.T
        return float((np.logaddexp(0, z) - self.y * z).mean())

    def gradients(self, ws: Tensor) -> Tensor:
        z = self.tx @ ws[:, 0].T
        return ((torch.sigmoid(z) - self.ty).T @ self.tx / len(self.x))[:, None]


class Multinomial(Loss):
    """The mean cross-entropy of one logit a class; y is one-hot."""

    @property
    def lipschitz(self) -> float:
        return self.largest_eigenvalue / 2

    def value(self, w: Array) -> float:
        z = self.x @ w.T
        top = z.max(1, keepdims=True)
        return float((np.log(np.exp(z - top).sum(1)) + top[:, 0] - (self.y * z).sum(1)).mean())

    def gradients(self, ws: Tensor) -> Tensor:
        z = torch.einsum("nf,mkf->nmk", self.tx, ws)
        error = z.softmax(-1) - self.ty[:, None]
        return torch.einsum("nmk,nf->mkf", error, self.tx) / len(self.x)


# ---------------------------------------------------------------------- problems, and scikit-learn's answers


@dataclass
class Problem:
    """loss + penalty at one λ, with scikit-learn's solution."""

    name: str
    loss: Any
    penalty: tr.Penalty
    strength: float
    solution: Array
    best: float = 0.0

    def __post_init__(self) -> None:
        self.best = self.objective(self.solution)

    def objective(self, w: Array) -> float:
        return self.loss.value(w) + self.penalty(torch.from_numpy(w)).item()

    def gap(self, w: Array) -> float:
        return (self.objective(w) - self.best) / self.best

    def same_support(self, w: Array) -> bool:
        return bool(((w != 0) == (self.solution != 0)).all())


def standardized(x: Array) -> Array:
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0)


def spread(x: Array) -> Array:
    """Columns whose scales go from 0.1 to 10."""
    x = standardized(x)
    return x * np.geomspace(0.1, 10, x.shape[1])


def one_hot(y: Array) -> Array:
    return np.eye(y.max() + 1)[y]


def solution(model: Any, x: Array, y: Array) -> Array:
    return np.atleast_2d(model.fit(x, y).coef_)


def linear_problems(name: str, ratio: float, x: Array, y: Array) -> list[Problem]:
    """The lasso (l1_ratio 1) or an elastic net, on one centred target."""
    loss, n = Squared(x, y[:, None]), len(x)
    found = []
    for fraction in FRACTIONS:
        alpha = fraction * np.abs(x.T @ y).max() / n / ratio
        model = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-12, max_iter=10**6)
        penalty = tr.ElasticNet.from_sklearn(alpha, ratio)
        found.append(Problem(f"{name}, λ/λ_max {fraction:g}", loss, penalty, alpha * ratio, solution(model, x, y)))
    return found


def multitask_problems(name: str, x: Array, y: Array) -> list[Problem]:
    """A group is a column: all that one feature feeds."""
    loss, n = Squared(x, y), len(x)
    found = []
    for fraction in FRACTIONS:
        alpha = fraction * np.linalg.norm(x.T @ y, axis=1).max() / n
        model = MultiTaskLasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=10**6)
        penalty = tr.GroupLasso(alpha, tr.Columns(), group_weights=[1.0] * x.shape[1])
        found.append(Problem(f"{name}, λ/λ_max {fraction:g}", loss, penalty, alpha, solution(model, x, y)))
    return found


def classification_problems(name: str, x: Array, labels: Array) -> list[Problem]:
    n, classes = len(x), int(labels.max()) + 1
    y = labels[:, None].astype(float) if classes == 2 else one_hot(labels)
    loss = Logistic(x, y) if classes == 2 else Multinomial(x, y)
    solver: dict[str, Any] = {"solver": "liblinear"} if classes == 2 else {"solver": "saga", "random_state": 0}
    # From 1.8 on scikit-learn takes the kind of the penalty from its ratio.
    lasso = {"l1_ratio": 1} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "l1"}
    found = []
    for fraction in FRACTIONS:
        strength = fraction * np.abs(x.T @ (y - 1 / classes)).max() / n
        model = LogisticRegression(
            C=1 / (n * strength), fit_intercept=False, tol=1e-12, max_iter=200_000, **lasso, **solver
        )
        penalty = tr.L1(strength)
        found.append(Problem(f"{name}, λ/λ_max {fraction:g}", loss, penalty, strength, solution(model, x, labels)))
    return found


def problems(short: bool = False) -> list[Problem]:
    """Every problem, those of one loss in a row; short: standardized columns and small data."""
    diabetes, target = datasets.load_diabetes(return_X_y=True)
    cancer, malign = datasets.load_breast_cancer(return_X_y=True)
    wine, cultivar = datasets.load_wine(return_X_y=True)
    digits, digit = datasets.load_digits(n_class=5, return_X_y=True)  # scikit-learn takes hours for ten
    target = (target - target.mean()) / target.std()
    cultivars = one_hot(cultivar) - one_hot(cultivar).mean(0)
    found = []
    for columns, label in [(standardized, "")] if short else [(standardized, ""), (spread, " 100:1")]:
        found += linear_problems(f"lasso, diabetes{label}", 1.0, columns(diabetes), target)
        found += linear_problems(f"elastic net, diabetes{label}", 0.5, columns(diabetes), target)
        found += multitask_problems(f"multi-task lasso, wine{label}", columns(wine), cultivars)
        found += classification_problems(f"logistic, breast cancer{label}", columns(cancer), malign)
        found += classification_problems(f"multinomial, wine{label}", columns(wine), cultivar)
        if not short:
            found += classification_problems(f"multinomial, digits{label}", columns(digits), digit)
    return found


# ---------------------------------------------------------------------- optimizers


@dataclass
class Row:
    """An optimizer with its settings; lr is `factor`·λ/L for a metric of each weight, `factor`/L for a plain one, and
    `factor` itself where the optimizer takes it relative to the weights."""

    name: str
    kind: type[Optimizer]
    factor: float
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    relative: bool = False

    def lr(self, problem: Problem) -> float:
        if self.relative:
            return self.factor
        return self.factor / problem.loss.lipschitz * (1.0 if self.plain else problem.strength)

    @property
    def lr_text(self) -> str:
        return f"{self.factor:g}" + ("" if self.relative else "/L" if self.plain else "·λ/L")


ROWS = [
    Row("SGD", SGD, 1.0, plain=True),
    Row("SGD, momentum 0.99", SGD, 1.0, {"momentum": 0.99}, plain=True),
    Row("SGD, momentum 0.99, dampening 0.5", SGD, 2.0, {"momentum": 0.99, "dampening": 0.5}, plain=True),
    Row("SGD, momentum 0.99, nesterov", SGD, 1.0, {"momentum": 0.99, "nesterov": True}, plain=True),
    Row("ASGD, lambd 0", ASGD, 1.0, {"lambd": 0.0}, plain=True),
    Row("Adam, β₁ 0.9", Adam, 10.0),
    Row("Adam, β₁ 0.99", Adam, 100.0, {"betas": (0.99, 0.999)}),
    Row("Adam, amsgrad", Adam, 10.0, {"amsgrad": True}),
    Row("AdamW, weight_decay 0", AdamW, 10.0, {"weight_decay": 0.0}),
    Row("Adamax", Adamax, 10.0),
    Row("NAdam", NAdam, 5.0),
    Row("RAdam", RAdam, 2.0),
    Row("RMSprop", RMSprop, 1.0),
    Row("RMSprop, momentum 0.9", RMSprop, 1.0, {"momentum": 0.9}),
    Row("Adagrad", Adagrad, 30.0),
    Row("Adadelta", Adadelta, 200.0),
    Row("Adafactor", Adafactor, 0.1, {"weight_decay": 0.0}, relative=True),
]

# ---------------------------------------------------------------------- runs

Groups = list[dict[str, Any]]
Build = Callable[[Row, Groups, tr.Regularizer, list[Problem]], Any]


def prox(row: Row, groups: Groups, reg: tr.Regularizer, todo: list[Problem]) -> Optimizer:
    optimizer = row.kind(groups, **row.settings)
    tr.optim.attach(optimizer, reg)
    return optimizer


def threshold_lr(row: Row, groups: Groups, reg: tr.Regularizer, todo: list[Problem]) -> Optimizer:
    optimizer = row.kind(groups, **row.settings)
    tr.optim.attach(optimizer, reg, step_size=tr.optim.learning_rate)
    return optimizer


def in_the_loss(row: Row, groups: Groups, reg: tr.Regularizer, todo: list[Problem]) -> Optimizer:
    return row.kind(groups, **row.settings)


def torchao(row: Row, groups: Groups, reg: tr.Regularizer, todo: list[Problem]) -> Optimizer:
    from torchao.prototype.pat.optim import PruneOptimizer

    for group, problem in zip(groups, todo, strict=True):
        group.update(prox_type="ProxLasso", group_type="ElemGrouper", reg_lambda=problem.strength)
    reg.disable()  # it has the penalty
    return PruneOptimizer(row.kind(groups, **row.settings))


RIVALS: dict[str, Build] = {
    "threshold lr·λ": threshold_lr,
    "penalty in the loss": in_the_loss,
    "torchao PruneOptimizer": torchao,
}


@dataclass
class Outcome:
    problem: Problem
    gap: float = float("inf")
    same_support: bool = False
    steps: int | None = None  # at which it was solved

    def look(self, w: Array, step: int) -> None:
        self.gap, self.same_support = self.problem.gap(w), self.problem.same_support(w)
        if abs(self.gap) <= GAP and self.same_support:
            self.steps = step


def run(todo: list[Problem], row: Row, build: Build, steps: int, every: int = 100) -> list[Outcome]:
    """Full-batch steps from zero at a constant lr, on every problem at once, each until it is solved."""
    weights = nn.ParameterList(torch.zeros(problem.solution.shape, dtype=torch.float64) for problem in todo)
    reg = tr.Regularizer(weights, {str(i): problem.penalty for i, problem in enumerate(todo)})
    groups = [{"params": [w], "lr": row.lr(problem)} for w, problem in zip(weights, todo, strict=True)]
    optimizer = build(row, groups, reg, todo)
    outcomes = [Outcome(problem) for problem in todo]
    unsolved = list(range(len(todo)))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with torch.no_grad():
            # The problems of a family have one loss: their gradients come from one product.
            for _, members in itertools.groupby(unsolved, key=lambda i: id(todo[i].loss)):
                own = list(members)
                gradients = todo[own[0]].loss.gradients(torch.stack([weights[i] for i in own]))
                for i, gradient in zip(own, gradients, strict=True):
                    weights[i].grad = gradient
        if build is in_the_loss:
            reg().backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            for i in unsolved:
                outcomes[i].look(weights[i].detach().numpy(), step)
            unsolved = [i for i in unsolved if outcomes[i].steps is None]
            if not unsolved:
                break
    return outcomes


def is_l1(problem: Problem) -> bool:
    return isinstance(problem.penalty, tr.L1) or getattr(problem.penalty, "l2", None) == 0


def cell(outcomes: list[Outcome]) -> str:
    """The median gap, and how many supports are right."""
    if not outcomes:
        return "refuses it"
    gaps = [outcome.gap if np.isfinite(outcome.gap) else np.inf for outcome in outcomes]
    return f"{np.median(gaps):.0e}, {sum(outcome.same_support for outcome in outcomes)} of {len(outcomes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="under five minutes: small data and the larger λ")
    parser.add_argument("--steps", type=int, help="at most so many (50,000; short: 2,000)")
    parser.add_argument("--only", nargs="+", default=[""], help="only optimizers whose name starts so")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    options = parser.parse_args()
    steps = options.steps or (2_000 if options.short else 50_000)
    if options.short:
        del FRACTIONS[2:]
    torch.set_num_threads(1)  # on weights this small, threads wait for each other
    logging.disable(logging.WARNING)  # torchao's, at import
    np.seterr(over="ignore", invalid="ignore")  # rivals that diverge

    started = time.perf_counter()
    todo = problems(options.short)
    small = [problem for problem in todo if "digits" not in problem.name]
    print(f"{len(todo)} problems, solved by scikit-learn in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n| optimizer | constant lr | solved | worst gap | steps: median, most | {' | '.join(RIVALS)} |")
    print("|---|---|---|---|---|" + "---|" * len(RIVALS), flush=True)
    record, unsolved = [], []
    for row in [row for row in ROWS if row.name.startswith(tuple(options.only))]:
        outcomes = run(todo, row, prox, steps)
        found = {"prox": outcomes}
        for name, build in RIVALS.items():
            own = [problem for problem in small if build is not torchao or is_l1(problem)]  # it has no elastic net
            try:
                found[name] = run(own, row, build, min(steps // 2, RIVAL_STEPS), every=RIVAL_STEPS)
            except AssertionError:  # torchao's wrapper takes no optimizer whose state is there before the first step
                found[name] = []
        reached = [outcome.steps for outcome in outcomes if outcome.steps is not None]
        unsolved += [(row, outcome) for outcome in outcomes if outcome.steps is None]
        speed = f"{np.median(reached):.0f}, {max(reached)}" if reached else "none"
        worst = max(outcome.gap if np.isfinite(outcome.gap) else np.inf for outcome in outcomes)
        cells = " | ".join(cell(found[name]) for name in RIVALS)
        count = f"{len(reached)} of {len(todo)}"
        print(f"| {row.name} | {row.lr_text} | {count} | {worst:.0e} | {speed} | {cells} |", flush=True)
        for route, results in found.items():
            record += [
                {"optimizer": row.name, "lr": row.lr_text, "route": route}
                | {"problem": outcome.problem.name, "gap": outcome.gap, "same_support": outcome.same_support}
                | {"steps": outcome.steps}
                for outcome in results
            ]
        if options.json:
            options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\nNot solved in {steps:,} steps: {'none' if not unsolved else ''}")
    for row, outcome in unsolved:
        support = "the same support" if outcome.same_support else "another support"
        print(f"- {row.name}: {outcome.problem.name}: gap {outcome.gap:.0e}, {support}")
    print(f"\ntorch {torch.__version__}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
