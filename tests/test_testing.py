"""The public certificates: what is right passes, and what is off by 1% does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import torchreg as tr
from tests.cases import every_plain_case
from tests.models import Bare
from torchreg.optim.step_sizes import STOCK, StepSize, learning_rate
from torchreg.testing import check_penalty, check_step_size

# ---------------------------------------------------------------------- step sizes

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0},
    "ASGD": {"lambd": 0},
    "Adafactor": {"weight_decay": 0},
}
every_optimizer = pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)


def builder(kind: type[Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: kind(params, lr=0.1, **SETTINGS.get(kind.__name__, {}))


@every_optimizer
def test_every_known_step_size_is_certified(kind: type[Optimizer]) -> None:
    check_step_size(builder(kind))


class Off(StepSize):
    """Another step size times a factor."""

    def __init__(self, other: StepSize, factor: float) -> None:
        self.other, self.factor = other, factor

    def before_update(self, *args: Any) -> Any:
        deferred = self.other.before_update(*args)
        return None if deferred is None else lambda state: self.factor * deferred(state)

    def after_update(self, *args: Any) -> None:
        self.other.after_update(*args)

    def __call__(self, *args: Any) -> Any:
        return self.factor * self.other(*args)


@pytest.mark.parametrize("factor", [0.99, 1.01])
@every_optimizer
def test_a_step_that_is_off_by_one_percent_is_not(kind: type[Optimizer], factor: float) -> None:
    with pytest.raises(AssertionError, match=r"^step 1: at gradient .* the optimizer moved by .* and the step is "):
        check_step_size(builder(kind), Off(STOCK[kind], factor))


@pytest.mark.parametrize("kind", [kind for kind in STOCK if kind.__name__ not in ("SGD", "ASGD", "RAdam")])
def test_the_learning_rate_is_the_unit_response_of_plain_sgd_alone(kind: type[Optimizer]) -> None:
    check_step_size(builder(SGD), learning_rate)
    with pytest.raises(AssertionError, match=r"the step is 0\.1"):
        check_step_size(builder(kind), learning_rate)


def test_a_response_that_is_exact_in_the_limit_may_settle() -> None:
    def build(params: list[nn.Parameter]) -> Optimizer:
        return SGD(params, lr=0.1, momentum=0.5)

    def limit(group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> float:
        return group["lr"] / (1 - group["momentum"])

    check_step_size(build, limit, steps=50, settle=40)
    with pytest.raises(AssertionError, match="step 8"):
        check_step_size(build, limit, settle=4)


class Lion(Optimizer):
    """An optimizer of somebody else's: here plain SGD whose lr is halved."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / 2)


def test_a_third_party_certifies_its_own() -> None:
    check_step_size(lambda params: Lion(params, lr=0.1), lambda group, state, parameter: group["lr"] / 2)
    with pytest.raises(AssertionError, match=r"at gradient 0.0001 the optimizer moved by 0.05·gradient"):
        check_step_size(lambda params: Lion(params, lr=0.1), learning_rate)


def test_an_optimizer_without_a_learning_rate_is_certified_too() -> None:
    class Unit(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad)

    check_step_size(Unit, lambda group, state, parameter: 1.0)
    with pytest.raises(AssertionError, match=r"moved by 1·gradient, and the step is 0\.5"):
        check_step_size(Unit, lambda group, state, parameter: 0.5)


# ---------------------------------------------------------------------- penalties


@every_plain_case
def test_every_penalty_is_certified(case: Any) -> None:
    check_penalty(case.penalty)


def test_a_penalty_without_certificates_is_certified_as_far_as_it_goes() -> None:
    check_penalty(Bare(0.3))


class OffProx(tr.L1):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return super().prox_map(w, 1.01 * step)


class OffValue(tr.L1):
    def value(self, w: Tensor) -> Tensor:
        return 1.01 * super().value(w)


class OffSign(tr.L2):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return w / (1 + self.strength * step)


class OffAtZero(tr.L2):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return super().prox_map(w, step) * (1 + 1e-12)


class OffGradient(tr.L2):
    def value(self, w: Tensor) -> Tensor:
        return self.strength * (w * w.detach()).sum()


class NaNGradient(tr.L1):
    def value(self, w: Tensor) -> Tensor:
        return self.strength * (w * w).sqrt().sum()


class InPlace(tr.L1):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return w.copy_(super().prox_map(w, step))


class NotScaled(tr.L1):
    def scaled(self, factor: float) -> tr.L1:
        return self


class Coupled(tr.L2):
    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return super().prox_map(w, step) + 0 * w.sum()


class OffSubgradient(tr.L1):
    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return 1.01 * super().nearest_subgradient(w, gradient)


class FarSubgradient(tr.L1):
    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return self.strength * w.sign()


class NoConjugate(tr.L1):
    def conjugate(self, v: Tensor) -> Tensor:
        return 0 * v.sum()


class OffConjugate(tr.ElasticNet):
    def conjugate(self, v: Tensor) -> Tensor:
        return 1.01 * super().conjugate(v)


class OffDualNorm(tr.L1):
    def dual_norm(self, gradient: Tensor) -> Tensor:
        return 1.01 * super().dual_norm(gradient)


class OffCoefficients(tr.L1):
    def coefficients(self) -> Any:
        return super().coefficients()._replace(l2=0.01 * self.strength)


class NotSmooth(tr.L1):
    smooth = True


class NoGraph(tr.L1):
    def value(self, w: Tensor) -> Tensor:
        return super().value(w).detach()


class Positive(tr.L1):
    """A constraint."""

    def value(self, w: Tensor) -> Tensor:
        return torch.where((w < 0).any(), torch.inf, super().value(w))


class NoProx(tr.L1):
    def prox_map(self, w: Tensor, step: Any) -> Any:
        return None


class Root(tr.L1):
    """λΣ√|w| is not convex; its own prox does not matter here."""

    def value(self, w: Tensor) -> Tensor:
        return self.strength * (w.abs() + 1e-3).sqrt().sum() - self.strength * w.numel() * 1e-3**0.5


BROKEN = {
    OffProx: "prox is not the argmin|not a subgradient",
    OffValue: "prox is not the argmin|not a subgradient",
    OffSign: "prox is not the argmin|not a subgradient",
    OffAtZero: "a step of 0 must leave",
    OffGradient: "the gradient of the value gives the slope",
    NaNGradient: "gradient of the value at w = 0 must be finite",
    InPlace: "leave w alone",
    NotScaled: r"scaled\(2\) must double",
    Coupled: "a NaN spreads",
    OffSubgradient: "is not a subgradient",
    FarSubgradient: "not the one nearest",
    OffDualNorm: "dual_norm says",
    NoConjugate: r"Ω\*\(v\) is 0, but",
    OffCoefficients: r"but with its coefficients\(\) 0.3 of .* and 0.003 of",
    NotSmooth: "says that it is smooth",
    NoGraph: "must be a tensor with a gradient",
    Positive: "must be finite at every w",
    NoProx: "prox must return a tensor",
    Root: "prox is not the argmin|not a subgradient|above its chord",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_penalty_is_not(kind: type[tr.L1]) -> None:
    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check_penalty(kind(0.3))


def test_a_step_that_loses_count_while_the_strength_is_zero_is_not_certified() -> None:
    class Counts:
        def __init__(self) -> None:
            self.t = 0

        def __call__(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> float:
            self.t += 1
            return group["lr"] * (1 - 0.5**self.t) / 0.5

    def build(params: list[nn.Parameter]) -> Optimizer:
        return SGD(params, lr=0.1, momentum=0.5)

    with pytest.raises(AssertionError, match="step 8"):
        check_step_size(build, Counts())


def test_an_optimizer_that_needs_a_closure_gets_one() -> None:
    with pytest.raises(AssertionError, match="step 1"):
        check_step_size(lambda params: torch.optim.LBFGS(params, lr=0.1), learning_rate)


def test_a_broken_conjugate_is_not_certified() -> None:
    with pytest.raises(AssertionError, match=r"Ω\(w\) \+ Ω\*\(v\) must be"):
        check_penalty(OffConjugate(0.3, 0.2))


def test_a_penalty_that_couples_its_weights_is_not_separable() -> None:
    class Mixed(tr.L2):
        def value(self, w: Tensor) -> Tensor:
            return self.strength * w.sum().square()

        def prox_map(self, w: Tensor, step: Any) -> Tensor:
            s = torch.as_tensor(step, dtype=w.dtype).expand(w.shape)
            return w - s * (2 * self.strength * w.sum() / (1 + 2 * self.strength * s.sum()))

    with pytest.raises(AssertionError, match="says that it is separable"):
        check_penalty(Mixed(0.3))
