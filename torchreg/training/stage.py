"""The stages of a training, and what holds in each: no penalty, the penalty, a wished share of zeros, a refit."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg._checks import greater_than, whole_number
from torchreg.binding.regularizer import Regularizer
from torchreg.optim.step_hooks import StepHooks, unwrapped_optimizer
from torchreg.penalties.groups import Groups
from torchreg.training.refit import freeze_zeros
from torchreg.training.schedules import Constant, Curve, Schedule, check_curve
from torchreg.training.target_sparsity import TargetSparsity

AS_WRITTEN = Constant(1.0)
"""The curve of a λ that stays as it was written."""


@dataclass(frozen=True, repr=False)
class Stage(ABC):
    """One part of a training, with what holds in it; a stage of your own says so in `on` and `description`.

    Args:
        steps: how many steps its optimizer makes.
        rewind: the stage starts from the weights as they were after that stage of the recipe, 0 being its beginning;
            weights that are zero stay zero. None is the weights as they are.
    Attributes:
        leaves_zeros: weights are zero after it, so that a `Refit` may follow.
    """

    leaves_zeros: ClassVar[bool] = True

    steps: int
    rewind: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_number("steps", self.steps))
        if self.rewind is not None:
            object.__setattr__(self, "rewind", whole_number("rewind", self.rewind, least=0))

    @property
    @abstractmethod
    def description(self) -> str:
        """The stage in words: a cell of the recipe's table."""

    @abstractmethod
    def on(self, regularizer: Regularizer, optimizer: Optimizer) -> AbstractContextManager[object]:
        """A `with` block in which it holds, for the steps of `optimizer`."""

    def check(self, regularizer: Regularizer) -> None:  # noqa: B027  most stages take any regularizer
        """Raises a ValueError where the stage cannot hold for `regularizer`: asked before the first stage begins."""

    def __repr__(self) -> str:
        fields = sorted(dataclasses.fields(self), key=lambda field: field.name == "rewind")  # last, as it is written
        said = [
            (field.name, getattr(self, field.name)) for field in fields if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said)})"


class Pretrain(Stage):
    """The penalty off: a warm-up, before zeros cost what has not been learned yet.

    Args, Raises: as `Refit`.

    >>> Pretrain(500)
    Pretrain(steps=500)
    """

    leaves_zeros = False

    @property
    def description(self) -> str:
        """The stage in words."""
        return "penalty off"

    @contextlib.contextmanager
    def on(self, regularizer: Regularizer, optimizer: Optimizer) -> Iterator[None]:
        """The penalty is off inside the `with` block."""
        with regularizer.disabled():
            yield


@dataclass(frozen=True, repr=False)
class Regularize(Stage):
    """The penalty on, the factor of λ moved along a curve by each step of the optimizer.

    Zeros come about under a proximal optimizer; they may revive where the data are against them.

    Args:
        steps: how many steps the optimizer makes, at least 1.
        curve: as in `Schedule`: of all terms, or a dict from term to curve. λ as it was written by default.
        rewind: the stage of the recipe after which the weights are taken that it starts from, 0 being the beginning.
    Raises:
        TypeError: `steps` or `rewind` is not a whole number, or `curve` not a curve.
        ValueError: `steps` is less than 1, or `rewind` less than 0.

    >>> Regularize(4000, tr.schedules.Cubic(0, 1, steps=2000))
    Regularize(steps=4000, curve=Cubic(start=0.0, end=1.0, steps=2000))
    """

    curve: Curve | Mapping[str, Curve] = AS_WRITTEN

    def __post_init__(self) -> None:
        super().__post_init__()
        for curve in self.curve.values() if isinstance(self.curve, Mapping) else [self.curve]:
            check_curve(curve)

    @property
    def description(self) -> str:
        """The stage in words."""
        return "penalty on" if self.curve == AS_WRITTEN else f"penalty on, λ times {self.curve!r}"

    def check(self, regularizer: Regularizer) -> None:
        """Raises where a term does not exist, or a curve begins with no factor."""
        with _factors_put_back(regularizer):
            Schedule(regularizer, self.curve)

    @contextlib.contextmanager
    def on(self, regularizer: Regularizer, optimizer: Optimizer) -> Iterator[Schedule]:
        """λ follows the curve inside the `with` block; the factors that were before come back after it."""
        check_enabled(regularizer)
        with _factors_put_back(regularizer):
            schedule = Schedule(regularizer, self.curve)
            with _stepped(self, schedule, optimizer):
                yield schedule


@dataclass(frozen=True, repr=False)
class Sparsify(Stage):
    """The penalty on, λ moved so that the stage ends with a wished share of zeros, by `TargetSparsity`.

    Args:
        steps: how many steps the optimizer makes, at least 50.
        target: 0 < target < 1, or a curve of such.
        term, groups: as in `TargetSparsity`.
        rewind: the stage of the recipe after which the weights are taken that it starts from, 0 being the beginning.
    Raises:
        TypeError: `steps` or `rewind` is not a whole number, or `target` neither a number nor a curve.
        ValueError: `steps`, `target` or `rewind` is out of range.

    >>> Sparsify(4000, target=0.95)
    Sparsify(steps=4000, target=0.95)
    """

    target: float | Curve
    term: str | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("steps", self.steps, least=50)
        if not callable(self.target):
            share = greater_than("target", self.target, 0, "pass the share of zeros, such as 0.9")
            if share >= 1:
                raise ValueError(f"target={self.target!r} must be below 1: it is a share, and 0.9 means 90% zeros")

    @property
    def description(self) -> str:
        """The stage in words."""
        target = f"{self.target!r}" if callable(self.target) else f"{self.target:.2%} zeros"
        return f"penalty on, λ moves to {target}"

    def check(self, regularizer: Regularizer) -> None:
        """Raises where the term does not exist."""
        if self.term is not None and self.term not in regularizer.terms:
            raise ValueError(f"no term {self.term!r} to move; the terms are {list(regularizer.terms)}")

    @contextlib.contextmanager
    def on(self, regularizer: Regularizer, optimizer: Optimizer) -> Iterator[TargetSparsity]:
        """λ is moved inside the `with` block; the factors that were before come back after it."""
        check_enabled(regularizer)
        with _factors_put_back(regularizer):
            found = TargetSparsity(regularizer, self.target, total_steps=self.steps, term=self.term, groups=self.groups)
            with _stepped(self, found, optimizer):
                yield found


class Refit(Stage):
    """The penalty off and every zero kept: what is left grows back what the penalty took off it (debiasing).

    Args:
        steps: how many steps the optimizer makes, at least 1.
        rewind: the stage of the recipe after which the weights are taken that it starts from, 0 being the beginning:
            the zeros stay, all else has the value that it had then.
    Raises:
        TypeError: `steps` or `rewind` is not a whole number.
        ValueError: `steps` is less than 1, or `rewind` less than 0.
    Source: Belloni and Chernozhukov, 2013, for the refit; Frankle et al., 2020, for rewinding.

    >>> Refit(2000, rewind=1)
    Refit(steps=2000, rewind=1)
    """

    @property
    def description(self) -> str:
        """The stage in words."""
        return "penalty off, zeros kept"

    @contextlib.contextmanager
    def on(self, regularizer: Regularizer, optimizer: Optimizer) -> Iterator[None]:
        """The penalty is off and zeros are kept inside the `with` block."""
        if not any(bool(zero.any()) for _, zero in zeros_of(regularizer)):
            warnings.warn(
                f"{self!r} keeps no zeros, as no weight of {regularizer!r} is zero; a penalty in the loss makes none: "
                "let a proximal optimizer carry it, such as tr.optim.ProxAdam(model.parameters(), regularizer=reg)",
                stacklevel=3,
            )
        with regularizer.disabled(), freeze_zeros(regularizer, optimizer):
            yield


# ---------------------------------------------------------------------- what a stage holds


@contextlib.contextmanager
def _factors_put_back(regularizer: Regularizer) -> Iterator[None]:
    """After the block, every factor of λ is what it was before it."""
    before = {key: term.factor for key, term in regularizer.terms.items()}
    try:
        yield
    finally:
        for key, factor in before.items():
            regularizer[key].factor = factor


@contextlib.contextmanager
def _stepped(stage: Stage, mover: Schedule | TargetSparsity, optimizer: Optimizer) -> Iterator[None]:
    """Inside the block, λ moves after each step of the optimizer."""
    hooks = StepHooks(unwrapped_optimizer(optimizer), after=mover.step)
    try:
        yield
    finally:
        hooks.remove()
    if mover.last_step < stage.steps:
        warnings.warn(
            f"{stage!r} ended after {mover.last_step:,} steps of {type(optimizer).__name__}; make stage.steps steps of "
            "the optimizer that stage.on() was given, or give the stage as many as it takes",
            stacklevel=5,  # of both with blocks
        )


@torch.no_grad()
def zeros_of(regularizer: Regularizer) -> list[tuple[Tensor, Tensor]]:
    """For each parameter what counts as zero, 0 or w₀, and which of its weights are that."""
    weights = [(binding.parameter(), binding.anchor) for binding in regularizer.bindings()]
    corners = [torch.zeros_like(w) if anchor is None else anchor.to(w) for w, anchor in weights]
    return [(corner, w == corner) for (w, _), corner in zip(weights, corners, strict=True)]


def check_enabled(regularizer: Regularizer) -> None:
    if not regularizer.enabled:
        raise ValueError("regularizer is disabled, so that nothing would be regularized; call reg.enable() first")
