"""Schedules: λ over time. A curve says which factor a step has, and a `Schedule` gives it to a regularizer's terms."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from torchreg._checks import checked_state, nonnegative, whole_number
from torchreg.binding.regularizer import Regularizer

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Geometric",
    "Linear",
    "Polynomial",
    "Schedule",
    "Steps",
]

Curve = Callable[[int], float]
"""Gives the value at each step, 0 the first: one of the curves here, or any function."""

# ---------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Constant:
    """The same value at every step: to hold a value before another curve of a `Chain`, or a term as it is.

    Args:
        value: a finite number ≥ 0.
        steps: how long it lasts in a `Chain`; None is forever.
    Raises:
        TypeError: value is not a number, or steps not a whole number.
        ValueError: value is negative, infinite or NaN, or steps is less than 1.

    >>> Constant(0.5)(1000)
    0.5
    """

    value: float
    steps: int | None = None

    def __post_init__(self) -> None:
        _set(self, value=_value("value", self.value))
        if self.steps is not None:
            _set(self, steps=whole_number("steps", self.steps))

    def __call__(self, step: int) -> float:
        """The value at that step."""
        return self.value


@dataclass(frozen=True)
class _Ramp(ABC):
    """From `start` at step 0 to `end` at step `steps`, which stays from there on."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _set(
            self,
            start=_value("start", self.start),
            end=_value("end", self.end),
            steps=whole_number("steps", self.steps),
        )

    def __call__(self, step: int) -> float:
        """The value at that step."""
        if step <= 0:
            return self.start
        return self.end if step >= self.steps else self._between(step / self.steps)

    def _between(self, t: float) -> float:
        """The value at 0 < t < 1, t = step/steps."""
        return self.start + (self.end - self.start) * self._share(t)

    @abstractmethod
    def _share(self, t: float) -> float:
        """The share of the way that is behind at t."""


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end − start)·t, t = step/steps.

    Args:
        start, end: finite numbers ≥ 0.
        steps: how many steps it takes, at least 1; the end stays.
    Raises:
        TypeError: a value is not a number, or steps not a whole number.
        ValueError: a value is negative, infinite or NaN, or steps is less than 1.

    >>> warm_up = Linear(0, 1, steps=4)
    >>> [warm_up(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def _share(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Cosine(_Ramp):
    """start + (end − start)·(1 − cos πt)/2, t = step/steps: level at both ends.

    Args, Raises: as `Linear`.
    Source: Loshchilov and Hutter, 2017.

    >>> anneal = Cosine(1, 0, steps=4)
    >>> [round(anneal(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    def _share(self, t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """end + (start − end)·(1 − t)^power, t = step/steps: fast first and level at the end where power > 1.

    Args:
        start, end, steps: as in `Linear`.
        power: > 0; 1 is `Linear`.
    Raises:
        TypeError: a value is not a number, or steps not a whole number.
        ValueError: a value is negative, infinite or NaN, power is 0, or steps is less than 1.

    >>> Polynomial(0, 1, steps=4, power=2)(2)
    0.75
    """

    power: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, power=nonnegative("power", self.power, "pass a power such as 2"))
        if self.power == 0:
            raise ValueError("power=0 never leaves the start; pass a power such as 2, or Constant(value)")

    def _share(self, t: float) -> float:
        return float(1 - (1 - t) ** self.power)


@dataclass(frozen=True)
class Cubic(_Ramp):
    """end + (start − end)·(1 − t)³, t = step/steps: the usual curve of sparsity targets.

    Args, Raises: as `Linear`.
    Source: Zhu and Gupta, 2017.

    >>> Cubic(0, 0.96, steps=4)(2)
    0.84
    """

    def _share(self, t: float) -> float:
        return float(1 - (1 - t) ** 3)


@dataclass(frozen=True)
class Geometric(_Ramp):
    """start·(end/start)^t, t = step/steps: by the same ratio at every step, as λ goes along a regularization path.

    Args:
        start, end: finite numbers > 0.
        steps: how many steps it takes, at least 1; the end stays.
    Raises:
        TypeError: a value is not a number, or steps not a whole number.
        ValueError: a value is not finite or not above 0, or steps is less than 1.

    >>> rise = Geometric(1e-3, 1, steps=3)
    >>> [round(rise(step), 6) for step in range(5)]
    [0.001, 0.01, 0.1, 1.0, 1.0]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.start, self.end) == 0:
            raise ValueError(f"{self!r} cannot reach or leave 0 by ratios; begin at 1e-3, or use Cubic or Cosine")

    def _between(self, t: float) -> float:
        return float(self.start ** (1 - t) * self.end**t)

    def _share(self, t: float) -> float:
        raise NotImplementedError  # it is not a share of the difference


@dataclass(frozen=True)
class Exponential:
    """end + (start − end)·exp(−step/time): goes 63% of what is left in every `time` steps, and never stops.

    Args:
        start, end: finite numbers ≥ 0.
        time: the time constant in steps, > 0.
    Raises:
        TypeError: a value is not a number.
        ValueError: a value is negative, infinite or NaN, or time is 0.

    >>> decay = Exponential(1, 0, time=100)
    >>> [round(decay(step), 3) for step in (0, 100, 200)]
    [1.0, 0.368, 0.135]
    """

    start: float
    end: float
    time: float

    def __post_init__(self) -> None:
        time = nonnegative("time", self.time, "pass the time constant in steps, such as 1000")
        if time == 0:
            raise ValueError("time=0 is not a time constant; pass one in steps, such as 1000")
        _set(self, start=_value("start", self.start), end=_value("end", self.end), time=time)

    def __call__(self, step: int) -> float:
        """The value at that step."""
        return self.end + (self.start - self.end) * math.exp(-max(step, 0) / self.time)


@dataclass(frozen=True)
class Steps:
    """`start`, and from each milestone on the value that stands there.

    Args:
        start: a finite number ≥ 0.
        milestones: a dict from step, at least 1, to the value from there on.
    Raises:
        TypeError: a value is not a number, a step not a whole number, or the milestones not a dict.
        ValueError: a value is negative, infinite or NaN, or a step is less than 1.

    >>> drop = Steps(1, {1000: 0.1, 2000: 0})
    >>> [drop(step) for step in (0, 999, 1000, 5000)]
    [1.0, 1.0, 0.1, 0.0]
    """

    start: float
    milestones: Mapping[int, float]

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Mapping):
            raise TypeError(
                f"milestones={self.milestones!r} is not a dict; pass the value from each step on: {{1000: 0.1}}"
            )
        pairs = sorted(
            (whole_number("milestone", at), _value(f"milestones[{at}]", v)) for at, v in self.milestones.items()
        )
        _set(self, start=_value("start", self.start), milestones=dict(pairs))

    def __call__(self, step: int) -> float:
        """The value at that step."""
        passed = bisect.bisect_right(list(self.milestones), step)
        return [self.start, *self.milestones.values()][passed]


class Chain:
    """One curve after another, each from its own step 0 on.

    Args:
        curves: each lasts its `steps`; the last may be any curve, and goes on forever.
    Raises:
        TypeError: one is not a curve.
        ValueError: there is none, or one that others follow has no end.

    >>> up_and_down = Chain(Constant(0, steps=2), Linear(0, 1, steps=2), Linear(1, 0, steps=4))
    >>> [up_and_down(step) for step in range(9)]
    [0.0, 0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(self, *curves: Curve) -> None:
        if not curves:
            raise ValueError("a chain of no curves has no value; pass one or more, such as Linear(0, 1, steps=1000)")
        for curve in curves:
            check_curve(curve)
        lengths = [getattr(curve, "steps", None) for curve in curves]
        for curve, length in zip(curves[:-1], lengths[:-1], strict=True):
            if length is None:
                raise ValueError(f"{curve!r} has no end, so nothing can follow it; give it steps=..., or put it last")
        self.curves = curves
        self.steps = None if lengths[-1] is None else sum(cast("list[int]", lengths))

    def __call__(self, step: int) -> float:
        """The value at that step."""
        *firsts, last = self.curves
        for curve in firsts:
            length = curve.steps  # type: ignore[attr-defined]  # checked above
            if step < length:
                return curve(step)
            step -= length
        return last(step)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.curves))})"


# ---------------------------------------------------------------------- the schedule


class Schedule:
    """Moves `reg[term].factor` along a curve, as a scheduler of torch moves the learning rate.

    Call `step()` once after each `optimizer.step()` (or once an epoch: a curve's steps are these calls). The factor of
    step 0 is set at construction. It multiplies the strengths, which stay as they are; nothing recompiles.

    Args:
        regularizer: whose terms to move.
        curve: which factor ≥ 0 a step has, for all terms, or a dict from term to curve: one of `tr.schedules`, or any
            function. Terms that the dict lacks are left alone.
    Attributes:
        last_step: the number of calls of `step()`.
    Raises:
        TypeError: an argument is not a regularizer or not a curve.
        ValueError: a term does not exist, or a curve gives no factor; nothing has changed.

    >>> reg = Regularizer(nn.Linear(3, 2), L1(1e-4))
    >>> schedule = Schedule(reg, tr.schedules.Linear(0, 1, steps=2))
    >>> for _ in range(3):
    ...     print(reg["l1"].penalty)  # and here a training step
    ...     schedule.step()
    L1(strength=0.0)
    L1(strength=5e-05)
    L1(strength=0.0001)
    """

    def __init__(self, regularizer: Regularizer, curve: Curve | Mapping[str, Curve]) -> None:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"expected a Regularizer, whose factors move, got {type(regularizer).__name__}; "
                "build one: Regularizer(model, L1(1e-4))"
            )
        terms = list(regularizer.terms)
        curves = dict(curve) if isinstance(curve, Mapping) else dict.fromkeys(terms, curve)
        if not curves:
            raise ValueError(f"the dict names no term; give a curve to one or more of {terms}")
        for term, own in curves.items():
            if term not in terms:
                raise ValueError(f"no term {term!r} to schedule; the terms are {terms}")
            check_curve(own)
        self.regularizer = regularizer
        self._curves = curves
        self._move(0)

    def step(self) -> None:
        """Sets the factors of the next step.

        Raises:
            TypeError, ValueError: a curve gives no factor; nothing has changed.
        """
        self._move(self.last_step + 1)

    @property
    def last_factor(self) -> dict[str, float]:
        """The factor that each term was given last."""
        return dict(self._factors)

    def _move(self, step: int) -> None:
        factors = {
            term: nonnegative(f"{curve!r}({step})", curve(step), "let the curve give a factor such as 1.0")
            for term, curve in self._curves.items()
        }
        for term, factor in factors.items():
            if self.regularizer[term].factor != factor:  # a change costs the next step what it had prepared
                self.regularizer[term].factor = factor
        self._factors, self.last_step = factors, step

    def state_dict(self) -> dict[str, int]:
        """The step at which it stands, a plain number for `torch.load(weights_only=True)`. The curves are not in it."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from where that schedule stood, and sets the factors of that step.

        Raises:
            TypeError: it is not a state of a schedule.
            ValueError: its step is negative; nothing has changed.
        """
        self._move(whole_number("last_step", checked_state(state, ["last_step"])["last_step"], least=0))

    def __repr__(self) -> str:
        return f"Schedule({self._curves}, last_step={self.last_step})"


# ---------------------------------------------------------------------- checks


def _value(name: str, value: object) -> float:
    return nonnegative(name, value, "pass a factor such as 1.0")


def check_curve(curve: object) -> None:
    """Raises unless `curve` can be called."""
    if not callable(curve):
        raise TypeError(f"{curve!r} is not a curve; pass Linear(0, 1, steps=1000), say, or a function of the step")


def _set(curve: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(curve, name, value)
